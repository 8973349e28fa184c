"""CLIP: pictures and texts in one space, where what belongs together points the same way (Radford et al. 2021).

    model = Clip.new(ClipConfig())                    # or Clip.load(folder)
    images = model.embed_images(pictures)             # uint8 [B, H, W, 3] -> float32 [B, E], of length 1
    texts = model.embed_texts(["a red circle"])       # float32 [B, E], of length 1
    best = model.classify(pictures, ["a star", "a ring"])

The network is open_clip's own, of a small configuration, and a folder is one of open_clip's format, so that
`open_clip.create_model("local-dir:FOLDER")` reads what we write. Nothing of this needs a network or a hub.

Legend: B rows, E embedding, L places of a text, W width of the text encoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.errors import ConfigError, DataError, did_you_mean

from .networks import plain_attention
from .scenes import vocabulary
from .words import END, Words

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"  # open_clip's names
HOTTEST = math.log(100.0)  # of the learned scale of the logits (Radford et al. 2021, section 2.5)
MEAN = STD = (0.5, 0.5, 0.5)
VISIONS = ("transformer", "resnet")
RESNET = "test_resnet"  # timm's name
# What a folder may say of timm: nothing that would fetch weights or run what we have not looked at.
TIMM = {
    "timm_model_name": (RESNET,),
    "timm_pool": ("", "avg"),
    "timm_proj": ("", "linear"),
    "timm_model_pretrained": (False,),
}


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """What looks at pictures, and a text transformer.

    Args:
        embed: E. image_size: pixels of the square pictures.
        vision: "transformer", or "resnet", a small residual network of timm's (0.4 M parameters). On small pictures of few objects
            it learns shapes in minutes, which the vision transformer had not begun to (docs/LOG.md).
        patch: pixels of a token of the vision transformer.
        vision_width, vision_layers, text_width, text_layers: of the transformers; heads are 32 wide.
        length: L, BEGIN and END included.
    """

    embed: int = 128
    image_size: int = 64
    vision: Literal["transformer", "resnet"] = "transformer"
    patch: int = 8
    vision_width: int = 128
    vision_layers: int = 6
    text_width: int = 128
    text_layers: int = 4
    length: int = 32

    def __post_init__(self) -> None:
        if self.vision not in VISIONS:
            raise ConfigError(f"vision is '{self.vision}'. {did_you_mean(self.vision, VISIONS)}")
        for key, value in vars(self).items():
            if key != "vision" and value < 1:
                raise ConfigError(f"{key} is {value}; it must be at least 1.")
        for key in ("vision_width", "text_width"):
            if getattr(self, key) % 32:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be a multiple of 32.")
        if self.image_size % self.patch:
            raise ConfigError(f"patch is {self.patch}; it must divide image_size, {self.image_size}.")

    def open_clip(self, vocabulary_size: int) -> dict[str, Any]:
        """The `model_cfg` of open_clip's JSON."""
        tower: dict[str, Any] = {
            "patch_size": self.patch, "width": self.vision_width, "layers": self.vision_layers, "head_width": 32,
        }  # fmt: skip
        if self.vision == "resnet":
            tower = {"timm_model_name": RESNET, "timm_pool": "", "timm_proj": "linear"}
        return {
            "embed_dim": self.embed, "custom_text": True,
            "vision_cfg": {"image_size": self.image_size, **tower},
            "text_cfg": {
                "context_length": self.length, "vocab_size": vocabulary_size, "width": self.text_width,
                "heads": self.text_width // 32, "layers": self.text_layers, "hf_tokenizer_name": "words",
            },
        }  # fmt: skip


