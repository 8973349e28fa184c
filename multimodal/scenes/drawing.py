"""Scenes as pictures, by signed distances: inside of a shape is negative, and a pixel's cover is half a pixel's ramp.

The edge is as sharp at any size. Shapes fit the circle of radius 1 around the origin, y downwards; distances are exact
near the edge, which is all that the ramp sees. Arithmetic is float64 in a fixed order, so machines agree within 1/255.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from oneira.platform.errors import UsageError

from .attributes import BACKGROUNDS, COLOURS, SHAPES, TURN, UNIT, Scenes, sample

MAX_SIZE = 256  # pixels
CIRCLE, SQUARE, TRIANGLE, DIAMOND, STAR, HEART, CROSS, RING = range(len(SHAPES))

PAINT = np.array(
    [
        [214, 40, 44], [240, 132, 24], [238, 208, 44], [52, 158, 66], [40, 190, 206],
        [44, 86, 216], [122, 52, 172], [244, 120, 180], [124, 76, 40], [132, 134, 138],
    ],
    np.int64,
)  # fmt: skip
GROUND = np.array(
    [[243, 243, 243], [16, 16, 16], [236, 224, 196], [24, 32, 72], [204, 234, 214], [216, 206, 240]], np.int64
)
assert len(PAINT) == len(COLOURS) and len(GROUND) == len(BACKGROUNDS)

_JIT: Any = {"nogil": True, "cache": True, "error_model": "numpy"}


def draw(scenes: Scenes, size: int = 64) -> np.ndarray:
    """Pictures of the scenes, uint8 [N, size, size, 3].

    Raises:
        UsageError: `size` (pixels) is not in [8, 256].
    """
    if not 8 <= size <= MAX_SIZE:
        raise UsageError(f"A picture of {size} pixels; allowed are 8 to {MAX_SIZE}.")
    pictures = np.empty((len(scenes), size, size, 3), np.uint8)
    s = scenes
    _draw(
        pictures, s.background, s.count, s.slope, s.shape, s.colour, s.x, s.y, s.radius, s.angle, s.shade, PAINT, GROUND
    )
    return pictures


def scene_batch(indices: np.ndarray, size: int = 64, split: str = "train") -> np.ndarray:
    """Pictures of the scenes of these indices [N], uint8 [N, size, size, 3]; see `sample` and `draw`."""
    return draw(sample(indices, split), size)


@numba.njit(**_JIT)
def _draw(pictures, background, count, slope, shape, colour, x, y, radius, angle, shade, paint, ground):
    side = pictures.shape[1]
    for n in range(len(pictures)):
        _fill(pictures[n], ground[background[n]], slope[n])
        for o in range(count[n]):
            _stamp(
                pictures[n], shape[n, o], paint[colour[n, o]], shade[n, o], x[n, o] * side / UNIT, y[n, o] * side / UNIT,
                radius[n, o] * side / UNIT, 2 * np.pi * angle[n, o] / TURN,
            )  # fmt: skip


@numba.njit(**_JIT)
def _fill(picture, rgb, slope):
    side = len(picture)
    for i in range(side):
        # The slope runs from -1/2 to 1/2 of itself, in whole numbers, rounded down.
        lighter = slope * (2 * i + 1 - side) // (2 * side)
        red, green, blue = rgb[0] + lighter, rgb[1] + lighter, rgb[2] + lighter
        for j in range(side):
            picture[i, j, 0], picture[i, j, 1], picture[i, j, 2] = red, green, blue


@numba.njit(**_JIT)
def _stamp(picture, shape, rgb, shade, x, y, radius, angle):
    """One object; centre and radius in pixels, angle in radians clockwise."""
    side = len(picture)
    cosine, sine = np.cos(angle), np.sin(angle)
    reach = radius + 1
    for i in range(max(0, int(np.floor(y - reach))), min(side, int(np.ceil(y + reach)))):
        for j in range(max(0, int(np.floor(x - reach))), min(side, int(np.ceil(x + reach)))):
            u, v = (j + 0.5 - x) / radius, (i + 0.5 - y) / radius
            cover = 0.5 - radius * _distance(shape, cosine * u + sine * v, cosine * v - sine * u)
            if cover <= 0:
                continue
            cover = min(cover, 1.0)
            for channel in range(3):
                wanted = min(max(rgb[channel] + shade, 0), 255)
                value = picture[i, j, channel] + cover * (wanted - picture[i, j, channel])
                picture[i, j, channel] = np.uint8(value + 0.5)


@numba.njit(**_JIT)
def _distance(shape, x, y):
    """Signed distance from (x, y) to the edge of a shape."""
    if shape == CIRCLE:
        return np.sqrt(x * x + y * y) - 0.9
    if shape == SQUARE:
        return max(abs(x), abs(y)) - 0.7
    if shape == TRIANGLE:  # equilateral, apex up, its centroid at the origin: three half-planes
        return max(y, 0.8660254037844386 * abs(x) - 0.5 * y) - 0.5
    if shape == DIAMOND:  # half as wide again in height
        return (1.5 * abs(x) + abs(y) - 1.0) / 1.8027756377319946
    if shape == STAR:
        return _star(x, y)
    if shape == HEART:
        return _heart(x, y)
    if shape == CROSS:
        return min(max(abs(x) - 0.9, abs(y) - 0.3), max(abs(x) - 0.3, abs(y) - 0.9))
    return abs(np.sqrt(x * x + y * y) - 0.7) - 0.2


@numba.njit(**_JIT)
def _star(x, y):
    """Five points of radius 1, corners between them of radius 0.45, the first point up."""
    x, y = abs(x), -y
    # Mirrors through the corners at 36 and 108 degrees fold all points onto the upper one, and x = 0 that onto a half.
    over = max(0.8090169943749475 * x - 0.5877852522924731 * y, 0.0)
    x, y = x - 2 * over * 0.8090169943749475, y + 2 * over * 0.5877852522924731
    over = max(-0.8090169943749475 * x - 0.5877852522924731 * y, 0.0)
    x, y = x + 2 * over * 0.8090169943749475, y + 2 * over * 0.5877852522924731
    x = abs(x)
    # The edge runs from the point (0, 1) to the corner (0.45 sin 36, 0.45 cos 36).
    corner_x, corner_y = 0.45 * 0.5877852522924731, 0.45 * 0.8090169943749475 - 1
    return (corner_x * (y - 1) - corner_y * x) / np.sqrt(corner_x * corner_x + corner_y * corner_y)


@numba.njit(**_JIT)
def _heart(x, y):
    """A square on its corner, and a circle on each of its upper sides."""
    side = 0.52  # half of the square's
    down = y - 0.12
    square = max(abs(x + down), abs(x - down)) * 0.7071067811865476 - side
    middle = side * 0.7071067811865476
    u, v = abs(x) - middle, down + middle
    return min(square, np.sqrt(u * u + v * v) - side)
