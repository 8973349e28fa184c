"""RBM and EBM: exact sums over small machines, agreement with scikit-learn, Langevin on a known energy, learning, the alarm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from oneira.generative.datasets import DataConfig, batches, first_rows, load_data
from oneira.generative.ebm import EBM, EBMConfig
from oneira.generative.ncsn import NCSN, NCSNConfig
from oneira.generative.noise import Noise
from oneira.generative.rbm import RBM, RBMConfig
from oneira.generative.scores import auroc
from oneira.generative.spaces import Space
from oneira.generative.training import TrainSettings, fit
from oneira.platform.checkpoints import Checkpoints
from oneira.platform.errors import NumericalError

SMALL = Space(kind="pictures", shape=(2, 3, 1), levels=2)


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def moons():
    return load_data(DataConfig(name="moons"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_rbm():
    torch.manual_seed(0)
    model = RBM(RBMConfig(hidden=4, chains=0), SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    return model


def every(bits):
    return (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1).float()


def test_free_energy_is_the_sum_over_hidden_bits():
    model, v = small_rbm(), every(6)
    h = every(4)
    energies = -(v @ model.visible)[:, None] - (h @ model.hidden)[None] - v @ model.weight @ h.T
    assert torch.allclose(model.free_energy(v), -torch.logsumexp(-energies, 1), atol=1e-5)


def test_gibbs_sampling_draws_from_the_models_distribution():
    model = small_rbm()
    with torch.no_grad():
        wanted = torch.softmax(-model.free_energy(every(6)), 0)
    v = model.gibbs(torch.zeros(20_000, 6), 30, Noise([(20_000, generator())]))
    shares = torch.bincount((v @ (2.0 ** torch.arange(6))).long(), minlength=64) / 20_000
    assert (shares - wanted).abs().max() < 4 * (0.25 / 20_000) ** 0.5


def test_pseudo_likelihood_by_hand():
    model, v = small_rbm(), every(6)[[5, 40]]
    with torch.no_grad():
        log_p = -model.free_energy(every(6))
    total = []
    for row in v:
        number = int(row @ (2.0 ** torch.arange(6)))
        total.append(
            sum(float(log_p[number] - torch.logaddexp(log_p[number], log_p[number ^ (1 << i)])) for i in range(6))
        )
    assert model.pseudo_log_likelihood(v).tolist() == pytest.approx(total, abs=1e-4)


def test_pseudo_likelihood_is_scikit_learns_on_average(digits):
    from sklearn.neural_network import BernoulliRBM

    v = first_rows(digits, "train", 100)["x"].reshape(100, -1) / 16
    theirs = BernoulliRBM(16, n_iter=3, random_state=0).fit(v)
    ours = RBM(RBMConfig(hidden=16), digits.space)
    with torch.no_grad():
        ours.weight.copy_(torch.from_numpy(theirs.components_.T))
        ours.hidden.copy_(torch.from_numpy(theirs.intercept_hidden_))
        ours.visible.copy_(torch.from_numpy(theirs.intercept_visible_))
    said = np.mean([theirs.set_params(random_state=seed).score_samples(v).mean() for seed in range(60)])
    assert float(ours.pseudo_log_likelihood(torch.from_numpy(v).float()).mean()) == pytest.approx(said, rel=0.04)


def rbm_settings(**values):
    return TrainSettings(**{"steps": 250, "batch_size": 32, "lr": 1e-2, "clip": 0, "precision": "fp32", **values})


@pytest.mark.parametrize("chains", [0, 32])
def test_rbm_learns_digits(digits, chains):
    torch.manual_seed(0)
    model = RBM(RBMConfig(hidden=48, chains=chains), digits.space)
    test = model.shares(torch.as_tensor(first_rows(digits, "test", 100)["x"]))
    before = float(model.pseudo_log_likelihood(test).mean())
    fit(model, batches(digits, 32, 0), rbm_settings())
    assert before == pytest.approx(-64 * math.log(2), rel=0.05)
    assert float(model.pseudo_log_likelihood(test).mean()) > before + 12


def test_chains_survive_a_kill(digits, tmp_path):
    def trained(checkpoints=None, kill_at=None):
        torch.manual_seed(0)

        def log(step, **values):
            if step == kill_at:
                raise KeyboardInterrupt

        model = RBM(RBMConfig(hidden=8, chains=16), digits.space)
        try:
            return fit(
                model,
                batches(digits, 16, 0),
                rbm_settings(steps=12, save_every=4, log_every=1),
                checkpoints=checkpoints,
                log=log,
            )
        except KeyboardInterrupt:
            return None

    checkpoints = Checkpoints(tmp_path)
    assert trained(checkpoints, kill_at=6) is None
    a, b = trained(checkpoints).state_dict(), trained().state_dict()
    assert a["chains"].any() and all(torch.equal(a[key], b[key]) for key in b)


# EBM ------------------------------------------------------------------------------------------------------------------


class Bowl(nn.Module):
    """E = |x - 1|^2 / 2: the energy of a normal distribution around 1."""

    def __init__(self):
        super().__init__()
        self.centre = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return 0.5 * (x - self.centre).square().sum(1, keepdim=True)


def test_langevin_draws_from_a_known_energy():
    model = EBM(EBMConfig(step=0.3, buffer=4), Space(kind="points", shape=(2,)))
    model.network = Bowl()
    x = model.langevin(torch.zeros(4000, 2), 300, Noise([(4000, generator())]))
    assert (x.mean(0) - 1).abs().max() < 0.06 and (x.std(0) - 1).abs().max() < 0.06
    assert model.network.centre.requires_grad and model.network.centre.grad is None
    cooler = EBM(EBMConfig(step=0.3, heat=0.5, buffer=4), model.space)
    cooler.network = model.network
    x = cooler.langevin(torch.zeros(4000, 2), 300, Noise([(4000, generator())]))
    assert (x.mean(0) - 1).abs().max() < 0.04 and (x.std(0) - 0.5).abs().max() < 0.03


def test_chains_that_do_not_follow_are_seen():
    model = EBM(EBMConfig(buffer=64), Space(kind="points", shape=(2,)))
    model.network = Bowl()
    true = {"x": 1 + torch.randn(200, 2, generator=generator())}
    model.buffer.fill_(5.0)
    scores = model.own_scores(true)
    assert scores["chains_behind"] == pytest.approx(15, abs=0.5) and "15." in model.alarms(scores)[0][:40]
    model.buffer.copy_(true["x"][:64])
    assert abs(model.own_scores(true)["chains_behind"]) < 0.5 and not model.alarms(model.own_scores(true))


def test_ebm_learns_two_moons(moons):
    torch.manual_seed(0)
    model = EBM(EBMConfig(width=48, steps=10, step=0.1, buffer=512, sweeps=100), moons.space)
    fit(model, batches(moons, 128, 0), TrainSettings(steps=250, batch_size=128, lr=3e-3, warmup=20, precision="fp32"))
    true = torch.as_tensor(first_rows(moons, "test", 500)["x"])
    noise = torch.rand(500, 2, generator=generator()) * torch.tensor([4.0, 2.4]) + torch.tensor([-1.5, -0.9])
    found = auroc(model.ood_score(noise).numpy(), model.ood_score(true).numpy())
    assert found > 0.75, found  # inside the box around the moons; nothing known is 0.5
    drawn = model.sample(500, 0)
    assert (drawn.mean(0) - true.mean(0)).abs().max() < 0.35


def test_score_by_hand():
    # All data at 0: with noise sigma the slope of log p is -x / sigma^2, and the best guess of -noise is -x / sigma.
    model = NCSN(NCSNConfig(width=8), Space(kind="points", shape=(2,)))
    model._noise_said = lambda x, level: -x / model.sigmas[level][:, None]
    batch = {"x": torch.zeros(50, 2)}
    assert model.loss(batch, generator())[0].item() < 1e-10
    x = torch.tensor([[1.0, -2.0]])
    assert torch.allclose(model.score(x, 3), -x / model.sigmas[3] ** 2)
    assert model.sigmas[[0, -1]].tolist() == pytest.approx([3.0, 0.05]) and (model.sigmas.diff() < 0).all()
    assert model.sample(200, 0).norm(dim=1).max() < 1e-3, "the last step takes the rest of the noise away"


def test_ncsn_learns_two_moons(moons):
    torch.manual_seed(0)
    model = NCSN(NCSNConfig(width=32, levels=12), moons.space)
    fit(
        model,
        batches(moons, 256, 0),
        TrainSettings(steps=1500, batch_size=256, lr=5e-3, warmup=20, ema=0.99, precision="fp32"),
    )
    true, drawn = torch.as_tensor(first_rows(moons, "test", 400)["x"]), model.sample(400, 0)
    normal = true.mean(0) + true.std(0) * torch.randn(400, 2, generator=generator())
    off, plain = (torch.cdist(rows, true).amin(1).median() for rows in (drawn, normal))
    assert off < 0.5 * plain and (drawn.std(0) / true.std(0) - 1).abs().max() < 0.2, (off, plain)


def test_the_alarm_ends_what_falls_apart(moons):
    model = EBM(EBMConfig(width=8, steps=1, buffer=8, pull=0.0), moons.space)
    with torch.no_grad():
        model.network[-1].weight.mul_(1e4)
    rows = {"x": 50 * torch.as_tensor(first_rows(moons, "train", 64)["x"])}
    losses = []
    for sign in (1, -1):  # one of the two has the chains far below the data, the other far above
        with torch.no_grad():
            model.network[-1].weight.mul_(sign)
        try:
            model.loss(rows, generator())
        except NumericalError as error:
            losses.append(str(error))
    assert len(losses) == 2 and all("falls apart" in said for said in losses)
    assert losses[0].count("-") != losses[1].count("-")
