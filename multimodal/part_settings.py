"""Configs of the runs that train the parts behind CLIP: prior, decoder, upsampler.

    oneira train scenes-prior --set clip=scenes-clip         # the run whose CLIP it learns from

A name of a run is made a path when the config is made, so that workers which run elsewhere find it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oneira.generative.learning import learn, lesson_report, seed_of, smoke_of
from oneira.generative.training import TrainSettings
from oneira.platform.devices import pick_device
from oneira.platform.errors import DataError

from .ar_prior import ArPrior, ArPriorConfig, ArPriorStage, Code
from .assembling import part_folder, part_place
from .clip import Clip
from .decoder import Decoder, DecoderConfig, DecoderStage
from .embedding import COUNTED, clip_folder, clip_place, encode, load_clip, square_clip, statistics
from .pictures import resize, to_bytes, to_signed
from .prior import Prior, PriorConfig, PriorStage
from .scenes import KINDS, UNSEEN, Scenes, captions, draw, lesson_scenes, rearranged, sample
from .stages import PictureRequest, Stage, through
from .text_stage import TextStage
from .upsampler import Upsampler, UpsamplerConfig, UpsamplerStage

PRIOR_STEPS, PRIOR_GUIDANCE = 10, 2.0
DECODER_STEPS, DECODER_GUIDANCE = 15, 2.0
UPSAMPLER_STEPS = 1  # more come no nearer (docs/LOG.md)


@dataclass(frozen=True, kw_only=True)
class PriorRun:
    """The diffusion prior. clip: a run of scenes-clip, a folder of open_clip's format, one of models/, or "builtin". checks: captions of each score."""

    seed: int = 0
    clip: str = "scenes-clip"
    prior: PriorConfig = field(default_factory=PriorConfig)
    training: TrainSettings
    checks: int = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", str(clip_place(self.clip)))

    def smoke(self) -> PriorRun:
        return replace(self, training=smoke_of(self.training), checks=32)

    def train(self, run: Any, executor: Any) -> dict[str, Any]:
        clip_folder(self.clip)
        return learn(self, run, executor)

    def report(self, run: Any) -> Path:
        return lesson_report(run, "from captions to image embeddings, by diffusion")

    def build(self) -> Prior:
        clip = square_clip(self.clip)
        mean, std = statistics(clip)
        return Prior.new(self.prior, embed=clip.shape[0], length=clip.shape[2], mean=mean, std=std)

    def batches(self) -> Callable[[int], dict[str, Tensor]]:
        return embedding_batches(square_clip(self.clip), self.training.batch_size, self.seed)

    def score(self, model: Prior) -> dict[str, float]:
        clip = square_clip(self.clip)
        model.to(clip.mean.device)
        return prior_scores(clip, PriorStage(model, steps=PRIOR_STEPS, guidance=PRIOR_GUIDANCE), self.checks)


@dataclass(frozen=True, kw_only=True)
class ArPriorRun:
    """The autoregressive prior; see `PriorRun`."""

    seed: int = 0
    clip: str = "scenes-clip"
    prior: ArPriorConfig = field(default_factory=ArPriorConfig)
    training: TrainSettings
    checks: int = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", str(clip_place(self.clip)))

    def smoke(self) -> ArPriorRun:
        return replace(self, training=smoke_of(self.training), checks=32)

    def train(self, run: Any, executor: Any) -> dict[str, Any]:
        clip_folder(self.clip)
        return learn(self, run, executor)

    def report(self, run: Any) -> Path:
        return lesson_report(run, "from captions to image embeddings, one component after another")

    def build(self) -> ArPrior:
        clip = load_clip(self.clip)
        found = encode(clip, sample(np.arange(COUNTED)), seed_of(self.seed, "code"))
        images, texts = found["image_embedding"].cpu(), found["text_embedding"].cpu()
        code = Code.fit(images, texts, self.prior.components, self.prior.buckets)
        return ArPrior(self.prior, code, text_width=clip.shape[1], length=clip.shape[2])

    def batches(self) -> Callable[[int], dict[str, Tensor]]:
        return embedding_batches(load_clip(self.clip), self.training.batch_size, self.seed)

    def score(self, model: ArPrior) -> dict[str, float]:
        clip = load_clip(self.clip)
        model.to(clip.mean.device)
        return prior_scores(clip, ArPriorStage(model, guidance=1.0), self.checks)


