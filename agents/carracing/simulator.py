"""Many cars at once: contacts, rewards and ends of CarRacing around `physics` and `raster`, in one compiled loop.

`CarRacingBatch` is the fast world in which data is collected and controllers are trained. Rewards, seeds, tracks and positions are
those of Gymnasium's `CarRacing-v3`; only the picture is drawn by other means. Reported scores never come from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numba import njit

from . import physics
from .physics import CAR, PLAYFIELD, TOUCH, WHEEL_POLYGON, advance, control, place
from .raster import GRID, SIZE, draw
from .track import TrackSet, lay

MAX_STEPS = 1000  # Gymnasium's TimeLimit for CarRacing-v3
LAP_SHARE = 0.95
WHEEL = WHEEL_POLYGON.astype(np.float32)
HULL_SHAPES = np.zeros((4, 8, 2), np.float32)
HULL_CORNERS = np.array([len(p) for p in physics.HULL_POLYGONS])
for _i, _p in enumerate(physics.HULL_POLYGONS):
    HULL_SHAPES[_i, : len(_p)] = _p


@lru_cache(maxsize=1)
def bodies() -> np.ndarray:
    """Box2D's mass properties of the car, asked for once."""
    return physics.measure_bodies()


@njit(cache=True, nogil=True)
def _near(px, py, qx, qy, ax, ay):
    """Squared distance from point a to the segment p-q."""
    ex, ey = qx - px, qy - py
    t = ((ax - px) * ex + (ay - py) * ey) / (ex * ex + ey * ey)
    t = min(max(t, 0.0), 1.0)
    dx, dy = px + t * ex - ax, py + t * ey - ay
    return dx * dx + dy * dy


@njit(cache=True, nogil=True)
def touches(xs, ys, corners, tile, normals):
    """Do a convex polygon (float64 [corners], either winding) and a tile come closer than `TOUCH`?

    A separating axis decides nearly always; the exact distance is computed only where the gap is within the skins.
    """
    gap = -1e9
    for e in range(4):
        nx, ny = normals[e, 0], normals[e, 1]
        least = 1e9
        for i in range(corners):
            least = min(least, (xs[i] - tile[e, 0]) * nx + (ys[i] - tile[e, 1]) * ny)
        gap = max(gap, least)
        if gap > TOUCH:
            return False
    area = 0.0
    for i in range(corners):
        k = i + 1 if i + 1 < corners else 0
        area += xs[i] * ys[k] - xs[k] * ys[i]
    sign = 1.0 if area > 0 else -1.0
    for i in range(corners):
        k = i + 1 if i + 1 < corners else 0
        nx, ny = sign * (ys[k] - ys[i]), -sign * (xs[k] - xs[i])
        length = math.sqrt(nx * nx + ny * ny)
        least = 1e9
        for e in range(4):
            least = min(least, ((tile[e, 0] - xs[i]) * nx + (tile[e, 1] - ys[i]) * ny) / length)
        gap = max(gap, least)
        if gap > TOUCH:
            return False
    if gap <= 0.0:
        return True
    best = 1e18
    for i in range(corners):
        k = i + 1 if i + 1 < corners else 0
        for e in range(4):
            f = (e + 1) % 4
            best = min(best, _near(tile[e, 0], tile[e, 1], tile[f, 0], tile[f, 1], xs[i], ys[i]))
            best = min(best, _near(xs[i], ys[i], xs[k], ys[k], tile[e, 0], tile[e, 1]))
    return math.sqrt(best) <= TOUCH


@njit(cache=True, nogil=True)
def _contacts(car, tiles, normals, centres, visited, driven, on_road):
    """Sensors at the present positions: wheels on road, tiles newly visited (reward), tiles that lose their shade."""
    xs, ys = np.empty(8), np.empty(8)
    num_tiles = len(tiles)
    on_road[:] = 0
    hx, hy = np.float64(car.position[0, 0]), np.float64(car.position[0, 1])
    for t in range(num_tiles):
        dx, dy = centres[t, 0] - hx, centres[t, 1] - hy
        reach = centres[t, 2] + 5.0
        if dx * dx + dy * dy > reach * reach:
            continue
        for w in range(4):
            b = w + 1
            px, py, s, c = car.position[b, 0], car.position[b, 1], car.sine[b], car.cosine[b]
            dx, dy = centres[t, 0] - np.float64(px), centres[t, 1] - np.float64(py)
            reach = centres[t, 2] + 0.7
            if dx * dx + dy * dy > reach * reach:
                continue
            for i in range(4):
                xs[i] = np.float64((c * WHEEL[i, 0] - s * WHEEL[i, 1]) + px)
                ys[i] = np.float64((s * WHEEL[i, 0] + c * WHEEL[i, 1]) + py)
            if touches(xs, ys, 4, tiles[t], normals[t]):
                on_road[w] = 1
                driven[t] = 1
                if visited[t] == 0:
                    visited[t] = 1
                    car.reward += 1000.0 / num_tiles
                    car.visited += 1
                    car.last_tile_step = car.steps
                    if t == 0 and car.visited / num_tiles > LAP_SHARE:
                        car.new_lap = 1
        if driven[t] == 0:
            px, py, s, c = car.position[0, 0], car.position[0, 1], car.sine[0], car.cosine[0]
            for k in range(4):
                for i in range(HULL_CORNERS[k]):
                    xs[i] = np.float64((c * HULL_SHAPES[k, i, 0] - s * HULL_SHAPES[k, i, 1]) + px)
                    ys[i] = np.float64((s * HULL_SHAPES[k, i, 0] + c * HULL_SHAPES[k, i, 1]) + py)
                if touches(xs, ys, HULL_CORNERS[k], tiles[t], normals[t]):
                    driven[t] = 1
                    break


