"""The twin against Gymnasium's CarRacing-v3: positions bit for bit, rewards and ends equal, pictures close, over many tracks."""

import gymnasium
import numpy as np
import pytest

from oneira.agents.carracing.simulator import CarRacingBatch, touches
from oneira.agents.carracing.track import make_track
from oneira.agents.environments import make_world, preprocess_carracing
from oneira.platform.errors import ConfigError

PIXEL_TOLERANCE = 2.8  # mean absolute difference of 255, a frame's at most; they differ at edges


def driver(env, rng, step):
    """Aims along the track by the reference's own state, with errors, so that cars drive, skid, brake and leave the road."""
    car, track = env.car, np.array([t[2:4] for t in env.track])
    position = np.array(car.hull.position)
    nearest = np.argmin(((track - position) ** 2).sum(1))
    ahead = track[(nearest + 6) % len(track)] - position
    forward = np.array(car.hull.GetWorldVector((0, 1)))
    angle = np.arctan2(forward[0] * ahead[1] - forward[1] * ahead[0], forward @ ahead)
    speed = np.hypot(*car.hull.linearVelocity)
    if rng.random() < 0.1:
        return rng.uniform([-1, 0, 0], [1, 1, 1]).astype(np.float32)
    steer = np.clip(-1.5 * angle + 0.3 * np.sin(step / 17) * rng.random(), -1, 1)
    return np.array([steer, 0.6 * (speed < 45), 0.5 * (speed > 60)], np.float32)


@pytest.mark.parametrize("seed", range(200, 206))
def test_physics_and_rewards_are_gymnasiums(seed):
    env = gymnasium.make("CarRacing-v3").unwrapped
    env._render = lambda mode: np.zeros((96, 96, 3), np.uint8)
    env.reset(seed=seed)
    twin = CarRacingBatch([seed], [0], picture=False)
    twin.reset()
    rng = np.random.default_rng(seed)
    for step in range(500):
        action = driver(env, rng, step)
        _, reward, terminated, _, _ = env.step(action)
        _, rewards, over, _ = twin.step(action[None])
        assert abs(reward - rewards[0]) <= 1e-9 and terminated == over[0], step
        for i, body in enumerate([env.car.hull, *env.car.wheels]):
            state = twin.cars[0]
            theirs = (*body.position, body.angle, *body.linearVelocity, body.angularVelocity)
            ours = (*state.position[i], state.angle[i], *state.velocity[i], state.spin[i])
            assert theirs == tuple(float(x) for x in ours), (step, i)
        if terminated:
            break


def test_leaving_the_field_ends_with_minus_100():
    env = gymnasium.make("CarRacing-v3").unwrapped
    env._render = lambda mode: np.zeros((96, 96, 3), np.uint8)
    env.reset(seed=3)
    twin = CarRacingBatch([3], [0], picture=False)
    twin.reset()
    action = np.array([0.0, 1.0, 0.0], np.float32)
    for _ in range(1000):
        _, reward, terminated, _, _ = env.step(action)
        _, rewards, over, truncated = twin.step(action[None])
        assert abs(reward - rewards[0]) <= 1e-9 and terminated == over[0]
        if terminated:
            assert rewards[0] == -100.0
            break
    assert terminated or truncated[0]


def test_time_limit_truncates_after_1000_steps():
    twin = CarRacingBatch([1], [0], picture=False)
    twin.reset()
    truncated = [bool(twin.step(np.zeros((1, 3), np.float32))[3][0]) for _ in range(1000)]
    assert truncated == [False] * 999 + [True]


@pytest.mark.parametrize("seed", range(300, 304))
def test_pictures_are_close_to_the_preprocessed_reference(seed):
    env = gymnasium.make("CarRacing-v3").unwrapped
    frame, _ = env.reset(seed=seed)
    twin = CarRacingBatch([seed], [0])
    frames = twin.reset()
    rng = np.random.default_rng(seed)
    worst = 0.0
    for step in range(70):
        reference = preprocess_carracing(frame[None])[0].astype(int)
        worst = max(worst, float(np.abs(reference - frames[0]).mean()))
        action = driver(env, rng, step)
        frame = env.step(action)[0]
        frames = twin.step(action[None])[0]
    assert worst <= PIXEL_TOLERANCE


def test_a_row_does_not_depend_on_its_neighbours():
    actions = np.random.default_rng(0).uniform([-1, 0, 0], [1, 1, 1], (50, 3, 3)).astype(np.float32)
    together, alone = CarRacingBatch([5, 6], [0, 1, 0]), CarRacingBatch([6], [0])
    together.reset(), alone.reset()
    for a in actions:
        frames, rewards, _, _ = together.step(a)
        single, reward, _, _ = alone.step(a[1:2])
    assert np.array_equal(frames[1], single[0]) and rewards[1] == reward[0]


def test_stepping_some_rows_leaves_the_others_as_they_were():
    batch = CarRacingBatch([5, 6], [0, 1])
    batch.reset()
    before = batch.cars[1].copy()
    batch.step(np.array([[0, 1, 0]], np.float32), np.array([0]))
    assert batch.cars[1] == before and batch.cars[0].steps == 1


def test_touching_needs_a_gap_below_two_skins():
    tile = np.array([[0, 0], [4, 0], [4, 2], [0, 2]], float)
    normals = np.array([[0, -1], [1, 0], [0, 1], [-1, 0]], float)

    def square(x, y):
        return np.array([x, x + 1, x + 1, x]), np.array([y, y, y + 1, y + 1])

    assert touches(*square(1.0, 0.5), 4, tile, normals)
    assert touches(*square(4.019, 0.5), 4, tile, normals)
    assert not touches(*square(4.021, 0.5), 4, tile, normals)
    assert touches(*square(4.014, 2.014), 4, tile, normals)  # corner to corner: 0.0198
    assert not touches(*square(4.015, 2.015), 4, tile, normals)  # 0.0212


def test_tracks_are_read_off_gymnasiums():
    env = gymnasium.make("CarRacing-v3").unwrapped
    env.reset(seed=11)
    track = make_track(11)
    assert len(track.tiles) == len(env.track) and len(track.polygons) == len(env.road_poly)
    assert np.array_equal(track.polygons, np.array([p for p, _ in env.road_poly]))


def test_unknown_world_names_the_nearest():
    with pytest.raises(ConfigError, match="carracing"):
        make_world("caracing")