class Clip(nn.Module):
    """An open_clip network with its tokenizer and the preparation of its pictures."""

    def __init__(self, network: Any, words: Words, settings: Mapping[str, Any]):
        """`settings`: what stands in the folder's JSON."""
        super().__init__()
        self.network: Any = network
        self.words, self.settings = words, dict(settings)
        for name in ("mean", "std"):
            values = torch.tensor(settings["preprocess_cfg"][name]).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @classmethod
    def new(cls, config: ClipConfig) -> Clip:
        """An untrained one for scenes; its weights come from torch's global generator."""
        words = Words.of(vocabulary(), config.length)
        preprocess = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "resize_mode": "squash"}
        settings = {"model_cfg": config.open_clip(len(words)), "preprocess_cfg": preprocess}
        return cls(_network(settings["model_cfg"]), words, settings)

    # ---- embeddings

    @property
    def image_size(self) -> int:
        return self.settings["model_cfg"]["vision_cfg"]["image_size"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, W and L: of an embedding, of a text's state, of a text."""
        text = self.settings["model_cfg"]["text_cfg"]
        return self.settings["model_cfg"]["embed_dim"], text["width"], text["context_length"]

    def pixels(self, pictures: np.ndarray | Tensor) -> Tensor:
        """Pictures uint8 [B, H, W, 3] of any size -> what the network takes, float32 [B, 3, S, S]."""
        x = torch.as_tensor(pictures).to(self.mean.device).permute(0, 3, 1, 2).float() / 255
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bicubic", antialias=True).clamp(0, 1)
        return (x - self.mean) / self.std

    def image_features(self, pictures: np.ndarray | Tensor) -> Tensor:
        """Pictures uint8 [B, H, W, 3] -> float32 [B, E], of length 1."""
        return F.normalize(self.network.encode_image(self.pixels(pictures)).float(), dim=-1)

    def text_features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of words int64 [B, L] -> float32 [B, E], of length 1, and the last layer's states [B, L, W].

        States behind END say nothing.
        """
        found = self.network.text.forward_intermediates(
            tokens, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        return F.normalize(found["text_features"].float(), dim=-1), found["text_intermediates"][0].float()

    @torch.no_grad()
    def embed_images(self, pictures: np.ndarray | Tensor) -> Tensor:
        """Pictures uint8 [B, H, W, 3] -> float32 [B, E], of length 1."""
        return self.image_features(pictures)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> float32 [B, E], of length 1."""
        return self.text_features(self.tokens(texts))[0]

    @torch.no_grad()
    def read_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Texts -> embeddings float32 [B, E], states [B, L, W], and bool [B, L]: which states belong to the text."""
        return self.read_tokens(self.tokens(texts))

    @torch.no_grad()
    def read_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`read_texts` for numbers of words int64 [B, L]."""
        ends = (tokens == self.words.number(END)).int().argmax(1, keepdim=True)
        return *self.text_features(tokens), torch.arange(tokens.shape[1], device=tokens.device) <= ends

    def tokens(self, texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(self.words(texts)).to(self.mean.device)

    @torch.no_grad()
    def classify(self, pictures: np.ndarray | Tensor, texts: Sequence[str] | Sequence[Sequence[str]]) -> Tensor:
        """Which text fits each picture best by the cosine, int64 [B]. A class of several texts is their mean."""
        groups = [[text] if isinstance(text, str) else list(text) for text in texts]
        flat = self.embed_texts([text for group in groups for text in group])
        classes = torch.stack([part.mean(0) for part in flat.split([len(group) for group in groups])])
        return (self.embed_images(pictures) @ F.normalize(classes, dim=-1).T).argmax(1)

    # ---- training

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Cross entropy over the batch, both ways (Radford et al. 2021, figure 3). Same words count as the same text.

        batch: pictures uint8 [B, H, W, 3], tokens int64 [B, L].
        """
        with plain_attention(self.mean.device):
            images, (texts, _) = self.image_features(batch["pictures"]), self.text_features(batch["tokens"])
        scale = self.network.logit_scale.clamp(max=HOTTEST).exp()
        logits = scale * images @ texts.T
        same = (batch["tokens"][:, None] == batch["tokens"]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        right = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        return loss, {"right": right.detach(), "scale": scale.detach()}

    # ---- folders

    def save(self, folder: Path) -> None:
        """Writes open_clip's files into an existing folder."""
        import safetensors.torch

        weights = {key: value.contiguous() for key, value in self.network.state_dict().items()}
        safetensors.torch.save_file(weights, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(self.settings, indent=1), encoding="utf-8")
        self.words.save(folder)

    @classmethod
    def load(cls, folder: Path) -> Clip:
        """A model that `save` wrote, in eval mode. Raises DataError when the folder holds none."""
        import safetensors.torch

        try:
            settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            network = _network(settings["model_cfg"])
            words = Words.load(folder, settings["model_cfg"]["text_cfg"]["context_length"])
            network.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
            return cls(network, words, settings).eval()
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise DataError(f"'{folder}' holds no CLIP of whole words in open_clip's format: {error}") from error


def _network(model_cfg: Mapping[str, Any]) -> Any:
    settings = [item for part in model_cfg.values() if isinstance(part, Mapping) for item in part.items()]
    # The tokenizer's name is for open_clip's own loaders; words are read from the folder here.
    foreign = sorted(
        key
        for key, value in settings
        if key.startswith(("hf_", "timm_")) and key != "hf_tokenizer_name" and value not in TIMM.get(key, ())
    )
    if foreign:
        raise ValueError(f"{', '.join(foreign)} would fetch a network from elsewhere")
    from open_clip.model import CustomTextCLIP  # seconds to import, so not before it is needed

    return CustomTextCLIP(**{key: value for key, value in model_cfg.items() if key != "custom_text"})
