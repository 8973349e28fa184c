"""Flows: hand-computed densities, agreement with zuko, and that they learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from oneira.generative.datasets import DataConfig, batches, first_rows, load_data
from oneira.generative.ffjord import FFJORD, FFJORDConfig
from oneira.generative.flows import normal_log_prob
from oneira.generative.glow import ActNorm, Glow, GlowConfig, Mix
from oneira.generative.interpolation import arc
from oneira.generative.realnvp import RealNVP, RealNVPConfig
from oneira.generative.spaces import Space
from oneira.generative.training import TrainSettings, fit
from oneira.platform.errors import ConfigError


@pytest.fixture(scope="module")
def moons():
    return load_data(DataConfig(name="moons"))


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig(name="digits"))


def train(model, data, steps, **values):
    settings = TrainSettings(steps=steps, precision="fp32", **{"batch_size": 128, "lr": 3e-3, "warmup": 20, **values})
    return fit(model, batches(data, settings.batch_size, 0), settings)


def likelihood(model, data, count=500):
    return float(model.log_prob(torch.as_tensor(first_rows(data, "test", count)["x"])).mean())


def test_normal_by_hand():
    assert normal_log_prob(torch.tensor([[0.0, 2.0]])).item() == pytest.approx(-math.log(2 * math.pi) - 2)


def test_arc_by_hand():
    way = arc(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]), 3)
    assert torch.allclose(way, torch.tensor([[2.0, 0.0], [3 / math.sqrt(2), 3 / math.sqrt(2)], [0.0, 4.0]]), atol=1e-6)
    opposite = arc(torch.ones(2), -torch.ones(2), 5)  # no circle is shortest: a line
    assert torch.allclose(opposite, torch.tensor([1, 0.5, 0, -0.5, -1])[:, None].expand(5, 2), atol=1e-6)
    assert torch.allclose(arc(torch.ones(2), 3 * torch.ones(2), 3), torch.tensor([[1.0, 1], [2, 2], [3, 3]]))


def test_a_coupling_by_hand():
    # All weights 0, last biases shift 2 and log-scale a: z_even = x_even e^a' + 2 with a' = a / (1 + |a| / 6.9).
    model = RealNVP(RealNVPConfig(couplings=2, width=4, depth=1), Space(kind="points", shape=(2,)))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        model.couplings[0].network[-1].bias.copy_(torch.tensor([2.0, 1.0]))
    z, log_det = model.transform(torch.tensor([[3.0, 5.0]]))
    a = 1 / (1 + 1 / 6.9)
    assert torch.allclose(z, torch.tensor([[3 * math.exp(a) + 2, 5.0]])) and log_det.item() == pytest.approx(a)


def test_realnvp_is_zukos_with_its_weights():
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    theirs = zuko.flows.RealNVP(2, transforms=4, hidden_features=(16, 16))
    ours = RealNVP(RealNVPConfig(couplings=4, width=16), Space(kind="points", shape=(2,)))
    for coupling, other in zip(ours.couplings, theirs.transform.transforms, strict=True):
        coupling.network.load_state_dict(other.hyper.state_dict())
    x = torch.randn(50, 2)  # theirs changes the odd number first, ours the even one
    assert torch.allclose(ours.log_prob(x), theirs().log_prob(x.flip(1)), atol=1e-4)


def test_realnvp_learns_two_moons(moons):
    torch.manual_seed(0)
    model = RealNVP(RealNVPConfig(couplings=6, width=32), moons.space)
    before = likelihood(model, moons)
    model = train(model, moons, 400)
    after = likelihood(model, moons)
    gauss = first_rows(moons, "train", 20_000)["x"]
    normal = -0.5 * math.log(np.linalg.det(2 * math.pi * math.e * np.cov(gauss.T)))  # of the best single normal
    assert after > normal + 0.4 and after > before + 0.4, (before, after, normal)
    drawn = model.sample(500, 0).numpy()
    assert np.abs(drawn.mean(0) - gauss.mean(0)).max() < 0.2 and np.abs(drawn.std(0) - gauss.std(0)).max() < 0.2


def test_ffjord_learns_two_moons(moons):
    torch.manual_seed(0)
    model = FFJORD(FFJORDConfig(width=32, depth=2, steps=3), moons.space)
    before = likelihood(model, moons, 200)
    model = train(model, moons, 120, lr=1e-2)
    assert likelihood(model, moons, 200) > max(before, -2.2) + 0.2


def test_hutchinsons_estimate_is_the_trace_on_average(moons):
    torch.manual_seed(0)
    model = FFJORD(FFJORDConfig(width=16, depth=1, steps=8, kinetic=0.0), moons.space)
    x = torch.as_tensor(first_rows(moons, "train", 4)["x"])
    said = [model.loss({"x": x}, torch.Generator().manual_seed(seed))[0].item() for seed in range(60)]
    assert np.std(said) > 0, "one vector of signs is an estimate only"
    assert np.mean(said) == pytest.approx(-float(model.log_prob(x).mean()) / 2, abs=4 * np.std(said) / 60**0.5 + 1e-4)


def test_actnorm_begins_with_mean_0_and_variance_1(digits):
    x = 3 + 5 * torch.randn(40, 2, 4, 4)
    norm = ActNorm(2)
    norm.begin(x)
    y, log_det = norm(x)
    assert y.mean((0, 2, 3)).abs().max() < 1e-5 and (y.std((0, 2, 3)) - 1).abs().max() < 1e-2
    assert log_det.item() == pytest.approx(-16 * float(x.std((0, 2, 3)).log().sum()), rel=1e-3)
    model = Glow(GlowConfig(steps=2, width=8), digits.space).train()
    batch = {"x": torch.as_tensor(first_rows(digits, "train", 64)["x"])}
    assert not model.is_begun
    model.loss(batch, torch.Generator().manual_seed(0))
    assert model.is_begun
    kept = model.scales[0][0].norm.shift.clone()
    model.loss({"x": batch["x"] * 0}, torch.Generator().manual_seed(0))
    assert torch.equal(model.scales[0][0].norm.shift, kept), "only the first batch sets it"


def test_mix_begins_as_a_rotation_and_undoes_itself():
    torch.manual_seed(0)
    mix, x = Mix(6), torch.randn(2, 6, 3, 3)
    y, log_det = mix(x)
    assert torch.allclose(y.square().sum(1), x.square().sum(1), rtol=1e-4) and abs(log_det.item()) < 1e-4
    assert torch.allclose(mix.invert(y), x, atol=1e-5)


def test_glow_learns_digits(digits):
    torch.manual_seed(0)
    model = train(Glow(GlowConfig(steps=2, width=32), digits.space), digits, 300, batch_size=64)
    bits = -likelihood(model, digits, 200) / math.log(2) / 64
    assert bits < 2.9, bits  # log2(17) = 4.09 is knowing nothing; a normal for each pixel has about 3.2
    assert model.sample(2, 0).max() <= 16


def test_dequantisation_by_hand():
    # A flow that is the identity on [-1/2, 1/2): log p of a picture is that of z, less dims * log(levels).
    model = Glow(GlowConfig(levels=1, steps=1, width=4), Space(kind="pictures", shape=(2, 2, 1), levels=4))
    step = model.scales[0][0]
    with torch.no_grad():
        step.mix.p.copy_(torch.eye(4)), step.mix.sign.fill_(1.0)
        for value in (step.mix.lower, step.mix.upper, step.mix.log_s):
            value.zero_()
    picture = torch.tensor([[[0], [1]], [[2], [3]]], dtype=torch.uint8)[None]
    noise = torch.rand(picture.shape, generator=torch.Generator().manual_seed(5))
    z = (picture + noise) / 4 - 0.5
    assert torch.allclose(model.log_prob(picture, seed=5), normal_log_prob(z) - 4 * math.log(4))
    assert torch.equal(model.decode(model.encode(picture)), picture)


def test_impossible_configs_are_refused(moons, digits):
    for make in (
        lambda: RealNVPConfig(couplings=1), lambda: RealNVPConfig(width=0), lambda: FFJORDConfig(kinetic=-1.0),
        lambda: GlowConfig(levels=0), lambda: RealNVP(RealNVPConfig(), digits.space),
        lambda: Glow(GlowConfig(), moons.space), lambda: Glow(GlowConfig(levels=4), digits.space),
        lambda: RealNVP(RealNVPConfig(), Space(kind="points", shape=(1,))),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            make()
