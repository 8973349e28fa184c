"""A device whose time the cluster's scheduler grants: the `Device` of `platform/devices.py` in a process that is on Ray.

    device = ClusterDevice()
    with device.lease(priority="train", bytes=...) as lease:
        for batch in batches:
            lease.step()              # looks at one flag; waits where somebody more urgent takes the device
            ...

A thread listens to the scheduler. A lease that its block has left stays with the process for a while, unless somebody
waits, and serves the next block that asks for the same: short blocks in a row cost no round trip each.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneira.platform.devices import Priority, check_priority, memory_bytes, num_cores, pick_device
from oneira.platform.errors import ClusterError, Interrupted

from ..connection import before_leaving
from .actor import MOVE_SECONDS, REJOIN_SECONDS, find_desk

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
ROOM_SECONDS = 20.0  # for which a model waits for room on a device
LINGER_SECONDS = 2.0  # for which a lease stays after its block
USABLE = 0.9  # of a device's memory
BEAT_SECONDS = 1.0  # between two signs of life; see SILENCE_SECONDS of the actor
CLOSE_SECONDS = 3.0  # for the listener to end
RETRY_SECONDS = 0.1  # between two tries to reach a scheduler that is being started again
JOIN_SECONDS = 30.0  # for which a new client tries: the scheduler's machine may just have died
SMOOTHING = 0.1  # of the seconds of a step
EVICT_SECONDS = MOVE_SECONDS + 5.0  # for the scheduler to send models away
EXPECT_SECONDS = 1.0  # for the scheduler to say how long a wait would be


class Busy(ClusterError):
    """The device cannot be had before the deadline. `retry_after`: seconds until it should."""

    def __init__(self, why: str, retry_after: float) -> None:
        super().__init__(f"The device was not granted: {why}. It should do in {retry_after:.1f} s.")
        self.why, self.retry_after = why, retry_after

    def __reduce__(self) -> tuple[type[Busy], tuple[str, float]]:
        return type(self), (self.why, self.retry_after)  # so that it comes back whole from another process


class ClusterLease:
    """A lease of one block. Belongs to the block's thread; the listener's thread sets its flags."""

    def __init__(self, session: _Session, number: int, fields: dict[str, Any], deadline: float | None) -> None:
        self.number, self.fields = number, fields
        self.until = None if deadline is None else time.monotonic() + deadline
        self.state = "waiting"
        self.in_use = True
        self.recalled = self.cancelled = False
        self.refused: dict[str, Any] | None = None
        self.load = False  # its model is to be brought to the device
        self.left = 0.0  # when its last block ended
        self.step_seconds = 0.0
        self._session, self._stepped = session, 0.0
        self._attention = False  # step() has to look
        self._news = threading.Event()

    def step(self) -> None:
        """Between two steps. Waits while somebody more urgent has the device. Raises Interrupted where it was cancelled."""
        if self._attention:
            self._attend()
        now = time.perf_counter()
        if self._stepped:
            took = now - self._stepped
            self.step_seconds += (SMOOTHING if self.step_seconds else 1.0) * (took - self.step_seconds)
        self._stepped = now

    def _attend(self) -> None:
        self._attention = False
        if not self.cancelled:
            self._news.clear()
            self._session.paused(self)
            self.wait()
        if self.cancelled:
            raise Interrupted("The lease of the device was cancelled.")
        self._stepped = 0.0

    def wait(self, seconds: float | None = None) -> None:
        """Until it is granted, refused or cancelled, or so many seconds have gone by."""
        end = None if seconds is None else time.monotonic() + seconds
        while not (self.state == "running" or self.cancelled or self.refused):
            if not self._news.wait(None if end is None else max(0.0, end - time.monotonic())):
                return
            self._news.clear()

    def hear(self, letter: dict[str, Any]) -> None:
        """In the listener's thread."""
        kind = letter["kind"]
        if self.refused is not None:  # what comes now is for an ask that came twice
            return
        if kind == "Granted":
            self.load, self.recalled = letter["load"] is not None, False
            self.state = "running"  # last: whoever waits may look at any time
        elif kind == "Wanted":
            self.recalled = True
            self._attention = self._attention or letter["pause"]
        elif kind == "Refused":
            self.refused = letter
        elif kind == "Cancelled":
            self.cancelled = self._attention = True
        self._news.set()

    def held(self) -> dict[str, Any]:
        """What a scheduler that was started again is told of it."""
        return {"number": self.number, "state": self.state, **self.fields}


