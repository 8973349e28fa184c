"""Engine and line: batching that changes no picture, cancelling within a step, and a fair line."""

import asyncio
from contextlib import contextmanager

import numpy as np
import pytest
from ray.exceptions import RayActorError

from oneira.cluster.serving import application
from oneira.cluster.serving.engine import Engine, Stopping
from oneira.cluster.serving.line import Full, Line
from oneira.cluster.serving.models import load_models
from oneira.cluster.serving.service import Service
from oneira.multimodal.stages import PictureRequest, through
from oneira.platform.devices import LocalDevice
from oneira.platform.errors import Interrupted, UsageError


def make(loader, name="tiny", rows=16, device=None, **line):
    models = load_models([name], loader)
    engine = Engine(models, rows=rows, threads=1, device=device)
    names = {model: [stage.name for stage in stages] for model, stages in models.items()}
    return engine, Service(engine, names, Line(**line)), models[name]


def asks(count, **fields):
    return [PictureRequest(prompt=f"a red circle {i}", seed=i, steps=3 + i % 3, **fields) for i in range(count)]


def test_a_picture_does_not_depend_on_who_shares_the_batch(tiny):
    async def main():
        engine, service, stages = make(tiny)
        requests = asks(6)
        together = await asyncio.gather(*(service.draw("tiny", [request]) for request in requests))
        largest = max(stages[2].batches)
        await engine.close()
        return requests, [state for [state] in together], largest

    requests, together, largest = asyncio.run(main())
    alone = [next(through(load_models(["tiny"], tiny)["tiny"], [request])) for request in requests]
    assert largest >= 4  # they did share
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["picture"].shape == (128, 128, 3)
        assert np.abs(ours["picture"].astype(int) - theirs["picture"]).max() <= 1
    assert not np.array_equal(together[0]["picture"], together[1]["picture"])


def test_plans_join_while_others_are_under_way_and_no_step_has_too_many_rows(tiny):
    async def main():
        engine, service, stages = make(tiny, rows=3)
        first = asyncio.ensure_future(service.draw("tiny", [PictureRequest(prompt="a", steps=60)]))
        while len(stages[2].batches) < 5:
            await asyncio.sleep(0.001)
        await service.draw("tiny", asks(5))
        assert not first.done()
        await first
        await engine.close()
        return stages[2].batches

    batches = asyncio.run(main())
    assert batches[0] == 1 and max(batches) == 3


def test_who_is_cancelled_leaves_within_a_step(tiny):
    async def main():
        engine, service, stages = make(tiny, "patient")
        decoder = stages[2]
        goes = asyncio.ensure_future(service.draw("patient", [PictureRequest(prompt="a", steps=100)]))
        while not decoder.batches:
            await asyncio.sleep(0.01)
        goes.cancel()
        with pytest.raises(asyncio.CancelledError):
            await goes
        made = len(decoder.batches)
        await asyncio.sleep(0.25)
        assert len(decoder.batches) <= made + 1
        assert engine.under_way == 0 and service.line.taken == service.line.waiting == 0
        await engine.close()

    asyncio.run(main())


def test_a_request_that_a_stage_refuses_takes_nobody_along(tiny):
    async def main():
        engine, service, _ = make(tiny)
        good, bad = await asyncio.gather(
            service.draw("tiny", asks(1)),
            service.draw("tiny", [PictureRequest(prompt="unknown purple")]),
            return_exceptions=True,
        )
        assert isinstance(bad, UsageError) and good[0]["picture"].shape == (128, 128, 3)
        with pytest.raises(UsageError, match="allowed are 1 to 100"):
            await service.draw("tiny", [PictureRequest(prompt="a", steps=101)])
        await engine.close()

    asyncio.run(main())


def test_closing_answers_those_who_wait(tiny):
    async def main():
        engine, service, _ = make(tiny, "patient")
        waits = asyncio.ensure_future(service.draw("patient", asks(2)))
        await asyncio.sleep(0.1)
        await engine.close()
        with pytest.raises(Stopping):
            await waits
        with pytest.raises(Stopping):
            await engine.run("patient", "text", PictureRequest(), {})

    asyncio.run(main())


class Counted(LocalDevice):
    """Counts leases and steps; `cancelled` ends the lease at its next step."""

    def __init__(self):
        super().__init__("cpu")
        self.leases, self.steps, self.held, self.cancelled = 0, 0, False, False

    @contextmanager
    def lease(self, **asked):
        assert asked["priority"] == "interactive" and not self.held
        self.leases, self.held = self.leases + 1, True
        yield self
        self.held = False

    def step(self):
        assert self.held
        self.steps += 1
        if self.cancelled:
            raise Interrupted("The lease of the device was cancelled.")


