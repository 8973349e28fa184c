"""The presets of this package: complete runs by name, `oneira train NAME`.

scenes-clip        pictures and captions in one space
scenes-checker     the judge of pictures
scenes-prior       from captions to image embeddings, by diffusion (--set clip=RUN, as for the next two)
scenes-prior-ar    the same, one component after another
scenes-decoder     from image embeddings and captions to pictures of 64 pixels
scenes-upsampler   pictures of twice the side
"""

from __future__ import annotations

from oneira.generative.training import TrainSettings

from .clip import ClipConfig
from .part_settings import ArPriorRun, DecoderRun, PriorRun, UpsamplerRun
from .settings import CheckerRun, ClipRun


def scenes_clip() -> ClipRun:
    return ClipRun(
        clip=ClipConfig(vision="resnet"),
        training=TrainSettings(
            steps=10_000, batch_size=64, lr=2e-3, warmup=200, weight_decay=0.05, ema=0.999, save_every=500
        ),
    )


def scenes_checker() -> CheckerRun:
    return CheckerRun(
        training=TrainSettings(
            steps=4_000, batch_size=64, lr=2e-3, warmup=300, ema=0.999, save_every=500, channels_last=True
        )
    )


def scenes_prior() -> PriorRun:
    return PriorRun(
        training=TrainSettings(
            steps=4_000, batch_size=32, lr=1e-3, warmup=200, weight_decay=0.02, ema=0.998, save_every=500
        )
    )


def scenes_prior_ar() -> ArPriorRun:
    return ArPriorRun(
        training=TrainSettings(
            steps=4_000, batch_size=64, lr=1e-3, warmup=200, weight_decay=0.02, ema=0.998, save_every=500
        )
    )


def scenes_decoder() -> DecoderRun:
    return DecoderRun(
        training=TrainSettings(
            steps=40_000, batch_size=16, lr=2e-3, warmup=200, weight_decay=0.01, ema=0.999, save_every=500
        )
    )


def scenes_upsampler() -> UpsamplerRun:
    return UpsamplerRun(
        training=TrainSettings(
            steps=4_000, batch_size=32, lr=2e-3, warmup=200, ema=0.999, save_every=250, channels_last=True
        )
    )
