"""Drawing what the agent sees of CarRacing, straight into its 64x64 frame.

Gymnasium draws 1000x800 pixels, shrinks them to 96x96, and the preprocessing shrinks rows 0..83 of those to 64x64: 99% of the time
of a step. Here the same polygons, in the same order and colours, are scan-filled on a grid of `SAMPLES` x `SAMPLES` points per pixel
of the 64x64 frame and averaged. The two differ at edges only, where one averages areas and the other points.

A sample holds red, green and blue in one integer, ten bits each, so that the average of a block adds three channels at a time.
Coordinates: world metres -> sample units, x to the right, y downwards, sample centres at whole numbers.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .physics import HULL_POLYGONS, PLAYFIELD

SIZE = 64
SAMPLES = 2
GRID = SIZE * SAMPLES
WINDOW_W, WINDOW_H, VIEW_H = 1000.0, 800.0, 700.0  # Gymnasium's window, and the part of it above the dashboard
SCALE_X, SCALE_Y = GRID / WINDOW_W, GRID / VIEW_H
SCALE, ZOOM = 6.0, 2.7
GRASS = PLAYFIELD / 20.0


def _pack(red: int, green: int, blue: int) -> np.uint32:
    return np.uint32(red | green << 10 | blue << 20)


BLACK, FIELD, GRASS_COLOUR = _pack(0, 0, 0), _pack(102, 204, 102), _pack(102, 230, 102)
CAR_RED, WHITE, KERB_RED, RIM = _pack(204, 0, 0), _pack(255, 255, 255), _pack(255, 0, 0), _pack(77, 77, 77)
ROAD = np.array([_pack(g, g, g) for g in (102, 104, 107)], np.uint32)
HULL = np.zeros((4, 8, 2))
HULL_CORNERS = np.array([len(p) for p in HULL_POLYGONS])
for _i, _p in enumerate(HULL_POLYGONS):
    HULL[_i, : len(_p)] = _p


@njit(cache=True, nogil=True, fastmath=True, boundscheck=False)
def fill(samples, xs, ys, corners, colour):
    """Fill a convex polygon of `corners` points (sample units) with one colour."""
    low, high = ys[0], ys[0]
    left, right = xs[0], xs[0]
    for i in range(1, corners):
        low, high = min(low, ys[i]), max(high, ys[i])
        left, right = min(left, xs[i]), max(right, xs[i])
    if right < 0.0 or left > GRID - 1 or high < 0.0 or low > GRID - 1:
        return
    first, last = max(math.ceil(low), 0), min(math.floor(high), GRID - 1)
    for row in range(first, last + 1):
        a, b = 1e9, -1e9
        for i in range(corners):
            k = i + 1 if i + 1 < corners else 0
            y0, y1 = ys[i], ys[k]
            if (y0 <= row) != (y1 <= row):
                x = xs[i] + (row - y0) * (xs[k] - xs[i]) / (y1 - y0)
                a, b = min(a, x), max(b, x)
        if b < a:
            continue
        start, stop = max(math.ceil(a), 0), min(math.floor(b), GRID - 1)
        base = row * GRID
        for column in range(start, stop + 1):
            samples[base + column] = colour


@njit(cache=True, nogil=True, fastmath=True, boundscheck=False)
def _ground(samples, a, b, tx, c, d, ty, x, y, reach, xs, ys):
    """The field, its lighter squares, and black beyond: affine map u = a wx + b wy + tx, v = c wx + d wy + ty."""
    if abs(x) + reach < PLAYFIELD and abs(y) + reach < PLAYFIELD:
        samples[:] = FIELD
    else:
        samples[:] = BLACK
        for i in range(4):
            wx = PLAYFIELD if i == 0 or i == 1 else -PLAYFIELD
            wy = PLAYFIELD if i == 0 or i == 3 else -PLAYFIELD
            xs[i], ys[i] = a * wx + b * wy + tx, c * wx + d * wy + ty
        fill(samples, xs, ys, 4, FIELD)
    first_x, last_x = max(math.floor((x - reach) / GRASS / 2), -10), min(math.floor((x + reach) / GRASS / 2), 9)
    first_y, last_y = max(math.floor((y - reach) / GRASS / 2), -10), min(math.floor((y + reach) / GRASS / 2), 9)
    for i in range(first_x, last_x + 1):
        for j in range(first_y, last_y + 1):
            for corner in range(4):
                wx = GRASS * (2 * i + (1 if corner == 0 or corner == 3 else 0))
                wy = GRASS * (2 * j + (1 if corner >= 2 else 0))
                xs[corner], ys[corner] = a * wx + b * wy + tx, c * wx + d * wy + ty
            fill(samples, xs, ys, 4, GRASS_COLOUR)


@njit(cache=True, nogil=True, fastmath=True, boundscheck=False)
def _car(samples, car, a, b, tx, c, d, ty, xs, ys):
    """Wheels with their turning rims, then the hull, in Gymnasium's order."""
    for w in range(4):
        i = w + 1
        px, py, s, co = car.position[i, 0], car.position[i, 1], car.sine[i], car.cosine[i]
        a1, a2 = car.phase[w], car.phase[w] + 1.2
        s1, s2, c1, c2 = math.sin(a1), math.sin(a2), math.cos(a1), math.cos(a2)
        for rim in range(2):
            top, bottom = 0.54, -0.54
            if rim == 1:
                if s1 > 0 and s2 > 0:
                    break
                if s1 > 0:
                    c1 = np.sign(c1)
                if s2 > 0:
                    c2 = np.sign(c2)
                top, bottom = 0.54 * c1, 0.54 * c2
            for corner in range(4):
                lx = 0.28 if corner == 1 or corner == 2 else -0.28
                ly = top if corner < 2 else bottom
                wx, wy = px + co * lx - s * ly, py + s * lx + co * ly
                xs[corner], ys[corner] = a * wx + b * wy + tx, c * wx + d * wy + ty
            fill(samples, xs, ys, 4, RIM if rim == 1 else BLACK)
    px, py, s, co = car.position[0, 0], car.position[0, 1], car.sine[0], car.cosine[0]
    for k in range(4):
        for corner in range(HULL_CORNERS[k]):
            lx, ly = HULL[k, corner, 0], HULL[k, corner, 1]
            wx, wy = px + co * lx - s * ly, py + s * lx + co * ly
            xs[corner], ys[corner] = a * wx + b * wy + tx, c * wx + d * wy + ty
        fill(samples, xs, ys, HULL_CORNERS[k], CAR_RED)


