"""The stages before evolution: who drives first, and at which moments dreams begin."""

import numpy as np
import torch

from oneira.agents.dreaming import PROGRESS
from oneira.agents.memory import MDNRNN
from oneira.agents.presets import carracing_paper, carracing_quick
from oneira.agents.stages import _moments, _under_way, collect, gather_starts, store_of
from oneira.platform.executor import SerialExecutor
from oneira.platform.runs import Run


def test_random_controllers_drive_before_there_is_a_model(tmp_path):
    config = carracing_paper().smoke()
    run = Run.create(tmp_path / "run", "carracing-paper", config)
    collect(config, 0, run, SerialExecutor(), None, [])
    store = store_of(run)
    assert len(store.episodes()) == config.rounds[0].collect.random and store.num_frames > 0
    assert store.actions[:].std() > 0


def test_under_way_is_where_the_return_rose_lately():
    rewards = np.array([0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.6, 0.6, 0.0, 0.0, 0.0], np.float32)
    # at t the rewards before t count, three of them; before t = 3 it is too early to say
    assert _under_way(rewards, window=3).tolist() == [True] * 3 + [True, True, True, False, False, True, True, False]


def test_dreams_start_where_the_agent_was_getting_on(tmp_path):
    config = carracing_quick().smoke()
    run = Run.create(tmp_path / "run", "carracing-quick", config)
    store, rng = store_of(run), np.random.default_rng(0)
    latents = []
    with store.writer("00-noisy-0000", policy="noisy") as writer:
        for good in (60, 300):  # it gets on for that many steps of 300, then stands still
            rewards = np.where(np.arange(300) < good, 1.0, -0.1).astype(np.float32)
            frames = rng.integers(0, 255, (301, 64, 64, 3), np.uint8)
            actions = rng.uniform(0, 1, (300, 3)).astype(np.float32)
            writer.add_episode(frames, actions, rewards, terminated=False, truncated=True, seed=1)
            z = np.zeros((301, 32), np.float32)
            z[:, 0] = np.arange(301)  # tells the time
            latents.append(z)
    mu = np.concatenate(latents)
    store.put_latents("00-noisy-0000", "key", mu, np.full_like(mu, -20.0))
    torch.manual_seed(0)
    memory = MDNRNN(config.memory).eval()
    starts = gather_starts(store, "key", memory, config, 0)
    assert len(starts["z"]) == config.starts and all(np.isfinite(x).all() for x in starts.values())
    times = starts["z"][:, 0]
    assert (times < 50).mean() > 0.2 and (times > 100).any()
    stopped = (starts["reward_prev"] < 0) & (times > 60 + 36 + PROGRESS)
    assert not stopped.any()
    h = memory.observe(*(torch.from_numpy(x)[None] for x in (mu[:300], store.actions[:300], store.rewards[:300])))[0][0]
    of_first = [
        i
        for i in range(len(times))
        if times[i] < 60 and np.abs(h[round(times[i])].numpy() - starts["h"][i]).max() < 1e-3
    ]
    assert of_first  # h is M's own at that moment


def test_dreams_often_start_before_what_undid_the_agent():
    rng = np.random.default_rng(0)
    crashed = np.where(np.arange(400) < 350, 1.0, -0.1)  # the last progress is at 349
    fine = np.ones(400)
    before = [np.mean((at >= 274) & (at <= 349)) for at in (_moments(x, 20_000, rng) for x in (crashed, fine))]
    share, usual = 76 / 385, 76 / 400  # of the moments at which it was getting on: 35 more than it made progress
    np.testing.assert_allclose(before, [0.75 * (0.5 + 0.5 * share), 0.75 * usual], atol=0.015)
    assert (_moments(crashed, 20_000, rng) < 50).mean() > 0.25
    alive = np.ones(350)  # where staying alive is all, the end of an episode is what undid it
    ends = [np.mean(_moments(alive, 20_000, rng, died=died) >= 274) for died in (True, False)]
    assert ends[0] > 0.45 and ends[1] < 0.25
    assert _moments(np.full(60, -0.1), 500, rng).max() < 50  # it never got on: only the beginning counts