class _Session:
    """This process as the scheduler knows it."""

    def __init__(self) -> None:
        import psutil

        self.desk = find_desk()
        self.host = socket.gethostname()
        self.id = f"{self.host}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.about = {"id": self.id, "host": self.host, "pid": os.getpid(), "born": psutil.Process().create_time()}
        self.devices = _devices(self.host)
        self._numbers = itertools.count(1)
        self._leases: dict[int, ClusterLease] = {}
        self._models: dict[str, _Model] = {}
        self._limits: dict[str, int] = {}
        self._asked: dict[str, int] = {}  # by model, since the scheduler was last told
        self._lock = threading.Lock()
        self._join_soon()
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="device-leases", daemon=True)
        self._thread.start()
        threading.Thread(target=self._beat, name="device-heartbeat", daemon=True).start()
        before_leaving.append(self.close)
        atexit.register(self.close)  # before Ray's own, which was registered when Ray was imported

    def close(self) -> None:
        """Gives everything back, and ends the listener before the connection to Ray ends: it must not speak after."""
        atexit.unregister(self.close)
        if not self._closed and self._thread.is_alive():
            self._closed = True
            self.desk.leave.remote(self.id)
            self._thread.join(CLOSE_SECONDS)

    def take(self, fields: dict[str, Any], deadline: float | None) -> ClusterLease:
        """A lease that runs: one that stayed, or a new one. Raises Busy, ClusterError, Interrupted."""
        with self._lock:
            for lease in self._leases.values():
                if not lease.in_use and not lease.recalled and not lease.cancelled and lease.fields == fields:
                    lease.in_use = True
                    return lease
            lease = self._new(fields, deadline)
        lease.wait()
        if lease.refused is not None:
            with self._lock:
                del self._leases[lease.number]
            why, retry_after = lease.refused["why"], lease.refused["retry_after"]
            if retry_after is None:
                raise ClusterError(f"The device was not granted: {why} ({fields['bytes']} bytes).")
            raise Busy(why, retry_after)
        if lease.cancelled:
            self.give_back(lease)
            raise Interrupted("The lease of the device was cancelled.")
        return lease

    def _new(self, fields: dict[str, Any], deadline: float | None) -> ClusterLease:
        """Asks for a lease. The lock is held: no call that says which leases there are goes out between the two."""
        lease = ClusterLease(self, next(self._numbers), fields, deadline)
        self._leases[lease.number] = lease
        self._ask(lease)
        return lease

    def _ask(self, lease: ClusterLease) -> None:
        left = None if lease.until is None else max(0.0, lease.until - time.monotonic())
        self.desk.ask.remote(self.id, lease.number, *lease.fields.values(), left)

    def keep(self, model: str, device: str) -> ClusterLease:
        """A lease, new each time, for which a model stays on a device. Raises Busy, ClusterError, Interrupted."""
        fields = {"priority": "interactive", "device": device, "bytes": 0, "slots": 0, "model": model}
        with self._lock:
            lease = self._new(fields, None)
        lease.wait(ROOM_SECONDS)
        if lease.state == "running":
            return lease
        self.give_back(lease)
        name = model.rpartition("@")[0]
        if lease.cancelled:
            raise Interrupted("The lease of the device was cancelled.")
        if lease.refused is not None:
            needs = f"{self._models[model].bytes / 1e6:.1f} MB"
            raise ClusterError(f"There is no room for model '{name}' of {needs}: {lease.refused['why']}.")
        raise Busy(f"there was no room for model '{name}' in {ROOM_SECONDS:.0f} s", ROOM_SECONDS)

    def expect(self, model: str, device: str, slots: int) -> float:
        """As `ClusterDevice.expect`."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        with self._lock:
            free = any(
                not lease.in_use and not lease.recalled and lease.fields["slots"] >= slots
                for lease in self._leases.values()
            )
        try:
            asked = self.desk.expect.remote(self.id, device, 0 if free else slots, model)
            return ray.get(asked, timeout=EXPECT_SECONDS)
        except (GetTimeoutError, RayError):  # away, or started again and not told of this device yet
            return 0.0

    def count(self, model: str, times: int) -> None:
        with self._lock:
            self._asked[model] = self._asked.get(model, 0) + times

    def is_worth(self, model: str, device: str) -> bool:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return ray.get(self.desk.is_worth.remote(model, device), timeout=EXPECT_SECONDS)
        except (GetTimeoutError, RayError):  # away, or started again and not told of this device yet
            return False

    def add_model(self, model: _Model) -> None:
        self._models[model.name] = model
        self.desk.add_model.remote(self.id, model.name, model.bytes)

    def loaded(self, lease: ClusterLease, seconds: float, state: str) -> None:
        self._models[lease.fields["model"]].here = True
        self.desk.loaded.remote(self.id, lease.number, seconds, state)

    def out_of_memory(self, lease: ClusterLease) -> bool:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        for _ in range(2):  # it may just be started again
            try:
                return ray.get(self.desk.out_of_memory.remote(self.id, lease.number), timeout=EVICT_SECONDS)
            except (GetTimeoutError, RayActorError):
                time.sleep(REJOIN_SECONDS)
        return False

    def limit(self, device: str, memory: int) -> None:
        self._limits[device] = memory
        self.desk.limit.remote(self.id, device, memory)

    def _send_away(self, letter: dict[str, Any]) -> None:
        """Somebody else needs a model's room."""
        model = self._models[letter["model"]]
        try:
            model.leave(letter.get("to", "cold"))
        except Exception:  # others' letters are still to be heard
            log.exception("The model '%s' could not be moved away.", model.name)
            if letter["kind"] == "Move":
                self.desk.stayed.remote(model.name, letter["device"])
            return
        model.here = False
        if letter["kind"] == "Move":
            self.desk.moved.remote(letter["model"], letter["device"])

    def leave(self, lease: ClusterLease) -> None:
        """Its block ended. It stays where nobody waits."""
        with self._lock:
            lease.in_use, lease.left, lease._stepped = False, time.monotonic(), 0.0
            stays = not lease.recalled and not lease.cancelled
        if not stays:
            self.give_back(lease)

    def give_back(self, lease: ClusterLease) -> None:
        with self._lock:
            if self._leases.pop(lease.number, None) is None:
                return
        self.desk.release.remote(self.id, lease.number)

    def paused(self, lease: ClusterLease) -> None:
        with self._lock:
            lease.state = "paused"
            self.desk.pause.remote(self.id, lease.number)

    def _listen(self) -> None:
        try:
            self._hear_all()
        finally:
            _sessions.pop(os.getpid(), None)  # whoever connects again begins anew

    def _beat(self) -> None:
        """Says that this process lives, also while the listener moves a model for longer than silence may last."""
        import ray

        while self._thread.is_alive() and not self._closed and ray.is_initialized():
            with suppress(Exception):  # away, or being started again
                self.desk.beat.remote(self.id)
            time.sleep(BEAT_SECONDS)

    def _hear_all(self) -> None:
        import ray
        from ray.exceptions import RayActorError

        read = 0
        while not self._closed and ray.is_initialized():
            try:
                with self._lock:
                    steps = {n: lease.step_seconds for n, lease in self._leases.items() if lease.step_seconds}
                    states = {n: lease.state for n, lease in self._leases.items() if lease.refused is None}
                    asked, self._asked = self._asked, {}
                    listening = self.desk.listen.remote(self.id, steps, states, read, asked)
                mail = ray.get(listening)
                if mail is None and not self._closed:
                    read = 0
                    self._join()
            except RayActorError:
                time.sleep(RETRY_SECONDS)
                with suppress(Exception):  # it may be gone for good: then a new one is made
                    self.desk = find_desk()
                continue
            except (Exception, SystemExit):  # the connection to Ray was closed
                return
            for letter in mail or ():
                if letter["serial"] > read:
                    read = letter["serial"]
                    self._read(letter)
            self._tidy()

    def _read(self, letter: dict[str, Any]) -> None:
        if letter["kind"] in ("Move", "Drop"):
            self._send_away(letter)
        elif (lease := self._leases.get(letter["number"])) is None:
            return
        elif letter["kind"] != "Unknown":
            lease.hear(letter)
        else:
            with self._lock:
                if lease.number in self._leases and lease.refused is None:
                    if model := self._models.get(lease.fields["model"]):
                        self.desk.add_model.remote(self.id, model.name, model.bytes)  # which may have been lost as well
                    self._ask(lease)

    def _tidy(self) -> None:
        """Gives back what stayed too long, or is wanted now."""
        now = time.monotonic()
        for lease in list(self._leases.values()):
            with self._lock:
                over = lease.recalled or lease.cancelled or now - lease.left > LINGER_SECONDS
                goes = not lease.in_use and over
                if goes:
                    self._leases.pop(lease.number, None)
            if goes:
                self.desk.release.remote(self.id, lease.number)

    def _join_soon(self) -> None:
        """Joins, also where the scheduler has just died: Ray starts it again, or a new one is made."""
        from ray.exceptions import RayActorError

        end = time.monotonic() + JOIN_SECONDS
        while True:
            try:
                return self._join()
            except RayActorError:
                if time.monotonic() > end:
                    raise
            time.sleep(RETRY_SECONDS)
            self.desk = find_desk()

    def _join(self) -> None:
        import ray

        with self._lock:  # what is given back or paused from now on is told after this
            models = [model.about() for model in list(self._models.values())]
            leases = [lease.held() for lease in list(self._leases.values())]
            joined = self.desk.join.remote(self.about, self.devices, models, leases)
        ray.get(joined)
        for device, memory in self._limits.items():
            self.desk.limit.remote(self.id, device, memory)