@dataclass(frozen=True, kw_only=True)
class DecoderRun:
    """The decoder; see `PriorRun`.

    checks: pictures drawn for the score.
    init: a run, a folder, or "builtin": the decoder whose weights the training begins with, on other scenes if the seed is
        another; empty for random ones.
    kinds: of scenes trained on, of `KINDS`; ("single",) is one object alone.
    """

    seed: int = 0
    clip: str = "scenes-clip"
    init: str = ""
    kinds: tuple[str, ...] = KINDS
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    training: TrainSettings
    checks: int = 128

    def __post_init__(self) -> None:
        sample(np.arange(0), kinds=self.kinds)  # raises for unknown ones
        object.__setattr__(self, "clip", str(clip_place(self.clip)))
        if self.init:
            object.__setattr__(self, "init", str(part_place(self.init, "decoder")))

    def smoke(self) -> DecoderRun:
        return replace(self, training=smoke_of(self.training), checks=4)

    def train(self, run: Any, executor: Any) -> dict[str, Any]:
        clip_folder(self.clip)
        if self.init:
            part_folder(self.init, "decoder")
        return learn(self, run, executor)

    def report(self, run: Any) -> Path:
        return lesson_report(run, "from image embeddings and captions to pictures")

    def build(self) -> Decoder:
        clip = load_clip(self.clip)
        mean, std = statistics(clip)
        new = Decoder.new(self.decoder, embed=clip.shape[0], text_width=clip.shape[1], mean=mean, std=std)
        if not self.init:
            return new
        found = Decoder.load(part_folder(self.init, "decoder"))
        try:
            new.load_state_dict(found.state_dict())
        except RuntimeError as error:
            raise DataError(
                f"The decoder in '{self.init}' is of another shape: its settings are not {self.decoder}."
            ) from error
        return new

    def batches(self) -> Callable[[int], dict[str, Any]]:
        clip, count, size = load_clip(self.clip), self.training.batch_size, self.decoder.size

        def batch_at(step: int) -> dict[str, Any]:
            scenes = lesson_scenes(self.seed, step, count, kinds=self.kinds)
            found = encode(clip, scenes, seed_of(self.seed, "words", step))
            return {**found, "pictures": draw(scenes, size)}

        return batch_at

    def score(self, model: Decoder) -> dict[str, float]:
        """By how much (of 1) the drawn pictures differ from the true ones, and how alike CLIP finds them, when the true
        embedding and caption are given, on combinations of two objects never trained on."""
        clip = load_clip(self.clip)
        model.to(clip.mean.device)
        scenes = sample(np.arange(self.checks) + UNSEEN, "combos")
        true = draw(scenes, self.decoder.size)
        wanted = clip.embed_images(true)
        stage = DecoderStage(model, steps=DECODER_STEPS, guidance=DECODER_GUIDANCE)
        requests = [
            PictureRequest(task="embedding", prompt=prompt, seed=k, embedding=embedding)
            for k, (prompt, embedding) in enumerate(zip(captions(scenes), wanted.cpu().numpy(), strict=True))
        ]
        drawn = np.stack([state["picture"] for state in through([TextStage(clip), stage], requests)])
        cosine = (clip.embed_images(drawn) * wanted).sum(1).mean()
        miss = np.abs(drawn.astype(np.float32) - true.astype(np.float32)).mean() / 255
        return {"cosine": float(cosine), "difference": float(miss)}


