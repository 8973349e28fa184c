"""Units of work: fixed by their contents, indifferent to their company, and cut where the config says."""

import numpy as np
import pytest
import torch

from oneira.agents.controller import ControllerConfig
from oneira.agents.evolving import seed_of, track_seeds, units_of
from oneira.agents.fitness import dream_unit, real_unit
from oneira.agents.memory import MDNRNN, MemoryConfig
from oneira.agents.settings import PopulationConfig
from oneira.agents.worldmodel import Senses, digest, pack, unpack
from oneira.generative.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    memory = MDNRNN(MemoryConfig(hidden=24, reward_input=False)).eval()
    tree = pack("carracing", VAE(VAEConfig(width=8)).eval(), [memory], ControllerConfig(memory=24))
    rng = np.random.default_rng(0)
    tree["starts"] = {
        "z": rng.standard_normal((20, 32)).astype(np.float32),
        "h": np.zeros((20, 24), np.float32),
        "c": np.zeros((20, 24), np.float32),
        "reward_prev": np.zeros(20, np.float32),
    }
    return tree


def candidates(count, size=171):
    return np.random.default_rng(1).normal(0, 0.3, (count, size)).astype(np.float32)


def test_the_same_unit_gives_the_same_bytes(model):
    unit = {"params": candidates(4), "seeds": [3, 4], "max_steps": 40, "stuck": 0}
    first, second = real_unit(model, unit), real_unit(model, unit)
    assert first["returns"].tobytes() == second["returns"].tobytes() and first["env_steps"] == 4 * 2 * 40
    dream = {"params": candidates(4), "seed": 9, "rollouts": 6, "horizon": 20, "tau": 1.0, "stuck": 0, "lost_cost": 0.0}
    assert dream_unit(model, dream)["returns"].tobytes() == dream_unit(model, dream)["returns"].tobytes()


def test_candidates_with_equal_parameters_share_their_luck(model):
    params = np.repeat(candidates(1), 3, 0)
    real = real_unit(model, {"params": params, "seeds": [5, 6], "max_steps": 60, "stuck": 0})["returns"]
    dream = dream_unit(
        model, {"params": params, "seed": 2, "rollouts": 5, "horizon": 30, "tau": 1.2, "stuck": 0, "lost_cost": 0.0}
    )["returns"]
    for returns in (real, dream):
        assert np.array_equal(returns, np.repeat(returns[:1], 3, 0)) and len(np.unique(returns[0])) > 1


def test_being_lost_costs_a_dream_what_the_unit_says(model):
    unit = {"params": candidates(4), "seed": 9, "rollouts": 30, "horizon": 60, "tau": 1.0, "stuck": 1}
    free, dear = (dream_unit(model, {**unit, "lost_cost": cost})["returns"] for cost in (0.0, 50.0))
    lost = free - dear
    assert set(np.unique(lost.round(3))) <= {0.0, 50.0} and lost.max() == 50


def test_episodes_without_progress_are_cut(model):
    still = np.zeros((1, 171), np.float32)
    still[0, -2] = -9  # no gas
    answer = real_unit(model, {"params": still, "seeds": [1], "max_steps": 300, "stuck": 35})
    assert 30 <= answer["env_steps"] <= 40


def test_what_senses_remember_is_what_m_observes(model):
    torch.manual_seed(1)
    tree = unpack(model)
    senses = Senses(tree, 3)
    frames = np.random.default_rng(0).integers(0, 255, (5, 3, 64, 64, 3), dtype=np.uint8)
    actions = np.random.default_rng(1).uniform(0, 1, (5, 3, 3)).astype(np.float32)
    seen = []
    for f, a in zip(frames, actions, strict=True):
        seen.append(senses.see(f).copy())
        senses.remember(a, np.zeros(3))
    z = torch.from_numpy(np.stack([s[:, :32] for s in seen], 1))
    h, _ = tree.members[0].observe(z, torch.from_numpy(actions.transpose(1, 0, 2)), torch.zeros(3, 5))
    ours = np.stack([s[:, 32:] for s in seen], 1)
    assert np.abs(ours - h[:, :5].numpy()).max() < 0.02  # bf16 products
    mu, _ = tree.vision.encode(torch.from_numpy(frames[0]))
    assert (mu - z[:, 0]).abs().max() < 0.1 * mu.abs().max() + 0.02


def test_keeping_rows_keeps_what_they_remember(model):
    senses = Senses(unpack(model), 4)
    frames = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    before = senses.see(frames).copy()
    senses.remember(np.zeros((4, 3), np.float32), np.arange(4.0))
    senses.keep(np.array([True, False, True, False]))
    assert senses.num_envs == 2 and np.array_equal(senses.reward, [0, 2])
    after = senses.see(frames[[0, 2]])[:, :32]
    # Without AVX-512 two rows and four differ in their last bits.
    assert np.abs(after - before[[0, 2], :32]).max() < 1e-4
    assert np.abs(after - before[[1, 3], :32]).max() > 1e-2


def test_a_generation_shares_its_tracks_and_no_other_does():
    config = PopulationConfig(name="p", world="real", episodes=3, unit=32)
    first = units_of(config, candidates(64), 3, 7, "evolve", 0, "p", 1)
    assert len(first) == 2 and first[0]["seeds"] == first[1]["seeds"]
    assert first[0]["seeds"] != units_of(config, candidates(64), 3, 7, "evolve", 0, "p", 2)[0]["seeds"]
    assert all(0 <= s < 2**24 for s in track_seeds(1000, 1))
    assert seed_of(1, "a") != seed_of(1, "b") and seed_of(1, "a") == seed_of(1, "a")


def test_a_digest_tells_trees_apart(model):
    other = {**model, "starts": {**model["starts"], "z": model["starts"]["z"] + 1}}
    assert digest(model) == digest(dict(model)) and digest(model) != digest(other)
