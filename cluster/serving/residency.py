"""Models of one process that share a device's memory: which are on it now, and how they come and go.

    residents = Residents(["a", "b"], loader, ClusterDevice())       # loads each once, to know its size
    residents.take("a")                                              # waits for room, brings it; it stays until ...
    residents.stage("a", "decoder").step(plans)
    residents.give("a")                                              # ... others may have its room

A model is hot (on the device), warm (its networks in the host's memory) or cold (on disk). What leaves for what is the
scheduler's decision; here it is done. A model that is larger than what the files say is known by its size only once it was
loaded: while the first load of a model lasts, the process may have more in memory than it was given.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

from .caches import CACHED, digest_of
from .models import KINDS, kind_of, load_model, must_be_new

if TYPE_CHECKING:
    from torch import nn

    from oneira.multimodal.stages import Stage

SHORTEST, LONGEST = 0.25, 5.0  # seconds for which a model is used before it gives way; else twice what bringing it took


class Use(Protocol):
    """A model's right to be on the device. `load`: whoever has it brings it there. `recalled`: somebody waits for its room."""

    load: bool
    recalled: bool


class Memory(Protocol):
    """Who shares out a device's memory; `ClusterDevice` is one."""

    def add_model(self, model: str, bytes: int, leave: Callable[[str], None]) -> None: ...

    def keep(self, model: str) -> Any: ...

    def let_go(self, lease: Any) -> None: ...

    def loaded(self, lease: Any, seconds: float, state: str) -> None: ...

    def out_of_memory(self, lease: Any) -> bool: ...

    def expect(self, model: str) -> float: ...

    def count(self, model: str, times: int) -> None: ...

    def is_worth(self, model: str) -> bool: ...


class Kept:
    """Models that all stay where they are: the shelf of an engine that shares its device with nobody."""

    def __init__(self, models: Mapping[str, Sequence[Stage]]) -> None:
        self._stages = {name: {stage.name: stage for stage in stages} for name, stages in models.items()}
        self.names = {name: list(stages) for name, stages in self._stages.items()}
        self.held: Collection[str] = list(self.names)
        self.digests = {
            (model, name): digest
            for model, stages in self._stages.items()
            for name, digest in _digests(list(stages.values())).items()
        }

    def stage(self, model: str, name: str) -> Stage:
        return self._stages[model][name]

    def states(self) -> dict[str, str]:
        return dict.fromkeys(self.names, "hot")

    def take(self, model: str) -> None:
        return None

    def give(self, model: str) -> None:
        return None

    def is_due(self, model: str) -> bool:
        return False

    def make_room(self, model: str) -> bool:
        return False

    def expect(self, model: str) -> float:
        return 0.0

    def count(self, model: str, times: int) -> None:
        return None

    def is_worth(self, model: str) -> bool:
        return False


