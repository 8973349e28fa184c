"""The Serve application: one deployment that is the ingress and hosts all stages (fused), or an ingress and one deployment for
each kind of stage, which scale by themselves (split). Both host the same stages with the same `Engine`.

Replicas ask Ray for a tenth of a CPU: the system shares the cores, and the whole starts on two. A replica of the ingress takes
any number of requests; its own line says who waits and who is sent away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from oneira.platform.errors import ClusterError, DataError

from ..scheduling.client import ClusterDevice
from .engine import Engine, Stopping, Work
from .line import Line
from .models import KINDS, kind_of, needed_kinds
from .residency import Residents
from .service import Request, Service

Layout = Literal["fused", "split"]
ACTOR_CPUS = 0.1
ACTOR_GPUS = 0.01  # where there are any: without a share, Ray hides them
STOP_SECONDS = 30.0  # for requests under way at a replica that stops
HEALTH_SECONDS = 2.0  # between two looks at a replica
FROZEN_SECONDS = 10.0  # for its answer; Serve replaces it after three looks in a row without one
LOOKS = 16  # calls of a host beside the pictures that it works on and those that wait next
SILENT_SECONDS = 60.0  # for an answer of a stage elsewhere, before nothing is promised any more
RETRIES = 2  # of a stage whose replica died: it gives the same wherever it runs
STATES = ("hot", "warm", "cold")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served, and how.

    Args:
        models: names, as the loader takes them. loader: see `models.load_models`. key: see `web.make_app`.
        rows: pictures under way at once, in each replica of a stage. queue: pictures that may wait.
        replicas: of each kind of stage at least, in the layout "split".
        memory: bytes of a device that models and work may use; 0: most of it.
    """

    models: Sequence[str]
    loader: str
    key: str | None = None
    rows: int = 16
    queue: int = 64
    replicas: int = 1
    memory: int = 0


