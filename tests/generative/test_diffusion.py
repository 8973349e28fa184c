"""Diffusion against diffusers' own schedulers and against distributions whose exact denoiser is known."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch

from oneira.generative.diffusion import (
    PREDICTIONS,
    SAMPLERS,
    SCHEDULES,
    Row,
    Schedule,
    Spacing,
    advance,
    noise_of,
    plan,
    to_x0,
    training_pair,
)
from oneira.platform.errors import ConfigError, UsageError

MEANS = torch.tensor([[-0.6, 0.4, 0.1], [0.7, -0.2, 0.5]])
SPREADS = torch.tensor([0.3, 0.15])
SHARES = torch.tensor([0.35, 0.65])


def exact_x0(x, alpha, sigma):
    """E[x_0 | x_t] where x_0 is a mixture of two Gaussians in three dimensions; x [B, 3], alpha and sigma [B, 1]."""
    variance = (alpha * SPREADS) ** 2 + sigma**2  # [B, 2]
    away = x[:, None] - alpha[..., None] * MEANS  # [B, 2, 3]
    weight = torch.softmax(SHARES.log() - away.square().sum(-1) / (2 * variance) - 1.5 * variance.log(), 1)
    posterior = MEANS + (alpha * SPREADS.square() / variance)[..., None] * away
    return (weight[..., None] * posterior).sum(1)


def exact(schedule, prediction):
    """The network that says exactly what `prediction` asks for. Unconditionally it says the same of x shrunk by a tenth."""

    def network(x, t, row, without):
        alpha, sigma = schedule.rates(t, x)
        x_0 = exact_x0(torch.where(without[:, None], 0.9 * x, x), alpha, sigma)
        eps = (x - alpha * x_0) / sigma
        return {"x0": x_0, "eps": eps, "v": alpha * eps - sigma * x_0}[prediction]

    return network


def run(rows, schedule, prediction="v", network=None, **more):
    while not all(row.done for row in rows):
        under_way = [row for row in rows if not row.done]
        advance(under_way, network or exact(schedule, prediction), schedule, prediction, **more)
    return torch.stack([row.x for row in rows])


# ---- schedules


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("timesteps", [50, 1000])
def test_schedules_fall_and_preserve_variance(kind, timesteps):
    alpha, sigma = Schedule(kind=kind, timesteps=timesteps).alpha_sigma
    assert alpha.shape == sigma.shape == (timesteps,)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(timesteps), atol=1e-6)
    assert (alpha.diff() < 0).all() and alpha[0] > 0.94 and alpha[-1] < 0.03


@pytest.mark.parametrize(
    ("kind", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2"), ("scaled-linear", "scaled_linear")]
)
def test_schedules_are_those_of_diffusers(kind, theirs):
    squared = diffusers.DDPMScheduler(beta_schedule=theirs).alphas_cumprod
    assert torch.allclose(Schedule(kind=kind).alpha_sigma[0] ** 2, squared, atol=2e-6)
    if kind != "cosine":
        squared = diffusers.DDPMScheduler(
            100, beta_schedule=theirs, beta_start=0.001, beta_end=0.3
        ).alphas_cumprod  # fmt: skip
        ours = Schedule(kind=kind, timesteps=100, betas=(0.001, 0.3))
        assert torch.allclose(ours.alpha_sigma[0] ** 2, squared, atol=2e-6)
        assert ours.at(-1) == (1, 0) and Schedule(kind=kind, betas=(0.1, 0.2), clean=False).at(-1)[
            0
        ] ** 2 == pytest.approx(0.9)
    with pytest.raises(ConfigError, match="betas"):
        Schedule(kind="linear", betas=(0.2, 0.1))


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize(
    "spacing", [Spacing("leading", 1), Spacing("leading"), Spacing("linspace"), Spacing("trailing")]
)
def test_spacings_are_those_of_diffusers(spacing, steps):
    common = {"timestep_spacing": spacing.kind, "steps_offset": spacing.offset}
    for sampler, kind in (("ddim", diffusers.DDIMScheduler), ("dpm++", diffusers.DPMSolverMultistepScheduler)):
        if (sampler, spacing.kind, steps) == ("ddim", "linspace", 1):
            continue  # theirs takes one step from timestep 0, where no noise is left to take away
        scheduler = kind(**common)
        scheduler.set_timesteps(steps)
        assert plan(Schedule(), sampler, steps, 0.0, spacing).timesteps.tolist() == scheduler.timesteps.tolist()


def test_a_spacing_says_when_it_has_too_few_timesteps():
    assert plan(Schedule(), "ddim", 500, 0.0, Spacing("leading", 1)).timesteps[0] == 999
    with pytest.raises(UsageError, match="1000 steps asked for"):
        plan(Schedule(), "dpm++", 1000, 0.0, Spacing("leading", 1))


def test_offset_cosine_by_hand():
    schedule = Schedule(kind="offset-cosine", timesteps=3)
    middle = (math.acos(0.95) + math.acos(0.02)) / 2
    assert schedule.at(0)[0] == pytest.approx(0.95) and schedule.at(2)[0] == pytest.approx(0.02)
    assert schedule.at(1) == pytest.approx((math.cos(middle), math.sin(middle)))
    assert schedule.at(-1) == (1.0, 0.0)


# ---- training


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_target_leads_back_to_the_picture(prediction):
    schedule = Schedule()
    x_0 = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    x_t, t, target = training_pair(schedule, prediction, x_0, torch.Generator().manual_seed(2))
    alpha, sigma = schedule.rates(t, x_0)
    assert torch.allclose(to_x0(prediction, target, x_t, alpha, sigma), x_0, atol=2e-4)
    noise = (x_t - alpha * x_0) / sigma
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)
    again = training_pair(schedule, prediction, x_0, torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip((x_t, t, target), again, strict=True))


def test_every_batch_sees_all_levels_of_noise():
    for seed in range(20):
        _, t, _ = training_pair(Schedule(), "v", torch.zeros(50, 1), torch.Generator().manual_seed(seed))
        assert torch.equal((t.sort().values // 20), torch.arange(50))
    _, t, _ = training_pair(Schedule(timesteps=10), "v", torch.zeros(10_000, 1), torch.Generator().manual_seed(0))
    assert torch.equal(torch.bincount(t), torch.full((10,), 1000))


# ---- samplers against diffusers

THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def their_scheduler(sampler, schedule, prediction, clip):
    alpha = schedule.alpha_sigma[0].double() ** 2
    betas = (1 - alpha / torch.cat([torch.ones(1, dtype=torch.float64), alpha[:-1]])).numpy()
    common = {
        "trained_betas": betas, "prediction_type": THEIR_PREDICTION[prediction], "timestep_spacing": "trailing",
        "num_train_timesteps": schedule.timesteps,
    }  # fmt: skip
    if sampler == "dpm++":
        return diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **common)
    kind = diffusers.DDIMScheduler if sampler == "ddim" else diffusers.DDPMScheduler
    return kind(clip_sample=clip > 0, clip_sample_range=clip or 1.0, **common)


def theirs(sampler, schedule, prediction, steps, eta, clip, seeds, patch):
    """Their samples [B, 3], with our noise in the place of theirs."""
    scheduler = their_scheduler(sampler, schedule, prediction, clip)
    scheduler.set_timesteps(steps)
    x = torch.stack([noise_of(seed, 0, (3,)) for seed in seeds])
    network, rows = exact(schedule, prediction), torch.arange(len(seeds))
    for k, t in enumerate(scheduler.timesteps):
        noise = torch.stack([noise_of(seed, k + 1, (3,)) for seed in seeds])
        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise)
        output = network(x, t.expand(len(seeds)), rows, rows < 0)
        more = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noise} if sampler == "ddim" else {}
        x = scheduler.step(
            output, t, x, **(more if eta or sampler != "ddim" else {**more, "variance_noise": None})
        ).prev_sample
    return x


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    ("sampler", "steps", "eta", "clip"),
    [
        ("ddpm", 1000, 0.0, 0.0), ("ddpm", 50, 0.0, 0.6), ("ddim", 20, 0.0, 0.0), ("ddim", 25, 0.0, 0.6),
        ("ddim", 20, 1.0, 0.0), ("ddim", 50, 0.5, 0.6), ("dpm++", 1, 0.0, 0.0), ("dpm++", 2, 0.0, 0.0),
        ("dpm++", 10, 0.0, 0.0), ("dpm++", 20, 0.0, 0.0), ("dpm++", 37, 0.0, 0.0),
    ],
)  # fmt: skip
def test_samplers_are_those_of_diffusers(sampler, kind, prediction, steps, eta, clip, monkeypatch):
    schedule = Schedule(kind=kind)
    seeds = [3, 1, 4, 15]
    rows = [Row.begin(schedule, (3,), seed=seed, steps=steps, sampler=sampler, eta=eta) for seed in seeds]
    ours = run(rows, schedule, prediction, clip=clip)
    other = theirs(sampler, schedule, prediction, steps, eta, clip, seeds, monkeypatch)
    # Their last cosine alpha is 5e-5 in single precision: dividing by it costs them digits.
    assert torch.allclose(ours, other, atol=1e-3 if kind == "cosine" else 5e-5), (ours - other).abs().max()


# ---- samplers against the truth


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_have_the_statistics_of_a_gaussian(sampler):
    schedule, mean, spread = Schedule(kind="linear"), torch.tensor([0.5, -1.0]), torch.tensor([0.5, 1.5])

    def network(x, t, row, without):
        alpha, sigma = schedule.rates(t, x)
        return mean + alpha * spread**2 / ((alpha * spread) ** 2 + sigma**2) * (x - alpha * mean)

    n = 1500
    rows = [Row.begin(schedule, (2,), seed=seed, steps=100, sampler=sampler) for seed in range(n)]
    x = run(rows, schedule, "x0", network)
    assert ((x.mean(0) - mean).abs() < 4 * spread / math.sqrt(n)).all()
    assert ((x.std(0) / spread - 1).abs() < 0.1).all()
    assert abs(np.corrcoef(x.T.numpy())[0, 1]) < 0.1


def test_samples_of_a_mixture_find_both_parts():
    schedule = Schedule(kind="linear")
    x = run([Row.begin(schedule, (3,), seed=seed, steps=40) for seed in range(2000)], schedule)
    first = (x - MEANS[0]).norm(dim=1) < (x - MEANS[1]).norm(dim=1)
    assert first.float().mean().item() == pytest.approx(0.35, abs=0.04)
    assert torch.allclose(x[first].mean(0), MEANS[0], atol=0.06) and torch.allclose(
        x[~first].mean(0), MEANS[1], atol=0.04
    )


def test_more_steps_come_nearer_to_the_limit():
    schedule = Schedule(kind="linear")
    limit = run([Row.begin(schedule, (3,), seed=s, steps=1000, sampler="ddim") for s in range(50)], schedule)
    errors = {}
    for sampler in ("ddim", "dpm++"):
        for steps in (10, 40):
            x = run([Row.begin(schedule, (3,), seed=s, steps=steps, sampler=sampler) for s in range(50)], schedule)
            errors[sampler, steps] = (x - limit).norm(dim=1).median()
    assert errors["ddim", 40] < errors["ddim", 10] / 2 and errors["dpm++", 40] < errors["dpm++", 10] / 2
    assert errors["dpm++", 10] < errors["ddim", 10]


# ---- rows of a batch


def mixed_rows(schedule, seed):
    rng = np.random.default_rng(seed)
    return [
        Row.begin(
            schedule, (3,), seed=int(rng.integers(1000)), steps=int(rng.integers(1, 30)), sampler=SAMPLERS[rng.integers(3)],
            eta=float(rng.choice([0.0, 0.5, 1.0])), guidance=float(rng.choice([0.0, 1.0, 3.0])),
        )
        for _ in range(9)
    ]  # fmt: skip


@pytest.mark.parametrize("trial", range(5))
def test_a_row_does_not_depend_on_who_shares_its_batch(trial):
    schedule = Schedule()
    alone = torch.cat([run([row], schedule) for row in mixed_rows(schedule, trial)])
    assert torch.equal(run(mixed_rows(schedule, trial), schedule), alone)
    # Rows that join and leave at random.
    rows, rng = mixed_rows(schedule, trial), np.random.default_rng(trial)
    while not all(row.done for row in rows):
        batch = [row for row in rows if not row.done and rng.random() < 0.5]
        if batch:
            advance([batch[i] for i in rng.permutation(len(batch))], exact(schedule, "v"), schedule, "v")
    assert torch.equal(torch.stack([row.x for row in rows]), alone)


def test_guidance_is_the_line_through_both_predictions_and_costs_a_pass_only_where_it_is_used():
    schedule, asked = Schedule(), []

    def network(x, t, row, without):
        asked.append((row.tolist(), without.tolist()))
        return torch.where(without[:, None], 1.0, 2.0).expand_as(x).clone()

    rows = [Row.begin(schedule, (2,), seed=0, steps=1, guidance=g) for g in (1.0, 0.0, 3.0)]
    advance(rows, network, schedule, "x0")
    assert asked == [([0, 1, 2, 1, 2], [False] * 3 + [True] * 2)]
    assert [row.x[0].item() for row in rows] == [2.0, 1.0, 4.0]
    assert all(row.done and torch.equal(row.estimate, row.x) for row in rows)


def test_estimates_are_clipped():
    schedule = Schedule()
    rows = [Row.begin(schedule, (2,), seed=0, steps=3)]
    advance(rows, lambda x, *_: torch.full_like(x, 7.0), schedule, "x0", clip=0.5)
    assert rows[0].estimate.tolist() == [0.5, 0.5]


def test_same_seed_same_noise_and_other_seeds_others():
    assert torch.equal(noise_of(5, 2, (4, 4)), noise_of(5, 2, (4, 4)))
    draws = torch.stack([noise_of(seed, place, (50,)) for seed in range(6) for place in range(6)])
    assert (torch.corrcoef(draws) - torch.eye(36)).abs().max() < 0.6


def test_what_cannot_be_asked_is_explained():
    schedule = Schedule()
    for make, message in (
        (lambda: plan(schedule, "dpm", 10), "Did you mean"),
        (lambda: plan(schedule, "ddim", 0), "1 to 1000"),
        (lambda: plan(schedule, "ddim", 1001), "1 to 1000"),
        (lambda: plan(schedule, "ddim", 10, 1.5), "eta"),
        (lambda: Row.begin(schedule, (2,), seed=-1, steps=2), "seed"),
    ):
        with pytest.raises(UsageError, match=message):
            make()
    with pytest.raises(ConfigError, match="cosine"):
        Schedule(kind="cosin")
    row = Row.begin(schedule, (2,), seed=0, steps=1)
    advance([row], lambda x, *_: x, schedule, "v")
    with pytest.raises(UsageError, match="done"):
        advance([row], lambda x, *_: x, schedule, "v")
