"""The executor over Ray: units of work on one-thread worker actors, and on one trainer actor with all cores.

The driver keeps the queue. A worker that is free takes the next unit; while many wait, one more is sent ahead to each,
so that no worker idles while the driver looks elsewhere. A unit whose worker dies, or runs out of memory, runs again on a new
worker. A unit that takes
much longer than others of its function, while a worker has nothing to do, is given to that one as well: the first answer
counts, and the slow worker is replaced. Nodes may join, which brings workers, and leave, which takes theirs away. Units are the
same wherever they run, so no result depends on any of this.
"""

from __future__ import annotations

import importlib
import itertools
import reprlib
import statistics
import sys
import time
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from oneira.platform.errors import ClusterError, OneiraError
from oneira.platform.executor import Tree, UnitFailed, Work, check_function, copy_tree
from oneira.platform.logs import say

from .connection import connect
from .scheduling.actor import find_desk
from .scheduling.client import ClusterDevice
from .together import run_together
from .workers import DONE, NO_MEMORY, UNKNOWN_FUNCTION, Worker

RERUNS = 3  # of a unit whose worker died
REST_SECONDS = (
    0.5  # before the first of them, twice as long before each other: what killed one worker may have killed all
)
LOOK_SECONDS = 1.0  # between looks for stragglers
NODES_SECONDS = 5.0  # between looks for nodes that joined or left
NOBODY_SECONDS = 30.0  # without a single node, after which the cluster is given up
SLOW_SECONDS = 10.0  # a unit is no straggler before
SLOW_FACTOR = 4.0  # ... nor before so many times the median of its function
REMEMBERED = 32  # units of a function, for that median
# An actor's claim on Ray's ledger. Tiny, so that executors never wait for each other: the system shares the cores.
ACTOR_CPUS = 0.01
ACTOR_GPUS = 0.01


@dataclass(frozen=True)
class RayShared:
    """A value in Ray's object store."""

    reference: Any


@dataclass(eq=False)
class RayHandle:
    """A unit of work that was given away."""

    _executor: RayExecutor
    name: str
    number: int
    shared: list
    unit: Tree
    threads: int
    deaths: int = 0
    copies: int = 0  # lanes that have it
    rests_until: float = 0.0  # seconds, monotonic
    done: bool = False
    value: Tree = None
    error: Exception | None = None

    def result(self) -> Tree:
        """Waits for the result.

        Raises:
            OneiraError: of the type that the function raised, with the worker's traceback as a note.
            RuntimeError: anything else that the function raised, with the worker's traceback.
            ClusterError: the unit's workers died again and again, or the executor was closed.
        """
        if not self.done:
            self._executor._finish([self])
        self._executor._news.pop(self, None)
        if self.error is not None:
            raise self.error
        return self.value

    def _end(self, *, value: Tree = None, error: Exception | None = None) -> None:
        self.done, self.value, self.error = True, value, error
        self.unit, self.shared = None, []
        self._executor._news[self] = None

    def __str__(self) -> str:
        return f"unit {self.number} of {self.name} ({reprlib.repr(self.unit)})"


@dataclass(eq=False)
class _Lane:
    """One actor and the units it has been sent, the first of which is running."""

    threads: int
    node: str | None
    actor: Any = None
    sent: deque[tuple[Any, RayHandle]] = field(default_factory=deque)
    began: float = 0.0  # when its first unit did; seconds, monotonic

    def start(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options: dict[str, Any] = {"num_cpus": ACTOR_CPUS, "max_restarts": 0}
        if self.node is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self.node, soft=True)
        elif ray.cluster_resources().get("GPU", 0) > 0:
            options["num_gpus"] = ACTOR_GPUS
        self.actor = ray.remote(Worker).options(**options).remote(self.threads, ClusterDevice)

    def stop(self) -> None:
        import ray

        if self.actor is not None:
            ray.kill(self.actor)
        self.actor = None