def build(serving: Serving, layout: Layout, cpus: int, gpus: int) -> serve.Application:
    """The application, for a cluster of so many CPUs and GPUs."""
    actor = {"num_cpus": ACTOR_CPUS, **({"num_gpus": ACTOR_GPUS} if gpus else {})}
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": STOP_SECONDS, "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": HEALTH_SECONDS, "health_check_timeout_s": FROZEN_SECONDS,
        "max_constructor_retry_count": 1, "logging_config": {"enable_access_log": False},
    }  # fmt: skip
    front = {**common, "max_ongoing_requests": 10_000}
    if layout == "fused":
        fused = serve.deployment(name="fused", ray_actor_options=actor, **front)(serve.ingress()(Fused))
        return fused.bind(serving)
    most = max(serving.replicas, cpus // 2, gpus)
    scale = {"min_replicas": serving.replicas, "max_replicas": most, "target_ongoing_requests": serving.rows}
    host = serve.deployment(
        ray_actor_options=actor, max_ongoing_requests=2 * serving.rows + LOOKS, autoscaling_config=scale, **common
    )(Host)
    hosts = {kind: host.options(name=kind).bind(serving, kind) for kind in needed_kinds(serving.models)}
    ingress = serve.deployment(name="ingress", ray_actor_options={"num_cpus": ACTOR_CPUS}, **front)(
        serve.ingress()(Split)
    )
    return ingress.bind(serving, hosts, serving.rows * most)  # so much work that all replicas can be wanted


def _engine(serving: Serving, kinds: Sequence[str] = KINDS) -> Engine:
    """The engine of this process's stages, on the device that the cluster's scheduler shares out."""
    device = ClusterDevice()
    if serving.memory:
        device.limit(serving.memory)
    return Engine(Residents(serving.models, serving.loader, device, kinds), rows=serving.rows, device=device)


class _Ingress:
    """What both ingresses share: a service, and the app over it."""

    service: Service
    key: str | None

    def __serve_build_asgi_app__(self) -> Any:
        from .watching import ask_scheduler
        from .web import make_app

        return make_app(self.service, self.key, ask_scheduler)

    async def drain(self, seconds: float) -> int:
        """As `Service.drain`."""
        return await self.service.drain(seconds)


class Fused(_Ingress):
    """Ingress and all stages in one process."""

    async def __init__(self, serving: Serving) -> None:  # type: ignore[misc]  # Serve awaits it
        self.key = serving.key
        self.engine = await asyncio.to_thread(_engine, serving)
        self.service = Service(self.engine, self.engine.names, Line(serving.rows, serving.queue))
        await self.service.begin()

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        must_live(self.engine)

    async def __del__(self) -> None:
        if hasattr(self, "service"):
            self.service.stop()
            await self.engine.close()


class Host:
    """The stages of one kind, of all models."""

    async def __init__(self, serving: Serving, kind: str) -> None:  # type: ignore[misc]  # Serve awaits it
        self.engine = await asyncio.to_thread(_engine, serving, [kind])

    async def stages(self) -> dict[str, list[str]]:
        """Names of the stages that are here, by model."""
        return self.engine.names

    async def states(self) -> dict[str, str]:
        """As `Engine.states`."""
        return await self.engine.states()

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        must_live(self.engine)

    async def digests(self) -> dict[tuple[str, str], str]:
        """As `Engine.digests`."""
        return await self.engine.digests()

    async def expect(self, model: str, stage: str) -> float:
        """As `Engine.expect`."""
        return await self.engine.expect(model, stage)

    async def want(self, model: str) -> None:
        """As `Engine.want`."""
        await self.engine.want(model)

    async def run(self, model: str, stage: str, request: Request, state: Mapping[str, Any]) -> Work:
        """As `Engine.run`."""
        return await self.engine.run(model, stage, request, state)

    async def __del__(self) -> None:
        if hasattr(self, "engine"):
            await self.engine.close()


def must_live(engine: Engine) -> None:
    """Raises ClusterError where the engine is dead."""
    if engine.dead:
        raise ClusterError(f"The engine is dead: {engine.dead}.")


class Split(_Ingress):
    """The ingress whose stages are elsewhere. It imports no torch."""

    async def __init__(self, serving: Serving, hosts: Mapping[str, Any], places: int) -> None:  # type: ignore[misc]
        """`places`: pictures under way at once. Serve awaits it."""
        self.key = serving.key
        found = await asyncio.gather(*(hosts[kind].stages.remote() for kind in hosts))
        names: dict[str, list[str]] = {}
        for stages in found:  # in the order of kinds, which is that of the stages
            for model, those in stages.items():
                names.setdefault(model, []).extend(those)
        if not names:
            raise DataError("No model has any stage.")
        way = Remote(hosts)
        self.service = Service(way, names, Line(places, serving.queue))
        self._watch = asyncio.create_task(way.watch())
        await self.service.begin()

    async def __del__(self) -> None:
        if hasattr(self, "service"):
            self.service.stop()
        if hasattr(self, "_watch"):
            self._watch.cancel()


class Remote:
    """The way through stages in other deployments. Serve replaces those of their replicas that die; where no replica of a kind
    answers for some time, the way is dead until one does."""

    def __init__(self, hosts: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._hosts, self._clock = hosts, clock
        self._heard = dict.fromkeys(hosts, clock())

    @property
    def dead(self) -> str:
        """Which kind of stage does not answer, or empty."""
        now = self._clock()
        silent = [kind for kind, heard in self._heard.items() if now - heard > SILENT_SECONDS]
        return f"no replica of the stage '{silent[0]}' has answered for {SILENT_SECONDS:.0f} s" if silent else ""

    async def watch(self) -> None:
        """Asks each kind again and again whether it is there."""

        async def look(kind: str) -> None:
            while True:
                with suppress(Exception):  # whatever it is, it is no answer; the next look may have one
                    async with asyncio.timeout(FROZEN_SECONDS):  # `wait_for` of Python 3.11 may lose a cancellation
                        await self._hosts[kind].stages.remote()
                    self._heard[kind] = self._clock()
                await asyncio.sleep(HEALTH_SECONDS)

        await asyncio.gather(*map(look, self._hosts))

    async def states(self) -> dict[str, str]:
        """Of each model, the state of the part that is farthest from the device."""
        found: dict[str, str] = {}
        for states in await self._of_all("states"):
            for model, state in states.items():
                found[model] = max(state, found.get(model, "hot"), key=STATES.index)
        return found

    async def digests(self) -> dict[tuple[str, str], str]:
        """As `Engine.digests`."""
        return {key: digest for digests in await self._of_all("digests") for key, digest in digests.items()}

    async def expect(self, model: str, stage: str) -> float:
        """As `Engine.expect`."""
        try:
            return await self._hosts[kind_of(stage)].expect.remote(model, stage)
        except (RayActorError, DeploymentUnavailableError, BackPressureError):
            return 0.0  # nobody knows; `run` tries another replica

    async def want(self, model: str) -> None:
        """As `Engine.want`."""
        await self._of_all("want", model)

    async def _of_all(self, method: str, *arguments: Any) -> list[Any]:
        """What one replica of each kind says."""
        try:
            return await asyncio.gather(*(getattr(host, method).remote(*arguments) for host in self._hosts.values()))
        except (RayActorError, DeploymentUnavailableError, BackPressureError) as error:
            raise Stopping from error

    async def run(self, model: str, stage: str, request: Request, state: Mapping[str, Any]) -> Work:
        """As `Engine.run`. A caller who is cancelled cancels it there as well. Where a replica dies, another one does it."""
        for _ in range(RETRIES):
            with suppress(RayActorError):
                return await self._run_once(model, stage, request, state)
        try:
            return await self._run_once(model, stage, request, state)
        except RayActorError as error:
            raise Stopping from error

    async def _run_once(self, model: str, stage: str, request: Request, state: Mapping[str, Any]) -> Work:
        response = self._hosts[kind_of(stage)].run.remote(model, stage, request, state)
        try:
            work: Work = await response
            self._heard[kind_of(stage)] = self._clock()  # looks may wait behind pictures
            return work
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError as error:
            raise error.cause from None
        except (DeploymentUnavailableError, BackPressureError) as error:
            raise Stopping from error
