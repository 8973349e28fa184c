"""The scheduler: every decision, under a clock that is given to it. It does nothing itself and talks to nobody.

    scheduler = Scheduler(clock)
    scheduler.add_device("gpu0", memory=80 << 30, slots=1)
    lease = scheduler.ask("client", "interactive", device="gpu0", bytes=1 << 30)
    for event in scheduler.events(): ...        # Granted, Wanted, Refused, Cancelled, Move, Drop: for the clients named in them

Every call may decide something; what was decided are the events. A device is never given more than once: bytes and slots
are booked before a lease is granted, and booked out only when its client says that it has stopped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from oneira.platform.devices import PRIORITIES, Priority, check_priority
from oneira.platform.errors import UsageError, did_you_mean

from .leases import CAN_WAIT, QUANTUM, Cancelled, Drop, Event, Granted, Lease, Model, Move, Refused, Wanted
from .ledger import Working
from .placing import LOOKED_AT, Place, Soonest
from .residency import Demand, Host, Restoring, State, cheapest

SMOOTHING = 0.3  # of measured seconds
PATIENCE = 0.25  # seconds between two thoughts of bringing a model to one more device
WORTH = 1.5  # a model comes when it is worth so many times what leaves for it: less would go to and fro
UNKNOWN_WAIT = 30.0  # seconds, told where only the end of a lease of unknown length makes room


class Scheduler:
    """Belongs to one thread. Times are the clock's, in seconds."""

    def __init__(self, clock: Callable[[], float], restoring: Restoring | None = None) -> None:
        self.clock = clock
        self.places: dict[str, Place] = {}
        self.hosts: dict[str, Host] = {}
        self.models: dict[str, Model] = {}
        self.leases: dict[int, Lease] = {}
        self.working, self.demand, self.restoring = Working(), Demand(), restoring or Restoring()
        self.moves = self.refusals = self.grants = self.pauses = 0
        self.waits = {
            priority: [0, 0.0] for priority in PRIORITIES
        }  # leases that were granted, seconds that they waited
        self.open = True  # False: nothing is granted yet
        self._ids = itertools.count(1)
        self._events: list[Event] = []
        self._free = Soonest()
        self._hot: dict[str, Soonest] = {}
        self._took: dict[tuple[str, int], float] = {}  # seconds, by model and rows

    # Devices and models -------------------------------------------------------------------------------------------

    def add_device(
        self, name: str, *, memory: int, slots: int = 1, node: str = "", host: int = 0, kind: str = "cpu"
    ) -> None:
        """Takes a device in. A second time: nothing happens.

        Args:
            memory: bytes that may be used. slots: 1, or a CPU's cores. node: machine that it is in. host: bytes of the
                node's memory for WARM models; the first device of a node says it. kind: "cpu", "cuda", "mps".
        """
        if name in self.places:
            return
        shared = self.hosts.setdefault(node, Host(host))
        self.places[name] = Place(name, memory, slots, node, shared, kind)
        self._free.put(name, 0.0)

    def remove_machine(self, node: str) -> None:
        """Forgets the devices of a machine that is gone with all of its clients; not one that a lease is waiting for."""
        asked = {lease.device for lease in self.leases.values()}
        for name in [name for name, place in self.places.items() if place.node == node and name not in asked]:
            for model in list(self.places[name].ledger.residents):
                self._leave(self.places[name], model, to="cold")
            del self.places[name]
            self._free.remove(name)
        if node in self.hosts and not any(place.node == node for place in self.places.values()):
            del self.hosts[node]

    def add_model(self, name: str, bytes: int, only: str = "") -> None:
        """Makes a model known by its size. It is COLD everywhere, unless it was known before.

        Args:
            only: the client whose own copy it is: with that client it is forgotten.
        """
        if name not in self.models:
            self.models[name], self._hot[name] = Model(name, bytes), Soonest()
        self.models[name].bytes, self.models[name].only = bytes, only

    def pin(self, model: str, device: str, pinned: bool = True) -> None:
        """A pinned model stays on its device."""
        self.places[device].ledger.residents[model].pinned = pinned

    def state(self, model: str, device: str) -> State:
        place = self.places[device]
        if model in place.ledger.residents:
            return "hot"
        return "warm" if model in place.host.models else "cold"

    def announce(self, client: str, model: str, bytes: int, device: str) -> bool:
        """A client says that a model of its own is on the device. False where it is not booked: there is no room."""
        self.add_model(model, bytes, self.models[model].only if model in self.models else "")
        place = self.places[device]
        if model in place.ledger.residents:
            return True
        if bytes > place.ledger.free:
            return False
        self._arrive(place, self.models[model], client)
        return True

    def limit(self, client: str, device: str, memory: int) -> None:
        """A device gives so many bytes at most, for as long as the client lives; what is there stays until its room is asked for."""
        self.places[device].limit(client, memory)

    def moved(self, model: str, device: str) -> None:
        """Its owner says that a model is off the device."""
        place = self.places[device]
        if model in place.ledger.residents:
            self._leave(place, model)
            self._advance(place)

    def stayed(self, model: str, device: str) -> None:
        """Its owner says that a model could not be moved: it stays, and whoever can never have room beside it is refused."""
        place = self.places[device]
        if model not in place.ledger.residents or not place.ledger.residents[model].leaving:
            return
        place.ledger.residents[model].leaving = False
        self.pin(model, device)
        place.host.forget(model)
        self._hot[model].put(device, place.until())
        for lease in place.line.in_order():
            if lease.state == "waiting" and not self._possible(place, lease):
                del self.leases[lease.id]
                self._end(place, lease, self.clock())
                self._refuse(lease, f"model '{model}' could not be moved away", None)
        self._advance(place)

    # Leases ---------------------------------------------------------------------------------------------------------

    def ask(
        self, client: str, priority: Priority, *, device: str | None = None, model: str | None = None, rows: int = 1,
        bytes: int = 0, slots: int = 1, seconds: float | None = None, deadline: float | None = None,
    ) -> int:  # fmt: skip
        """Asks for a device, any or the one named. What comes of it is an event.

        Args:
            client: who asks. model: that is to be resident. rows: of its batch, from which working memory is known.
            bytes: of working memory, where it is more than was measured. slots: of time; 0 keeps a model where it is, and no more. seconds: that it will take; None: as before.
            deadline: seconds from now; see `Lease`.

        Returns:
            The lease's number.

        Raises:
            UsageError: no such priority, device or model.
        """
        check_priority(priority)
        if device is not None and device not in self.places:
            raise UsageError(f"Unknown device '{device}'. {did_you_mean(device, self.places)}")
        if model is not None and model not in self.models:
            raise UsageError(f"Unknown model '{model}'. {did_you_mean(model, self.models)}")
        now = self.clock()
        if model is not None:
            self.demand.count(model, now)
            bytes = max(bytes, self.working.bytes(model, rows))
            seconds = self._took.get((model, rows)) if seconds is None else seconds
        lease = Lease(
            next(self._ids), client, priority, now, device or "", model, rows, bytes, slots,
            math.inf if seconds is None else seconds, math.inf if deadline is None else now + deadline,
            now + CAN_WAIT[priority], device is not None,
        )  # fmt: skip
        place = self.places[device] if device is not None else self._choose(lease, now)
        if place is None or not self._possible(place, lease):
            self._refuse(lease, "no device is large enough for it", None)
            return lease.id
        lease.device, lease.restore = place.name, self._restore(place, lease)
        if lease.deadline != math.inf:
            late = now + self.wait(lease) + self._length(lease) - lease.deadline
            if late > 0:
                ready = self._bring(lease, now)
                self._refuse(lease, "its deadline cannot be met", ready or (late if late < math.inf else UNKNOWN_WAIT))
                return lease.id
        self._enlist(place, lease)
        return lease.id

    def wait(self, lease: Lease) -> float:
        """Seconds until a lease that is placed, and not in line yet, would begin its work; its model's restoring counts."""
        place, now = self.places[lease.device], self.clock()
        short = place.missing(lease, self._bytes(lease.model))
        if short > sum(bytes for _, bytes in place.removable(lease, wanted=True)):
            ends = [l.granted + l.restore + l.seconds - now for l in place.running.values()]
            return max(0.0, min(ends, default=math.inf))
        return place.wait(lease, now) + lease.restore

    def expect(self, client: str, device: str, *, model: str | None = None, slots: int = 1) -> float:
        """Seconds until an interactive lease would begin its work if it was asked for now, where nobody of the same priority
        keeps it waiting; its model's restoring counts. Infinite where the device is too small.
        """
        now, place = self.clock(), self.places[device]
        lease = Lease(0, client, "interactive", now, device, model, slots=slots, turn=now, named=True)
        if not self._possible(place, lease):
            return math.inf
        return place.wait(lease, now, hoping=True) + self._restore(place, lease)

    def count(self, model: str, times: int) -> None:
        """A client was asked for a model so many times, and had it, or refused: no lease tells of these."""
        if model in self.models:
            self.demand.count(model, self.clock(), times)

    def is_worth(self, model: str, device: str) -> bool:
        """Whether bringing a model to a device now is worth more than what would leave for it."""
        now, place = self.clock(), self.places[device]
        lease = Lease(0, "", "interactive", now, device, model, slots=0, turn=now, named=True)
        if model in place.ledger.residents or not self._possible(place, lease):
            return False
        cost = self._giving_up(place, lease, now)
        return cost is not None and self._pays(place, lease, cost, now)

    def release(self, lease_id: int) -> None:
        """The client is done with a lease, or does not want it any more. Unknown ones are ignored."""
        lease = self.leases.pop(lease_id, None)
        if lease is None:
            return
        place, now = self.places[lease.device], self.clock()
        if (
            lease.state == "running"
            and lease.model is not None
            and lease.slots
            and not lease.yielding
            and lease.seconds
        ):
            took, key = now - lease.granted - lease.restore, (lease.model, lease.rows)
            self._took[key] = self._took.get(key, took) + SMOOTHING * (took - self._took.get(key, took))
        self._end(place, lease, now)
        self._advance(place)

    def pause(self, lease_id: int) -> None:
        """The client has stopped between two steps: it keeps its bytes and waits for its slots again."""
        lease = self.leases.get(lease_id)
        if lease is None or lease.state != "running":
            return
        place, now = self.places[lease.device], self.clock()
        place.ledger.pause(lease.id)
        del place.running[lease.id]
        if lease.seconds != math.inf:
            lease.seconds = max(0.0, lease.seconds + lease.restore - (now - lease.granted))
        lease.state, lease.yielding, lease.recalled, lease.restore = "paused", False, False, 0.0
        lease.ran += now - lease.granted
        if lease.ran >= QUANTUM:
            lease.turn, lease.ran = now + CAN_WAIT[lease.priority], 0.0
        self.pauses += 1
        place.line.add(lease)
        self._advance(place)

    def cancel(self, lease_id: int, why: str = "it was cancelled") -> None:
        """Takes a lease back: one that waits is gone, one that runs or is paused ends when its client says so."""
        lease = self.leases.get(lease_id)
        if lease is None or lease.gone:
            return
        lease.gone = True
        self._events.append(Cancelled(lease.id, lease.client))
        if lease.state == "waiting":
            self.release(lease.id)
        elif lease.state == "paused":
            self.places[lease.device].line.remove(lease)

    def forget(self, client: str) -> None:
        """A client is dead: what it held is free."""
        now, touched = self.clock(), []
        for lease in [lease for lease in self.leases.values() if lease.client == client]:
            del self.leases[lease.id]
            place = self.places[lease.device]
            self._end(place, lease, now)
            touched.append(place)
        for place in self.places.values():
            owned = [name for name, resident in place.ledger.residents.items() if resident.owner == client]
            for name in owned:
                self._leave(place, name, to="cold")
            if place.limit(client, None) or owned or place in touched:
                self._advance(place)
        for model in [model for model in self.models.values() if model.only == client]:
            self._forget_model(model)

    def _forget_model(self, model: Model) -> None:
        """No process has it any more."""
        wanted = any(lease.model == model.name for lease in self.leases.values())
        if model.devices or wanted:  # of another client, which asks for what is not its own
            return
        for host in self.hosts.values():
            host.forget(model.name)
        del self.models[model.name], self._hot[model.name]
        self.working.forget(model.name)
        self.demand.forget(model.name)
        self.restoring.forget(model.name)
        self._took = {key: value for key, value in self._took.items() if key[0] != model.name}

    def adopt(self, lease: Lease) -> int:
        """Books in a lease that was granted before this scheduler began. Returns its number, or 0 where it does not fit."""
        place = self.places[lease.device]
        slots = lease.slots if lease.state == "running" else 0
        if lease.bytes > place.ledger.free or slots > place.ledger.slots_free:
            return 0
        lease = replace(lease, id=next(self._ids), yielding=False, recalled=False)
        place.ledger.hold(lease.id, lease.bytes, slots)
        self.leases[lease.id] = lease
        _add(place.wanted, lease.model, 1)
        _add(place.using, lease.model, 1)
        if lease.state == "running":
            place.running[lease.id] = lease
        else:
            place.line.add(lease)
        return lease.id

    # What clients measure -------------------------------------------------------------------------------------------

    def stepped(self, lease_id: int, seconds: float) -> None:
        """A step of a lease takes so long: what others wait for it to pause."""
        lease = self.leases.get(lease_id)
        if lease is not None:
            place, lease.step = self.places[lease.device], seconds
            place.step += (SMOOTHING if place.step else 1.0) * (seconds - place.step)

    def loaded(self, lease_id: int, seconds: float, state: State) -> None:
        """Bringing a lease's model to the device took so long, from WARM or COLD."""
        lease = self.leases.get(lease_id)
        if lease is not None and lease.model is not None:
            self.restoring.measure(lease.model, state, seconds)

    def out_of_memory(self, lease_id: int) -> bool:
        """The device had less room than the books say. True: models are on their way out, the client may try once more."""
        lease = self.leases.get(lease_id)
        if lease is None:
            return False
        place = self.places[lease.device]
        if lease.model is not None:
            self.working.measure(lease.model, lease.rows, lease.bytes + lease.bytes // 4 + 1)
        going = place.removable(lease, wanted=True)
        for name, _ in going:
            self._send_away(place, name)
        return bool(going)

    # What came of it ------------------------------------------------------------------------------------------------

    def events(self) -> list[Event]:
        """What was decided since the last call, in order."""
        found, self._events = self._events, []
        return found

    def tick(self) -> None:
        """Looks at every line again: turns and deadlines come by themselves. To be called every quarter second or so."""
        now = self.clock()
        for place in self.places.values():
            if len(place.line):
                for lease in place.line.in_order():
                    if self._is_late(lease, now):
                        self._expire(place, lease, now)
                self._advance(place)

    def report(self) -> dict[str, Any]:
        """Everything as JSON values: devices, leases, models, counts. Seconds and bytes."""
        now = self.clock()
        return {
            "devices": [_describe(place, now) for place in self.places.values()],
            "models": [
                {"name": m.name, "bytes": m.bytes, "devices": sorted(m.devices), "asks_per_second": round(self.demand.rate(m.name, now), 3),
                 "state": "hot" if m.devices else "warm" if any(m.name in h.models for h in self.hosts.values()) else "cold"}
                for m in self.models.values()
            ],
            "counts": {"grants": self.grants, "refusals": self.refusals, "moves": self.moves, "pauses": self.pauses},
            "waits": {priority: {"leases": n, "seconds": round(s, 6)} for priority, (n, s) in self.waits.items()},
        }  # fmt: skip

    # Decisions ------------------------------------------------------------------------------------------------------

    def _choose(self, lease: Lease, now: float) -> Place | None:
        """The device where the lease is expected to begin first, or None where none can hold it."""
        hot = None
        if lease.model is not None:
            for name in self._hot[lease.model].first(self._until):
                hot = self.places[name] if lease.slots <= self.places[name].ledger.slots else None
                if hot is not None and hot.until() <= now:
                    return hot
        best, least = None, math.inf
        for name in self._free.first(self._until, LOOKED_AT):
            place = self.places[name]
            cost = self._giving_up(place, lease, now)
            if cost is None or (lease.model is not None and lease.model in place.ledger.residents):
                continue
            begins = max(now, place.until()) + self._restore(place, lease) + cost
            if begins < least:
                best, least = place, begins
        if hot is not None and (best is None or hot.until() <= least):
            return hot
        if best is None:
            best = next((place for place in self.places.values() if self._possible(place, lease)), None)
        return best

    def _bring(self, lease: Lease, now: float) -> float | None:
        """Has a model brought to one more device where it is worth more than what leaves for it.

        A lease is refused where bringing its model takes too long; without this nobody would ever get that model.

        Returns:
            Seconds until it is there, where it comes.
        """
        if lease.model is None or now < (model := self.models[lease.model]).again or model.coming in self.leases:
            return None
        model.again = now + PATIENCE
        best, least = None, math.inf
        names = [lease.device] if lease.named else self._free.first(self._until, LOOKED_AT)
        for place in (self.places[name] for name in names):
            cost = None if model.name in place.ledger.residents else self._giving_up(place, lease, now)
            if cost is not None and (cost, place.until()) < (least, best.until() if best else math.inf):
                best, least = place, cost
        if best is None:
            return None
        if not self._pays(best, lease, least, now):
            return None
        restore = self._restore(best, lease)
        coming = replace(
            lease, id=next(self._ids), device=best.name, bytes=0, seconds=0.0, deadline=math.inf, restore=restore
        )
        model.coming = coming.id
        wait = best.wait(coming, now) + restore
        self._enlist(best, coming)
        return wait

    def _pays(self, place: Place, lease: Lease, cost: float, now: float) -> bool:
        """Whether bringing the lease's model is worth what leaves for it, a `cost` as of `_giving_up`."""
        name = lease.model or ""
        gain = self._restore(place, lease) * self.demand.rate(name, now) / (len(self.models[name].devices) + 1)
        return gain > WORTH * cost

    def _enlist(self, place: Place, lease: Lease) -> None:
        self.leases[lease.id] = lease
        _add(place.wanted, lease.model, 1)
        place.line.add(lease)
        self._advance(place)

    def _until(self, name: str) -> float:
        return self.places[name].until()

    def _giving_up(self, place: Place, lease: Lease, now: float) -> float | None:
        """The cost of what would leave the device for it; None where it does not fit."""
        if lease.slots > place.ledger.slots:
            return None
        short = place.missing(lease, self._bytes(lease.model))
        if short <= 0:
            return 0.0
        costs = self._costs(place, place.removable(lease, wanted=False), now)
        going = cheapest(costs, short)
        if going is None:
            return None
        return sum(cost for name, _, cost in costs if name in going)

    def _costs(self, place: Place, models: list[tuple[str, int]], now: float) -> list[tuple[str, int, float]]:
        found = []
        for name, bytes in models:
            state: State = "warm" if place.host.memory >= bytes else "cold"
            again = self.restoring.seconds(name, state, bytes) * self.demand.rate(name, now)
            found.append((name, bytes, again / max(1, len(self.models[name].devices))))
        return found

    def _advance(self, place: Place) -> None:
        """Grants what can be granted on a device, in the order of turns."""
        if not self.open:
            return
        now, head = self.clock(), place.line.head()
        if head is None:
            return
        bytes_left = True
        for lease in [head] if len(place.line) == 1 else place.line.in_order():
            if not bytes_left and self._takes(place, lease):
                continue
            outcome = self._try(place, lease, now)
            if outcome == "stop":
                return
            bytes_left = bytes_left and outcome != "keep bytes"

    def _try(self, place: Place, lease: Lease, now: float) -> str:
        """One lease at its place in the line: "done", "wait" (others may pass), "keep bytes" (those who need none), "stop" (nobody)."""
        if self._is_late(lease, now):
            self._expire(place, lease, now)
            return "done"
        resident = place.ledger.residents.get(lease.model or "")
        here = resident is not None and not resident.leaving and lease.state == "waiting"
        if here and self.models[lease.model or ""].coming == lease.id:
            del self.leases[lease.id]  # somebody else brought the model
            self._end(place, lease, now)
            return "done"
        due = lease.turn <= now
        if lease.slots > place.ledger.slots_free:
            return "stop" if self._make_time(place, lease, now) or due else "wait"
        short = place.missing(lease, self._bytes(lease.model))
        if short > 0 or (resident is not None and resident.leaving):
            if self._make_room(place, lease, short, now):
                return "stop"
            return "keep bytes" if due and self._would_fit(place, lease, short) else "wait"
        if self._takes(place, lease) > place.ledger.free:
            return "stop"  # what is on its way out has not left yet
        self._grant(place, lease, now)
        return "done"

    def _make_time(self, place: Place, lease: Lease, now: float) -> bool:
        """Tells those that run to give way. True where that will do."""
        running = [other for other in place.running.values() if other.slots]
        giving = [other for other in running if other.yielding or other.gives_way_to(lease, now)]
        short = lease.slots - place.ledger.slots_free
        enough = sum(other.slots for other in giving) >= short
        for other in sorted(giving, key=lambda other: (not other.yielding, -other.standing(now))) if enough else ():
            if short <= 0:
                break
            short -= other.slots
            if not other.yielding:
                other.yielding = other.recalled = True
                self._events.append(Wanted(other.id, other.client, pause=True))
        self._recall(running)
        return enough

    def _make_room(self, place: Place, lease: Lease, short: int, now: float) -> bool:
        """Sends models away for a lease. True where there will be room."""
        if short <= 0:
            return True
        for wanted in (False, True) if lease.turn <= now else (False,):
            going = cheapest(self._costs(place, place.removable(lease, wanted=wanted), now), short)
            if going is not None:
                for name in going:
                    self._send_away(place, name)
                return True
        self._recall(list(place.running.values()))
        return False

    def _recall(self, leases: list[Lease]) -> None:
        """Tells them, once, that somebody waits for what they have."""
        for lease in leases:
            if not lease.recalled:
                lease.recalled = True
                self._events.append(Wanted(lease.id, lease.client, pause=False))

    def _would_fit(self, place: Place, lease: Lease, short: int) -> bool:
        """Whether there would be room for it, had nobody begun since its turn came: then nobody else begins now."""
        short -= sum(bytes for _, bytes in place.removable(lease, wanted=True))
        since = (other for id in place.ledger.held if (other := self.leases[id]).began >= lease.turn)
        return sum(other.bytes for other in since) >= short

    def _send_away(self, place: Place, model: str) -> None:
        resident = place.ledger.residents[model]
        resident.leaving = True
        self._hot[model].remove(place.name)
        to = "warm" if self._keeps(place, model) else "cold"
        self.moves += 1
        self._events.append(Move(model, resident.owner, place.name, to))  # type: ignore[arg-type]

    def _keeps(self, place: Place, model: str) -> bool:
        now, host = self.clock(), place.host
        own = self.models[model].bytes
        costs = [(name, size, self._cold_cost(name, size, now)) for name, size in host.models.items()]
        gone = host.keep(model, own, costs, self._cold_cost(model, own, now))
        self._events += [Drop(name, self.models[name].owner) for name in gone or ()]
        return gone is not None

    def _cold_cost(self, model: str, bytes: int, now: float) -> float:
        more = self.restoring.seconds(model, "cold", bytes) - self.restoring.seconds(model, "warm", bytes)
        return max(0.0, more) * self.demand.rate(model, now)

    def _grant(self, place: Place, lease: Lease, now: float) -> None:
        place.line.remove(lease)
        load = None
        fresh = lease.id not in place.ledger.held
        if lease.model is not None and lease.model not in place.ledger.residents:
            lease.restore, load = self._restore(place, lease), lease.model
            self._arrive(place, self.models[lease.model], lease.client)
        else:
            lease.restore = 0.0
        place.ledger.hold(lease.id, lease.bytes, lease.slots)
        if fresh:
            waits = self.waits[lease.priority]
            waits[0], waits[1] = waits[0] + 1, waits[1] + now - lease.asked
            lease.began = now
            _add(place.using, lease.model, 1)
        place.running[lease.id] = lease
        lease.state, lease.granted, lease.yielding, lease.recalled = "running", now, False, False
        self.grants += 1
        self._events.append(Granted(lease.id, lease.client, place.name, load))

    def _is_late(self, lease: Lease, now: float) -> bool:
        return lease.state == "waiting" and now + self._length(lease) > lease.deadline

    def _expire(self, place: Place, lease: Lease, now: float) -> None:
        del self.leases[lease.id]
        self._end(place, lease, now)
        self._refuse(lease, "its deadline has come", self._length(lease))

    def _refuse(self, lease: Lease, why: str, retry_after: float | None) -> None:
        self.refusals += 1
        self._events.append(Refused(lease.id, lease.client, why, retry_after))

    # Books ----------------------------------------------------------------------------------------------------------

    def _end(self, place: Place, lease: Lease, now: float) -> None:
        """Books a lease out, wherever it is."""
        if lease.id in place.ledger.held:
            _add(place.using, lease.model, -1)
        place.ledger.let_go(lease.id)
        place.running.pop(lease.id, None)
        place.line.remove(lease)
        _add(place.wanted, lease.model, -1)
        place.ended = now
        self._sooner(place)

    def _arrive(self, place: Place, model: Model, owner: str) -> None:
        place.ledger.put(model.name, model.bytes, owner)
        place.host.forget(model.name)
        model.devices.add(place.name)
        model.owner = owner
        self._hot[model.name].put(place.name, place.until())

    def _leave(self, place: Place, model: str, to: State | None = None) -> None:
        place.ledger.drop(model)
        self.models[model].devices.discard(place.name)
        self._hot[model].remove(place.name)
        if to == "cold":
            place.host.forget(model)

    def _sooner(self, place: Place) -> None:
        until = place.until()
        self._free.put(place.name, until)
        for name, resident in place.ledger.residents.items():
            if not resident.leaving:
                self._hot[name].put(place.name, until)

    def _possible(self, place: Place, lease: Lease) -> bool:
        """Whether the device could hold it if nothing but pinned models were there."""
        pinned = sum(r.bytes for name, r in place.ledger.residents.items() if r.pinned and name != lease.model)
        need = lease.bytes + self._bytes(lease.model)
        return lease.slots <= place.ledger.slots and need <= place.ledger.memory - pinned

    def _takes(self, place: Place, lease: Lease) -> int:
        """Bytes that granting it takes."""
        there = lease.model is None or lease.model in place.ledger.residents
        return (0 if lease.id in place.ledger.held else lease.bytes) + (0 if there else self._bytes(lease.model))

    def _bytes(self, model: str | None) -> int:
        return 0 if model is None else self.models[model].bytes

    def _restore(self, place: Place, lease: Lease) -> float:
        """Seconds to bring its model to the device."""
        model = lease.model
        if model is None or model in place.ledger.residents:
            return 0.0
        return self.restoring.seconds(model, "warm" if model in place.host.models else "cold", self._bytes(model))

    @staticmethod
    def _length(lease: Lease) -> float:
        return 0.0 if lease.seconds == math.inf else lease.seconds


def _add(counts: dict[str, int], key: str | None, number: int) -> None:
    if key is not None:
        counts[key] = counts.get(key, 0) + number
        if not counts[key]:
            del counts[key]


def _describe(place: Place, now: float) -> dict[str, Any]:
    ledger = place.ledger
    leases = [*place.running.values(), *place.line.in_order()]
    return {
        "name": place.name, "kind": place.kind, "node": place.node, "memory": ledger.memory, "used": ledger.used,
        "resident": ledger.resident_bytes, "working": ledger.held_bytes, "slots": ledger.slots, "slots_taken": ledger.slots_taken, "step_seconds": round(place.step, 6), "warm": sorted(place.host.models),
        "residents": [
            {"model": name, "bytes": r.bytes, "owner": r.owner, "pinned": r.pinned, "leaving": r.leaving}
            for name, r in ledger.residents.items()
        ],
        "leases": [
            {"id": l.id, "client": l.client, "priority": l.priority, "state": l.state, "model": l.model, "bytes": l.bytes,
             "slots": l.slots, "seconds": round(now - (l.granted if l.state == "running" else l.asked), 3)}
            for l in leases
        ],
    }  # fmt: skip
