"""Where models are: HOT (on a device), WARM (in the node's memory), COLD (on disk); and which of them give way.

What it costs to lose a model is what it takes to bring it back, as often as it will be asked for: seconds to restore it,
times asks a second, shared among its copies. Of all sets of models that make enough room the one with the least cost goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

State = Literal["hot", "warm", "cold"]
HALF_LIFE = 30.0  # seconds after which an ask counts half
SMOOTHING = 0.3  # of measured seconds of restoring
WARM_BYTES_PER_SECOND = 8e9  # until something was measured: host to device
COLD_BYTES_PER_SECOND = 1e9  # … disk to device
EXACT = 10  # candidates up to which all sets are looked at


def cheapest(candidates: Sequence[tuple[str, int, float]], need: int) -> list[str] | None:
    """The names of the set that frees at least `need` bytes at the least cost; of equal ones that with fewest bytes.

    Exact for up to 10 candidates; for more, those with the least cost per byte, without any that the others make needless.

    Args:
        candidates: (name, bytes, cost >= 0).

    Returns:
        None where all together are too small.
    """
    if need <= 0:
        return []
    if sum(bytes for _, bytes, _ in candidates) < need:
        return None
    if len(candidates) <= EXACT:
        return _exact(candidates, need)
    chosen, freed = [], 0
    for candidate in sorted(candidates, key=lambda c: c[2] / max(c[1], 1)):
        chosen.append(candidate)
        freed += candidate[1]
        if freed >= need:
            break
    for candidate in sorted(chosen, key=lambda c: -c[2]):
        if freed - candidate[1] >= need:
            chosen.remove(candidate)
            freed -= candidate[1]
    return [name for name, _, _ in chosen]


def _exact(candidates: Sequence[tuple[str, int, float]], need: int) -> list[str]:
    best: tuple[float, float, list[str]] = (math.inf, math.inf, [])
    ordered = sorted(candidates, key=lambda c: -c[1])
    left = [0] * (len(ordered) + 1)  # bytes of all from here on
    for i in range(len(ordered) - 1, -1, -1):
        left[i] = left[i + 1] + ordered[i][1]

    def look(i: int, freed: int, cost: float, names: list[str]) -> None:
        nonlocal best
        if freed >= need:
            if (cost, freed) < best[:2]:
                best = (cost, freed, names)
            return
        if freed + left[i] < need or cost > best[0]:
            return
        name, bytes, price = ordered[i]
        look(i + 1, freed + bytes, cost + price, [*names, name])
        look(i + 1, freed, cost, names)

    look(0, 0, 0.0, [])
    return best[2]


class Demand:
    """Asks a second for each model, of late."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}  # (weight, time)

    def count(self, model: str, now: float, times: int = 1) -> None:
        weight, then = self._seen.get(model, (0.0, now))
        self._seen[model] = (weight * 0.5 ** ((now - then) / HALF_LIFE) + times, now)

    def forget(self, model: str) -> None:
        self._seen.pop(model, None)

    def rate(self, model: str, now: float) -> float:
        """Asks a second."""
        weight, then = self._seen.get(model, (0.0, now))
        return weight * 0.5 ** ((now - then) / HALF_LIFE) * math.log(2) / HALF_LIFE


class Restoring:
    """Seconds from WARM or COLD to HOT, as measured; until then guessed from bytes."""

    def __init__(self, warm: float = WARM_BYTES_PER_SECOND, cold: float = COLD_BYTES_PER_SECOND) -> None:
        """`warm`, `cold`: bytes a second that are believed until a model was measured."""
        self._rates: dict[State, float] = {"warm": warm, "cold": cold}
        self._measured: dict[tuple[str, State], float] = {}

    def measure(self, model: str, state: State, seconds: float) -> None:
        """Tells what restoring took."""
        before = self._measured.get((model, state), seconds)
        self._measured[model, state] = before + SMOOTHING * (seconds - before)

    def forget(self, model: str) -> None:
        self._measured = {key: value for key, value in self._measured.items() if key[0] != model}

    def seconds(self, model: str, state: State, bytes: int) -> float:
        if state == "hot":
            return 0.0
        return self._measured.get((model, state)) or bytes / self._rates[state]


class Host:
    """Models kept in a node's memory, as many as fit into `memory` bytes. 0 keeps none: those are COLD."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.models: dict[str, int] = {}
        self.used = 0

    def keep(self, model: str, bytes: int, costs: Sequence[tuple[str, int, float]], cost: float) -> list[str] | None:
        """Makes a model WARM if that costs less than what has to go for it.

        Args:
            costs: (name, bytes, cost) of the models here. cost: of this one.

        Returns:
            Models that become COLD for it, or None: it becomes COLD itself.
        """
        if model in self.models:
            return []
        gone = cheapest(costs, self.used + bytes - self.memory)
        if gone is None or sum(price for name, _, price in costs if name in gone) > cost:
            return None
        for name in gone:
            self.forget(name)
        self.models[model] = bytes
        self.used += bytes
        return gone

    def forget(self, model: str) -> None:
        self.used -= self.models.pop(model, 0)
