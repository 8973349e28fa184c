"""V, the variational auto-encoder of World Models (Ha & Schmidhuber 2018, appendix A.1): a frame becomes z, 32 numbers.

    model = fit(VAE(VAEConfig()), batch_at, settings)            # batches uint8 [B, 64, 64, 3]
    mu, logvar = fast_encoder(model)(frames)                     # float32 [B, Z] each

Two kinds with one loss. "paper" is the paper's: four convolutions in, four transposed ones out. "fast" is made for
CPUs, whose matrix products run near their peak where their convolutions do not: it is linear layers over tokens only.
Its encoder merges neighbours that already lie side by side in memory (16 pixels of a row, a row, 4 rows), so that no
number is ever moved; its decoder splits tokens into 2x2 and at last into 4x4 pixels, and its loss cuts the target into
patches rather than put the picture together.

Legend: B batch, Z latent size, H W rows and columns, C channels, T tokens of a frame.
Frames are uint8 [0, 255], [B, 64, 64, 3].
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.devices import pick_precision
from oneira.platform.errors import ConfigError, did_you_mean

SIZE = 64  # pixels, both ways
KINDS = ("fast", "paper")
CHUNK = 64  # frames that `fast_encoder` takes at a time: what they become stays in a core's cache

Frames = np.ndarray | Tensor
Encoder = Callable[[Frames], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """What V is made of."""

    kind: Literal["paper", "fast"] = "fast"
    z: int = 32  # latent size
    width: int = 32  # the encoder's channels next to the pixels; deeper stages have 2 and 4 times as many ("fast" only)
    decoder_width: int = 48  # the decoder's, likewise
    emphasis: float = (
        0.0  # k: a pixel's squared error e counts e * (1 + k * e), so that small bright things are worth their nats
    )
    kl_floor: float = 0.5  # nats per latent dimension that the KL may have for free (the paper's tolerance)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind is '{self.kind}'. {did_you_mean(self.kind, KINDS)}")
        for key in ("z", "width", "decoder_width"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")
        for key in ("kl_floor", "emphasis"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must not be negative.")


class VAE(nn.Module):
    """Frames to p(z | frame) and back."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder: StripEncoder | ConvEncoder
        self.decoder: PatchDecoder | ConvDecoder
        if config.kind == "fast":
            self.encoder = StripEncoder(config.z, config.width)
            self.decoder = PatchDecoder(config.z, config.decoder_width)
        else:
            self.encoder, self.decoder = ConvEncoder(config.z), ConvDecoder(config.z)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames uint8 [B, 64, 64, 3] -> mean and log-variance of z, float32 [B, Z] each."""
        mu, logvar = self.encoder(frames).float().chunk(2, dim=1)
        return mu, logvar

    def reconstruct(self, z: Tensor) -> Tensor:
        """z [B, Z] -> pictures, float32 [B, 3, 64, 64] in [0, 1]."""
        return self.decoder.picture(self.decoder(z))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """z [B, Z] -> frames uint8 [B, 64, 64, 3]."""
        return (self.reconstruct(z) * 255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    @torch.no_grad()
    def sample(self, n: int, seed: int) -> Tensor:
        """`n` frames uint8 [n, 64, 64, 3] from z of a standard normal. The same seed gives the same frames."""
        z = torch.randn(n, self.config.z, generator=torch.Generator().manual_seed(seed))
        return self.decode(z.to(next(self.parameters()).device))

    def loss(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Squared error summed over the frame (large ones emphasised), plus max(KL(q(z | frame) || N(0, 1)), floor) in nats; means over B."""
        mu, logvar = self.encode(batch)
        noise = torch.randn(mu.shape, generator=generator, device=mu.device)
        values = self.decoder(mu + torch.exp(0.5 * logvar) * noise)
        error = self._error(values, self.decoder.target(batch)) / len(batch)
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(dim=1)
        loss = error + kl.clamp(min=self.config.kl_floor * self.config.z).mean()
        return loss, {"error": error.detach(), "kl": kl.detach().mean()}

    def _error(self, values: Tensor, target: Tensor) -> Tensor:
        """Of all values, one number."""
        if not self.config.emphasis:
            return F.mse_loss(values, target, reduction="sum")
        square = (values - target).square()
        return (square * (1 + self.config.emphasis * square)).sum()