class _Pool:
    """Lanes of one kind and the units that wait for them. What it costs to give or take one does not grow with the lanes."""

    def __init__(self, lanes: list[_Lane]) -> None:
        self.waiting: deque[RayHandle] = deque()
        self.lanes: dict[_Lane, None] = {}
        self.at: dict[Any, _Lane] = {}  # where each reference that was sent is
        self._by_load: tuple[dict[_Lane, None], ...] = ({}, {}, {})  # lanes with 0, 1, 2 units
        for lane in lanes:
            self.add(lane)

    def add(self, lane: _Lane) -> None:
        self.lanes[lane] = self._by_load[0][lane] = None

    def remove(self, lane: _Lane) -> None:
        """`lane` has nothing to do any more."""
        del self.lanes[lane], self._by_load[0][lane]

    def idle(self) -> list[_Lane]:
        return list(self._by_load[0])

    def next_lane(self) -> _Lane | None:
        """The lane that takes the next waiting unit now, if any does."""
        ahead = 2 if len(self.waiting) > 2 * len(self.lanes) else 1
        free = (lane for lanes in self._by_load[:ahead] for lane in lanes)
        return next(free, None) if self.waiting else None

    def put(self, lane: _Lane, reference: Any, handle: RayHandle) -> None:
        """`handle` was sent to the lane."""
        self._move(lane, 1)
        lane.sent.append((reference, handle))
        self.at[reference] = lane
        handle.copies += 1

    def take(self, lane: _Lane) -> RayHandle:
        """The lane's first unit, off it."""
        self._move(lane, -1)
        reference, handle = lane.sent.popleft()
        del self.at[reference]
        handle.copies -= 1
        return handle

    def _move(self, lane: _Lane, by: int) -> None:
        del self._by_load[len(lane.sent)][lane]
        self._by_load[len(lane.sent) + by][lane] = None


