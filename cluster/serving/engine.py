"""Stages of one or more models in one process, stepped by one thread, batched across requests.

    engine = Engine({"builtin": stages}, rows=16, threads=2)
    work = await engine.run("builtin", "decoder", request, state)       # work.found, work.seconds

Whoever awaits `run` holds one plan of a stage. In every turn the thread makes one step of one stage, with all of its
plans that are under way (at most `rows`, the oldest first); stages take turns, so that none waits for another's queue.
Plans join and leave between any two turns: a caller who is cancelled has no plan any more when the next turn begins.

From the first plan to the last the engine has a lease of its device: training on it pauses once for all the turns of
the requests, not for each. A model whose plans are under way is held on the device (`residency`); plans of one that is not
there wait while it is brought, and the others go on.

An engine that cannot go on is `dead`, and says why: its loop ended, its device failed for good, or a step does not come
to an end. It takes no more work; whoever hosts it ends the process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oneira.platform.devices import Device, Lease, LocalDevice, num_cores
from oneira.platform.logs import say

from ..scheduling.client import ROOM_SECONDS, Busy
from .residency import Kept, Residents, is_out_of_memory

if TYPE_CHECKING:
    from oneira.multimodal.stages import Stage, State

Key = tuple[str, str]  # (model, stage)
PATIENCE = 0.25  # seconds between two thoughts of bringing a model that is only wanted
STUCK_SECONDS = 600.0  # of one step, after which it is held to hang


class Stopping(Exception):
    """The engine takes no more work."""


@dataclass(frozen=True)
class Work:
    """What one stage did for one picture.

    Args:
        found: what it adds to the state. steps: of its network. seconds: of the thread's time, shared with those in the
            same steps. rows: pictures in a step, itself counted, on average; 0 where no step was needed.
    """

    found: State
    steps: int
    seconds: float
    rows: float


@dataclass(eq=False)
class _Job:
    request: Any
    state: Mapping[str, Any]
    answer: asyncio.Future
    plan: Any = None
    error: Exception | None = None
    steps: int = 0
    seconds: float = 0.0
    rows: int = 0


class Engine:
    """Make it and use it inside one event loop."""

    def __init__(
        self, models: Mapping[str, Sequence[Stage]] | Residents, *, rows: int = 16, threads: int = 0,
        device: Device | None = None,
    ) -> None:  # fmt: skip
        """`rows`: plans in one step at most. `threads`: torch's, of the one thread that steps; 0 is all cores.
        models: those that come and go, or stages that stay. device: who grants the time; None: the engine takes it.
        """
        self._shelf: Kept | Residents = models if isinstance(models, Residents) else Kept(models)
        self.names = self._shelf.names
        self._rows = rows
        self._jobs: dict[Key, list[_Job]] = {(name, stage): [] for name, of in self.names.items() for stage in of}
        self._device: Device = LocalDevice() if device is None else device
        self._threads = threads or num_cores()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stages", initializer=self._begin_thread)
        self._bringers = ThreadPoolExecutor(len(self.names), thread_name_prefix="models")
        self._coming: dict[str, asyncio.Task] = {}
        self._again: dict[str, float] = {}  # when bringing a model may be thought of next, monotonic
        self._awake = asyncio.Event()
        self._loop: asyncio.Task | None = None
        self._closed = self._leased = False
        self._died = ""
        self._step_began = 0.0  # of the step that is being made, monotonic; 0 between steps

    def _begin_thread(self) -> None:
        import torch

        torch.set_num_threads(self._threads)  # of this thread; Ray gives a process one

    async def run(self, model: str, stage: str, request: Any, state: Mapping[str, Any]) -> Work:
        """Takes one request, for a picture or for samples, through one stage.

        Raises:
            Stopping: the engine is closed, or dead. Whatever the stage raises for this request.
        """
        if self._closed or self.dead:
            raise Stopping
        self._shelf.count(model, 1)
        jobs = self._jobs[model, stage]
        job = _Job(request, state, asyncio.get_running_loop().create_future())
        jobs.append(job)
        self._awake.set()
        self._begin_loop()
        try:
            return await job.answer
        finally:
            if job in jobs:  # cancelled: the next step is made without it
                jobs.remove(job)

    def _begin_loop(self) -> None:
        if self._loop is None:
            self._loop = asyncio.create_task(self._work())

    @property
    def dead(self) -> str:
        """Why it makes no pictures any more; empty while it does, and where it was closed."""
        if self._closed or self._died:
            return self._died
        stuck = self._step_began and time.monotonic() - self._step_began > STUCK_SECONDS
        return f"a step has not ended in {STUCK_SECONDS:.0f} s" if stuck else ""

    @property
    def under_way(self) -> int:
        """Pictures that are in some stage now."""
        return sum(map(len, self._jobs.values()))

    async def close(self) -> None:
        """Ends after the step that is being made; who waits gets `Stopping`."""
        dead, self._closed = self.dead, True
        if dead:
            self._fail(Stopping())
            self._thread.shutdown(wait=False)
            return
        self._awake.set()
        if self._loop is not None:
            await self._loop
        for model in list(self._shelf.held):
            self._shelf.give(model)
        self._thread.shutdown()
        self._bringers.shutdown(wait=False)

    async def expect(self, model: str, stage: str) -> float:
        """Seconds until a request would be in a step of a stage, if it came now."""
        if self._leased and model in self._shelf.held:
            return 0.0
        return await asyncio.to_thread(self._shelf.expect, model)

    async def want(self, model: str) -> None:
        """A request for a model was refused for want of time. It is brought where that is worth what leaves for it: else nobody
        would ever have it in time."""
        self._shelf.count(model, len(self.names[model]))
        now = time.monotonic()
        if self._is_here(model) or now < self._again.get(model, 0.0):
            return
        self._again[model] = now + PATIENCE
        if await asyncio.to_thread(self._shelf.is_worth, model) and not self._is_here(model):
            self._coming[model] = asyncio.create_task(self._bring(model))
            self._begin_loop()  # which gives it back

    def _is_here(self, model: str) -> bool:
        """Or is being brought, or shall not be."""
        return model in self._shelf.held or model in self._coming or self._closed or bool(self.dead)

    async def states(self) -> dict[str, str]:
        """Of each model: hot, warm or cold."""
        return self._shelf.states()

    async def digests(self) -> dict[tuple[str, str], str]:
        """Of the weights of stages, by (model, stage), as `caches.key_of` wants them."""
        return self._shelf.digests

    async def _work(self) -> None:
        try:
            while not self._closed and not self._died:
                self._tidy()
                if self._ready():
                    try:
                        await self._while_leased()
                    except Exception as error:  # the device was refused, or taken back
                        self._fail(error)
                else:
                    self._awake.clear()
                    await self._awake.wait()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # no mistake of a request or a device: the loop does not go on
            self._died = f"{type(error).__name__}: {error}"
        finally:
            if self._died:
                say("engine-died", f"oneira: the engine makes no more pictures: {self._died}")
            self._fail(Stopping())

    async def _while_leased(self) -> None:
        """Turns until nothing is left to do with the models that are held."""
        block = ExitStack()
        lease = await self._in_thread(lambda: block.enter_context(self._device.lease(priority="interactive")))
        self._leased = True
        try:
            while not self._died and (keys := self._ready()):
                for key in keys:
                    batch = self._jobs[key][: self._rows]
                    if self._closed:
                        return
                    if batch:
                        await self._in_thread(self._turn, lease, key, batch)
                        self._settle(key, batch)
                await asyncio.sleep(0)  # those who were answered go on to their next stage
                self._tidy()
        finally:
            self._leased = False
            await self._in_thread(block.close)

    def _ready(self) -> list[Key]:
        """Stages with plans under way, of models that are held."""
        return [key for key, jobs in self._jobs.items() if jobs and key[0] in self._shelf.held]

    def _tidy(self) -> None:
        """Gives back the models that nobody asks for or others wait for, and has those brought that are asked for."""
        wanted = {model for (model, _), jobs in self._jobs.items() if jobs}
        for model in list(self._shelf.held):
            if model not in wanted or self._shelf.is_due(model):
                self._shelf.give(model)
        for model in wanted.difference(self._shelf.held, self._coming):
            self._coming[model] = asyncio.create_task(self._bring(model))

    async def _bring(self, model: str) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._bringers, self._shelf.take, model)
        except Exception as error:
            self._fail(error, model)
        finally:
            del self._coming[model]
            self._awake.set()

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _fail(self, error: Exception, model: str | None = None) -> None:
        """All who are under way, or those of one model, get the error."""
        for jobs in [jobs for (of, _), jobs in self._jobs.items() if model in (None, of)]:
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)
            jobs.clear()

    def _turn(self, lease: Lease, key: Key, batch: list[_Job]) -> None:
        """In the thread: one step of a stage with these jobs, planned first where they are new."""
        lease.step()
        self._step_began = time.monotonic()
        try:
            self._plan_and_step(key, batch)
        finally:
            self._step_began = 0.0

    def _plan_and_step(self, key: Key, batch: list[_Job]) -> None:
        import torch

        stage = self._shelf.stage(*key)
        began = time.perf_counter()
        for job in batch:
            if job.plan is None:
                try:
                    job.plan = stage.plan(job.request, job.state)
                except Exception as error:  # of this request alone
                    job.error = error
        left = [job for job in batch if job.error is None and not job.plan.done]
        if left:
            try:
                self._step(key[0], stage, [job.plan for job in left])
            except Exception as error:
                for job in left:
                    job.error = error
                if isinstance(error, torch.AcceleratorError):  # every later call to the device fails as well
                    self._died = f"{type(error).__name__}: {error}"
        spent = time.perf_counter() - began
        for job in batch:
            job.seconds += spent / len(batch)
        for job in left:
            job.steps += 1
            job.rows += len(left)

    def _step(self, model: str, stage: Stage, plans: list[Any]) -> None:
        """One step; once more where memory was short and others could leave."""
        try:
            stage.step(plans)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not self._shelf.make_room(model):
                raise Busy("its memory is full", ROOM_SECONDS) from error
            stage.step(plans)

    def _settle(self, key: Key, batch: list[_Job]) -> None:
        """Back in the loop: answers those that are done, and forgets them."""
        for job in batch:
            if job.answer.done():  # cancelled while the step was made
                continue
            if job.error is not None:
                job.answer.set_exception(job.error)
            elif job.plan.done:
                rows = job.rows / job.steps if job.steps else 0.0
                job.answer.set_result(Work(dict(job.plan.found), job.steps, job.seconds, rows))
            else:
                continue
            self._jobs[key].remove(job)
