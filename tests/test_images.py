"""Pictures as recorders store them become 8-bit colours, or a line that says why not; the resize is openpi's."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openpi_port.images import decode, resize_with_pad

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
DEPTH = np.random.default_rng(1).integers(400, 5000, (10, 12))  # mm


def content(pixels: np.ndarray | Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind)
    return buffer.getvalue()


def test_what_has_eight_bits_becomes_colour():
    np.testing.assert_array_equal(decode(content(PIXELS)), PIXELS)
    np.testing.assert_array_equal(decode(content(np.dstack([PIXELS, PIXELS[..., 0]]))), PIXELS)  # with transparency
    np.testing.assert_array_equal(decode(content(PIXELS[..., 0])), np.repeat(PIXELS[..., :1], 3, axis=2))
    assert decode(content(Image.fromarray(PIXELS).convert("CMYK"), "jpeg")).shape == PIXELS.shape


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (content(DEPTH.astype(np.uint16)), "its numbers are more than 8 bits, as of depth"),
        (content(DEPTH.astype(np.int32), "tiff"), "its numbers are more than 8 bits, as of depth"),
        (content(DEPTH.astype(np.float32) / 1000, "tiff"), "its numbers are real, as of depth"),
        (content(PIXELS)[:80], "truncated|broken"),
        (b"no picture", "it is neither JPEG nor PNG"),
        (None, "no bytes of a picture are there"),
        (PIXELS.tolist(), "no bytes of a picture are there"),
    ],
)
def test_what_would_lose_its_meaning_is_refused(stored, words):
    with pytest.raises(ValueError, match=words):
        decode(stored)


def test_resize_equals_openpi(golden):
    vectors = np.load(golden / "openpi" / "io" / "io.npz")
    for i in range(4):
        np.testing.assert_array_equal(resize_with_pad(vectors[f"resize/{i}/in"], 224), vectors[f"resize/{i}/out"])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(4, 64))
def test_resize_fits_any_shape(height, width, size):
    white = np.full((height, width, 3), 255, np.uint8)
    out = resize_with_pad(white, size)
    assert out.shape == (size, size, 3) and out.dtype == np.uint8
    inside = out[..., 0] == 255
    ratio = max(height, width) / size
    assert inside.sum() == max(1, int(height / ratio)) * max(1, int(width / ratio))
    assert inside[size // 2, size // 2] or inside[(size - 1) // 2, (size - 1) // 2]
    np.testing.assert_array_equal(resize_with_pad(out, size), out)


def test_resize_refuses_floats():
    with pytest.raises(ValueError, match="uint8"):
        resize_with_pad(np.zeros((4, 4, 3), np.float32), 8)