@njit(cache=True, nogil=True)
def _step_one(car, parts, tiles, normals, centres, visited, driven, act, steer, gas, brake):
    """One environment step. Returns (reward, terminated)."""
    on_road = np.empty(4, np.int8)
    if act:
        control(car, steer, gas, brake)
        car.steps += 1
    _contacts(car, tiles, normals, centres, visited, driven, on_road)
    advance(car, parts)
    for w in range(4):
        car.on_road[w] = on_road[w]
    car.time += 1.0 / 50.0
    if not act:
        return 0.0, False
    car.reward -= 0.1
    reward = car.reward - car.previous_reward
    car.previous_reward = car.reward
    terminated = car.visited == len(tiles) or car.new_lap == 1
    if abs(car.position[0, 0]) > PLAYFIELD or abs(car.position[0, 1]) > PLAYFIELD:
        terminated = True
        reward = -100.0
    return reward, terminated


@njit(cache=True, nogil=True)
def _run(
    rows,
    act,
    cars,
    parts,
    of,
    tile_offset,
    tiles,
    normals,
    centres,
    poly_offset,
    polygons,
    poly_centre,
    colours,
    poly_tile,
    visited,
    driven,
    actions,
    rewards,
    terminated,
    frames,
    samples,
    picture,
):
    for index in range(len(rows)):
        n = rows[index]
        k = of[n]
        a, b = tile_offset[k], tile_offset[k + 1]
        steer, gas, brake = 0.0, 0.0, 0.0
        if act:
            steer, gas, brake = (
                np.float64(actions[index, 0]),
                np.float64(actions[index, 1]),
                np.float64(actions[index, 2]),
            )
        r, t = _step_one(
            cars[n], parts, tiles[a:b], normals[a:b], centres[a:b], visited[n], driven[n], act, steer, gas, brake
        )
        rewards[index] = r
        terminated[index] = t
        if picture:
            p, q = poly_offset[k], poly_offset[k + 1]
            draw(
                frames[index],
                samples,
                cars[n],
                polygons[p:q],
                poly_centre[p:q],
                colours[p:q],
                poly_tile[p:q],
                driven[n],
            )


class CarRacingBatch:
    """N cars on K tracks, stepped together.

    Args:
        seeds: the K seeds, as `CarRacing-v3`'s `reset(seed=)` takes them. track_of: int [N], which of them a car drives.
        picture: False leaves the frames out (physics alone).
    """

    def __init__(self, seeds: Sequence[int], track_of: Sequence[int] | np.ndarray, *, picture: bool = True) -> None:
        self.tracks: TrackSet = lay(seeds)
        self.track_of = np.asarray(track_of, np.int64)
        self.picture = picture
        self.num_envs = len(self.track_of)
        self._samples = np.empty(GRID * GRID, np.uint32)
        self.cars = np.zeros(self.num_envs, CAR).view(np.recarray)
        self._visited = np.zeros((self.num_envs, self.tracks.most_tiles), np.int8)
        self._driven = np.zeros_like(self._visited)

    def reset(self) -> np.ndarray:
        """Put every car at its start. Returns frames, uint8 [N, 64, 64, 3]."""
        self.cars = np.zeros(self.num_envs, CAR).view(np.recarray)
        self._visited[:] = 0
        self._driven[:] = 0
        for n in range(self.num_envs):
            angle, x, y = self.tracks.starts[self.track_of[n]]
            place(self.cars[n], bodies(), angle, x, y)
        rows = np.arange(self.num_envs)
        return self._advance(rows, False, np.zeros((self.num_envs, 3), np.float32))[0]

    def step(
        self, actions: np.ndarray, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One step of 1/50 s for all cars, or for `rows` alone (the others stand still in time).

        Args:
            actions: float32 [R, 3]: steer in [-1, 1], gas and brake in [0, 1]. rows: int64 [R].

        Returns:
            frames uint8 [R, 64, 64, 3]; rewards float64 [R]; terminated bool [R]; truncated bool [R] (1,000 steps).
        """
        rows = np.arange(self.num_envs) if rows is None else rows
        frames, rewards, terminated = self._advance(rows, True, np.ascontiguousarray(actions, np.float32))
        return frames, rewards, terminated, self.cars["steps"][rows] >= MAX_STEPS

    def _advance(self, rows: np.ndarray, act: bool, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        frames = np.empty((len(rows) if self.picture else 0, SIZE, SIZE, 3), np.uint8)
        rewards, terminated = np.empty(len(rows)), np.empty(len(rows), np.bool_)
        t = self.tracks
        _run(
            rows,
            act,
            self.cars,
            bodies(),
            self.track_of,
            t.tile_offset,
            t.tiles,
            t.normals,
            t.tile_centre,
            t.polygon_offset,
            t.polygons,
            t.polygon_centre,
            t.colours,
            t.polygon_tile,
            self._visited,
            self._driven,
            actions,
            rewards,
            terminated,
            frames,
            self._samples,
            self.picture,
        )
        return frames, rewards, terminated

    @property
    def steps_since_tile(self) -> np.ndarray:
        """int [N]: steps since a car last reached a new tile."""
        return self.cars["steps"] - self.cars["last_tile_step"]

    @property
    def speed(self) -> np.ndarray:
        """float [N]: the hull's speed [m/s]."""
        return np.linalg.norm(self.cars["velocity"][:, 0], axis=-1)
