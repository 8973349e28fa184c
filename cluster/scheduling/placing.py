"""Devices as the scheduler sees them, and which of them takes a lease that names none.

A lease goes where its answer is expected soonest: to the device with its model whose line is shortest, or, where the wait
there is longer than restoring the model takes, to the device that is free first and gives up least for it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator

from .leases import RANK, Lease, Line
from .ledger import Ledger
from .residency import Host

LOOKED_AT = 4  # devices free first, of which the one that gives up least is taken


class Place:
    """One device: its books, those that run, those that wait."""

    __slots__ = (
        "_limits", "_memory", "ended", "host", "kind", "ledger", "line", "name", "node", "running", "step", "using", "wanted",
    )  # fmt: skip

    def __init__(self, name: str, memory: int, slots: int, node: str, host: Host, kind: str = "cpu") -> None:
        self.name, self.node, self.host, self.kind = name, node, host, kind
        self.ledger, self.line = Ledger(memory, slots), Line()
        self._memory, self._limits = memory, dict[str, int]()
        self.running: dict[int, Lease] = {}
        self.using: dict[str, int] = {}  # by model: leases that run or are paused
        self.wanted: dict[str, int] = {}  # by model: all leases
        self.step = 0.0  # seconds of a step of those that can pause, as measured
        self.ended = 0.0  # when it last did something

    def limit(self, client: str, memory: int | None) -> bool:
        """A client's limit of the device's bytes, or None for none. The lowest counts. Whether it had one before."""
        before = self._limits.pop(client, None)
        if memory is not None:
            self._limits[client] = memory
        self.ledger.memory = min([self._memory, *self._limits.values()])
        return before is not None

    def until(self) -> float:
        """When all that is known to be ahead is done; in the past where nothing is."""
        end = self.ended
        if self.ledger.slots_taken >= self.ledger.slots:
            for lease in self.running.values():
                if lease.seconds != math.inf:
                    end = max(end, lease.granted + lease.restore + lease.seconds)
        return end + sum(self.line.work) / self.ledger.slots

    def missing(self, lease: Lease, model_bytes: int) -> int:
        """Bytes that the lease needs here beside those it has, those that are free and those on their way out."""
        more = 0 if lease.id in self.ledger.held else lease.bytes
        if lease.model is not None and lease.model not in self.ledger.residents:
            more += model_bytes
        if more <= self.ledger.free:
            return 0
        return more - self.ledger.free - sum(r.bytes for r in self.ledger.residents.values() if r.leaving)

    def removable(self, lease: Lease, *, wanted: bool) -> list[tuple[str, int]]:
        """(model, bytes) that may go for it: nobody uses them, and, unless `wanted`, nobody waits for them."""
        busy = self.using if wanted else self.wanted
        return [
            (name, resident.bytes)
            for name, resident in self.ledger.residents.items()
            if not resident.pinned and not resident.leaving and not busy.get(name) and name != lease.model
        ]

    def slots_in(self, lease: Lease, now: float, *, hoping: bool = False) -> float:
        """Seconds until those that run leave it enough slots. `hoping`: its equals of unknown length are about to end."""
        short = lease.slots - self.ledger.slots_free
        if short <= 0:
            return 0.0
        waits = []
        for other in self.running.values():
            done = other.granted + other.restore + other.seconds - now
            if RANK[lease.priority] < RANK[other.priority]:
                due = 0.0 if other.turn > lease.turn else other.safe_until - now
            elif hoping and other.seconds == math.inf and other.priority == lease.priority:
                due = 0.0
            else:
                due = max(lease.turn, other.safe_until) - now
            waits.append((max(0.0, min(done, due + (other.step or self.step))), other.slots))
        for wait, slots in sorted(waits):
            short -= slots
            if short <= 0:
                return wait
        return math.inf

    def wait(self, lease: Lease, now: float, *, hoping: bool = False) -> float:
        """Seconds until it would begin, if it came to the line now."""
        ahead = sum(self.line.work[: RANK[lease.priority] + 1]) / self.ledger.slots
        return self.slots_in(lease, now, hoping=hoping) + ahead


class Soonest:
    """The devices of a set in the order in which they are free. What is stored for one may be too early, never too late."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._stored: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, name: str, until: float) -> None:
        """Adds a device, or tells that it is free earlier than before."""
        if until < self._stored.get(name, math.inf):
            self._stored[name] = until
            heapq.heappush(self._heap, (until, name))
            if len(self._heap) > 2 * len(self._stored) + 8:  # most of it is of devices that were removed
                self._heap = [(until, name) for name, until in self._stored.items()]
                heapq.heapify(self._heap)

    def remove(self, name: str) -> None:
        self._stored.pop(name, None)

    def first(self, until: Callable[[str], float], count: int = 1) -> list[str]:
        """Up to `count` devices, the one that is free first before the others."""
        found = list(self._in_order(until, count))
        for name in found:
            heapq.heappush(self._heap, (self._stored[name], name))
        return found

    def _in_order(self, until: Callable[[str], float], count: int) -> Iterator[str]:
        heap, stored = self._heap, self._stored
        while heap and count:
            then, name = heap[0]
            if stored.get(name) != then:
                heapq.heappop(heap)
                continue
            now = until(name)
            if now > then:
                stored[name] = now
                heapq.heapreplace(heap, (now, name))
                continue
            heapq.heappop(heap)
            count -= 1
            yield name
