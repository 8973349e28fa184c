"""Laws that hold of every family, by the checker that is shipped for authors; and that the checker finds what it must."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from oneira.generative.autoencoder import VAE, Autoencoder, AutoencoderConfig, VAEConfig
from oneira.generative.bidirectional import Bidirectional, BidirectionalConfig
from oneira.generative.checking import ModelProblems, check_model
from oneira.generative.classifier import Classifier, ClassifierConfig
from oneira.generative.datasets import Arrays, DataConfig, first_rows, learn_tokens, load_data, text_space, token_rows
from oneira.generative.ddpm import DDPM, DDPMConfig
from oneira.generative.ebm import EBM, EBMConfig
from oneira.generative.encoder import Encoder, EncoderConfig
from oneira.generative.ffjord import FFJORD, FFJORDConfig
from oneira.generative.gan import GAN, GANConfig
from oneira.generative.glow import Glow, GlowConfig
from oneira.generative.gpt import GPT, GPTConfig
from oneira.generative.ncsn import NCSN, NCSNConfig
from oneira.generative.pixelcnn import PixelCNN, PixelCNNConfig
from oneira.generative.rbm import RBM, RBMConfig
from oneira.generative.realnvp import RealNVP, RealNVPConfig
from oneira.generative.recurrent import Recurrent, RecurrentConfig
from oneira.generative.spaces import Space
from oneira.generative.translator import Translator, TranslatorConfig
from oneira.platform.presets import find_entry_points

SMALL: dict[str, tuple[Callable, str]] = {
    # name: (space -> model, data set)
    "autoencoder": (lambda space: Autoencoder(AutoencoderConfig(z=4, width=4), space), "digits"),
    "autoencoder-denoising": (
        lambda space: Autoencoder(AutoencoderConfig(objective="denoising", z=4, width=4), space),
        "digits",
    ),
    "bidirectional-gru": (lambda space: Bidirectional(BidirectionalConfig(cell="gru", width=16), space), "verses"),
    "bidirectional-lstm": (lambda space: Bidirectional(BidirectionalConfig(width=16), space), "verses"),
    "classifier-cnn": (lambda space: Classifier(ClassifierConfig(width=8), space), "digits"),
    "classifier-mlp": (lambda space: Classifier(ClassifierConfig(body="mlp", width=8), space), "digits"),
    "ddpm": (lambda space: DDPM(DDPMConfig(widths=(8, 16), steps=4), space), "digits"),
    "ddpm-conditional": (lambda space: DDPM(DDPMConfig(widths=(8, 16), steps=4, conditional=True), space), "digits"),
    "ebm-pictures": (lambda space: EBM(EBMConfig(width=8, steps=2, buffer=16, sweeps=3), space), "digits"),
    "ebm-points": (lambda space: EBM(EBMConfig(width=8, steps=2, buffer=16, sweeps=3), space), "moons"),
    "encoder": (lambda space: Encoder(EncoderConfig(width=16, layers=2, heads=2), space), "verses"),
    "ffjord": (lambda space: FFJORD(FFJORDConfig(width=16, depth=2, steps=2), space), "moons"),
    "gan-conditional": (lambda space: GAN(GANConfig(z=4, width=4, conditional=True), space), "digits"),
    "gan-dcgan": (lambda space: GAN(GANConfig(objective="dcgan", z=4, width=4), space), "digits"),
    "gan-wgan-gp": (lambda space: GAN(GANConfig(z=4, width=4), space), "digits"),
    "glow": (lambda space: Glow(GlowConfig(steps=2, width=8), space), "digits"),
    "gpt-learned": (lambda space: GPT(GPTConfig(width=16, layers=2, heads=2), space), "verses"),
    "gpt-rotary": (lambda space: GPT(GPTConfig(width=16, layers=1, heads=2, positions="rotary"), space), "verses"),
    "gpt-sinusoidal": (
        lambda space: GPT(GPTConfig(width=16, layers=1, heads=2, positions="sinusoidal"), space),
        "verses",
    ),
    "ncsn-pictures": (lambda space: NCSN(NCSNConfig(width=8, levels=3, steps=1), space), "digits"),
    "ncsn-points": (lambda space: NCSN(NCSNConfig(width=8, levels=3, steps=1), space), "many moons"),
    "pixelcnn": (lambda space: PixelCNN(PixelCNNConfig(width=8, blocks=1), space), "digits"),
    "pixelcnn-logistic": (lambda space: PixelCNN(PixelCNNConfig(head="logistic", width=8, blocks=1), space), "digits"),
    "pixelcnn-colour": (lambda space: PixelCNN(PixelCNNConfig(width=12, blocks=1), space), "colours"),
    "rbm": (lambda space: RBM(RBMConfig(hidden=8, chains=8, sweeps=5), space), "digits"),
    "rbm-cd": (lambda space: RBM(RBMConfig(hidden=8, chains=0, sweeps=5), space), "digits"),
    "realnvp": (lambda space: RealNVP(RealNVPConfig(couplings=3, width=16), space), "moons"),
    "translator": (lambda space: Translator(TranslatorConfig(width=16, layers=2, heads=2), space), "pairs"),
    "vae": (lambda space: VAE(VAEConfig(z=4, width=4), space), "digits"),
    "recurrent-gru": (lambda space: Recurrent(RecurrentConfig(cell="gru", width=16), space), "verses"),
    "recurrent-lstm": (lambda space: Recurrent(RecurrentConfig(width=16), space), "verses"),
}


def colours():
    """Pictures uint8 [40, 4, 4, 3] of 6 levels."""
    x = np.random.default_rng(0).integers(0, 6, (40, 4, 4, 3)).astype(np.uint8)
    return Arrays.divide(Space(kind="pictures", shape=(4, 4, 3), levels=6), {"x": x})


def verses():
    documents = [
        f"the {colour} {shape} sleeps" for colour in ("red", "green", "blue") for shape in ("dog", "cat", "owl", "fish")
    ]
    tokenizer = learn_tokens(documents, 300)
    return Arrays.divide(text_space(tokenizer, 12), {"x": token_rows(tokenizer, documents, 12)})


def pairs():
    data = verses()
    rows = {split: rows | {"source": rows["x"][:, ::-1].copy()} for split, rows in data.splits.items()}
    return Arrays(data.space, rows)


DATA = {
    "colours": colours,
    "digits": lambda: load_data(DataConfig(name="digits")),
    "pairs": pairs,
    "moons": lambda: load_data(DataConfig(name="moons")),
    "verses": verses,
}
EVERY = pytest.mark.parametrize("name", SMALL)


def make(name, seed=0):
    build, data = SMALL[name]
    dataset = DATA[data.removeprefix("many ")]()
    torch.manual_seed(seed)
    return build(dataset.space).eval(), {
        k: torch.as_tensor(v) for k, v in first_rows(dataset, "train", 24 if data.startswith("many") else 6).items()
    }


@EVERY
def test_laws(name):
    model, batch = make(name)
    check_model(model, batch)


def test_no_family_is_left_out():
    kinds = {make(name)[0].kind for name in SMALL}
    assert kinds == set(find_entry_points("oneira.models"))


@EVERY
def test_kinds_and_configs_are_declared(name):
    model, _ = make(name)
    assert type(model).kind in find_entry_points("oneira.models") and dataclasses.is_dataclass(type(model).Config)


# What the checker must find -------------------------------------------------------------------------------------------


class Broken(RealNVP):
    """A good model that each test breaks in one place."""


def found(change, **values):
    space = Space(kind="points", shape=(3,))
    torch.manual_seed(0)
    cls = type("Broken", (Broken,), change)
    model = cls(RealNVPConfig(couplings=2, width=8), space)
    batch = {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(1))}
    with pytest.raises(ModelProblems) as error:
        check_model(model, batch)
    return " ".join(error.value.problems)


def unused(self, config, space):
    RealNVP.__init__(self, config, space)
    self.spare = nn.Parameter(torch.ones(2))


def half_determinant(self, x):
    z, log_det = RealNVP.transform(self, x)
    return z, 0.5 * log_det


def global_sample(self, n, seed):
    return torch.randn(n, 3)


def wrong_shape(self, n, seed):
    return RealNVP.sample(self, n, seed)[:, :2]


def crooked(self, z):
    return RealNVP.invert(self, z) + 0.01


def not_finite(self, x, seed=0):
    return RealNVP.log_prob(self, x) + math.nan


def crowded(self, noise):
    x = RealNVP.draw(self, noise)
    x[-1] += 0.1 * (len(noise) > 3)  # one row of five
    return x


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"draw": crowded}, r"other rows when another group is drawn with it: rows [4] of 5, by up to 0.1"),
        ({"__init__": unused}, "No gradient reaches the parameter 'spare'"),
        ({"transform": half_determinant}, "autograd's Jacobian"),
        ({"sample": global_sample}, "other rows for the same seed"),
        ({"sample": global_sample}, "global generator"),
        ({"sample": wrong_shape}, "the space says"),
        ({"invert": crooked}, "undoes `encode` only up to"),
        ({"log_prob": not_finite}, "one finite number a row"),
        ({"loss": lambda self, batch, generator: (RealNVP.loss(self, batch, generator)[0] * torch.rand(()), {})}, "two calls"),
        ({}, "another class"),  # it saves itself under the kind of another
    ],
)  # fmt: skip
def test_the_checker_finds(change, said):
    assert said in found(change)


def test_the_checker_leaves_the_model_as_it_was():
    model, batch = make("realnvp")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_model(model, batch)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert np.isfinite(batch["x"]).all()
