"""Leases: what is asked for, in which order it is given, and what its client is told.

The order is a time, the lease's turn: when it asked, and as many seconds on as its priority can wait. Who asks later
with a more urgent priority goes first, but not for ever: one `batch` lease is passed by the `interactive` ones of the
next minute and by no other. Since a turn never changes while it waits, a heap holds the line.

A lease that runs is paused for one with an earlier turn. Once it has run for `QUANTUM` seconds its own turn is the one that
it would get if it asked now; before, it keeps the one it had, and where that has come nobody takes the device from it.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Literal

from oneira.platform.devices import PRIORITIES, Priority

CAN_WAIT: dict[str, float] = {"interactive": 0.0, "dream": 5.0, "train": 15.0, "batch": 60.0}  # seconds
RANK = {priority: rank for rank, priority in enumerate(PRIORITIES)}
QUANTUM = 0.5  # seconds
LONGEST = 5.0  # seconds for which a lease of known length is left alone by its equals


@dataclass(slots=True, eq=False)
class Lease:
    """Everything about one ask, from asking to the end.

    Attributes:
        client: whose it is. device: where; "" until it is placed. model: that must be resident, or none.
        rows: of its batch. bytes: of working memory. slots: of the device's time.
        seconds: that it is expected to take, infinite where nobody knows. deadline: when it must be done (where seconds
            are known) or begun. turn: see above. Times are the clock's.
    """

    id: int
    client: str
    priority: Priority
    asked: float
    device: str = ""
    model: str | None = None
    rows: int = 1
    bytes: int = 0
    slots: int = 1
    seconds: float = math.inf
    deadline: float = math.inf
    turn: float = 0.0
    named: bool = False  # its client asked for this device
    restore: float = 0.0  # seconds for its model, where that was not on the device when it was placed
    state: Literal["waiting", "running", "paused"] = "waiting"
    granted: float = 0.0
    ran: float = 0.0  # seconds since it got its turn, without those since it was granted
    yielding: bool = False  # it was told to pause
    recalled: bool = False  # it was told that somebody waits
    began: float = math.inf  # when it was first granted
    gone: bool = False
    step: float = 0.0  # seconds of one of its steps, as measured

    @property
    def work(self) -> float:
        """Seconds of slots that it is known to take."""
        return 0.0 if self.seconds == math.inf else (self.seconds + self.restore) * self.slots

    @property
    def safe_until(self) -> float:
        """Until then it keeps its turn: for a quantum, or what it is expected to take where that is not much longer."""
        return (
            self.granted
            - self.ran
            + (QUANTUM if self.seconds == math.inf else max(QUANTUM, min(self.seconds, LONGEST)))
        )

    def standing(self, now: float) -> float:
        """The turn that counts for one that runs."""
        return self.turn if now < self.safe_until else now + CAN_WAIT[self.priority]

    def gives_way_to(self, other: Lease, now: float) -> bool:
        """Whether it is to pause for another at its next step."""
        urgent = RANK[other.priority] < RANK[self.priority] or other.turn <= now
        return urgent and other.turn < self.standing(now)


class Line:
    """Leases that wait for one device, by turn."""

    __slots__ = ("_added", "_heap", "_live", "work")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Lease]] = []
        self._live: dict[int, int] = {}  # lease -> the number under which it was added last
        self._added = 0
        self.work = [0.0] * len(PRIORITIES)  # seconds of slots, by rank

    def __len__(self) -> int:
        return len(self._live)

    def add(self, lease: Lease) -> None:
        self._added += 1
        heapq.heappush(self._heap, (lease.turn, lease.id, self._added, lease))
        self._live[lease.id] = self._added
        self.work[RANK[lease.priority]] += lease.work

    def remove(self, lease: Lease) -> None:
        """Takes a lease out. Its place in the heap is cleared when it comes up."""
        if self._live.pop(lease.id, None) is not None:
            rank = RANK[lease.priority]
            self.work[rank] = max(0.0, self.work[rank] - lease.work) if self._live else 0.0

    def head(self) -> Lease | None:
        heap = self._heap
        while heap and self._live.get(heap[0][1]) != heap[0][2]:
            heapq.heappop(heap)
        return heap[0][3] if heap else None

    def in_order(self) -> list[Lease]:
        """All of them, by turn."""
        self._heap = sorted(entry for entry in self._heap if self._live.get(entry[1]) == entry[2])
        return [entry[3] for entry in self._heap]


# What clients are told ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Granted:
    """The lease runs from now on. `load`: its client brings the model to the device first.

    One that the client did not ask for is there for that alone: it loads the model, and releases the lease.
    """

    lease: int
    client: str
    device: str
    load: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Somebody waits for what the lease has. `pause`: it is to pause at its next step; else only when it is not in use."""

    lease: int
    client: str
    pause: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """The lease will not be given. `retry_after`: seconds until asking again should do; None: never, as it is."""

    lease: int
    client: str
    why: str
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The lease was taken back: its work stops at the next step."""

    lease: int
    client: str


@dataclass(frozen=True, slots=True)
class Move:
    """The owner of a model moves it away from the device, and says so (`Scheduler.moved`)."""

    model: str
    client: str
    device: str
    to: Literal["warm", "cold"]


@dataclass(frozen=True, slots=True)
class Drop:
    """A WARM model gives way in its node's memory: its owner forgets it."""

    model: str
    client: str


Event = Granted | Wanted | Refused | Cancelled | Move | Drop


@dataclass(slots=True)
class Model:
    """A model that may be asked for. `devices`: where it is HOT. `coming`: the lease that brings it to one more.

    owner: the client that had it last. only: the client whose own copy it is, with whom it ends; empty for none. again: when bringing it may be thought of next.
    """

    name: str
    bytes: int
    devices: set[str] = field(default_factory=set)
    coming: int = 0
    owner: str = ""
    only: str = ""
    again: float = 0.0
