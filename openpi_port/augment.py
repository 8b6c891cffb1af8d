"""Image augmentation on the host, per sample and camera, on uint8: one affine warp and one or two passes of colour.

Two kinds for robots in the world, beside "none":

| | "default" | "openpi": what openpi's JAX training does (augmax 0.4.1) |
|---|---|---|
| crop to 95 %, scale back, rotate by up to 5 degrees | always, except wrist cameras | the same |
| what the warp uncovers | mirrored, so that no black wedges appear that a robot never sees | black |
| colour | always | with probability 0.5 |
| brightness | factor 0.7 to 1.3 | HSV value towards black or white by up to 0.3 |
| contrast | factor 0.6 to 1.4 about the image's mean grey | augmax's curve on the HSV value, up to 0.4 |
| saturation | factor 0.5 to 1.5 | none: augmax computes it and drops the result |
| hue | none: colours name objects in prompts | turned by up to 0.1 of the circle, though openpi never asks for it |

A third, "shift", is for a camera that never moves, as in simulation, where a pixel is a place: half the images are
shifted by up to 4 pixels, brightness and contrast change a little (factors 0.8 to 1.2), and nothing else.

Wrist cameras (with "wrist" in their name) keep their geometry: it says where the gripper is in the picture.
H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import cv2
import numpy as np

Kind = Literal["default", "openpi", "shift", "none"]

CROP = 0.95  # of each side
ROTATION = math.radians(5.0)
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.3, 0.4, 0.5, 0.1
SHIFT = 4.0  # pixels
GREY = np.array([0.299, 0.587, 0.114])  # luma of RGB, ITU-R BT.601


def augment(images: Mapping[str, np.ndarray], kind: Kind, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Augments all cameras of one sample, each with its own parameters.

    Args:
      images: {camera: uint8 [H,W,3]}; never written to.
      kind: see the module.
      rng: the sample's own generator; the same generator state gives the same result.

    Returns:
      {camera: uint8 [H,W,3]} in the same order.
    """
    if kind == "none":
        return dict(images)
    border = cv2.BORDER_CONSTANT if kind == "openpi" else cv2.BORDER_REFLECT_101
    colour = {"default": _colour_default, "openpi": _colour_openpi, "shift": _colour_shift}[kind]
    out = {}
    # By name, so that the parameters don't depend on the order in which cameras are listed.
    for camera in sorted(images):
        # A fixed number of draws per camera: switching one part off leaves the others as they were.
        draws = rng.uniform(-1.0, 1.0, 8)
        image = images[camera]
        if "wrist" not in camera and kind == "shift":
            image = _shift(image, *draws[:3])
        elif "wrist" not in camera:
            height, width = image.shape[:2]
            matrix = warp_matrix(height, width, *draws[:3])
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            image = cv2.warpAffine(image, matrix, (width, height), flags=flags, borderMode=border)
        out[camera] = colour(image, draws[3:])
    return {camera: out[camera] for camera in images}


def warp_matrix(height: int, width: int, x: float, y: float, angle: float) -> np.ndarray:
    """Crop, scale back and rotate as one affine map from output to input pixels.

    Args:
      height, width: of the image.
      x, y: where the crop lies, from -1 (left, top) to 1.
      angle: from -1 to 1, in units of `ROTATION`.

    Returns:
      f64 [2,3]: (x, y) of the input for (x, y, 1) of the output. Rotation is about the output's centre, before the
      crop, so it may look beyond the crop into the rest of the image (as augmax composes them).
    """
    crop_height, crop_width = int(height * CROP), int(width * CROP)
    cos, sin = math.cos(angle * ROTATION), math.sin(angle * ROTATION)
    scale = np.array([[crop_width / width, 0.0], [0.0, crop_height / height]])
    linear = scale @ np.array([[cos, -sin], [sin, cos]])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = np.array([x * (width - crop_width) / 2, y * (height - crop_height) / 2])
    return np.column_stack([linear, centre + shift - linear @ centre])


def _shift(image: np.ndarray, x: float, y: float, coin: float) -> np.ndarray:
    """Shifts one image in two by whole pixels, which needs no interpolation; mirrored where nothing comes in."""
    if coin <= 0:
        return image
    height, width = image.shape[:2]
    x, y = round(SHIFT * x), round(SHIFT * y)  # output (0, 0) shows input (x, y)
    left, right, top, bottom = max(-x, 0), max(x, 0), max(-y, 0), max(y, 0)
    seen = image[bottom : height - top, right : width - left]
    return cv2.copyMakeBorder(seen, top, bottom, left, right, cv2.BORDER_REFLECT_101)


def _colour_shift(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Brightness and contrast, each by a fifth."""
    brightness, contrast = 1.0 + 0.2 * draws[0], 1.0 + 0.2 * draws[1]
    mean = brightness * float(GREY @ cv2.mean(image)[:3])
    matrix = np.column_stack([contrast * brightness * np.eye(3), np.full(3, (1.0 - contrast) * mean)])
    return cv2.transform(image, matrix)


def _colour_default(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Brightness, contrast and saturation are affine in the colour, so together they are one 3x4 matrix."""
    brightness = 1.0 + BRIGHTNESS * draws[0]
    contrast = 1.0 + CONTRAST * draws[1]
    saturation = 1.0 + SATURATION * draws[2]
    mean = brightness * float(GREY @ cv2.mean(image)[:3])
    # saturation: grey + s * (rgb - grey); it leaves grey, and so the mean grey, as it is.
    mix = saturation * np.eye(3) + (1.0 - saturation) * GREY[None, :]
    matrix = np.column_stack([contrast * brightness * mix, np.full(3, (1.0 - contrast) * mean)])
    return cv2.transform(image, matrix)  # fixed point, within 1 of 255; saturates once, at the end


def _colour_openpi(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """augmax's ColorJitter through 8-bit HSV and a table: within 5 of 255 of the exact computation, 1 on average."""
    if draws[4] < 0:
        return image
    value = _adjust_contrast(_adjust_brightness(np.arange(256) / 255, BRIGHTNESS * draws[0]), CONTRAST * draws[1])
    table = np.empty((256, 3), np.uint8)
    table[:, 0] = (np.arange(256) + round(HUE * draws[2] * 256)) % 256  # HSV_FULL: the circle is 256
    table[:, 1] = np.arange(256)
    table[:, 2] = np.rint(np.clip(value, 0, 1) * 255)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    return cv2.cvtColor(cv2.LUT(hsv, table[None]), cv2.COLOR_HSV2RGB_FULL)


def _adjust_brightness(value: np.ndarray, amount: float) -> np.ndarray:
    """Towards black (amount < 0) or white; [0,1] stays in [0,1]. Formula: augmax, after GIMP's."""
    return value * (1 + amount) if amount < 0 else value * (1 - amount) + amount


def _adjust_contrast(value: np.ndarray, amount: float) -> np.ndarray:
    """A piecewise linear curve of slope tan((amount + 1) * pi / 4) about 0.5, 1 / slope at the ends (augmax)."""
    slope = math.tan((amount + 1) * math.pi / 4)
    if math.isclose(slope, 1.0):
        return value
    low = (slope - slope**2) / (2 * (1 - slope**2))
    middle = slope * (value - 0.5) + 0.5
    return np.where(value < low, value / slope, np.where(value > 1 - low, value / slope + 1 - 1 / slope, middle))
