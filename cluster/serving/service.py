"""Requests taken through a model's stages, wherever these are: in this process (`Engine`) or in other deployments.

service = Service(way, {"builtin": ["text", "prior", "decoder", "upsampler"]})
await service.begin()                                       # makes one picture: after it the server is ready
states = await service.draw("builtin", [PictureRequest(prompt="a red circle")], size=128)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from oneira.multimodal.stages import PictureRequest, State
from oneira.platform.errors import DataError, UsageError

from .caches import CACHED, MOST_BYTES, Cache, key_of
from .engine import Work
from .line import Line, Ticket
from .models import kind_of
from .pacing import Asked, Late, Pace, asked_of
from .sampling import SampleRequest, SampleStage

Request = PictureRequest | SampleRequest
Goal = int | str | None  # a picture's size, the name of an embedding, None: all stages
FIRST_PROMPT = "a red circle"


class Way(Protocol):
    """Where the stages are. `Engine` is one. `dead`: why they make nothing any more, or empty."""

    @property
    def dead(self) -> str: ...

    async def run(self, model: str, stage: str, request: Request, state: Mapping[str, Any]) -> Work: ...

    async def states(self) -> dict[str, str]: ...

    async def digests(self) -> dict[tuple[str, str], str]: ...

    async def expect(self, model: str, stage: str) -> float: ...

    async def want(self, model: str) -> None: ...


class Measures:
    """What /metrics tells. Times in seconds."""

    def __init__(self, line: Line, caches: Mapping[str, Cache]) -> None:
        self.registry = CollectorRegistry()
        names: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("oneira_requests", "Requests answered.", ["route", "status"], **names)
        self.latency = Histogram(
            "oneira_request_seconds", "From a request to the end of its answer.", ["route"],
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60), **names,
        )  # fmt: skip
        self.steps = Counter("oneira_steps", "Steps made for pictures.", ["model", "stage"], **names)
        self.seconds = Counter("oneira_stage_seconds", "Time of the stages.", ["model", "stage"], **names)
        self.rows = Histogram(
            "oneira_batch_rows", "Pictures that shared a step, on average over a picture's steps.", ["stage"],
            buckets=(1, 2, 4, 8, 16, 32), **names,
        )  # fmt: skip
        Gauge("oneira_queue", "Pictures that wait.", **names).set_function(lambda: line.waiting)
        Gauge("oneira_under_way", "Pictures that are being made.", **names).set_function(lambda: line.taken)
        self.hits = Counter("oneira_cache_hits", "Results of a stage that were remembered.", ["stage"], **names)
        self.misses = Counter("oneira_cache_misses", "Results that were made to be remembered.", ["stage"], **names)
        size = Gauge("oneira_cache_bytes", "Bytes of what is remembered.", ["stage"], **names)
        for kind, cache in caches.items():
            size.labels(kind).set_function(partial(getattr, cache, "bytes"))

    def count(self, model: str, stage: str, work: Work) -> None:
        self.steps.labels(model, stage).inc(work.steps)
        self.seconds.labels(model, stage).inc(work.seconds)
        if work.steps:
            self.rows.labels(stage).observe(work.rows)


class Service:
    """Belongs to one event loop.

    Attributes:
        models: names of the stages by name of the model. sizes: of the pictures that each model can give, rising,
            embedding: its number of dimensions, and finds: what its states hold; samples: what a model of samples gives,
            "points", "pictures" or "text"; all known after `begin`.
    """

    def __init__(self, way: Way, models: Mapping[str, Sequence[str]], line: Line | None = None) -> None:
        self.models = dict(models)
        self.sizes: dict[str, list[int]] = {}
        self.embedding: dict[str, int] = {}
        self.samples: dict[str, str] = {}
        self.finds: dict[str, set[str]] = {}
        self._begun = False
        self.line = line or Line()
        self.caches = {kind: Cache(MOST_BYTES) for kind in CACHED}
        self.measures = Measures(self.line, self.caches)
        self._digests: dict[tuple[str, str], str] = {}
        self._pace = Pace()
        self._last: dict[tuple[str, Goal], str] = {}  # the stage with which a goal was reached
        self._way = way

    async def begin(self) -> None:
        """Makes one picture or sample with each model, which loads and compiles what is left to be, and tells what it makes.

        Raises:
            DataError: a model makes no picture.
        """
        self._digests = await self._way.digests()
        for model in self.models:
            if self.models[model] == [SampleStage.name]:
                self.samples[model] = str((await self.sample(model, SampleRequest()))["kind"])
                continue
            sizes: list[int] = []

            def note(_: int, picture: np.ndarray, sizes: list[int] = sizes) -> None:
                sizes.append(picture.shape[1])

            request = PictureRequest(prompt=FIRST_PROMPT, steps=1)
            [state] = await self.draw(model, [request], on_picture=note)
            if not sizes or "text_embedding" not in state:
                raise DataError(f"Model '{model}' makes no picture. Its stages: {', '.join(self.models[model])}.")
            self.sizes[model], self.embedding[model] = sorted(set(sizes)), len(state["text_embedding"])
            self.finds[model] = set(state)
        self._pace = Pace()  # what is done for the first time takes longer than it ever will
        self._begun = True

    @property
    def ready(self) -> bool:
        """Whether pictures are made: it has begun, was not stopped, and the stages are alive."""
        return self._begun and not self._way.dead

    async def states(self) -> dict[str, str]:
        """Where each model is: hot (on a device), warm (in the host's memory) or cold (on disk)."""
        return await self._way.states()

    def stop(self) -> None:
        """From now on requests get `Stopping`; those under way go on."""
        self._begun = False

    async def drain(self, seconds: float) -> int:
        """Takes no new request, and gives those under way so many seconds. The number of pictures that were left then."""
        self.stop()
        end = time.monotonic() + seconds
        while (left := self.line.taken + self.line.waiting) and time.monotonic() < end and not self._way.dead:
            await asyncio.sleep(0.05)
        return left

    async def draw(
        self, model: str, requests: Sequence[PictureRequest], *, size: int | None = None,
        on_picture: Callable[[int, np.ndarray], None] | None = None, until: float | None = None,
    ) -> list[State]:  # fmt: skip
        """The state of each request when its picture has `size` (None: at the end).

        Args:
            on_picture: gets (which request, picture uint8 [H, W, 3]) for every picture on the way, the last included.
            until: the loop's time by which all have to be done.

        Raises:
            Full: too many wait. Late: not by `until`, which is said as soon as it is known. Stopping: the stages end.
            Whatever a stage raises for one of the requests.
        """
        return await self._all(model, requests, size, lambda state: _has(state, size), on_picture, until)

    async def embed(
        self, model: str, requests: Sequence[PictureRequest], name: str, *, until: float | None = None
    ) -> list[State]:
        """The state of each request as soon as it has `name`: "text_embedding" or "image_embedding".

        Raises:
            UsageError: the model has no such embedding. Else as `draw`.
        """
        if name not in self.finds.get(model, ()):
            raise UsageError(f"Model '{model}' has no {name.replace('_', ' ')}s.")
        return await self._all(model, requests, name, lambda state: name in state, None, until)

    async def sample(self, model: str, request: SampleRequest, *, until: float | None = None) -> State:
        """A state with `samples` and their `kind`. Raises as `draw`; UsageError for what the model cannot do."""
        [state] = await self._all(model, [request], None, lambda state: False, None, until)
        return state

    async def _all(
        self, model: str, requests: Sequence[Request], goal: Goal, enough: Callable[[State], bool],
        on_picture: Callable[[int, np.ndarray], None] | None, until: float | None,
    ) -> list[State]:  # fmt: skip
        asked, began = asked_of(requests), asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(until) as limit:
                if until is not None:
                    await self._check_time(model, requests, goal, asked, until)
                return await self._made(model, requests, asked, goal, enough, on_picture)
        except TimeoutError as error:
            if limit.expired():
                spent = asyncio.get_running_loop().time() - began
                self._pace.took_longer(model, self._left(model, requests, goal), asked, spent)
                raise Late("it took longer than was expected", 1.0) from error
            raise

    async def _made(
        self, model: str, requests: Sequence[Request], asked: Asked, goal: Goal, enough: Callable[[State], bool],
        on_picture: Callable[[int, np.ndarray], None] | None,
    ) -> list[State]:  # fmt: skip
        async with self.line.request(len(requests)) as ticket:
            try:
                async with asyncio.TaskGroup() as group:  # one that fails, or a caller who goes, cancels all
                    tasks = [
                        group.create_task(self._one(ticket, model, request, asked, goal, enough, on_picture, i))
                        for i, request in enumerate(requests)
                    ]
            except BaseExceptionGroup as problems:
                raise problems.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _check_time(
        self, model: str, requests: Sequence[Request], goal: Goal, asked: Asked, until: float
    ) -> None:
        """Raises Late where the wait and the work, as far as they are known, last longer than until then."""
        left = self._left(model, requests, goal)
        if not left:
            return
        wait = self.line.wait(len(requests)) + await self._way.expect(model, left[0])
        work = sum(self._pace.seconds(model, stage, asked) for stage in left)
        late = asyncio.get_running_loop().time() + wait + work - until
        if late > 0:
            for stage in left if late <= work else ():  # without the work it would have been in time
                self._pace.doubt(model, stage, asked)
            with suppress(Exception):  # the request is refused, whatever becomes of this
                await self._way.want(model)
            raise Late(f"it would wait for {wait:.2f} s and take {work:.2f} s", late)

    def _left(self, model: str, requests: Sequence[Request], goal: Goal) -> list[str]:
        """The stages on the way to a goal whose results are not remembered."""
        stages = list(self.models[model])
        if (model, goal) in self._last:
            stages = stages[: stages.index(self._last[model, goal]) + 1]
        return [stage for stage in stages if not all(self._remembers(model, stage, request) for request in requests)]

    def _remembers(self, model: str, stage: str, request: Request) -> bool:
        return kind_of(stage) in CACHED and key_of(self._digests, model, stage, request) in self.caches[kind_of(stage)]

    async def _one(
        self, ticket: Ticket, model: str, request: Request, asked: Asked, goal: Goal, enough: Callable[[State], bool],
        on_picture: Callable[[int, np.ndarray], None] | None, number: int,
    ) -> State:  # fmt: skip
        state: State = {}
        async with self.line.place(ticket):
            seconds = 0.0
            for stage in self.models[model]:
                work = await self._through(model, stage, request, state)
                state.update(work.found)
                seconds += work.seconds
                self.measures.count(model, stage, work)
                if work.steps:
                    self._pace.measure(model, stage, asked, work.seconds * work.rows, work.steps)
                if on_picture is not None and "picture" in work.found:
                    on_picture(number, work.found["picture"])
                if enough(state):
                    self._last[model, goal] = stage
                    break
            self.line.measure(seconds)
        return state

    async def _through(self, model: str, stage: str, request: Request, state: State) -> Work:
        """One stage of a request: as remembered, or made now."""
        key = key_of(self._digests, model, stage, request)
        if key is None:
            return await self._way.run(model, stage, request, state)
        kind = kind_of(stage)
        cache = self.caches[kind]
        found = cache.get(key)
        if found is not None:
            self.measures.hits.labels(kind).inc()
            return Work(found, steps=0, seconds=0.0, rows=0.0)
        self.measures.misses.labels(kind).inc()
        work = await self._way.run(model, stage, request, state)
        cache.put(key, work.found)
        return work


def _has(state: State, size: int | None) -> bool:
    return size is not None and "picture" in state and state["picture"].shape[1] == size