# The fast kind -------------------------------------------------------------------------------------------------------


class StripEncoder(nn.Module):
    """Frames -> [B, 2Z]. Every stage is one matrix product over tokens that lie together in the stage before."""

    # (tokens of a frame, pieces of the stage before in each): 16 pixels of 3 numbers, a row, 4 rows.
    STAGES = ((256, 48), (64, 4), (16, 4))

    def __init__(self, z: int, width: int):
        super().__init__()
        channels = (1, width, 2 * width, 4 * width)
        self.stages = nn.ModuleList(
            nn.Linear(pieces * before, after)
            for (_, pieces), before, after in zip(self.STAGES, channels[:-1], channels[1:], strict=True)
        )
        self.head = nn.Linear(self.STAGES[-1][0] * channels[-1], 2 * z)
        _initialise(self.stages)
        nn.init.normal_(self.head.weight, std=0.5 * self.head.in_features**-0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, frames: Tensor) -> Tensor:
        x_BTC = frames.float() / 127.5 - 1
        for (tokens, _), stage in zip(self.STAGES, self.stages, strict=True):
            x_BTC = F.relu(stage(x_BTC.reshape(len(frames), tokens, -1)))
        return self.head(x_BTC.flatten(1))

    @torch.no_grad()
    def pack(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The same for inference, frames -> float32 [B, 2Z]: weights transposed once, buffers kept between calls."""
        first, *others = [(layer.weight.detach(), layer.bias.detach()) for layer in (*self.stages, self.head)]
        # Whole numbers up to 256 are exact in bf16: the first layer takes pixels as they are, with scaled weights.
        layers = [(first[0] / 127.5, first[1] - first[0].sum(dim=1)), *others]
        packed = [(w.t().contiguous().to(dtype), b.to(dtype)) for w, b in layers]
        tokens = [count for count, _ in self.STAGES] + [1]
        place = first[0].device
        pixels = torch.empty(CHUNK, SIZE, SIZE, 3, dtype=dtype, device=place)
        outputs = [
            torch.empty(CHUNK * count, w.shape[1], dtype=dtype, device=place)
            for count, (w, _) in zip(tokens, packed, strict=True)
        ]

        def run(frames: Tensor) -> Tensor:
            result = torch.empty(len(frames), outputs[-1].shape[1], device=place)
            for start in range(0, len(frames), CHUNK):
                chunk = frames[start : start + CHUNK]
                n = len(chunk)
                x = pixels[:n].copy_(chunk)
                for count, (weight, bias), output in zip(tokens, packed, outputs, strict=True):
                    x = torch.addmm(bias, x.view(n * count, -1), weight, out=output[: n * count])
                    if count > 1:
                        x.relu_()
                result[start : start + n] = x
            return result

        return run


class PatchDecoder(nn.Module):
    """z -> 4x4 tokens -> 8x8 -> 16x16 -> patches of 4x4 pixels, float32 [B, 16, 16, 48] in [0, 1]."""

    def __init__(self, z: int, width: int):
        super().__init__()
        self.deepest = 4 * width
        self.first = nn.Linear(z, 4 * 4 * self.deepest)
        self.stages = nn.ModuleList([nn.Linear(4 * width, 4 * 2 * width), nn.Linear(2 * width, 4 * width)])
        self.last = nn.Linear(width, 4 * 4 * 3)
        _initialise([self.first, *self.stages])

    def forward(self, z: Tensor) -> Tensor:
        x_BHWC = F.relu(self.first(z)).view(len(z), 4, 4, self.deepest)
        for stage in self.stages:
            x_BHWC = _split(F.relu(stage(x_BHWC)), 2)
        return torch.sigmoid(self.last(x_BHWC).float())

    def target(self, frames: Tensor) -> Tensor:
        """Frames as `forward` gives them."""
        return _merge(frames, 4).float() / 255

    def picture(self, values: Tensor) -> Tensor:
        return _split(values, 4).permute(0, 3, 1, 2)


def _merge(x_BHWC: Tensor, side: int) -> Tensor:
    """[B, H, W, C] -> [B, H / side, W / side, side * side * C]."""
    b, h, w, c = x_BHWC.shape
    return x_BHWC.reshape(b, h // side, side, w // side, side, c).transpose(2, 3).reshape(b, h // side, w // side, -1)


def _split(x_BHWC: Tensor, side: int) -> Tensor:
    """Undoes `_merge`."""
    b, h, w, c = x_BHWC.shape
    return x_BHWC.reshape(b, h, w, side, side, c // side**2).transpose(2, 3).reshape(b, h * side, w * side, -1)


def _initialise(layers: nn.ModuleList | list[nn.Module]) -> None:
    """Keeps the variance through ReLU (He et al. 2015, eq. 10)."""
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)


# The paper's kind ----------------------------------------------------------------------------------------------------


class ConvEncoder(nn.Module):
    """Frames -> [B, 2Z]: convolutions 4x4 of stride 2 with 32, 64, 128 and 256 channels, then one dense layer."""

    def __init__(self, z: int):
        super().__init__()
        channels = (3, 32, 64, 128, 256)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2) for a, b in pairwise(channels))
        self.head = nn.Linear(2 * 2 * 256, 2 * z)

    def forward(self, frames: Tensor) -> Tensor:
        x_BCHW = frames.permute(0, 3, 1, 2).float() / 255
        for conv in self.convs:
            x_BCHW = F.relu(conv(x_BCHW))
        return self.head(x_BCHW.flatten(1))

    @torch.no_grad()
    def pack(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The same function for inference, frames -> float32 [B, 2Z]."""
        packed = copy.deepcopy(self).eval().to(dtype).to(memory_format=torch.channels_last)
        place = packed.head.weight.device

        def run(frames: Tensor) -> Tensor:
            x_BCHW = frames.to(place).permute(0, 3, 1, 2).to(dtype) / 255
            for conv in packed.convs:
                x_BCHW = conv(x_BCHW).relu_()
            return packed.head(x_BCHW.flatten(1)).float()

        return run


class ConvDecoder(nn.Module):
    """z -> 1024 -> transposed convolutions of stride 2, kernels 5, 5, 6, 6 -> float32 [B, 3, 64, 64] in [0, 1]."""

    def __init__(self, z: int):
        super().__init__()
        self.first = nn.Linear(z, 1024)
        layers = ((1024, 128, 5), (128, 64, 5), (64, 32, 6), (32, 3, 6))
        self.convs = nn.ModuleList(nn.ConvTranspose2d(a, b, kernel, stride=2) for a, b, kernel in layers)

    def forward(self, z: Tensor) -> Tensor:
        x_BCHW = self.first(z)[:, :, None, None]
        *inner, last = self.convs
        for conv in inner:
            x_BCHW = F.relu(conv(x_BCHW))
        return torch.sigmoid(last(x_BCHW).float())

    def target(self, frames: Tensor) -> Tensor:
        return frames.permute(0, 3, 1, 2).float() / 255

    def picture(self, values: Tensor) -> Tensor:
        return values


# ---------------------------------------------------------------------------------------------------------------------


def fast_encoder(model: VAE) -> Encoder:
    """`model.encode` for inference: frames uint8 [B, 64, 64, 3] -> (mu, logvar), float32 [B, Z] each.

    A snapshot: later changes of the weights do not reach it. It keeps buffers between calls: each thread needs its own.
    Works in bf16 where the device has units for it; takes NumPy arrays, read-only ones too, and tensors.
    """
    with torch.inference_mode(False):  # its buffers are written in later calls, whatever the mode of those
        run = model.encoder.pack(pick_precision("auto", next(model.parameters()).device))
    z = model.config.z

    def encode(frames: Frames) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # not inference_mode: its tensors could not enter another model's training
            moments = run(_tensor(frames))
        return moments[:, :z], moments[:, z:]

    return encode


def _tensor(frames: Frames) -> Tensor:
    if isinstance(frames, Tensor):
        return frames
    with warnings.catch_warnings():  # of arrays that cannot be written, which shared memory gives; nobody writes here
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(frames)
