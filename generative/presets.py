"""The presets of this package: complete runs by name, `oneira train NAME`. Each takes at most ten minutes on two cores.

ae-digits, dae-digits        autoencoder, and one that takes noise away, on digits
cnn-digits, mlp-digits       classifiers of digits; cnn-things, mlp-things of pictures of one object, by shape and colour
cnn-cifar10, mlp-cifar10     classifiers of CIFAR-10's photographs, for whoever has a network or the data
cgan-digits                  a conditional GAN on digits
dcgan-digits, wgan-digits    GANs on digits: with a critic of likelihoods, and of distances
ddpm-digits                  diffusion on digits, told the label
bilstm-captions              a recurrent encoder that reads both ways and fills in hidden words of captions
ebm-digits, ebm-moons        energy-based models
encoder-captions             a transformer that fills in hidden words of captions
ffjord-moons                 a flow in continuous time on two moons
glow-digits                  a flow on several scales on digits
gpt-captions                 a causal transformer on captions of scenes
gru-captions, lstm-captions  recurrent models on captions of scenes
ncsn-digits, ncsn-moons      score matching, sampled by Langevin dynamics
pixelcnn-digits              pixel after pixel, by a softmax; pixelcnn-logistic-digits by a mixture of logistic distributions
rbm-digits                   a restricted Boltzmann machine on digits
realnvp-moons                a flow of affine couplings on two moons
translator-captions          an encoder-decoder that says a short caption in full
vae-digits, vae-scenes       variational autoencoders; beta-vae-scenes with beta 4

On data of one's own: `oneira train vae-scenes --set data.name=images --set data.path=FOLDER`; a folder of labelled pictures goes
with `cnn-things` and `mlp-things` in the same way. CIFAR-10 comes from the hub, or from a folder of its Parquet files. With `--set classifier=RUN`, a run of `cnn-digits` or
`cnn-things` judges the samples of the models of those data.
"""

from __future__ import annotations

from typing import Any

from .autoencoder import VAE, Autoencoder, AutoencoderConfig, VAEConfig
from .bidirectional import Bidirectional, BidirectionalConfig
from .classifier import Classifier, ClassifierConfig
from .datasets import DataConfig
from .ddpm import DDPM, DDPMConfig
from .ebm import EBM, EBMConfig
from .encoder import Encoder, EncoderConfig
from .ffjord import FFJORD, FFJORDConfig
from .gan import GAN, GANConfig
from .glow import Glow, GlowConfig
from .gpt import GPT, GPTConfig
from .ncsn import NCSN, NCSNConfig
from .pixelcnn import PixelCNN, PixelCNNConfig
from .rbm import RBM, RBMConfig
from .realnvp import RealNVP, RealNVPConfig
from .recurrent import Recurrent, RecurrentConfig
from .settings import run_of
from .training import TrainSettings
from .translator import Translator, TranslatorConfig

MOONS, DIGITS = DataConfig(name="moons"), DataConfig(name="digits")
SCENES, THINGS = DataConfig(name="scenes", size=32), DataConfig(name="things", size=32)
CAPTIONS = DataConfig(name="captions", length=48)
CIFAR10 = DataConfig(name="hub", path="uoft-cs/cifar10")


def _run(model: Any, config: Any, data: DataConfig, checks: int = 2000, **training: Any) -> Any:
    settings = TrainSettings(**{"save_every": 500, "batch_size": 64, **training})
    return run_of(model)(data=data, model=config, training=settings, checks=checks)


def _few(steps: int, **training: Any) -> dict[str, Any]:
    """Training on data so few that a model learns them by heart: it stops where validation is best."""
    return {"steps": steps, "validate_every": 200, "patience": 8, **training}


# Flows ----------------------------------------------------------------------------------------------------------------


def realnvp_moons() -> Any:
    return _run(
        RealNVP, RealNVPConfig(), MOONS, 10_000, steps=8000, batch_size=256, lr=2e-3, ema=0.99, precision="fp32"
    )


def ffjord_moons() -> Any:
    return _run(FFJORD, FFJORDConfig(), MOONS, 10_000, steps=6000, batch_size=256, lr=3e-3, ema=0.99, precision="fp32")


def glow_digits() -> Any:
    return _run(Glow, GlowConfig(), DIGITS, **_few(6000, lr=1e-3, ema=0.995, precision="fp32"))


# Autoregressive models and transformers -------------------------------------------------------------------------------


def pixelcnn_digits() -> Any:
    return _run(PixelCNN, PixelCNNConfig(), DIGITS, **_few(8000, lr=1e-3, ema=0.995, weight_decay=0.01))


def pixelcnn_logistic_digits() -> Any:
    config = PixelCNNConfig(head="logistic")
    return _run(PixelCNN, config, DIGITS, **_few(8000, lr=1e-3, ema=0.995, weight_decay=0.01, precision="fp32"))


def lstm_captions() -> Any:
    return _run(Recurrent, RecurrentConfig(cell="lstm"), CAPTIONS, steps=800, lr=3e-3, ema=0.99)