@dataclass
class _Model:
    """A model of this process. `leave`: called with "warm" or "cold", in the listener's thread, takes it off the device."""

    name: str
    bytes: int
    device: str
    leave: Callable[[str], None]
    here: bool = False

    def about(self) -> dict[str, Any]:
        return {"model": self.name, "bytes": self.bytes, "device": self.device, "here": self.here}


_sessions: dict[int, _Session] = {}
_starting = threading.Lock()


def _session() -> _Session:
    """This process's, made at the first ask; a process that was forked has its own."""
    with _starting:
        if os.getpid() not in _sessions:
            _sessions.clear()
            _sessions[os.getpid()] = _Session()
        return _sessions[os.getpid()]


def _devices(host: str) -> list[dict[str, Any]]:
    """The devices of this machine, as `Scheduler.add_device` takes them."""
    memory = memory_bytes()
    cpu = {"name": f"{host}/cpu", "memory": int(USABLE * memory), "slots": num_cores(), "kind": "cpu"}
    place = pick_device()
    warm = memory // 4 if place.type != "cpu" else 0  # where the device is the CPU, its memory is the host's
    found = [{**cpu, "node": host, "host": warm}]
    if place.type == "cuda":
        import torch

        for index in range(torch.cuda.device_count()):
            total = torch.cuda.get_device_properties(index).total_memory
            about = {
                "name": f"{host}/{_kind_of(torch.device('cuda', index))}",
                "memory": int(USABLE * total),
                "slots": 1,
                "kind": "cuda",
            }
            found.append({**about, "node": host, "host": 0})
    elif place.type == "mps":
        found.append({**cpu, "name": f"{host}/mps", "slots": 1, "kind": "mps", "node": host, "host": 0})
    return found


