"""Fleets that exist only under a fake clock: how policies are compared and scale is planned. The scheduler in it is the real one.

    requests = poisson(zipf_models(20, seed=0), rate=40, seconds=120, seed=0)
    outcome = simulate(Ours(fleet), requests)

A request is one picture or so: it takes the device for its model's seconds, after its model was brought there if it was
not. The same seed gives the same requests, the same decisions and the same outcome. Peer: what Ray Serve's multiplexing
does, which keeps a number of models a replica and lets the one used longest ago go, whatever its size.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .leases import Granted, Move, Refused
from .residency import WARM_BYTES_PER_SECOND
from .scheduler import Scheduler

ON_TIME = 3.0  # an answer counts when it comes within so many times the unloaded latency
MATCHING_SECONDS = 1.0  # for which Serve's router waits for a replica that has the model
ONGOING = 5  # requests that Serve sends to one replica at the same time


@dataclass(frozen=True)
class SimulatedModel:
    """`seconds`: of a request, alone on a device that has the model. `share`: of all requests."""

    name: str
    bytes: int
    seconds: float
    share: float


@dataclass(frozen=True)
class Fleet:
    """`memory`: bytes of each device. Every model is in the memory of every node."""

    devices: int
    memory: int
    models: Sequence[SimulatedModel]

    def capacity(self) -> float:
        """Requests a second if every device had every model."""
        return self.devices / sum(model.share * model.seconds for model in self.models)


@dataclass(slots=True, eq=False)
class Request:
    """Seconds of the fake clock. `answered`: infinite where it never was."""

    at: float
    model: SimulatedModel
    answered: float = math.inf

    @property
    def on_time(self) -> bool:
        return self.answered - self.at <= ON_TIME * self.model.seconds + 1e-9


def zipf_models(count: int, *, exponent: float = 1.1, mean_bytes: float = 3e9, seed: int = 0) -> list[SimulatedModel]:
    """Models of mixed size, asked for by Zipf's law. Larger ones take longer: 25 to 100 ms a gigabyte."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(0, 0.7, count))
    sizes *= mean_bytes / sizes.mean()
    shares = 1.0 / np.arange(1, count + 1) ** exponent
    per_byte = rng.uniform(25e-12, 100e-12, count)
    return [
        SimulatedModel(f"m{i}", int(size), float(size * cost), float(share))
        for i, (size, cost, share) in enumerate(zip(sizes, per_byte, shares / shares.sum(), strict=True))
    ]


def poisson(models: Sequence[SimulatedModel], *, rate: float, seconds: float, seed: int) -> list[Request]:
    """Requests that come by chance, `rate` of them a second on average."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
    picks = rng.choice(len(models), len(times), p=[model.share for model in models])
    return [Request(float(at), models[pick]) for at, pick in zip(times, picks, strict=True)]


class Policy(Protocol):
    """Who decides. Times are those of the fake clock; `later(seconds, thing)` has `due` called with the thing."""

    def arrive(self, request: Request, world: World) -> None: ...
    def due(self, thing: object, world: World) -> None: ...


@dataclass
class World:
    """The clock and what is to come."""

    now: float = 0.0
    _coming: list[tuple[float, int, object]] = field(default_factory=list)
    _count: int = 0

    def later(self, seconds: float, thing: object) -> None:
        self._count += 1
        heapq.heappush(self._coming, (self.now + seconds, self._count, thing))

    def next(self, before: float) -> object | None:
        """The next thing that is due until then; the clock goes there."""
        if not self._coming or self._coming[0][0] > before:
            return None
        self.now, _, thing = heapq.heappop(self._coming)
        return thing


@dataclass(frozen=True)
class Outcome:
    """`goodput`: requests answered on time, a second. `late`: share answered too late. `refused`: share never answered."""

    goodput: float
    late: float
    refused: float
    loads: int


def simulate(policy: Policy, requests: Sequence[Request], *, warm_up: float = 0.0) -> Outcome:
    """Plays requests through a policy. The first `warm_up` seconds are not counted."""
    world = World()
    for request in requests:
        while (thing := world.next(request.at)) is not None:
            policy.due(thing, world)
        world.now = request.at
        policy.arrive(request, world)
    end = world.now
    while (thing := world.next(math.inf)) is not None:
        policy.due(thing, world)
    counted = [request for request in requests if request.at >= warm_up]
    good = sum(request.on_time for request in counted)
    never = sum(request.answered == math.inf for request in counted)
    late = len(counted) - good - never
    return Outcome(good / (end - warm_up), late / len(counted), never / len(counted), getattr(policy, "loads", 0))


class Ours:
    """The real scheduler; every request has a deadline, `ON_TIME` times its unloaded latency.

    Attributes:
        decisions: processor seconds of every call into the scheduler with its events.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._world = World()
        self.scheduler = Scheduler(lambda: self._world.now)
        self.decisions: list[float] = []
        self.loads = 0
        total = sum(model.bytes for model in fleet.models)
        for number in range(fleet.devices):
            self.scheduler.add_device(f"d{number}", memory=fleet.memory, node=f"n{number}", host=total)
        for model in fleet.models:
            self.scheduler.add_model(model.name, model.bytes)
            for host in self.scheduler.hosts.values():
                host.keep(model.name, model.bytes, [], 0.0)
        self._requests: dict[int, Request] = {}

    def arrive(self, request: Request, world: World) -> None:
        self._world = world
        model = request.model
        began = time.thread_time()
        lease = self.scheduler.ask(
            "host", "interactive", model=model.name, seconds=model.seconds, deadline=ON_TIME * model.seconds
        )
        events = self.scheduler.events()
        self.decisions.append(time.thread_time() - began)
        self._requests[lease] = request
        self._follow(events, world)

    def due(self, thing: object, world: World) -> None:
        assert isinstance(thing, int)
        if thing in self._requests:  # else the scheduler had a model brought
            self._requests.pop(thing).answered = world.now
        began = time.thread_time()
        self.scheduler.release(thing)
        events = self.scheduler.events()
        self.decisions.append(time.thread_time() - began)
        self._follow(events, world)

    def _follow(self, events: Sequence[object], world: World) -> None:
        for event in events:
            if isinstance(event, Granted):
                request = self._requests.get(event.lease)
                seconds = request.model.seconds if request else 0.0
                if event.load is not None:
                    self.loads += 1
                    seconds += self.scheduler.models[event.load].bytes / WARM_BYTES_PER_SECOND
                world.later(seconds, event.lease)
            elif isinstance(event, Refused):
                del self._requests[event.lease]
            elif isinstance(event, Move):
                self.scheduler.moved(event.model, event.device)
                self._follow(self.scheduler.events(), world)


