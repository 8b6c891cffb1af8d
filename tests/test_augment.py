"""Augmentation against its definition in floating point."""

from __future__ import annotations

import colorsys
import time

import cv2
import numpy as np
import pytest

from openpi_port import augment as module
from openpi_port.augment import augment, warp_matrix
from openpi_port.rng import generator

RNG = np.random.default_rng(0)
IMAGE = cv2.resize(RNG.integers(0, 256, (14, 14, 3), np.uint8), (224, 224), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("kind", ["default", "openpi", "none"])
def test_pure_function_of_the_generator(kind):
    images = {"base_0_rgb": IMAGE, "left_wrist_0_rgb": IMAGE}
    before = IMAGE.copy()
    one, other = (augment(images, kind, generator(0, 1, "augment")) for _ in range(2))
    turned = augment(dict(reversed(images.items())), kind, generator(0, 1, "augment"))
    assert list(one) == list(images)
    for camera in images:
        assert one[camera].dtype == np.uint8 and one[camera].shape == IMAGE.shape
        np.testing.assert_array_equal(one[camera], other[camera])
        np.testing.assert_array_equal(one[camera], turned[camera])
    np.testing.assert_array_equal(IMAGE, before)
    different = augment(images, kind, generator(0, 2, "augment"))
    assert np.array_equal(one["base_0_rgb"], different["base_0_rgb"]) == (kind == "none")


@pytest.mark.parametrize("kind", ["default", "openpi"])
def test_wrist_cameras_keep_their_geometry(kind):
    """Of a grey picture with a white column, the column stays where it is; elsewhere it moves in some sample."""
    image = np.full((224, 224, 3), 100, np.uint8)
    image[:, 60] = 180
    moved = {"base_0_rgb": False, "left_wrist_0_rgb": False}
    for index in range(8):
        out = augment(dict.fromkeys(moved, image), kind, generator(0, index, "augment"))
        for camera, changed in out.items():
            moved[camera] |= not (changed[..., 0].argmax(1) == 60).all()
    assert moved == {"base_0_rgb": True, "left_wrist_0_rgb": False}


def test_warp_matrix_is_crop_resize_rotate():
    """Points go through the three steps one after the other; a warped picture shows what the points say."""
    x, y, angle = 0.7, -0.4, 0.6
    matrix = warp_matrix(224, 224, x, y, angle)
    crop = int(224 * 0.95)
    for point in ((0, 0), (223, 0), (111.5, 111.5), (30, 200)):
        centred = np.array(point) - 111.5
        theta = angle * np.deg2rad(5)
        turned = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]]) @ centred
        expected = turned * crop / 224 + np.array([x, y]) * (224 - crop) / 2 + 111.5
        np.testing.assert_allclose(matrix @ [*point, 1], expected, atol=1e-9)
    # Without rotation the corners of the crop stay inside the picture.
    corners = warp_matrix(224, 224, 1.0, 1.0, 0.0) @ [[-0.5, 223.5], [-0.5, 223.5], [1, 1]]
    assert corners.min() >= -0.5 and np.isclose(corners.max(), 223.5)


def test_default_colour_equals_three_steps_in_float():
    draws = np.array([0.5, -0.8, 0.9, 0.0, 0.0])
    image = IMAGE.astype(np.float64)
    grey = np.array([0.299, 0.587, 0.114])
    bright = image * (1 + 0.3 * draws[0])
    level = (bright @ grey).mean()
    contrasted = (bright - level) * (1 + 0.4 * draws[1]) + level
    own = (contrasted @ grey)[..., None]
    saturated = (contrasted - own) * (1 + 0.5 * draws[2]) + own
    expected = np.clip(saturated, 0, 255)
    assert np.abs(module._colour_default(IMAGE, draws) - expected).max() <= 1.0


def test_openpi_colour_is_close_to_augmax_in_float():
    """The formulas of augmax 0.4.1 in floating point, pixel by pixel, against 8-bit HSV."""
    draws = np.array([-0.6, 0.7, 0.8, 0.0, 1.0])
    pixels = IMAGE[::9, ::9].reshape(-1, 3)
    value = np.arange(256) / 255
    curve = module._adjust_contrast(module._adjust_brightness(value, 0.3 * draws[0]), 0.4 * draws[1])
    expected = []
    for pixel in pixels / 255:
        hue, saturation, v = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((hue + 0.1 * draws[2]) % 1, saturation, curve[round(v * 255)]))
    got = module._colour_openpi(pixels[None], draws)[0]
    error = np.abs(got - 255 * np.array(expected))
    assert error.max() <= 5 and error.mean() < 1


def test_contrast_curve():
    """Monotonic, keeps 0, 0.5 and 1; a positive amount is steeper in the middle."""
    value = np.linspace(0, 1, 101)
    for amount in (-0.4, -0.1, 0.0, 0.2, 0.4):
        curve = module._adjust_contrast(value, amount)
        np.testing.assert_allclose(curve[[0, 50, 100]], [0, 0.5, 1], atol=1e-12)
        assert (np.diff(curve) > 0).all()
        assert np.sign(np.round(curve[51] - curve[49] - 0.02, 9)) == np.sign(amount)


def test_openpi_leaves_the_colours_of_half_the_samples():
    wrist = {"wrist": IMAGE}
    same = sum(np.array_equal(augment(wrist, "openpi", generator(0, i, "augment"))["wrist"], IMAGE) for i in range(200))
    assert 70 < same < 130


def test_fast_enough():
    """Under 1 ms for an image of 224 px on one core; ten times that here, because tests share the machine."""
    images = {"base_0_rgb": IMAGE}
    start = time.process_time()
    for index in range(20):
        augment(images, "default", generator(0, index, "augment"))
    assert (time.process_time() - start) / 20 < 0.010


def test_shift_moves_half_the_images_by_whole_pixels():
    image = np.zeros((64, 64, 3), np.uint8)
    image[30:34, 30:34] = 200
    moved = 0
    for seed in range(40):
        out = augment({"base_0_rgb": image}, "shift", np.random.default_rng(seed))["base_0_rgb"]
        bright = np.argwhere(out[..., 0] > 0.5 * out.max())
        assert len(bright) == 16, "the square keeps its size"
        offset = bright.min(0) - 30
        assert (np.abs(offset) <= 4).all()
        moved += bool(offset.any())
    assert 10 < moved < 30