@njit(cache=True, nogil=True, boundscheck=False)
def _average(samples, frame):
    shift = np.uint32(SAMPLES * SAMPLES)
    half = np.uint32(SAMPLES * SAMPLES // 2)
    mask = np.uint32(1023)
    for row in range(SIZE):
        for column in range(SIZE):
            total = np.uint32(0)
            for i in range(SAMPLES):
                base = (row * SAMPLES + i) * GRID + column * SAMPLES
                for j in range(SAMPLES):
                    total += samples[base + j]
            frame[row, column, 0] = ((total & mask) + half) // shift
            frame[row, column, 1] = (((total >> np.uint32(10)) & mask) + half) // shift
            frame[row, column, 2] = (((total >> np.uint32(20)) & mask) + half) // shift


@njit(cache=True, nogil=True, boundscheck=False)
def draw(frame, samples, car, polygons, centres, colours, tiles, driven):
    """Draw one car's view.

    Args:
        frame: uint8 [64, 64, 3], written. samples: uint32 [GRID * GRID], scratch.
        polygons: float64 [P, 4, 2], road tiles and kerbs in drawing order; centres: float64 [P, 2]; colours: uint32 [P];
        tiles: int32 [P], the tile of a polygon or -1 for a kerb; driven: int8 [tiles], 1 where a tile was touched (it loses its shade).
    """
    xs, ys = np.empty(8), np.empty(8)
    angle = -np.float64(car.angle[0])
    zoom = 0.1 * SCALE * max(1.0 - car.time, 0.0) + ZOOM * SCALE * min(car.time, 1.0)
    x, y = np.float64(car.position[0, 0]), np.float64(car.position[0, 1])
    s, co = math.sin(angle) * zoom, math.cos(angle) * zoom
    a, b = co * SCALE_X, -s * SCALE_X
    c, d = -s * SCALE_Y, -co * SCALE_Y
    tx = WINDOW_W / 2 * SCALE_X - 0.5 - a * x - b * y
    ty = (WINDOW_H - WINDOW_H / 4) * SCALE_Y - 0.5 - c * x - d * y
    reach = 782.0 / zoom  # from the hull to the farthest corner of the view: (500, 600) window pixels
    _ground(samples, a, b, tx, c, d, ty, x, y, reach, xs, ys)
    limit = (reach + 10.0) ** 2
    for p in range(len(polygons)):
        dx, dy = centres[p, 0] - x, centres[p, 1] - y
        if dx * dx + dy * dy > limit:
            continue
        u, v = a * centres[p, 0] + b * centres[p, 1] + tx, c * centres[p, 0] + d * centres[p, 1] + ty
        margin = 8.0 * zoom * SCALE_Y
        if u < -margin or u > GRID + margin or v < -margin or v > GRID + margin:
            continue
        for i in range(4):
            wx, wy = polygons[p, i, 0], polygons[p, i, 1]
            xs[i], ys[i] = a * wx + b * wy + tx, c * wx + d * wy + ty
        colour = colours[p]
        if tiles[p] >= 0 and driven[tiles[p]] == 1:
            colour = ROAD[0]
        fill(samples, xs, ys, 4, colour)
    _car(samples, car, a, b, tx, c, d, ty, xs, ys)
    _average(samples, frame)