@dataclass(eq=False)
class _Replica:
    models: OrderedDict[str, None] = field(default_factory=OrderedDict)  # used longest ago first
    queue: deque[Request] = field(default_factory=deque)  # the first is being answered


class CountedModels:
    """Ray Serve's multiplexing: `count` models a replica, of any size; the one used longest ago goes for another.

    Its router sends a request to the shorter queue of two replicas that have the model, then of two with the fewest
    models, then of any two; a request that finds all of these full waits in the router. `most_waiting` is Serve's
    `max_queued_requests`: None, its default, refuses nobody. It is taken to have memory for any `count` models.
    """

    def __init__(self, fleet: Fleet, count: int = 4, most_waiting: int | None = None, seed: int = 0) -> None:
        self.replicas = [_Replica() for _ in range(fleet.devices)]
        self.count, self.most_waiting, self.loads = count, most_waiting, 0
        self._waiting: deque[Request] = deque()
        self._rng = np.random.default_rng(seed)

    def arrive(self, request: Request, world: World) -> None:
        if self.most_waiting is not None and len(self._waiting) >= self.most_waiting:
            return
        self._waiting.append(request)
        self._route(world)

    def due(self, thing: object, world: World) -> None:
        assert isinstance(thing, _Replica)
        thing.queue.popleft().answered = world.now
        self._begin(thing, world)
        self._route(world)

    def _route(self, world: World) -> None:
        kept: deque[Request] = deque()
        room = sum(len(replica.queue) < ONGOING for replica in self.replicas)
        while self._waiting and room:
            request = self._waiting.popleft()
            replica = self._pick(request, world.now)
            if replica is None:
                kept.append(request)
                continue
            replica.queue.append(request)
            room -= len(replica.queue) == ONGOING
            if len(replica.queue) == 1:
                self._begin(replica, world)
        self._waiting.extendleft(reversed(kept))

    def _pick(self, request: Request, now: float) -> _Replica | None:
        having = [replica for replica in self.replicas if request.model.name in replica.models]
        if having and now - request.at < MATCHING_SECONDS:
            return self._shorter(having)
        fewest = min(len(replica.models) for replica in self.replicas)
        return self._shorter([r for r in self.replicas if len(r.models) == fewest]) or self._shorter(self.replicas)

    def _shorter(self, replicas: Sequence[_Replica]) -> _Replica | None:
        two = self._rng.choice(len(replicas), min(2, len(replicas)), replace=False)
        best = min((replicas[i] for i in two), key=lambda replica: len(replica.queue))
        return best if len(best.queue) < ONGOING else None

    def _begin(self, replica: _Replica, world: World) -> None:
        if not replica.queue:
            return
        model, load = replica.queue[0].model, 0.0
        if model.name not in replica.models:
            load = model.bytes / WARM_BYTES_PER_SECOND
            self.loads += 1
            while len(replica.models) >= self.count:
                replica.models.popitem(last=False)
            replica.models[model.name] = None
        replica.models.move_to_end(model.name)
        world.later(load + model.seconds, replica)