def gru_captions() -> Any:
    return _run(Recurrent, RecurrentConfig(cell="gru"), CAPTIONS, steps=800, lr=3e-3, ema=0.99)


def bilstm_captions() -> Any:
    return _run(Bidirectional, BidirectionalConfig(), CAPTIONS, steps=1000, lr=3e-3, ema=0.99)


def gpt_captions() -> Any:
    return _run(GPT, GPTConfig(positions="rotary"), CAPTIONS, steps=800, lr=2e-3, warmup=100, ema=0.99)


def encoder_captions() -> Any:
    return _run(Encoder, EncoderConfig(), CAPTIONS, steps=1000, lr=2e-3, warmup=100, ema=0.99)


def translator_captions() -> Any:
    data = DataConfig(name="paraphrases", length=48)
    return _run(Translator, TranslatorConfig(), data, steps=800, lr=2e-3, warmup=100, ema=0.99)


# Energy-based models --------------------------------------------------------------------------------------------------


def rbm_digits() -> Any:
    return _run(RBM, RBMConfig(), DIGITS, steps=4000, lr=3e-3, clip=0, precision="fp32")


def ebm_moons() -> Any:
    config = EBMConfig(step=0.2, heat=0.3, pull=0.01, sweeps=300)
    return _run(EBM, config, MOONS, steps=2500, batch_size=256, lr=2e-3, clip=0.1, ema=0.99, precision="fp32")


def ebm_digits() -> Any:
    config = EBMConfig(width=64, steps=20, step=1.4, heat=0.007, sweeps=200)
    return _run(EBM, config, DIGITS, steps=1500, lr=1e-3, clip=0.1, ema=0.99, precision="fp32")


# GANs -----------------------------------------------------------------------------------------------------------------


def _gan(config: GANConfig, steps: int, beta1: float) -> Any:
    return _run(
        GAN,
        config,
        DIGITS,
        steps=steps,
        lr=5e-4,
        beta1=beta1,
        clip=0,
        ema=0.995,
        final_lr_fraction=0.2,
        precision="fp32",
    )


def dcgan_digits() -> Any:
    return _gan(GANConfig(objective="dcgan", critic_steps=1), 4000, 0.5)


def wgan_digits() -> Any:
    return _gan(GANConfig(), 6000, 0.0)


def cgan_digits() -> Any:
    return _gan(GANConfig(conditional=True), 6000, 0.0)


# Codes ----------------------------------------------------------------------------------------------------------------


def ae_digits() -> Any:
    return _run(Autoencoder, AutoencoderConfig(), DIGITS, **_few(5000, lr=1e-3, ema=0.99))


def dae_digits() -> Any:
    return _run(Autoencoder, AutoencoderConfig(objective="denoising"), DIGITS, **_few(5000, lr=1e-3, ema=0.99))


def vae_digits() -> Any:
    return _run(VAE, VAEConfig(), DIGITS, **_few(8000, lr=1e-3, ema=0.99))


def vae_scenes() -> Any:
    return _run(VAE, VAEConfig(z=32), SCENES, steps=5000, batch_size=32, lr=1.5e-3, ema=0.995)


def beta_vae_scenes() -> Any:
    return _run(VAE, VAEConfig(z=32, beta=4.0), SCENES, steps=5000, batch_size=32, lr=1.5e-3, ema=0.995)


# Diffusion ------------------------------------------------------------------------------------------------------------


def ddpm_digits() -> Any:
    return _run(DDPM, DDPMConfig(conditional=True), DIGITS, steps=3000, lr=2e-3, ema=0.998)


def ncsn_digits() -> Any:
    return _run(NCSN, NCSNConfig(first=8.0, levels=24), DIGITS, steps=3000, lr=2e-3, ema=0.998)


def ncsn_moons() -> Any:
    return _run(NCSN, NCSNConfig(), MOONS, steps=6000, batch_size=256, lr=2e-3, ema=0.995, precision="fp32")


# Classifiers ----------------------------------------------------------------------------------------------------------


def mlp_digits() -> Any:
    return _run(Classifier, ClassifierConfig(body="mlp"), DIGITS, **_few(3000, lr=2e-3, ema=0.99))


def cnn_digits() -> Any:
    return _run(Classifier, ClassifierConfig(), DIGITS, **_few(3000, lr=2e-3, ema=0.99))


def mlp_things() -> Any:
    return _run(Classifier, ClassifierConfig(body="mlp", noise=0.0), THINGS, steps=3000, lr=1e-3, ema=0.99)


def cnn_things() -> Any:
    return _run(Classifier, ClassifierConfig(noise=0.0), THINGS, steps=3000, lr=2e-3, ema=0.99)


def mlp_cifar10() -> Any:
    config = ClassifierConfig(body="mlp", noise=0.0)
    return _run(Classifier, config, CIFAR10, 10_000, **_few(8000, lr=1e-3, ema=0.99))


def cnn_cifar10() -> Any:
    return _run(Classifier, ClassifierConfig(noise=0.0), CIFAR10, 10_000, **_few(8000, lr=2e-3, ema=0.99))