def test_one_lease_lasts_from_the_first_plan_to_the_last(tiny):
    async def main():
        device = Counted()
        engine, service, stages = make(tiny, device=device)
        await asyncio.gather(*(service.draw("tiny", [request]) for request in asks(4)))
        turns = sum(len(stage.batches) for stage in stages[1:]) + 1
        while device.held:
            await asyncio.sleep(0.001)
        assert device.leases == 1 and device.steps >= turns
        await service.draw("tiny", asks(1))
        assert device.leases == 2
        await engine.close()

    asyncio.run(main())


def test_a_lease_that_is_taken_back_ends_what_is_under_way_and_nothing_else(tiny):
    async def main():
        device = Counted()
        engine, service, _ = make(tiny, "patient", device=device)
        waits = [asyncio.ensure_future(service.draw("patient", asks(1))) for _ in range(2)]
        while device.steps < 3:
            await asyncio.sleep(0.01)
        device.cancelled = True
        for wait in waits:
            with pytest.raises(Interrupted):
                await wait
        device.cancelled = device.held = False
        [state] = await service.draw("patient", asks(1))
        assert state["picture"].shape == (128, 128, 3) and engine.under_way == 0
        await engine.close()

    asyncio.run(main())


def test_stages_elsewhere_that_do_not_answer_are_seen_and_heard_again(monkeypatch):
    monkeypatch.setattr(application, "HEALTH_SECONDS", 0.001)
    now, lost = [0.0], [False]

    class Host:
        """A deployment's handle: its decoder may be lost."""

        def __init__(self, kind):
            self.stages, self.kind = self, kind

        async def remote(self):
            if lost[0] and self.kind == "decoder":
                raise RayActorError
            return {}

    async def main():
        way = application.Remote({kind: Host(kind) for kind in ("prior", "decoder")}, clock=lambda: now[0])
        watch = asyncio.create_task(way.watch())

        async def pass_time(seconds):
            now[0] += seconds
            await asyncio.sleep(0.05)

        await pass_time(application.SILENT_SECONDS + 1)
        assert way.dead == "", "both have answered since"
        lost[0] = True
        await pass_time(application.SILENT_SECONDS - 1)
        assert way.dead == ""
        await pass_time(2)
        assert "'decoder'" in way.dead and not watch.done()
        lost[0] = False
        await pass_time(1)
        assert way.dead == ""
        watch.cancel()

    asyncio.run(main())


def test_the_line_lets_a_small_request_pass_a_large_one_and_counts():
    async def main():
        line, order = Line(places=2, limit=8), []

        async def ask(name, pictures):
            async def one(ticket):
                async with line.place(ticket):
                    assert line.taken <= 2
                    await asyncio.sleep(0.01)
                    order.append(name)

            async with line.request(pictures) as ticket:
                await asyncio.gather(*(one(ticket) for _ in range(pictures)))

        large = asyncio.ensure_future(ask("large", 8))
        await asyncio.sleep(0)
        small = asyncio.ensure_future(ask("small", 1))
        await asyncio.gather(large, small)
        assert order.index("small") in (2, 3) and len(order) == 9
        assert line.taken == line.waiting == 0

    asyncio.run(main())


def test_a_full_line_says_when_to_come_back():
    async def main():
        line = Line(places=1, limit=2)
        for _ in range(100):
            line.measure(4.0)
        async with line.request(3) as ticket, line.place(ticket):
            assert line.waiting == 2
            with pytest.raises(Full) as caught:
                async with line.request(2):
                    pass
            assert caught.value.retry_after == 8  # two pictures must leave, of four seconds each
        async with line.request(3):
            pass

    asyncio.run(main())


def test_one_who_is_cancelled_in_the_line_leaves_no_trace():
    async def main():
        line = Line(places=1, limit=4)
        async with line.request(1) as first, line.place(first):

            async def other():
                async with line.request(1) as ticket, line.place(ticket):
                    pass

            waits = asyncio.ensure_future(other())
            await asyncio.sleep(0)
            assert line.waiting == 1
            waits.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waits
            assert (line.waiting, line.taken) == (0, 1)
        assert line.taken == 0

    asyncio.run(main())