class Residents:
    """The shelf of an engine on a shared device. `take` may be called in several threads, for different models.

    Attributes:
        names: of the stages, by model. held: models that were taken and not given back. digests: see `caches`.
    """

    def __init__(self, names: Sequence[str], loader: str, memory: Memory, kinds: Sequence[str] = KINDS) -> None:
        """As `models.load_models`, and raises what `Memory.keep` raises where one model alone is too large."""
        self._memory = memory
        self._loads: dict[str, Callable[[], Sequence[Stage]]] = {}
        self._stages: dict[str, dict[str, Stage]] = {}
        self._states: dict[str, str] = {}
        self._seconds: dict[str, float] = {}  # that bringing a model took last
        self._since: dict[str, float] = {}
        self.names: dict[str, list[str]] = {}
        self.held: dict[str, Use] = {}
        self.digests: dict[tuple[str, str], str] = {}
        for name in names:
            began = time.perf_counter()
            model, stages = load_model(name, loader, kinds)
            must_be_new(model, self.names)
            self.names[model] = [stage.name for stage in stages]
            if stages:
                self._put(model, stages)
                self._seconds[model] = time.perf_counter() - began
                self.digests |= {(model, stage): digest for stage, digest in _digests(stages).items()}
                self._loads[model] = partial(_stages, name, loader, kinds)
                memory.add_model(model, size_of(stages), partial(self._leave, model))
                self.take(model)
                self.give(model)

    def stage(self, model: str, name: str) -> Stage:
        """A stage of a model that was taken."""
        return self._stages[model][name]

    def states(self) -> dict[str, str]:
        """hot, warm or cold, by model."""
        return dict(self._states)

    def take(self, model: str) -> None:
        """Returns when the model is on the device; it stays there until `give`.

        Raises:
            Busy: there is no room now. ClusterError, Interrupted: see `ClusterDevice.keep`. Whatever its loader raises.
        """
        use = self._memory.keep(model)
        try:
            if use.load or self._states[model] != "hot":
                self._bring(model, use)
        except BaseException:
            self._memory.let_go(use)
            raise
        self.held[model], self._since[model] = use, time.monotonic()

    def give(self, model: str) -> None:
        """Others may have its room; it stays until they want it."""
        self._memory.let_go(self.held.pop(model))

    def is_due(self, model: str) -> bool:
        """Whether somebody waits for the room of a model that has been used for long enough since it came."""
        hold = min(max(SHORTEST, 2 * self._seconds[model]), LONGEST)
        return self.held[model].recalled and time.monotonic() - self._since[model] >= hold

    def make_room(self, model: str) -> bool:
        """The device had no memory for a step of a model that was taken. True: others have left, try once more."""
        return self._memory.out_of_memory(self.held[model])

    def expect(self, model: str) -> float:
        """Seconds until a model would be there and the device free."""
        return self._memory.expect(model)

    def count(self, model: str, times: int) -> None:
        """Tells that a model was asked for."""
        self._memory.count(model, times)

    def is_worth(self, model: str) -> bool:
        """Whether a model that is not here should come, whatever leaves for it."""
        return self._memory.is_worth(model)

    def _bring(self, model: str, use: Use) -> None:
        state = self._states[model]
        if state != "hot":  # at its first time it was loaded to be measured
            began = time.perf_counter()
            try:
                self._fetch(model)
            except Exception as error:
                if not is_out_of_memory(error) or not self._memory.out_of_memory(use):
                    raise
                self._fetch(model)
            self._seconds[model] = time.perf_counter() - began
        self._memory.loaded(use, self._seconds[model], "warm" if state == "warm" else "cold")

    def _fetch(self, model: str) -> None:
        if self._states[model] == "warm":
            place = _place()
            for network in networks_of(self._stages[model].values()):
                network.to(place)
            self._states[model] = "hot"
        else:
            self._put(model, self._loads[model]())

    def _put(self, model: str, stages: Sequence[Stage]) -> None:
        networks_of(stages)  # those that come when they are first used come now
        self._stages[model] = {stage.name: stage for stage in stages}
        self._states[model] = "hot"

    def _leave(self, model: str, to: str) -> None:
        """Nobody uses the model, and somebody else needs its room."""
        if to == "warm":
            for network in networks_of(self._stages[model].values()):
                network.to("cpu")
        else:
            self._stages.pop(model, None)
        self._states[model] = to
        _release_memory()


def _stages(name: str, loader: str, kinds: Sequence[str]) -> Sequence[Stage]:
    return load_model(name, loader, kinds)[1]


def networks_of(stages: Any) -> list[nn.Module]:
    """The networks of stages, each once; one that a stage would load when it is first used is loaded."""
    from torch import nn

    found: dict[int, nn.Module] = {}
    for stage in stages:
        for kind in type(stage).__mro__:
            for name, value in vars(kind).items():
                if isinstance(value, cached_property):
                    getattr(stage, name)
        for value in vars(stage).values():
            if isinstance(value, nn.Module):
                found[id(value)] = value
    return list(found.values())


def size_of(stages: Sequence[Stage]) -> int:
    """Bytes of the stages' weights."""
    tensors = {
        id(tensor): tensor
        for network in networks_of(stages)
        for tensor in (*network.parameters(), *network.buffers())
    }  # fmt: skip
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _digests(stages: Sequence[Stage]) -> dict[str, str]:
    """Of the stages whose results may be remembered, by name."""
    return {stage.name: digest_of(stage, networks_of([stage])) for stage in stages if kind_of(stage.name) in CACHED}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that the device's memory, or the host's, was not enough."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _place() -> Any:
    from oneira.platform.devices import pick_device

    return pick_device()


def _release_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
