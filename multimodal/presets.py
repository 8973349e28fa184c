"""The presets of this package: complete runs by name, `oneira train NAME`.

scenes-clip      pictures and captions in one space
scenes-checker   the judge of pictures
"""

from __future__ import annotations

from oneira.generative.training import TrainSettings

from .settings import CheckerRun, ClipRun


def scenes_clip() -> ClipRun:
    return ClipRun(
        training=TrainSettings(
            steps=20_000, batch_size=256, lr=1e-3, warmup=500, weight_decay=0.05, ema=0.999, save_every=500
        )
    )


def scenes_checker() -> CheckerRun:
    return CheckerRun(
        training=TrainSettings(
            steps=12_000, batch_size=128, lr=2e-3, warmup=300, ema=0.999, save_every=500, channels_last=True
        )
    )
