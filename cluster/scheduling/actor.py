"""The scheduler of a cluster: one detached, named Ray actor that hosts a `Scheduler` and passes its events on.

Clients ask by calls that answer nothing, and hear by one call that is always under way (`listen`). When the actor dies
Ray starts it again, empty; every client then hears that it is unknown, and tells what it has. Until `REJOIN_SECONDS` have
gone by nothing is granted, so that nothing is granted twice.

Networks lose calls and answers. A letter therefore stays in a client's mail until the client says that it has read it, and
each call of `listen` says which leases the client has, by which a lost `ask`, `pause` or `release` shows.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from ..connection import NAMESPACE
from .leases import Drop, Lease, Move, Refused
from .scheduler import Scheduler

NAME = "device-scheduler"
LISTEN_SECONDS = 1.0  # one call of `listen` at most
TICK_SECONDS = 0.25
MOVE_SECONDS = 10.0  # for models to leave where memory was short
REJOIN_SECONDS = 2.5  # after a restart
SILENCE_SECONDS = 4.0  # of a client on another machine, after which it is dead; on this one its process is looked for


@dataclass
class _Client:
    """A process: about is {"id", "host", "pid", "born"}; it numbers its leases itself.

    heard: when it last gave a sign of life, infinity while it listens. mail: letters that it has not said it has read, each
    with its "serial". posted: the last serial. missing: numbers of leases that it did not name when it last listened. stopped:
    of those that it called paused, and that run here.
    """

    about: dict[str, Any]
    heard: float
    mail: list[dict[str, Any]] = field(default_factory=list)
    posted: int = 0
    ring: asyncio.Event = field(default_factory=asyncio.Event)
    missing: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)

    def write(self, kind: str, **fields: Any) -> None:
        self.posted += 1
        self.mail.append({"kind": kind, "serial": self.posted, **fields})
        self.ring.set()


class Desk:
    """The actor."""

    def __init__(self, restarted: bool | None = None) -> None:
        self.scheduler = Scheduler(time.monotonic)
        if _was_restarted() if restarted is None else restarted:
            self.scheduler.open = False
        self._opens = time.monotonic() + REJOIN_SECONDS
        self._clients: dict[str, _Client] = {}
        self._ids: dict[tuple[str, int], int] = {}  # (client, its number) -> the scheduler's
        self._numbers: dict[int, int] = {}
        self._ticking: asyncio.Task | None = None

    async def join(
        self, client: Mapping[str, Any], devices: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]],
        leases: Sequence[Mapping[str, Any]],
    ) -> None:  # fmt: skip
        """A process says who it is, which devices its machine has, which models of its own are on them, and which leases it
        has or waits for."""
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())
        name = client["id"]
        known = self._clients.setdefault(name, _Client(dict(client), 0.0))
        known.heard = time.monotonic()
        for device in devices:
            self.scheduler.add_device(**device)
        for model in models:
            self.scheduler.add_model(model["model"], model["bytes"], name)
            if model["here"]:
                self.scheduler.announce(name, model["model"], model["bytes"], model["device"])
        for held in leases:
            self._take_back(name, held)
        self._post()

    def _take_back(self, client: str, held: Mapping[str, Any]) -> None:
        if (client, held["number"]) in self._ids:
            return
        if held["state"] != "waiting":
            now = self.scheduler.clock()
            lease = Lease(
                0, client, held["priority"], now, held["device"], held["model"], 1, held["bytes"], held["slots"],
                turn=now, named=True, state=held["state"], granted=now, began=now,
            )  # fmt: skip
            id = self.scheduler.adopt(lease)
            if id:
                self._know(client, held["number"], id)
                return
            self._clients[client].write("Wanted", number=held["number"], pause=True)
        self._ask(
            client, held["number"], held["priority"], held["device"], held["bytes"], held["slots"], held["model"], None
        )

    async def listen(
        self, client: str, steps: Mapping[int, float], leases: Mapping[int, str], read: int, asked: Mapping[str, int]
    ) -> list[dict[str, Any]] | None:
        """What there is to tell a client, as soon as there is something; at the latest after a second. None: who is that?

        Args:
            steps: seconds of a step, by the client's numbers of its leases.
            leases: states of all leases that it has or waits for, by its numbers.
            read: serial of the last letter that it has read; later ones are told (again).
            asked: how many times models were asked for since it last listened.
        """
        known = self._clients.get(client)
        if known is None:
            return None
        known.heard = math.inf  # it is listening
        known.mail = [letter for letter in known.mail if letter["serial"] > read]
        for number, seconds in steps.items():
            self.scheduler.stepped(self._ids.get((client, number), 0), seconds)
        for model, times in asked.items():
            self.scheduler.count(model, times)
        self._compare(client, leases)
        if not known.mail:
            known.ring.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(known.ring.wait(), LISTEN_SECONDS)
        if client not in self._clients:
            return None
        known.heard = time.monotonic()
        return known.mail

    def _compare(self, client: str, leases: Mapping[int, str]) -> None:
        """Makes good what was lost on the way here: what a client has asked for, paused, or given back."""
        known = self._clients[client]
        stopped: set[int] = set()
        told = {letter["number"] for letter in known.mail if letter["kind"] in ("Granted", "Refused", "Unknown")}
        for number, state in leases.items():
            id = self._ids.get((client, number))
            if number in told:
                continue
            if id is None:
                known.write("Unknown", number=number)
            elif state == "paused" and (lease := self.scheduler.leases.get(id)) and lease.state == "running":
                stopped.add(number)
        for number in stopped & known.stopped:  # not once alone: calls may overtake each other
            self.scheduler.pause(self._ids[client, number])
        known.stopped = stopped
        missing = {number for name, number in self._ids if name == client} - leases.keys()
        for number in missing & known.missing:
            self._release(client, number)
        known.missing = missing
        self._post()

    async def beat(self, client: str) -> None:
        """A process lives, whatever its listener is busy with."""
        if client in self._clients:
            self._clients[client].heard = max(self._clients[client].heard, time.monotonic())

    async def leave(self, client: str) -> None:
        """A process ends in order: what it held is free."""
        if client in self._clients:
            self._forget(client)
            self._post()

    async def ask(
        self, client: str, number: int, priority: Any, device: str, bytes: int, slots: int, model: str | None,
        deadline: float | None,
    ) -> None:  # fmt: skip
        """As `Scheduler.ask`; what comes of it is heard."""
        if client in self._clients and (client, number) not in self._ids:
            self._ask(client, number, priority, device, bytes, slots, model, deadline)
            self._post()

    def _ask(
        self, client: str, number: int, priority: Any, device: str, bytes: int, slots: int, model: str | None,
        deadline: float | None,
    ) -> None:  # fmt: skip
        events_before = self.scheduler.events()
        id = self.scheduler.ask(
            client, priority, device=device, model=model, bytes=bytes, slots=slots, deadline=deadline
        )
        self._know(client, number, id)
        self._post(events_before)

    async def release(self, client: str, number: int) -> None:
        self._release(client, number)
        self._post()

    def _release(self, client: str, number: int) -> None:
        id = self._ids.pop((client, number), None)
        if id is not None:
            del self._numbers[id]
            self.scheduler.release(id)

    async def pause(self, client: str, number: int) -> None:
        """The lease's loop has stopped between two steps."""
        self.scheduler.pause(self._ids.get((client, number), 0))
        self._post()

    async def expect(self, client: str, device: str, slots: int, model: str | None) -> float:
        """As `Scheduler.expect`."""
        return self.scheduler.expect(client, device, model=model, slots=slots)

    async def is_worth(self, model: str, device: str) -> bool:
        """As `Scheduler.is_worth`."""
        return model in self.scheduler.models and self.scheduler.is_worth(model, device)

    async def add_model(self, client: str, name: str, bytes: int) -> None:
        """A process has a model of its own; see `Scheduler.add_model`."""
        if client in self._clients:
            self.scheduler.add_model(name, bytes, client)

    async def limit(self, client: str, device: str, memory: int) -> None:
        """As `Scheduler.limit`."""
        if client in self._clients:
            self.scheduler.limit(client, device, memory)

    async def moved(self, model: str, device: str) -> None:
        """A model is off a device, as it was told to be."""
        self.scheduler.moved(model, device)
        self._post()

    async def stayed(self, model: str, device: str) -> None:
        """As `Scheduler.stayed`."""
        self.scheduler.stayed(model, device)
        self._post()

    async def loaded(self, client: str, number: int, seconds: float, state: Any) -> None:
        """As `Scheduler.loaded`."""
        self.scheduler.loaded(self._ids.get((client, number), 0), seconds, state)

    async def out_of_memory(self, client: str, number: int) -> bool:
        """As `Scheduler.out_of_memory`; answers when the models are gone that were sent away, or do not go."""
        lease = self.scheduler.leases.get(self._ids.get((client, number), 0))
        if lease is None or not self.scheduler.out_of_memory(lease.id):
            return False
        self._post()
        residents, end = self.scheduler.places[lease.device].ledger.residents, time.monotonic() + MOVE_SECONDS
        while any(resident.leaving for resident in residents.values()) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return True

    async def cancel(self, id: int) -> bool:
        """Takes back the lease that `report` shows under this number. False where there is none."""
        known = id in self.scheduler.leases
        self.scheduler.cancel(id)
        self._post()
        return known

    async def report(self) -> dict[str, Any]:
        """As `Scheduler.report`, with the clients."""
        return {**self.scheduler.report(), "clients": [client.about for client in self._clients.values()]}

    def _know(self, client: str, number: int, id: int) -> None:
        self._ids[client, number], self._numbers[id] = id, number

    def _post(self, before: Sequence[Any] = ()) -> None:
        """Puts events into the mail of those whom they are for."""
        for event in [*before, *self.scheduler.events()]:
            known = self._clients.get(event.client)
            if known is None:
                continue
            if isinstance(event, (Move, Drop)):
                known.write(type(event).__name__, **asdict(event))
            elif event.lease in self._numbers:
                known.write(type(event).__name__, number=self._numbers[event.lease], **asdict(event))
                if isinstance(event, Refused):
                    del self._ids[event.client, self._numbers.pop(event.lease)]

    async def _tick(self) -> None:
        host = socket.gethostname()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            if not self.scheduler.open and now >= self._opens:
                self.scheduler.open = True
            for name, client in list(self._clients.items()):
                silent = now - client.heard  # negative infinity while it listens
                if not _lives(client.about) if client.about["host"] == host else silent > SILENCE_SECONDS:
                    self._forget(name)
            self.scheduler.tick()
            self._post()

    def _forget(self, name: str) -> None:
        for key in [key for key in self._ids if key[0] == name]:
            del self._numbers[self._ids.pop(key)]
        gone = self._clients.pop(name)
        gone.ring.set()
        self.scheduler.forget(name)
        host = gone.about["host"]
        if host != socket.gethostname() and all(client.about["host"] != host for client in self._clients.values()):
            self.scheduler.remove_machine(host)  # one that was scaled away comes back under another name


def _was_restarted() -> bool:
    import ray

    return ray.get_runtime_context().was_current_actor_reconstructed


def _lives(client: Mapping[str, Any]) -> bool:
    import psutil

    try:
        process = psutil.Process(client["pid"])
        return abs(process.create_time() - client["born"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def find_desk(*, start: bool = True) -> Any:
    """The cluster's scheduler; it is started where there is none, or the answer is None."""
    import ray

    if not start:
        with suppress(ValueError):
            return ray.get_actor(NAME, namespace=NAMESPACE)
        return None
    options: dict[str, Any] = {
        "name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True, "num_cpus": 0,
        "max_restarts": -1, "max_concurrency": 1000,
    }  # fmt: skip
    return ray.remote(Desk).options(**options).remote()
