"""Pictures: files of them to pixels, and the one resize of the house (openpi's resize_with_pad).

H W pixels.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError


def decode(content: bytes | None) -> np.ndarray:
    """The pixels of a JPEG or PNG.

    Args:
      content: the file's bytes.

    Returns:
      uint8 [H,W,3]; grey becomes colour, transparency is dropped.

    Raises:
      ValueError: in words: there is no picture, it is damaged, or its numbers are more than 8 bits, as depth's are,
        which would be cut off at 255.
    """
    if not isinstance(content, bytes | bytearray | memoryview):
        raise ValueError("no bytes of a picture are there")
    try:
        image = Image.open(io.BytesIO(content))
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(f"its numbers are {'real' if image.mode == 'F' else 'more than 8 bits'}, as of depth")
        return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError("it is neither JPEG nor PNG") from error
    except OSError as error:
        raise ValueError(str(error)) from error


def resize_with_pad(image: np.ndarray, size: int) -> np.ndarray:
    """Scales an image to fit a square, keeping its proportions, and pads the rest with zeros, centred.

    PIL's BILINEAR on uint8 (it widens its support when shrinking, so it antialiases), as openpi does on the host.

    Args:
      image: uint8 [H,W,3].
      size: side of the square, pixels.

    Returns:
      uint8 [size,size,3]; the input itself where it has that shape already.

    Raises:
      ValueError: not uint8 [H,W,3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 [H,W,3] image, got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    ratio = max(width / size, height / size)
    # Truncated, not rounded, as openpi does; at least one pixel is left of very long images.
    new_height, new_width = max(1, int(height / ratio)), max(1, int(width / ratio))
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    if (new_height, new_width) == (size, size):
        return np.array(resized)
    out = np.zeros((size, size, 3), np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    out[top : top + new_height, left : left + new_width] = resized
    return out
