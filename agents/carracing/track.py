"""Tracks as arrays: Gymnasium makes them (its own generator, its own seeds), this file reads them off once.

Making one costs about 11 ms, so a track is kept for all the cars that drive it: the candidates of a generation share theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .raster import KERB_RED, ROAD, WHITE


@dataclass(frozen=True)
class Track:
    """One track. T tiles, P polygons to draw (tiles and kerbs in Gymnasium's order)."""

    start: np.ndarray  # float64 [3]: angle [rad], x, y [m]
    tiles: np.ndarray  # float32 [T, 4, 2]: the sensors' corners, counter-clockwise
    polygons: np.ndarray  # float64 [P, 4, 2]
    colours: np.ndarray  # uint32 [P]
    polygon_tile: np.ndarray  # int32 [P]: index of the tile, -1 for a kerb


@lru_cache(maxsize=1)
def _maker():
    from gymnasium.envs.box2d.car_racing import CarRacing

    class Undrawn(CarRacing):
        """Gymnasium's environment without its drawing: `reset` makes the track and the car."""

        def _render(self, mode: str) -> None:
            return None

    return Undrawn()


@lru_cache(maxsize=512)
def make_track(seed: int) -> Track:
    """The track that `CarRacing-v3` makes for `reset(seed=seed)`."""
    env = _maker()
    env.reset(seed=int(seed))
    tiles = np.array([[tuple(v) for v in tile.fixtures[0].shape.vertices] for tile in env.road], np.float32)
    polygons = np.array([polygon for polygon, _ in env.road_poly], np.float64)
    colours, owners, tile = [], [], -1
    for _, colour in env.road_poly:
        if isinstance(colour, np.ndarray):
            tile += 1
            owners.append(tile)
            colours.append(ROAD[tile % 3])
        else:
            owners.append(-1)
            colours.append(WHITE if tuple(colour) == (255, 255, 255) else KERB_RED)
    return Track(
        start=np.array(env.track[0][1:4], np.float64),
        tiles=tiles,
        polygons=polygons,
        colours=np.array(colours, np.uint32),
        polygon_tile=np.array(owners, np.int32),
    )


@dataclass(frozen=True)
class TrackSet:
    """Several tracks laid end to end in arrays that compiled code can index."""

    starts: np.ndarray  # float64 [K, 3]
    tile_offset: np.ndarray  # int64 [K + 1]
    tiles: np.ndarray  # float64 [sum T, 4, 2], counter-clockwise
    normals: np.ndarray  # float64 [sum T, 4, 2], outward, of the edge from corner i to i + 1
    tile_centre: np.ndarray  # float64 [sum T, 3]: x, y, radius
    polygon_offset: np.ndarray  # int64 [K + 1]
    polygons: np.ndarray
    polygon_centre: np.ndarray
    colours: np.ndarray
    polygon_tile: np.ndarray
    most_tiles: int


def lay(seeds: Sequence[int]) -> TrackSet:
    """The tracks of these seeds, in this order."""
    tracks = [make_track(int(seed)) for seed in seeds]
    tiles = np.concatenate([t.tiles for t in tracks]).astype(np.float64)
    edges = np.roll(tiles, -1, axis=1) - tiles
    normals = np.stack([edges[..., 1], -edges[..., 0]], -1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    centre = tiles.mean(1)
    radius = np.linalg.norm(tiles - centre[:, None], axis=-1).max(1)
    polygons = np.concatenate([t.polygons for t in tracks])
    return TrackSet(
        starts=np.stack([t.start for t in tracks]),
        tile_offset=np.cumsum([0] + [len(t.tiles) for t in tracks]),
        tiles=tiles,
        normals=normals,
        tile_centre=np.concatenate([centre, radius[:, None]], 1),
        polygon_offset=np.cumsum([0] + [len(t.polygons) for t in tracks]),
        polygons=polygons,
        polygon_centre=polygons.mean(1),
        colours=np.concatenate([t.colours for t in tracks]),
        polygon_tile=np.concatenate([t.polygon_tile for t in tracks]),
        most_tiles=max(len(t.tiles) for t in tracks),
    )
