"""What stages have found before: embeddings of prompts, by the weights that made them. Bounded in bytes.

    prompt                              -> what the text stage says of it
    model, prompt, seed, guidance, steps       -> the prior's image embedding

Only plain requests are remembered (a prompt, no picture). Two models that have the same CLIP share what it said.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .models import kind_of

if TYPE_CHECKING:
    from oneira.multimodal.stages import Stage, State

CACHED = ("text", "prior")  # kinds of stages
ENTRY_BYTES = 512  # of a key and what holds the arrays, about
MOST_BYTES = 64 << 20

Key = tuple[Any, ...]
Digests = Mapping[tuple[str, str], str]  # of the weights and settings, by (model, stage)


class Cache:
    """The entries of one kind of stage; the one that was used longest ago goes first. `bytes` never exceeds `most`."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self._entries: OrderedDict[Key, State] = OrderedDict()

    def __contains__(self, key: Key | None) -> bool:
        return key in self._entries

    def get(self, key: Key) -> State | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: Key, found: State) -> None:
        size = _size(key, found)
        if key in self._entries or size > self.most:
            return
        # A row of a batch keeps all of its batch: it is copied.
        self._entries[key] = {name: array.copy() if array.base is not None else array for name, array in found.items()}
        self.bytes += size
        while self.bytes > self.most:
            self.bytes -= _size(*self._entries.popitem(last=False))


def _size(key: Key, found: State) -> int:
    words = sum(len(part.encode()) for part in key if isinstance(part, str))
    return ENTRY_BYTES + words + sum(array.nbytes for array in found.values())


def key_of(digests: Digests, model: str, stage: str, request: Any) -> Key | None:
    """What a stage's result depends on; None where it is not remembered."""
    kind = kind_of(stage)
    if kind not in CACHED or getattr(request, "task", None) != "generate" or request.picture is not None:
        return None
    mine = digests.get((model, stage))
    if mine is None:
        return None
    if kind == "text":
        return mine, request.prompt
    return model, mine, digests.get((model, "text"), ""), request.prompt, request.seed, request.guidance, request.steps


def digest_of(stage: Stage, networks: Sequence[Any]) -> str:
    """sha256 of a stage's weights, and of the numbers and words that it was made with."""
    import torch

    said = hashlib.sha256(type(stage).__qualname__.encode())
    for name, value in sorted(vars(stage).items()):
        if isinstance(value, (str, int, float)):
            said.update(f"{name}={value!r};".encode())
    for network in networks:
        for name, tensor in network.state_dict().items():
            said.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            said.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return said.hexdigest()
