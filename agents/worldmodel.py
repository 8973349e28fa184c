"""V and M together, as they cross processes and as they run beside the simulator.

A world model travels as a tree of plain values and arrays (`pack`), keyed by its content; a worker builds the modules once for each
key (`unpack`). `Senses` is what an agent does at each step of a real episode: see (V), and remember (M).

Shapes: n rows (episodes under way), Z latent, H hidden, A action.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from oneira.generative.vae import VAE, VAEConfig, fast_encoder
from oneira.platform.config import from_dict, to_dict

from . import kernels
from .controller import ControllerConfig
from .dreaming import DreamModel, _Member
from .memory import MDNRNN, MemoryConfig, pack_state_dict, read_actions

M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class WorldModel:
    """V, the members of M's ensemble (usually one), and the controller that fits them."""

    key: str
    world: str
    vision: VAE
    members: tuple[MDNRNN, ...]
    controller: ControllerConfig


def _arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in module.state_dict().items()}


def pack(world: str, vision: VAE, members: list[MDNRNN], controller: ControllerConfig) -> dict[str, Any]:
    """The tree of a world model; `tree["key"]` is the sha256 of everything in it."""
    tree = {
        "world": world,
        "vision": {"config": to_dict(vision.config), "weights": _arrays(vision)},
        "memory": {"config": to_dict(members[0].config), "members": [_arrays(m) for m in members]},
        "controller": to_dict(controller),
    }
    return {"key": digest(tree), **tree}


def digest(tree: Any) -> str:
    """sha256 over names, values and bytes of a tree, in order of its keys."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value):
                sha.update(key.encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        elif isinstance(value, np.ndarray):
            sha.update(f"{value.dtype}{value.shape}".encode())
            sha.update(np.ascontiguousarray(value).tobytes())
        else:
            sha.update(repr(value).encode())

    feed(tree)
    return sha.hexdigest()


def load_into(module: M, weights: Mapping[str, Any]) -> M:
    """Fill a module with copied weights and put it in eval mode."""
    tensors = {name: torch.tensor(v) if isinstance(v, np.ndarray) else v.clone() for name, v in weights.items()}
    module.load_state_dict(tensors)
    return module.eval()


_KEPT: dict[str, WorldModel] = {}


def unpack(tree: Mapping[str, Any]) -> WorldModel:
    """The modules of a tree; the last two keys are kept built."""
    key = tree["key"]
    if key not in _KEPT:
        with torch.inference_mode(False):  # whoever asks first, the weights must serve gradients too
            model = _build(tree)
        while len(_KEPT) >= 2:
            _KEPT.pop(next(iter(_KEPT)))
        _KEPT[key] = model
    return _KEPT[key]


def _build(tree: Mapping[str, Any]) -> WorldModel:
    vision = load_into(VAE(from_dict(VAEConfig, tree["vision"]["config"])), tree["vision"]["weights"])
    config = from_dict(MemoryConfig, tree["memory"]["config"])
    members = tuple(load_into(MDNRNN(config), weights) for weights in tree["memory"]["members"])
    return WorldModel(tree["key"], tree["world"], vision, members, from_dict(ControllerConfig, tree["controller"]))


class Senses:
    """What the rows of a batch of real episodes know: z from the frame before them, h from all that came before.

    Only rows under way are held; `keep` drops the others. The first member of M's ensemble is the one that remembers.
    """

    def __init__(self, model: WorldModel, num_envs: int) -> None:
        self.encode = _kept("encode", model, lambda: fast_encoder(model.vision))
        self.member: _Member = _kept(
            "member", model, lambda: _Member(pack_state_dict(model.members[0]), model.members[0].config)
        )
        self.config = model.members[0].config
        self.with_memory = model.controller.features != "z"
        self.with_cell = model.controller.features == "zch"
        self.num_envs = num_envs
        self.reward = np.zeros(num_envs, np.float32)  # what the last step brought; M's expectation where nobody says
        self._known = np.zeros((num_envs, self.config.z + self.config.hidden), np.float32)
        self._cell = np.zeros((num_envs, self.config.hidden), np.float32)

    def see(self, frames: np.ndarray) -> np.ndarray:
        """frames uint8 [n, 64, 64, 3] -> features float32 [n, F] as the controller takes them, perhaps a view that the next call overwrites."""
        size = self.config.z
        self._known[:, :size] = np.asarray(self.encode(frames)[0])
        if self.with_cell:
            return np.concatenate([self._known[:, :size], self._cell, self._known[:, size:]], 1)
        return self._known if self.with_memory else self._known[:, :size]

    def remember(self, actions: np.ndarray, rewards: np.ndarray | None = None) -> None:
        """Take in the step: actions float32 [n, A] or int64 [n]; `rewards` float [n] is what they brought, which M reads at the next step."""
        config = self.config
        if self.with_memory:
            parts = [torch.from_numpy(self._known), read_actions(actions, config)]
            if config.reward_input:
                parts.append(torch.from_numpy(self.reward / np.float32(config.reward_scale))[:, None])
            low = torch.cat(parts, 1).bfloat16()
            gates = torch.mm(low, self.member.gates)
            kernels.lstm_dream(
                kernels.bits(gates), self.member.gates_bias, self._cell, self._known, kernels.bits(low), config.z
            )
        if rewards is not None:
            self.reward = np.asarray(rewards, np.float32)
        elif config.reward_input and self.with_memory:
            h = self._known[:, config.z :]
            self.reward = (h @ self.member.outcome[0] + self.member.outcome_bias[0]) * np.float32(config.reward_scale)

    def keep(self, mask: np.ndarray) -> None:
        """Go on with these rows alone; mask bool [n]."""
        self._known, self._cell, self.reward = self._known[mask], self._cell[mask], self.reward[mask]
        self.num_envs = len(self._known)

    def forget(self, mask: np.ndarray) -> None:
        """New episodes begin in these rows; mask bool [n]."""
        self._known[mask], self._cell[mask], self.reward[mask] = 0, 0, 0


_BUILT: dict[tuple[str, str], Any] = {}


def _kept(kind: str, model: WorldModel, build: Any) -> Any:
    """Something made of a world model, made once for each key; the last four are kept."""
    if (kind, model.key) not in _BUILT:
        while len(_BUILT) >= 4:
            _BUILT.pop(next(iter(_BUILT)))
        _BUILT[kind, model.key] = build()
    return _BUILT[kind, model.key]


def dream_model(model: WorldModel) -> DreamModel:
    """The packed dream of a world model."""
    return _kept("dream", model, lambda: DreamModel(list(model.members), model.members[0].config))