def _kind_of(place: torch.device) -> str:
    """A device's name on its machine. A GPU has that of its chip: Ray shows each process its own GPUs, counted from 0."""
    if place.type != "cuda":
        return place.type
    import torch

    about = torch.cuda.get_device_properties(place.index or 0)
    chip = getattr(about, "uuid", None)
    return f"cuda:{place.index or 0}" if chip is None else f"cuda:{str(chip)[:13]}"


class ClusterDevice:
    """A torch device of this machine, its time granted by the cluster's scheduler. The process is connected to Ray."""

    def __init__(self, name: str = "auto", *, cores: int = 0) -> None:
        """`cores`: of a CPU, that a lease takes; 0 is all. An accelerator is leased as a whole."""
        self.name, self.cores = name, cores

    @functools.cached_property
    def torch_device(self) -> torch.device:
        return pick_device(self.name)

    @contextmanager
    def lease(
        self, *, bytes: int = 0, priority: Priority = "train", deadline: float | None = None
    ) -> Iterator[ClusterLease]:
        """As `Device.lease`.

        Raises:
            Busy: the deadline cannot be met. ClusterError: so many bytes are more than the device has.
            Interrupted: it was cancelled.
        """
        check_priority(priority)
        session = _session()
        fields = {"priority": priority, "device": self._name, "bytes": bytes, "slots": self._slots, "model": None}
        lease = session.take(fields, deadline)
        try:
            yield lease
        finally:
            session.leave(lease)

    @property
    def _slots(self) -> int:
        return (self.cores or num_cores()) if self.torch_device.type == "cpu" else 1

    # Models in its memory; see `Memory` in cluster/serving/residency.py

    @property
    def _name(self) -> str:
        return f"{_session().host}/{_kind_of(self.torch_device)}"

    def limit(self, memory: int) -> None:
        """The scheduler gives so many bytes of this device from now on, to all of the cluster together."""
        _session().limit(self._name, memory)

    def add_model(self, model: str, bytes: int, leave: Callable[[str], None]) -> None:
        """Makes a model of this process known. `leave`: called with "warm" or "cold" when it is to go, in another thread."""
        _session().add_model(_Model(_of_this_process(model), bytes, self._name, leave))

    def keep(self, model: str) -> ClusterLease:
        """Waits for room for a model, which stays on the device until `let_go`. Where the lease's `load` is True, whoever asked
        brings it there and then says `loaded`.

        Raises:
            Busy: there was no room for some time. ClusterError: there never will be. Interrupted: the lease was cancelled.
        """
        return _session().keep(_of_this_process(model), self._name)

    def expect(self, model: str) -> float:
        """Seconds until a request for a model would be worked on; 0 where the scheduler does not say."""
        return _session().expect(_of_this_process(model), self._name, self._slots)

    def count(self, model: str, times: int) -> None:
        """Tells that a model was asked for so many times: what decides which models stay."""
        if (session := _sessions.get(os.getpid())) is not None:  # counting is no reason to begin one
            session.count(_of_this_process(model), times)

    def is_worth(self, model: str) -> bool:
        """Whether bringing a model now is worth more than what would leave for it."""
        return _session().is_worth(_of_this_process(model), self._name)

    def let_go(self, lease: ClusterLease) -> None:
        """Others may have the model's room now."""
        _session().give_back(lease)

    def loaded(self, lease: ClusterLease, seconds: float, state: str) -> None:
        """The lease's model is on the device now, which took so long from "warm" or "cold"."""
        _session().loaded(lease, seconds, state)

    def out_of_memory(self, lease: ClusterLease) -> bool:
        """The device had less room than its books say. True: what nobody uses has been sent away, try once more."""
        return _session().out_of_memory(lease)


def _of_this_process(model: str) -> str:
    """The name of this process's copy of a model in the books."""
    return f"{model}@{socket.gethostname()}:{os.getpid()}"
