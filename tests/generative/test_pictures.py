"""GANs, autoencoders, classifiers and diffusion over pictures: hand-computed losses, what is known stays, learning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from oneira.generative.autoencoder import VAE, Autoencoder, AutoencoderConfig, VAEConfig
from oneira.generative.classifier import Classifier, ClassifierConfig
from oneira.generative.datasets import Arrays, DataConfig, batches, first_rows, load_data
from oneira.generative.ddpm import DDPM, DDPMConfig, time_vectors
from oneira.generative.diffusion import Schedule
from oneira.generative.gan import GAN, GANConfig
from oneira.generative.scores import mean_nats
from oneira.generative.spaces import Space
from oneira.generative.training import TrainSettings, fit
from oneira.platform.errors import ConfigError, UsageError


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def bars():
    """Bars of 4x4 pixels: label 0 lies, 1 stands; uint8 of 4 levels."""
    rng = np.random.default_rng(0)
    x, y = np.zeros((400, 4, 4, 1), np.uint8), rng.integers(0, 2, 400)
    for picture, label, place in zip(x, y, rng.integers(0, 4, 400), strict=True):
        (picture if label == 0 else picture.transpose(1, 0, 2))[place] = 3
    return Arrays.divide(Space(kind="pictures", shape=(4, 4, 1), levels=4, classes=2), {"x": x, "y": y})


def stands(pictures):
    """Which pictures are bars that stand, and which lie: two bool [N]."""
    on = pictures[..., 0].numpy() >= 2
    return (on.all(1).sum(1) == 1) & (on.sum((1, 2)) == 4), (on.all(2).sum(1) == 1) & (on.sum((1, 2)) == 4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def train(model, data, steps, **values):
    settings = TrainSettings(steps=steps, precision="fp32", **{"batch_size": 64, "lr": 2e-3, "warmup": 10, **values})
    return fit(model, batches(data, settings.batch_size, 0), settings)


def rows(data, count, split="test"):
    return {key: torch.as_tensor(value) for key, value in first_rows(data, split, count).items()}


# GAN ------------------------------------------------------------------------------------------------------------------


class Slope(nn.Module):
    """A critic whose gradient is `steep` everywhere: steep * sum / sqrt(dims)."""

    def __init__(self, steep):
        super().__init__()
        self.steep = nn.Parameter(torch.tensor(steep))

    def forward(self, x, labels):
        return self.steep * x.flatten(1).sum(1) / x[0].numel() ** 0.5


def test_gradient_penalty_by_hand(bars):
    torch.manual_seed(0)
    model = GAN(GANConfig(z=2, width=4, penalty=7.0), bars.space)
    model.critic = Slope(3.0)
    loss, values = model.player_loss("critic", rows(bars, 8), generator())
    assert loss.item() == pytest.approx(-values["gap"].item() + 7 * (3 - 1) ** 2, rel=1e-4)


def test_dcgan_losses_by_hand(bars):
    torch.manual_seed(0)
    model = GAN(GANConfig(objective="dcgan", z=2, width=4, noise=0.0), bars.space)
    model.critic = Slope(0.0)  # says 0 of all: as likely true as not
    loss, _ = model.player_loss("critic", rows(bars, 8), generator())
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-5)
    assert model.player_loss("painter", rows(bars, 8), generator())[0].item() == pytest.approx(math.log(2), rel=1e-5)


def test_no_batch_norm_in_the_critic(bars):
    model = GAN(GANConfig(width=4), bars.space)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.critic.modules())
    one, both = rows(bars, 1)["x"], rows(bars, 5)["x"]
    real = lambda x: x.permute(0, 3, 1, 2).float()  # noqa: E731
    assert torch.allclose(model.critic(real(one), None), model.critic(real(both), None)[:1], atol=1e-6)


@pytest.mark.parametrize("objective", ["wgan-gp", "dcgan"])
def test_a_conditional_gan_learns_to_paint_what_is_asked(bars, objective):
    torch.manual_seed(0)
    model = GAN(GANConfig(objective=objective, z=4, width=16, conditional=True, critic_steps=2), bars.space)
    train(model, bars, 1500, lr=2e-3, beta1=0.0, clip=0, ema=0.98)
    upright, lying = stands(model.sample(100, 0, labels=torch.ones(100, dtype=torch.long)))
    other_upright, other_lying = stands(model.sample(100, 0, labels=torch.zeros(100, dtype=torch.long)))
    assert upright.mean() > 0.6 and other_lying.mean() > 0.6, (upright.mean(), other_lying.mean())
    assert lying.mean() < 0.1 and other_upright.mean() < 0.1


def test_collapse_is_seen(bars, digits):
    model = GAN(GANConfig(width=4), digits.space).eval()
    nn.init.zeros_(model.painter.body[-2].weight)  # paints one picture only
    assert model.own_scores(rows(digits, 200))["mode_collapse"] == 1.0
    assert "Mode collapse" in model.alarms({"mode_collapse": 1.0})[0] and not model.alarms({"mode_collapse": 0.0})
    model.sample = lambda n, seed: rows(digits, n, "train")["x"]
    assert model.own_scores(rows(digits, 200))["mode_collapse"] == 0.0
    assert model.own_scores(rows(digits, 5)) == {}, "too few to say so"
    with pytest.raises(UsageError, match="without labels"):
        GAN(GANConfig(width=4), bars.space).sample(2, 0, labels=torch.tensor([0, 1]))


# Autoencoders ---------------------------------------------------------------------------------------------------------


def test_vae_loss_by_hand(bars):
    # With the reader's last layer 0: mu = 0, log-variance = v, so KL = Z / 2 (e^v - 1 - v).
    model = VAE(VAEConfig(z=3, width=4, beta=2.0), bars.space)
    nn.init.zeros_(model.reader[-1].weight)
    with torch.no_grad():
        model.reader[-1].bias.copy_(torch.tensor([0.0] * 3 + [0.5] * 3))
    x = rows(bars, 5)
    loss, values = model.loss(x, generator(1))
    kl = 1.5 * (math.exp(0.5) - 1 - 0.5)
    assert values["kl"].item() == pytest.approx(kl, rel=1e-5)
    z = math.exp(0.25) * torch.randn(5, 3, generator=generator(1))
    nats = model._nats(x["x"], model._means(z)).mean()
    assert loss.item() == pytest.approx((nats.item() + 2 * kl) / 16, rel=1e-5)


@pytest.fixture(scope="module")
def vae(bars):
    torch.manual_seed(0)
    return train(VAE(VAEConfig(z=3, width=8), bars.space), bars, 400, lr=5e-3)


def test_the_vae_learns_and_its_bound_is_one(vae, bars):
    x = rows(bars, 40)["x"]
    bound = float(vae.log_prob(x).mean())
    assert -16 * math.log(4) < bound < -math.log(8) + 0.2, (
        bound
    )  # eight bars are equally frequent: no model can do better
    assert bound > -8
    upright, lying = stands(vae.sample(200, 0))
    assert (upright | lying).mean() > 0.5
    assert (vae.decode(vae.encode(x)) == x).float().mean() > 0.95


def test_codes_can_be_changed(vae, bars):
    batch = rows(bars, 100, "train")
    x, y = batch["x"], batch["y"]
    vector = vae.attribute(x, y == 1)
    assert torch.allclose(vector, vae.encode(x[y == 1]).mean(0) - vae.encode(x[y == 0]).mean(0))
    way = vae.interpolate(x[0], x[1], 5)
    assert torch.equal(way[[0, -1]], vae.decode(vae.encode(x[:2])))
    line = vae.traverse(x[0], 1, torch.tensor([-1.0, float(vae.encode(x[:1])[0, 1])]))
    assert torch.equal(line[1], vae.decode(vae.encode(x[:1]))[0]) and line.shape == (2, 4, 4, 1)
    assert vae.latent_map(x).shape == (100, 2)
    with pytest.raises(UsageError, match="dim"):
        vae.traverse(x[0], 3)
    with pytest.raises(UsageError, match="without it"):
        vae.attribute(x, torch.ones(100, dtype=torch.bool))


@pytest.mark.parametrize("objective", ["dcgan", "wgan-gp"])
def test_a_gan_can_be_measured_on_rows(digits, objective):
    model = GAN(GANConfig(width=4, objective=objective), digits.space).eval()
    assert np.isfinite(mean_nats(model, first_rows(digits, "validation", 20)))


def test_small_ones_are_reported_too(bars):
    vae = VAE(VAEConfig(z=1, width=8), bars.space).eval()
    assert vae.pictures(rows(bars, 20)) and vae.pictures(rows(bars, 1))
    short = DDPM(DDPMConfig(widths=(8,), steps=10, schedule=Schedule(timesteps=20)), bars.space).eval()
    assert short.pictures(rows(bars, 16))
    for model in (vae, short):
        with pytest.raises(UsageError, match="at least 1"):
            model.sample(0, 0)
    with pytest.raises(UsageError, match="guidance"):
        DDPM(DDPMConfig(widths=(8,), conditional=True), bars.space).sample(1, 0, guidance=float("nan"))


def test_what_reports_show(vae, ddpm, bars):
    batch = rows(bars, 40)
    for model, count in ((vae, 5), (ddpm, 2)):
        shown = model.pictures(batch)
        assert len(shown) == count and all(page.dtype == np.uint8 and page.shape[2] == 3 for page in shown.values())
    pairs = vae.pictures(batch)["true pictures, and what is left of them in z"]
    assert pairs.shape == (9, 39, 3) and np.array_equal(pairs[:4, :4, 0], batch["x"][0, ..., 0].numpy() * 85)


def test_the_denoising_one_takes_noise_away(bars):
    torch.manual_seed(0)
    model = train(Autoencoder(AutoencoderConfig(objective="denoising", z=4, width=8), bars.space), bars, 300, lr=5e-3)
    x = rows(bars, 40)["x"]
    noisy = x + 0.75 * torch.randn(x.shape, generator=generator())
    error = (model.denoise(noisy).float() - x).square().mean()
    assert error < 0.5 * (noisy - x).square().mean()
    assert not model.can_sample
    with pytest.raises(UsageError, match="sampled"):
        model.sample(1, 0)


# Classifiers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["mlp", "cnn"])
def test_classifiers_learn_digits(digits, body):
    torch.manual_seed(0)
    model = train(Classifier(ClassifierConfig(body=body, width=16), digits.space), digits, 150, lr=5e-3)
    assert model.own_scores(rows(digits, 300))["accuracy"] > 0.85
    assert model.features(rows(digits, 5)["x"]).shape == (5, 16)


@pytest.mark.parametrize("body", ["mlp", "cnn"])
def test_classifiers_look_past_brightness_and_contrast(digits, body):
    model = Classifier(ClassifierConfig(body=body, width=8), digits.space).eval()
    x = rows(digits, 20)["x"] // 3
    for other in (x + 9, x * 3):
        assert torch.allclose(model.features(x), model.features(other), atol=1e-3)


# Diffusion ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ddpm(bars):
    torch.manual_seed(0)
    config = DDPMConfig(widths=(16, 32), conditional=True, schedule=Schedule(timesteps=200), steps=10)
    return train(DDPM(config, bars.space), bars, 400, lr=4e-3, ema=0.98)


def test_diffusion_learns_and_is_guided(ddpm):
    labels = torch.arange(80) % 2
    for settings in ({}, {"guidance": 2.0}, {"sampler": "dpm++", "steps": 8}):
        upright, lying = stands(ddpm.sample(80, 0, labels=labels, **settings))
        right = np.where(labels == 1, upright, lying)
        assert right.mean() > 0.75, (settings, right.mean())


def test_a_picture_depends_on_its_place_only(ddpm):
    assert torch.equal(
        ddpm.sample(2, 3, labels=torch.tensor([1, 0])), ddpm.sample(4, 3, labels=torch.tensor([1, 0, 1, 0]))[:2]
    )


def test_what_is_known_stays(ddpm, bars):
    x = rows(bars, 20)["x"]
    known = torch.zeros(4, 4, 1, dtype=torch.bool)
    known[:, :2] = True
    found = ddpm.complete(x, known, 0, steps=40)
    assert torch.equal(found[:, known], x[:, known])
    lying = (x[:, :, 0, 0] == 3).sum(1) == 1  # a bar that lies shows in the left half where: the right half must agree
    agree = (found[lying] == x[lying]).float().mean((1, 2, 3)) == 1
    assert agree.float().mean() > 0.6, agree.float().mean()


def test_interpolation_comes_near_its_ends(ddpm, bars):
    x = rows(bars, 2)["x"]
    way = ddpm.interpolate(x[0], x[1], 4)
    assert way.shape == (4, 4, 4, 1) and (way[[0, -1]] == x).float().mean() > 0.85


def test_time_vectors_by_hand():
    found = time_vectors(torch.tensor([3, 0]), 4)
    assert torch.allclose(found[0], torch.tensor([math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]))
    assert found[1].tolist() == [0, 1, 0, 1]


def test_impossible_configs_are_refused(bars, digits):
    odd = Space(kind="pictures", shape=(6, 6, 1), levels=4)
    for make in (
        lambda: GANConfig(objective="gan"), lambda: GANConfig(smooth=0.2), lambda: GAN(GANConfig(), odd),
        lambda: GAN(GANConfig(conditional=True), Space(kind="pictures", shape=(4, 4, 1), levels=4)),
        lambda: VAEConfig(beta=0.0), lambda: AutoencoderConfig(noise=-1.0), lambda: VAE(VAEConfig(), Space(kind="pictures", shape=(9, 9, 1), levels=2)),
        lambda: ClassifierConfig(body="cn"), lambda: Classifier(ClassifierConfig(), odd), lambda: DDPMConfig(widths=(7,)),
        lambda: DDPMConfig(steps=2000), lambda: DDPM(DDPMConfig(widths=(8, 8, 8)), odd), lambda: DDPM(DDPMConfig(conditional=True), odd),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            make()
