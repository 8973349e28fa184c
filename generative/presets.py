"""The presets of this package: complete runs by name, `oneira train NAME`. Each takes at most ten minutes on two cores.

ffjord-moons     a flow in continuous time on two moons
glow-digits      a flow on several scales on digits
realnvp-moons    a flow of affine couplings on two moons
"""

from __future__ import annotations

from typing import Any

from .datasets import DataConfig
from .ffjord import FFJORD, FFJORDConfig
from .glow import Glow, GlowConfig
from .realnvp import RealNVP, RealNVPConfig
from .settings import run_of
from .training import TrainSettings

MOONS, DIGITS = DataConfig(name="moons"), DataConfig(name="digits")


def realnvp_moons() -> Any:
    return run_of(RealNVP)(
        data=MOONS,
        model=RealNVPConfig(),
        training=TrainSettings(steps=8000, batch_size=256, lr=2e-3, ema=0.99, precision="fp32", save_every=1000),
        checks=10_000,
    )


def ffjord_moons() -> Any:
    return run_of(FFJORD)(
        data=MOONS,
        model=FFJORDConfig(),
        training=TrainSettings(steps=8000, batch_size=256, lr=3e-3, ema=0.99, precision="fp32", save_every=500),
        checks=10_000,
    )


def glow_digits() -> Any:
    return run_of(Glow)(
        data=DIGITS,
        model=GlowConfig(),
        training=TrainSettings(
            steps=6000, batch_size=64, lr=1e-3, ema=0.995, precision="fp32", validate_every=250, patience=6, save_every=250
        ),
    )
