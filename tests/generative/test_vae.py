from __future__ import annotations

import numpy as np
import pytest
import torch

from oneira.generative.training import TrainSettings, fit
from oneira.generative.vae import VAE, VAEConfig, _merge, _split, fast_encoder
from oneira.platform.checkpoints import Checkpoints
from oneira.platform.errors import ConfigError

KINDS = pytest.mark.parametrize("kind", ["fast", "paper"])


def make(kind="fast", **values):
    torch.manual_seed(0)
    return VAE(VAEConfig(kind=kind, **values))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def trained(frames):
    """A "fast" V after 250 steps on the first 160 frames."""
    settings = TrainSettings(steps=250, batch_size=32, lr=4e-3, warmup=50)
    model = make(width=16, decoder_width=16)
    return fit(model, lambda step: frames[torch.randperm(160, generator=generator(step))[:32]], settings)


@KINDS
def test_every_parameter_gets_a_gradient(kind, frames):
    model = make(kind)
    loss, values = model.loss(frames[:8], generator())
    loss.backward()
    assert values.keys() == {"error", "kl"}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@KINDS
def test_shapes_types_and_ranges(kind, frames):
    model = make(kind, z=5)
    mu, logvar = model.encode(frames[:3])
    assert mu.shape == logvar.shape == (3, 5) and mu.dtype == logvar.dtype == torch.float32
    picture, decoded = model.reconstruct(mu), model.decode(mu)
    assert picture.shape == (3, 3, 64, 64) and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() <= 1
    assert decoded.shape == (3, 64, 64, 3) and decoded.dtype == torch.uint8
    assert torch.equal(decoded, (picture * 255).round().to(torch.uint8).permute(0, 2, 3, 1))


@KINDS
def test_same_seed_same_sample_and_loss(kind, frames):
    model = make(kind)
    assert torch.equal(model.sample(2, 7), model.sample(2, 7))
    assert not torch.equal(model.sample(2, 7), model.sample(2, 8))
    assert model.loss(frames[:4], generator(1))[0] == model.loss(frames[:4], generator(1))[0]
    assert model.loss(frames[:4], generator(1))[0] != model.loss(frames[:4], generator(2))[0]


@KINDS
def test_save_and_load_is_exact(kind, frames, tmp_path):
    model, other = make(kind), VAE(VAEConfig(kind=kind))
    Checkpoints(tmp_path).save("vision", model.state_dict(), {"kind": kind})
    other.load_state_dict(Checkpoints(tmp_path).load("vision").tensors)
    assert all(torch.equal(a, b) for a, b in zip(model.encode(frames[:4]), other.encode(frames[:4]), strict=True))
    assert torch.equal(model.sample(2, 0), other.sample(2, 0))


@KINDS
def test_target_is_the_picture(kind, frames):
    # An error of zero must mean that the picture is the frame, whatever layout the loss is computed in.
    decoder = make(kind).decoder
    assert torch.allclose(decoder.picture(decoder.target(frames[:2])), frames[:2].permute(0, 3, 1, 2) / 255)


def test_split_undoes_merge():
    x = torch.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    assert torch.equal(_split(_merge(x, 4), 4), x)
    assert torch.equal(_merge(x, 4)[1, 0, 1].reshape(4, 4, 3), x[1, :4, 4:])


def test_loss_by_hand(frames):
    # With all of the head's weights 0: mu = m and logvar = v everywhere, so KL = Z / 2 * (e^v + m^2 - 1 - v).
    model, m, v = make("paper", z=4), 0.5, 0.25
    torch.nn.init.zeros_(model.encoder.head.weight)
    with torch.no_grad():
        model.encoder.head.bias.copy_(torch.tensor([m] * 4 + [v] * 4))
    loss, values = model.loss(frames[:2], generator(3))
    kl = 2 * (np.exp(v) + m * m - 1 - v)
    assert values["kl"].item() == pytest.approx(kl, rel=1e-5)
    z = m + np.exp(v / 2) * torch.randn(2, 4, generator=generator(3))
    error = (model.reconstruct(z) - frames[:2].permute(0, 3, 1, 2) / 255).square().sum((1, 2, 3)).mean()
    assert loss.item() == pytest.approx(error.item() + max(kl, 0.5 * 4), rel=1e-5)


@KINDS
@pytest.mark.parametrize("count", [1, 64, 100])
def test_fast_encoder_agrees_with_encode(kind, count, frames):
    model = make(kind)
    array = frames[:count].numpy()
    array.flags.writeable = False
    turned = frames.flip(0)[:count].flip(2)
    for given, same in ((array, frames[:count]), (frames[:count], frames[:count]), (turned, turned)):
        for a, b in zip(fast_encoder(model)(given), model.encode(same), strict=True):
            assert a.dtype == torch.float32 and a.shape == b.shape
            assert (a - b).square().mean().sqrt() < 0.02 * b.square().mean().sqrt()  # bf16 keeps 8 bits


def test_fast_encoder_of_a_trained_model(trained, frames):
    # Buffers are kept between calls: a later call must not change an earlier result.
    encode = fast_encoder(trained)
    mu, logvar = encode(frames[:160])
    kept = mu.clone()
    encode(frames.flip(0))
    assert torch.equal(mu, kept)
    exact = trained.encode(frames[:160])
    spread = exact[0].std(0).max()
    assert (mu - exact[0]).abs().max() < 0.1 * spread and (logvar - exact[1]).abs().max() < 0.2


def test_learns_more_than_the_mean_picture(trained, frames):
    seen, held_out = frames[:160].float() / 255, frames[160:]
    mean_error = (held_out / 255 - seen.mean(0)).square().sum((1, 2, 3)).mean()
    picture = trained.decode(trained.encode(held_out)[0])
    error = (picture.float() - held_out.float()).div(255).square().sum((1, 2, 3)).mean()
    assert error < 0.7 * mean_error, (error, mean_error)


def test_latents_are_used_and_bounded(trained, frames):
    mu, logvar = trained.encode(frames)
    assert (mu.std(0) > 0.3).sum() >= 3, "several latents carry what differs between frames"
    assert mu.abs().max() < 20 and logvar.max() < 3


def test_impossible_configs_are_refused():
    with pytest.raises(ConfigError, match=r"paper"):
        VAEConfig(kind="papper")
    with pytest.raises(ConfigError, match="width"):
        VAEConfig(width=0)
    with pytest.raises(ConfigError):
        VAEConfig(kl_floor=-1.0)
