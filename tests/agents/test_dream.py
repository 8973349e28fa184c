"""A dream is an ordinary Gymnasium environment: the shipped checkers accept it and a stock learner trains in it."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from oneira.agents import make_dream
from oneira.agents.dream import DreamSource
from oneira.agents.memory import MDNRNN, MemoryConfig
from oneira.platform.errors import DataError, UsageError

DREAM = "oneira.agents:oneira/Dream-v0"
CONFIG = MemoryConfig(z=4, action=2, hidden=16, mixtures=2)


def decode(z: np.ndarray) -> np.ndarray:
    """A decoder small enough to see through: every pixel shows the first latent."""
    shade = np.clip(128 + 40 * np.asarray(z)[:, 0], 0, 255).astype(np.uint8)
    return np.broadcast_to(shade[:, None, None, None], (len(shade), 64, 64, 3)).copy()


def make_source(num_members: int = 2, done_bias: float = -6.0, max_steps: int = 20) -> DreamSource:
    members = []
    for seed in range(num_members):
        torch.manual_seed(seed)
        members.append(MDNRNN(CONFIG))
        with torch.no_grad():
            members[-1].outcome.bias[1] = done_bias
    g = np.random.default_rng(0)
    starts = {"z": (9, 4), "h": (9, 16), "c": (9, 16), "reward_prev": (9,)}
    return DreamSource(
        members=members,
        config=CONFIG,
        starts={name: np.tanh(g.normal(size=shape)).astype(np.float32) for name, shape in starts.items()},
        decode=decode,
        action_low=np.array([-1, -1], np.float32),
        action_high=np.array([1, 1], np.float32),
        max_steps=max_steps,
    )


@pytest.mark.filterwarnings("ignore:.*render_fps.*:UserWarning")
@pytest.mark.parametrize("obs", ["latent", "pixels"])
def test_gymnasiums_checker_accepts_it(obs):
    env = gymnasium.make(DREAM, run=make_source(), obs=obs, render_mode="rgb_array")
    check_env(env.unwrapped)
    env.reset(seed=0)
    frame = env.render()
    assert frame.dtype == np.uint8 and frame.shape == (64, 64, 3)


@pytest.mark.parametrize("obs", ["latent", "pixels"])
def test_the_vector_keeps_its_contract(obs):
    dream = make_dream(make_source(), num_envs=5, obs=obs)
    assert dream.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    observation, info = dream.reset(seed=3)
    assert observation in dream.observation_space and info == {}
    dream.action_space.seed(0)
    for _ in range(4):
        kept = observation.copy(), observation
        observation, reward, terminated, truncated, _ = dream.step(dream.action_space.sample())
        assert observation in dream.observation_space and observation[0] in dream.single_observation_space
        assert (reward.shape, terminated.dtype, truncated.dtype) == ((5,), bool, bool)
        np.testing.assert_array_equal(*kept)  # what a user keeps is not overwritten
    assert all(frame.shape == (64, 64, 3) and frame.dtype == np.uint8 for frame in dream.render())
    dream.close()


def play(dream, seed: int, steps: int = 12):
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, dream.num_envs, 2)).astype(np.float32)
    first, _ = dream.reset(seed=seed)
    return [first] + [np.concatenate([x.ravel() for x in dream.step(a)[:4]]) for a in actions]


def test_the_seed_fixes_the_dream():
    source = make_source()
    one, two, other = (play(make_dream(source, num_envs=3, seed=s), seed) for s, seed in ((0, 4), (1, 4), (0, 5)))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one[-1], other[-1])
    constructed = [make_dream(source, num_envs=3, seed=7).reset()[0] for _ in range(2)]
    np.testing.assert_array_equal(*constructed)


def test_a_vector_is_its_single_environments():
    source, actions = make_source(), np.random.default_rng(0).uniform(-1, 1, (6, 3, 2)).astype(np.float32)
    vector = make_dream(source, num_envs=3)
    singles = [gymnasium.make(DREAM, run=source) for _ in range(3)]
    observations = vector.reset(seed=10)[0]
    for i, env in enumerate(singles):
        np.testing.assert_array_equal(env.reset(seed=10 + i)[0], observations[i])
    for action in actions:
        observations, rewards, *_ = vector.step(action)
        for i, env in enumerate(singles):
            observation, reward, *_ = env.step(action[i])
            np.testing.assert_allclose(observation, observations[i], atol=0.03)
            assert reward == pytest.approx(rewards[i], abs=0.03)


def test_length_truncates_and_the_next_step_starts_anew():
    source = make_source(done_bias=-40.0, max_steps=3)
    dream = make_dream(source, num_envs=2)
    dream.reset(seed=0)
    zero = np.zeros((2, 2), np.float32)
    ends = [dream.step(zero)[2:4] for _ in range(3)]
    assert [bool(t.any()) for _, t in ends] == [False, False, True] and not any(e.any() for e, _ in ends)
    observation, reward, terminated, truncated, _ = dream.step(zero)
    assert not reward.any() and not terminated.any() and not truncated.any()
    assert all(any(np.array_equal(row[:4], start) for start in source.starts["z"]) for row in observation)


def test_the_memory_terminates():
    dream = make_dream(make_source(done_bias=40.0), num_envs=2)
    dream.reset(seed=0)
    _, _, terminated, truncated, _ = dream.step(np.zeros((2, 2), np.float32))
    assert terminated.all() and not truncated.any()


def test_a_mask_resets_only_its_environments():
    dream = make_dream(make_source(), num_envs=3)
    dream.reset(seed=0)
    before = dream.step(np.zeros((3, 2), np.float32))[0]
    after, _ = dream.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert not np.array_equal(before[1], after[1])


def test_gymnasium_makes_the_vector_too():
    envs = gymnasium.make_vec(DREAM, num_envs=4, vectorization_mode="vector_entry_point", run=make_source())
    assert envs.reset(seed=0)[0].shape == (4, 20)


def test_wrong_use_is_named():
    with pytest.raises(UsageError, match="'latent'"):
        make_dream(make_source(), obs="latents")
    with pytest.raises(UsageError, match="reset"):
        make_dream(make_source(), num_envs=2).step(np.zeros((2, 2), np.float32))
    with pytest.raises(DataError, match="reward_prev"):
        DreamSource(
            members=[], config=CONFIG, starts={"z": np.zeros((1, 4))}, decode=decode, action_low=-1, action_high=1
        )


def test_stable_baselines3_learns_in_it_unchanged():
    sb3 = pytest.importorskip("stable_baselines3")
    env = gymnasium.make(DREAM, run=make_source())
    learner = sb3.PPO("MlpPolicy", env, n_steps=128, batch_size=64, n_epochs=2, seed=0, device="cpu",
                      policy_kwargs={"net_arch": [16]})  # fmt: skip
    before = [p.detach().clone() for p in learner.policy.parameters()]
    learner.learn(384)
    assert learner.num_timesteps == 384
    assert all(torch.isfinite(p).all() for p in learner.policy.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))
    assert len(learner.ep_info_buffer) > 10  # whole episodes of at most 20 steps came back