class RayExecutor:
    """An `Executor` whose units run in Ray actors: as many one-thread workers as the cluster has CPUs, and a trainer.
    What units do on a device waits for leases of the cluster's scheduler.

    The actors start in the background: make the executor first, and import what is slow to import after.
    """

    def __init__(self, address: str | None = None) -> None:
        """`address`: as for `connect`. Raises ClusterError."""
        connect(address)
        self._nodes = _cpus_of_nodes()
        self._looked = self._peopled = time.monotonic()
        lanes = [_Lane(1, node) for node, cpus in self._nodes.items() for _ in range(cpus)]
        if not lanes:
            raise ClusterError(
                f"The Ray cluster has no CPU to work on: {len(self._nodes)} nodes. Allowed: at least one CPU."
            )
        self.core_seconds = 0.0
        self._workers = _Pool(lanes)
        self._trainer = _Pool([_Lane(0, None)])
        self._code: dict[str, list] = {}  # functions that workers cannot import by name: [reference to the function]
        self._functions: dict[str, Work] = {}
        self._numbers = itertools.count()
        self._seconds: dict[str, deque[float]] = {}  # of units that are done, by function
        self._news: weakref.WeakKeyDictionary[RayHandle, None] = weakref.WeakKeyDictionary()  # done, not asked for yet
        self._searched = time.monotonic()  # for stragglers
        self._resting: list[RayHandle] = []  # whose worker died
        self._closed = False
        find_desk()
        for lane in lanes:
            lane.start()

    @property
    def num_workers(self) -> int:
        """Workers that are there now, the trainer not counted."""
        return len(self._workers.lanes)

    def share(self, value: Tree) -> RayShared:
        """Puts a value into the object store once; workers on its node read its arrays there, without a copy."""
        import ray

        self._check_open()
        return RayShared(ray.put(copy_tree(value, path="shared")))

    def submit(self, function: Work, shared: RayShared | None, unit: Tree, *, threads: int = 1) -> RayHandle:
        """Queues `function(shared value, unit)`: on a worker, or for `threads` other than 1 (0: all) on the trainer."""
        self._check_open()
        check_function(function)
        name = f"{function.__module__}:{function.__qualname__}"
        self._functions[name] = function
        references = [] if shared is None else [shared.reference]
        handle = RayHandle(self, name, next(self._numbers), references, copy_tree(unit, path="unit"), threads)
        self._pool(handle).waiting.append(handle)
        self._send()
        return handle

    def wait(self, handles: Collection[RayHandle]) -> RayHandle:
        """One of the handles, finished."""
        if not handles:
            raise ValueError("wait() needs at least one handle")
        return self._finish(handles)

    def map(
        self, function: Work, shared: RayShared | None, units: Iterable[Tree], *, threads: int = 1
    ) -> Iterator[Tree]:
        """Results in the order of the units. Units that still wait are dropped where the caller stops reading."""
        return self._in_order(deque(self.submit(function, shared, unit, threads=threads) for unit in units))

    def together(self, function: Work, unit: Tree, count: int) -> Tree:
        """Runs `function(None, unit)` in `count` processes at once, by Ray Train; see `together.run_together`."""
        self._check_open()
        check_function(function)
        name = f"{function.__module__}:{function.__qualname__}"
        self._functions[name] = function
        attempts, error = 0, None
        while attempts <= RERUNS:
            outcome = run_together(name, self._code.get(name, []), copy_tree(unit, path="unit"), count)
            if outcome.status == UNKNOWN_FUNCTION:
                self._code[name] = [_ship(function)]
                continue
            self.core_seconds += count * outcome.core_seconds
            if outcome.said:
                print(outcome.said, end="", file=sys.stderr, flush=True)
            if outcome.status == DONE:
                return copy_tree(outcome.value, path="result")
            error = _rebuild(*outcome.value)
            if not outcome.again:
                raise error
            attempts += 1
        raise ClusterError(f"A group of {count} workers ended {attempts} times. The last time: {error}") from error

    def close(self) -> None:
        """Ends the actors. Handles without a result raise ClusterError from now on. The connection to Ray stays."""
        if self._closed:
            return
        self._closed = True
        for pool in (self._workers, self._trainer):
            for handle in [*self._resting, *pool.waiting, *(handle for lane in pool.lanes for _, handle in lane.sent)]:
                handle._end(error=ClusterError(f"The executor was closed before {handle} had run."))
            pool.waiting.clear()
            for lane in pool.lanes:
                lane.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- the queue ---------------------------------------------------------------------------------------------------

    def _in_order(self, handles: deque[RayHandle]) -> Iterator[Tree]:
        try:
            while handles:
                yield handles.popleft().result()
        finally:
            for handle in handles:
                place = self._resting if handle in self._resting else self._pool(handle).waiting
                if not handle.done and handle in place:
                    place.remove(handle)
                    handle._end(error=ClusterError(f"{handle} was dropped: its results were not read to the end."))

    def _finish(self, handles: Collection[RayHandle]) -> RayHandle:
        """Works the queue until one of the handles is done."""
        import ray

        while True:
            news = (handle for handle in self._news if handle in handles)
            done = next(news, None) or next((handle for handle in handles if handle.done), None)
            if done is not None:
                return done
            sent = [*self._workers.at, *self._trainer.at]
            if sent:
                patience = REST_SECONDS if self._resting else LOOK_SECONDS
                ray.wait(sent, num_returns=1, timeout=patience, fetch_local=False)
                ready, _ = ray.wait(sent, num_returns=len(sent), timeout=0, fetch_local=False)
                self._collect(ready)
            else:
                time.sleep(REST_SECONDS)
            self._look_at_nodes()
            self._wake()
            self._send()
            self._send_again()

    def _wake(self) -> None:
        """Those that have rested wait again, before the others."""
        rested = [handle for handle in self._resting if handle.rests_until <= time.monotonic()]
        for handle in reversed(rested):
            self._resting.remove(handle)
            self._pool(handle).waiting.appendleft(handle)

    def _send(self) -> None:
        for pool in (self._workers, self._trainer):
            while (lane := pool.next_lane()) is not None:
                self._give(pool, lane, pool.waiting.popleft())

    def _give(self, pool: _Pool, lane: _Lane, handle: RayHandle) -> None:
        if lane.actor is None:
            lane.start()
        if not lane.sent:
            lane.began = time.monotonic()
        code = self._code.get(handle.name, [])
        reference = lane.actor.run.remote(handle.name, code, handle.shared, handle.unit, handle.threads)
        pool.put(lane, reference, handle)

    def _look_at_nodes(self) -> None:
        """Workers for nodes that have joined; those of nodes that have left go, and their units wait again."""
        if time.monotonic() - self._looked < NODES_SECONDS:
            return
        before, self._nodes, self._looked = self._nodes, _cpus_of_nodes(), time.monotonic()
        if self._nodes:
            self._peopled = self._looked
        elif self._looked - self._peopled > NOBODY_SECONDS:
            raise ClusterError(
                f"The Ray cluster has had no node for {NOBODY_SECONDS:.0f} s, its head's included. Go on with another cluster."
            )
        joined = [_Lane(1, node) for node in self._nodes if node not in before for _ in range(self._nodes[node])]
        left = [lane for lane in self._workers.lanes if lane.node not in self._nodes]
        if len(left) == self.num_workers + len(joined):
            left = []  # their units would have nobody: they begin again wherever there is room
        if joined or left:
            text = f"oneira: {len(joined)} workers join and {len(left)} leave; there were {self.num_workers}."
            say("nodes", text, joined=len(joined), left=len(left))
        for lane in joined:
            lane.start()
            self._workers.add(lane)
        for lane in left:
            self._restart(self._workers, lane)
            self._workers.remove(lane)

    def _send_again(self) -> None:
        """Gives stragglers to workers that have nothing to do."""
        now = time.monotonic()
        if now - self._searched < LOOK_SECONDS:
            return
        self._searched = now
        idle = [] if self._workers.waiting else self._workers.idle()
        for lane in [lane for lane in self._workers.lanes if lane.sent] if idle else []:
            handle, spent = lane.sent[0][1], now - lane.began
            usual = statistics.median(self._seconds.get(handle.name) or [float("inf")])
            if idle and handle.copies == 1 and spent > max(SLOW_SECONDS, SLOW_FACTOR * usual):
                said = f"oneira: {handle} takes {spent:.0f} s and others {usual:.1f} s: sent to another worker as well."
                say("straggler", said, unit=handle.number, function=handle.name, seconds=spent, usual=usual)
                self._give(self._workers, idle.pop(), handle)

    def _collect(self, ready: list) -> None:
        """Takes finished units off their lanes, and puts back what has to run again."""
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError

        finished = set(ready)
        found = {lane: pool for pool in (self._workers, self._trainer) for ref in ready if (lane := pool.at.get(ref))}
        for lane, pool in found.items():
            while lane.sent and (reference := lane.sent[0][0]) in finished:
                handle = pool.take(lane)
                spent, lane.began = time.monotonic() - lane.began, time.monotonic()
                try:
                    outcome, value, *rest = ray.get(reference)
                    self._settle(handle, outcome, value, *rest)
                    if outcome == NO_MEMORY:  # a new process begins without what the old one holds
                        self._restart(pool, lane)
                        self._again(handle, MemoryError(value))
                    if handle.done:
                        self._seconds.setdefault(handle.name, deque(maxlen=REMEMBERED)).append(spent)
                except RayTaskError as error:  # Ray could not carry the arguments or the result
                    handle._end(error=RuntimeError(f"{handle} failed: {error}"))
                except (RayActorError, OutOfMemoryError, NodeDiedError) as error:
                    self._restart(pool, lane)  # what was sent after it had not begun
                    self._again(handle, error)
                except RayError as error:  # the result was lost with its node
                    self._again(handle, error)
                self._stop_copies(handle)

    def _settle(self, handle: RayHandle, outcome: str, value: Any, said: str, core_seconds: float) -> None:
        self.core_seconds += core_seconds
        if said:
            print(said, end="", file=sys.stderr, flush=True)
        if outcome == UNKNOWN_FUNCTION:
            self._code[handle.name] = [_ship(self._functions[handle.name])]
            if not handle.copies:
                self._pool(handle).waiting.appendleft(handle)
        elif outcome == NO_MEMORY:
            return
        elif outcome == DONE:
            handle._end(value=copy_tree(value, path="result"))
        else:
            handle._end(error=_rebuild(*value))

    def _restart(self, pool: _Pool, lane: _Lane) -> None:
        """Ends the lane's actor, and puts back what it was sent and nobody else has."""
        lane.stop()
        behind = [pool.take(lane) for _ in range(len(lane.sent))]
        pool.waiting.extendleft(later for later in reversed(behind) if not later.copies)

    def _stop_copies(self, handle: RayHandle) -> None:
        """Ends workers that are still at a unit which is done: they may hang for ever."""
        for lane in self._workers.lanes if handle.done and handle.copies else []:
            if lane.sent and lane.sent[0][1] is handle:
                self._restart(self._workers, lane)

    def _again(self, handle: RayHandle, error: Exception) -> None:
        handle.deaths += 1
        if handle.copies:  # another worker has it
            return
        if handle.deaths > RERUNS:
            why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"  # Ray tells more than one wants to know
            handle._end(error=ClusterError(f"{handle} ended its worker {handle.deaths} times. The last time: {why}"))
        else:
            handle.rests_until = time.monotonic() + REST_SECONDS * 2 ** (handle.deaths - 1)
            self._resting.append(handle)

    def _pool(self, handle: RayHandle) -> _Pool:
        return self._workers if handle.threads == 1 else self._trainer

    def _check_open(self) -> None:
        if self._closed:
            raise ClusterError("This executor is closed. Make a new one.")


def _cpus_of_nodes() -> dict[str, int]:
    """CPUs of each node that is alive, by its id."""
    import ray

    return {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]}


def _ship(function: Work) -> Any:
    """A reference to the function by value, with what it uses of its own module."""
    import ray
    from ray import cloudpickle

    module = sys.modules[function.__module__]
    by_reference = module.__name__ != "__main__"  # a script's own functions always travel by value
    if by_reference:
        cloudpickle.register_pickle_by_value(module)
    try:
        return ray.put(function)
    finally:
        if by_reference:
            cloudpickle.unregister_pickle_by_value(module)


def _rebuild(kind: str, message: str, trace: str) -> Exception:
    """The worker's exception: an OneiraError as itself, all else as UnitFailed."""
    module, _, qualname = kind.partition(":")
    found = getattr(importlib.import_module(module), qualname, None) if module.startswith("oneira.") else None
    if isinstance(found, type) and issubclass(found, OneiraError):
        error: Exception = found(message)
        error.add_note(f"In a worker:\n{trace.rstrip()}")
        return error
    return UnitFailed(f"{qualname}: {message}", trace)
