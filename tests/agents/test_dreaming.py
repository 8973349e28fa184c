"""Laws of DreamModel: its step is M's prediction sampled, temperature is the paper's, and a seed fixes a dream."""

import numpy as np
import pytest
import torch

from oneira.agents import kernels
from oneira.agents.dreaming import DreamModel, Noise
from oneira.agents.memory import MDNRNN, MemoryConfig
from oneira.platform.errors import DataError, UsageError

CONFIG = MemoryConfig(z=4, action=2, hidden=32, mixtures=3, reward_scale=2.0)
B = 24


def make_member(seed: int = 0, config: MemoryConfig = CONFIG) -> MDNRNN:
    torch.manual_seed(seed)
    member = MDNRNN(config)
    with torch.no_grad():  # wider than the initial weights: distinct mixtures, and states that depend on their history
        member.mixture.weight.mul_(4)
        member.mixture.bias[-config.mixtures * config.z :] -= 1.0
    return member


def make_rows(rows: int = B, seed: int = 0) -> dict[str, np.ndarray]:
    g = np.random.default_rng(seed)
    shapes = {"z": (rows, 4), "h": (rows, 32), "c": (rows, 32), "reward_prev": (rows,)}
    rows_of = {name: g.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return rows_of | {"h": np.tanh(rows_of["h"])}


def make_policy(candidates: int):
    weights = torch.randn(candidates, 36, 2, generator=torch.Generator().manual_seed(5)) * 0.3
    return lambda features: torch.tanh(torch.bmm(features, weights))


@pytest.mark.parametrize("reward_input", [True, False])
def test_a_step_is_the_prediction_of_the_memory(reward_input):
    config = MemoryConfig(z=4, action=2, hidden=32, mixtures=3, reward_scale=2.0, reward_input=reward_input)
    member, rows = make_member(config=config), make_rows()
    action = np.random.default_rng(1).uniform(-1, 1, (B, 2)).astype(np.float32)
    noise = Noise.draw(kernels.row_keys(3, B), np.zeros(B, np.int64), 4)
    z, reward, done, h, c = DreamModel([member], config).step(
        rows["z"], action, rows["reward_prev"], rows["h"], rows["c"], 0.0, noise
    )
    as_step = [torch.from_numpy(x)[:, None] for x in (rows["z"], action, rows["reward_prev"])]
    with torch.no_grad():
        expected, state = member(*as_step, (torch.from_numpy(rows["h"]), torch.from_numpy(rows["c"])))
    np.testing.assert_allclose(h, state[0], atol=0.02)
    np.testing.assert_allclose(c, state[1], atol=0.03)
    np.testing.assert_allclose(reward, expected.reward[:, 0], atol=0.03)
    np.testing.assert_allclose(done, torch.sigmoid(expected.done_logit[:, 0]), atol=0.01)
    best = expected.log_weights[:, 0].argmax(1, keepdim=True)  # tau -> 0: the mean of the likeliest component
    clear = expected.log_weights[:, 0].topk(2, 1).values.diff(dim=1).abs()[:, 0] > 0.1  # bf16 may swap near-ties
    mode = expected.means[:, 0].gather(1, best)[:, 0]
    assert clear.float().mean() > 0.6
    np.testing.assert_allclose(z[clear], mode[clear], atol=0.05)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
def test_samples_have_the_moments_of_the_tempered_mixture(tau):
    rows, member, draws = make_rows(1), make_member(), 40_000
    many = {name: np.repeat(value, draws, 0) for name, value in rows.items()}
    noise = Noise.draw(kernels.row_keys(0, draws), np.zeros(draws, np.int64), 4)
    action = np.zeros((draws, 2), np.float32)
    z, *_ = DreamModel([member], CONFIG).step(many["z"], action, many["reward_prev"], many["h"], many["c"], tau, noise)
    first = [torch.from_numpy(x[:1])[:, None] for x in (many["z"], action, many["reward_prev"])]
    with torch.no_grad():
        p, _ = member(*first, (torch.from_numpy(rows["h"]), torch.from_numpy(rows["c"])))
    weights = torch.softmax(p.log_weights[0, 0] / tau, 0)  # section A.2: logits / tau, and sigma^2 * tau
    mean = (weights * p.means[0, 0]).sum(0)
    variance = (weights * (p.log_sigmas[0, 0].mul(2).exp() * tau + (p.means[0, 0] - mean) ** 2)).sum(0)
    np.testing.assert_allclose(z.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(z.var(0), variance, rtol=0.06)


def test_noise_is_uniform_and_normal_and_independent():
    noise = Noise.draw(kernels.row_keys(7, 20_000), np.arange(20_000) % 3, 4)
    assert noise.uniform.min() >= 0 and noise.uniform.max() < 1
    np.testing.assert_allclose(np.histogram(noise.uniform, 8, (0, 1))[0] / noise.uniform.size, 1 / 8, atol=0.004)
    np.testing.assert_allclose([noise.normal.mean(), noise.normal.var()], [0, 1], atol=0.02)
    assert np.mean(noise.normal**4) == pytest.approx(3, abs=0.1)
    everything = np.concatenate([noise.uniform, noise.normal, noise.done[:, None]], 1)
    assert np.abs(np.corrcoef(everything.T) - np.eye(9)).max() < 0.03


def test_a_rollout_is_fixed_by_its_seed():
    model, starts, policy = DreamModel([make_member()], CONFIG), make_rows(6), make_policy(4)
    first, again, other = (
        model.rollout(starts, policy, 30, 1.0, seed, candidates=4, termination=kind)
        for seed, kind in ((1, "sampled"), (1, "sampled"), (2, "never"))
    )
    assert first.returns.shape == first.lengths.shape == (4, 6)
    np.testing.assert_array_equal(first.returns, again.returns)
    np.testing.assert_array_equal(first.lengths, again.lengths)
    assert (first.returns != other.returns).all()


def test_a_candidates_return_does_not_depend_on_its_company():
    model, starts, policy = DreamModel([make_member()], CONFIG), make_rows(6), make_policy(4)
    together = model.rollout(starts, policy, 8, candidates=4, termination="never")
    alone = model.rollout(starts, lambda f: policy(f.expand(4, -1, -1))[2:3], 8, candidates=1, termination="never")
    np.testing.assert_allclose(together.returns[2:3], alone.returns, atol=1e-3)


@pytest.mark.parametrize("num_members", [1, 3])
def test_a_rollout_is_its_steps(num_members):
    """Also: candidates do not disturb each other, and each rollout keeps its member."""
    members = [make_member(seed) for seed in range(num_members)]
    model, starts, policy, rollouts, steps = DreamModel(members, CONFIG), make_rows(6), make_policy(2), 6, 8
    dreams = model.rollout(starts, policy, steps, 1.0, 9, candidates=2, termination="threshold")
    keys, share = kernels.row_keys(9, rollouts), rollouts // num_members
    for k in range(2):
        state = {name: value.copy() for name, value in starts.items()}
        total, alive = np.zeros(rollouts), np.ones(rollouts, bool)
        for t in range(steps):
            noise = Noise.draw(keys, np.full(rollouts, t), 4)
            features = torch.from_numpy(np.concatenate([state["z"], state["h"]], 1))
            action = policy(features.expand(2, -1, -1))[k].numpy()
            done = np.zeros(rollouts)
            for m in range(num_members):
                rows = slice(m * share, (m + 1) * share)
                own = Noise(*(x[rows] for x in noise))
                out = model.step(
                    state["z"][rows], action[rows], state["reward_prev"][rows], state["h"][rows], state["c"][rows], 1.0,
                    own, member=m,
                )  # fmt: skip
                state["z"][rows], state["reward_prev"][rows], done[rows], state["h"][rows], state["c"][rows] = out
            total += np.where(alive, state["reward_prev"], 0)
            alive &= done <= 0.5
        np.testing.assert_allclose(dreams.returns[k], total, atol=1e-3)


def test_termination_ends_the_rewards():
    member = make_member()
    with torch.no_grad():
        member.outcome.weight.zero_()
        member.outcome.bias.copy_(
            torch.tensor([0.5, -1.0986])
        )  # reward 0.5 * scale 2 = 1 a step; done with probability 1/4
    model, starts, policy = DreamModel([member], CONFIG), make_rows(500), make_policy(2)
    sampled = model.rollout(starts, policy, 60, candidates=2)
    np.testing.assert_allclose(sampled.returns, sampled.lengths, rtol=1e-5)
    assert sampled.lengths[0].mean() == pytest.approx(4, rel=0.15)  # geometric
    for kind in ("threshold", "never"):
        assert (model.rollout(starts, policy, 60, candidates=2, termination=kind).lengths == 60).all()
    with torch.no_grad():
        member.outcome.bias[1] = 0.1
    assert (
        DreamModel([member], CONFIG).rollout(starts, make_policy(1), 60, termination="threshold").lengths == 1
    ).all()


def test_a_state_dict_serves_as_well_as_the_module():
    member, starts = make_member(), make_rows(4)
    as_arrays = {name: value.numpy() for name, value in member.state_dict().items()}
    dreams = [DreamModel([m], CONFIG).rollout(starts, make_policy(1), 5).returns for m in (member, as_arrays)]
    np.testing.assert_array_equal(*dreams)


def test_a_broken_candidate_returns_nan_and_leaves_the_others_alone():
    model, starts, policy = DreamModel([make_member()], CONFIG), make_rows(6), make_policy(2)

    def broken(features):
        actions = policy(features)
        actions[1] = float("nan")
        return actions

    whole, half = (model.rollout(starts, p, 8, candidates=2, termination="never").returns for p in (policy, broken))
    np.testing.assert_array_equal(half[0], whole[0])
    assert np.isnan(half[1]).all()


def test_wrong_use_is_named():
    with pytest.raises(DataError, match="at least one"):
        DreamModel([], CONFIG)
    with pytest.raises(DataError, match="shape"):
        DreamModel([make_member()], MemoryConfig(z=4, action=3, hidden=32, mixtures=3))
    with pytest.raises(UsageError, match="sampled"):
        DreamModel([make_member()], CONFIG).rollout(make_rows(2), make_policy(1), 2, termination="sample")


@pytest.mark.parametrize(("reward", "length"), [(-0.1, 10), (0.05, 10), (0.15, 40), (1.0, 40)])
def test_a_dream_that_does_not_get_on_ends(reward, length):
    """Ten steps in which the return rises by less than PROGRESS are the end, however little it still pays."""
    member = make_member()
    with torch.no_grad():
        member.outcome.weight.zero_()
        member.outcome.bias.copy_(torch.tensor([reward / CONFIG.reward_scale, -20.0]))
    dreams = DreamModel([member], CONFIG).rollout(make_rows(5), make_policy(2), 40, candidates=2, stuck=10)
    assert (dreams.lengths == length + (length < 40)).all()
    np.testing.assert_allclose(dreams.returns, reward * dreams.lengths, rtol=1e-3)


def test_only_what_was_cut_is_lost():
    member, starts = make_member(), make_rows(5)
    with torch.no_grad():
        member.outcome.weight.zero_()
        member.outcome.bias.copy_(torch.tensor([0.0, -20.0]))
    still = DreamModel([member], CONFIG).rollout(starts, make_policy(2), 40, candidates=2, stuck=10)
    uncut = DreamModel([member], CONFIG).rollout(starts, make_policy(2), 40, candidates=2)
    with torch.no_grad():
        member.outcome.bias[1] = 20.0
    ended = DreamModel([member], CONFIG).rollout(starts, make_policy(2), 40, candidates=2, stuck=10)
    assert still.lost.all() and not uncut.lost.any() and not ended.lost.any() and (ended.lengths == 1).all()
