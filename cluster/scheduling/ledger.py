"""What is in the memory of one device, and who has its time. Sums only: no clock, no policy, no Ray.

bytes:  weights of resident models + working memory of leases        never above `memory`
slots:  of time: 1 for an accelerator, the cores of a CPU            never above `slots`
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


class Overdrawn(Exception):
    """A booking would take more than the device has. The scheduler looks before it books, so this is a mistake of ours."""


@dataclass(slots=True)
class Resident:
    """A model in a device's memory. `owner`: the client whose process has it, who alone can move it away."""

    bytes: int
    owner: str
    pinned: bool = False
    leaving: bool = False  # its owner was told to move it away; its bytes count until that is done


@dataclass(slots=True)
class Held:
    """What one lease has of a device. A paused one keeps its bytes and has no slots."""

    bytes: int
    slots: int


class Ledger:
    """The books of one device."""

    __slots__ = ("_held_bytes", "_resident_bytes", "held", "memory", "residents", "slots", "slots_taken")

    def __init__(self, memory: int, slots: int) -> None:
        """`memory`: bytes that may be used. `slots`: leases of one slot that may run at the same time."""
        self.memory, self.slots = memory, slots
        self.residents: dict[str, Resident] = {}
        self.held: dict[int, Held] = {}
        self._resident_bytes = self._held_bytes = self.slots_taken = 0

    @property
    def used(self) -> int:
        """Bytes."""
        return self._resident_bytes + self._held_bytes

    @property
    def free(self) -> int:
        """Bytes."""
        return self.memory - self.used

    @property
    def slots_free(self) -> int:
        return self.slots - self.slots_taken

    @property
    def resident_bytes(self) -> int:
        """Bytes of all models that are here."""
        return self._resident_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes of working memory of all leases."""
        return self._held_bytes

    def put(self, model: str, bytes: int, owner: str, *, pinned: bool = False) -> None:
        """Books a model in. Raises Overdrawn."""
        if model in self.residents or bytes > self.free:
            raise Overdrawn(f"model '{model}' of {bytes} bytes; {self.free} are free")
        self.residents[model] = Resident(bytes, owner, pinned)
        self._resident_bytes += bytes

    def drop(self, model: str) -> None:
        """Books a model out."""
        self._resident_bytes -= self.residents.pop(model).bytes

    def hold(self, lease: int, bytes: int, slots: int) -> None:
        """Books a lease in, or the slots of one that was paused. Raises Overdrawn."""
        before = self.held.get(lease)
        more = bytes - (before.bytes if before else 0)
        if more > self.free or slots > self.slots_free or (before is not None and before.slots):
            raise Overdrawn(f"lease {lease} of {bytes} bytes, {slots} slots; free: {self.free}, {self.slots_free}")
        self.held[lease] = Held(bytes, slots)
        self._held_bytes += more
        self.slots_taken += slots

    def pause(self, lease: int) -> None:
        """Books a lease's slots out; its bytes stay."""
        held = self.held[lease]
        self.slots_taken -= held.slots
        held.slots = 0

    def let_go(self, lease: int) -> None:
        """Books a lease out. Nothing happens where it holds nothing."""
        held = self.held.pop(lease, None)
        if held is not None:
            self._held_bytes -= held.bytes
            self.slots_taken -= held.slots


class Working:
    """Working memory of models, as measured: the highest peak seen for each batch size."""

    def __init__(self) -> None:
        self._peaks: dict[str, list[tuple[int, int]]] = {}  # by model: (rows, bytes), rising

    def measure(self, model: str, rows: int, bytes: int) -> None:
        """Tells a peak, in bytes, of a step with so many rows."""
        peaks = self._peaks.setdefault(model, [])
        at = bisect_left(peaks, (rows, 0))
        if at < len(peaks) and peaks[at][0] == rows:
            peaks[at] = (rows, max(bytes, peaks[at][1]))
        else:
            peaks.insert(at, (rows, bytes))

    def forget(self, model: str) -> None:
        self._peaks.pop(model, None)

    def bytes(self, model: str, rows: int) -> int:
        """What a step of so many rows needs: the peak of the next larger batch measured, or the largest one's scaled up.

        0 where nothing was measured: the first to run measures it.
        """
        peaks = self._peaks.get(model)
        if not peaks:
            return 0
        at = bisect_left(peaks, (rows, 0))
        if at < len(peaks):
            return peaks[at][1]
        most_rows, most = peaks[-1]
        return -(-most * rows // most_rows)