@dataclass(frozen=True, kw_only=True)
class UpsamplerRun:
    """The upsampler. checks: pictures of the score."""

    seed: int = 0
    upsampler: UpsamplerConfig = field(default_factory=UpsamplerConfig)
    training: TrainSettings
    checks: int = 64

    def smoke(self) -> UpsamplerRun:
        return replace(self, training=smoke_of(self.training), checks=4)

    def train(self, run: Any, executor: Any) -> dict[str, Any]:
        return learn(self, run, executor)

    def report(self, run: Any) -> Path:
        return lesson_report(run, "pictures of twice the side")

    def build(self) -> Upsampler:
        return Upsampler.new(self.upsampler)

    def batches(self) -> Callable[[int], dict[str, np.ndarray]]:
        count, size = self.training.batch_size, self.upsampler.size
        return lambda step: scale_batch(lesson_scenes(self.seed, step, count), size, seed_of(self.seed, "cuts", step))

    def score(self, model: Upsampler) -> dict[str, float]:
        """How far from true pictures (of 1), in root mean square; "bicubic" is what resizing would give."""
        model.to(pick_device())
        size = 2 * self.upsampler.size
        scenes = sample(np.arange(self.checks) + UNSEEN, "all")
        small, true = draw(scenes, size // 2), draw(scenes, size).astype(np.float32)
        stage = UpsamplerStage(model, size=size, steps=UPSAMPLER_STEPS)
        plans = [stage.plan(PictureRequest(seed=k), {"picture": picture}) for k, picture in enumerate(small)]
        while not plans[0].done:
            stage.step(plans)
        drawn = np.stack([plan.found["picture"] for plan in plans])
        plain = to_bytes(resize(to_signed(small), size))
        miss = {"rms": drawn, "bicubic": plain}
        return {key: float(np.sqrt(np.square(value - true).mean()) / 255) for key, value in miss.items()}


def embedding_batches(clip: Clip, count: int, seed: int) -> Callable[[int], dict[str, Tensor]]:
    """What CLIP says of `count` scenes of the training split a step; see `embedding.encode`."""
    return lambda step: encode(clip, lesson_scenes(seed, step, count), seed_of(seed, "words", step))


def scale_batch(scenes: Scenes, size: int, seed: int) -> dict[str, np.ndarray]:
    """Pictures of two sizes: large uint8 [B, size, size, 3], small half of that.

    Half of the scenes are seen whole at `size`, the others as a square cut out of twice the size, each drawn anew at half of
    it, as decoders draw: not made small from the large one.
    """
    rng = np.random.default_rng(seed)
    whole, half = scenes[: len(scenes) // 2], scenes[len(scenes) // 2 :]
    large, small = [draw(whole, size)], [draw(whole, size // 2)]
    finer, coarser = draw(half, 2 * size), draw(half, size)
    for k, (left, top) in enumerate(rng.integers(0, size // 2 + 1, (len(half), 2))):
        large.append(finer[k : k + 1, 2 * top : 2 * top + size, 2 * left : 2 * left + size])
        small.append(coarser[k : k + 1, top : top + size // 2, left : left + size // 2])
    return {"large": np.concatenate(large), "small": np.concatenate(small)}


def prior_scores(clip: Clip, stage: Stage, checks: int) -> dict[str, float]:
    """How near a prior's embeddings come to those of true pictures, as cosines between deviations from the mean.

    "cosine": to the picture that the caption is of. "ceiling": between two pictures of one caption, placed differently.
    "unrelated": to a picture that shares no object's attribute and no background with the caption.
    """
    scenes = sample(np.arange(max(4 * checks, 400)) + UNSEEN, "all")
    mean = statistics(clip)[0]

    def deviations(embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings.cpu() - mean, dim=-1)

    requests = [PictureRequest(prompt=text, seed=k) for k, text in enumerate(captions(scenes[:checks], full=True))]
    found = torch.from_numpy(
        np.stack([state["image_embedding"] for state in through([TextStage(clip), stage], requests)])
    )
    true = deviations(clip.embed_images(draw(scenes, clip.image_size)))
    again = deviations(clip.embed_images(draw(rearranged(scenes[:checks], 1), clip.image_size)))
    found = deviations(found)
    others = [strangers(scenes, k) for k in range(checks)]
    unrelated = torch.stack([found[k] @ true[other].mean(0) for k, other in enumerate(others) if len(other)])
    return {
        "cosine": float((found * true[:checks]).sum(1).mean()),
        "ceiling": float((again * true[:checks]).sum(1).mean()),
        "unrelated": float(unrelated.mean()),
    }


def strangers(scenes: Any, k: int) -> np.ndarray:
    """Numbers of the scenes that share neither background nor count nor any object's shape, colour or size with scene k."""
    alone = (scenes.background != scenes.background[k]) & (scenes.count != scenes.count[k])
    for key in ("shape", "colour", "size"):
        values = getattr(scenes, key)
        mine = values[k, : scenes.count[k]]
        alone &= ~np.isin(values, mine).any(1)
    return np.flatnonzero(alone)
