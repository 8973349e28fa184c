"""Models that come and go in one process: as few as fit, the same pictures, and one more try where memory was short."""

import asyncio
import threading
import time

import numpy as np
import pytest

from oneira.cluster.scheduling.client import Busy
from oneira.cluster.scheduling.leases import Granted, Move, Refused, Wanted
from oneira.cluster.scheduling.scheduler import Scheduler
from oneira.cluster.serving.engine import Engine
from oneira.cluster.serving.models import load_models
from oneira.cluster.serving.pacing import Late
from oneira.cluster.serving.residency import Residents, networks_of, size_of
from oneira.cluster.serving.service import Service
from oneira.multimodal.stages import PictureRequest, through
from oneira.platform.errors import ClusterError, UsageError

NAMES = ("tiny", "other", "third")


class Use:
    load = recalled = granted = False


class Books:
    """The real scheduler in this process. Counts what is resident at most."""

    def __init__(self, memory, **device):
        self.scheduler, self.most, self.evicted = Scheduler(time.monotonic), 0, []
        self.scheduler.add_device("d", memory=memory, slots=2, **device)
        self.leaves, self.uses, self.turn = {}, {}, threading.RLock()

    def add_model(self, model, bytes, leave):
        self.leaves[model] = leave
        self.scheduler.add_model(model, bytes)

    def keep(self, model):
        with self.turn:
            number = self.scheduler.ask("here", "interactive", device="d", model=model, slots=0)
            use = self.uses[number] = Use()
            use.number = number
            self.hear()
        end = time.monotonic() + 120
        while not use.granted:
            if use.number is None:
                raise ClusterError("There is no room.")
            assert time.monotonic() < end
            time.sleep(0.002)
        return use

    def let_go(self, use):
        with self.turn:
            self.scheduler.release(use.number)
            self.hear()

    def loaded(self, use, seconds, state):
        self.scheduler.loaded(use.number, seconds, state)

    def out_of_memory(self, use):
        with self.turn:
            found = self.scheduler.out_of_memory(use.number)
            self.hear()
            return found

    def expect(self, model):
        return self.scheduler.expect("here", "d", model=model, slots=0)

    def count(self, model, times):
        self.scheduler.count(model, times)

    def is_worth(self, model):
        return self.scheduler.is_worth(model, "d")

    def hear(self):
        while events := self.scheduler.events():
            for event in events:
                if isinstance(event, Granted):
                    self.uses[event.lease].load, self.uses[event.lease].granted = event.load is not None, True
                elif isinstance(event, Wanted):
                    self.uses[event.lease].recalled = True
                elif isinstance(event, Refused):
                    self.uses[event.lease].number = None
                elif isinstance(event, Move):
                    self.leaves[event.model](event.to)
                    self.evicted.append(event.model)
                    self.scheduler.moved(event.model, event.device)
            self.most = max(self.most, len(self.scheduler.places["d"].ledger.residents))

    @property
    def there(self):
        return set(self.scheduler.places["d"].ledger.residents)


def size(tiny):
    return size_of(load_models(["tiny"], tiny)["tiny"])


def alone(tiny, model, request):
    return next(through(load_models([model], tiny)[model], [request]))["picture"]


def serving(residents):
    engine = Engine(residents, threads=1)
    return engine, Service(engine, engine.names)


def test_as_many_models_stay_as_fit_and_all_draw_what_they_would_alone(tiny):
    books = Books(int(2.5 * size(tiny)))
    residents = Residents(NAMES, tiny, books)
    assert len(books.there) == 2 and sorted(residents.states().values()) == ["cold", "hot", "hot"]
    request = PictureRequest(prompt="a red circle", seed=3)

    async def main():
        engine, service = serving(residents)
        found = {}
        for model in (*NAMES, *NAMES):
            [state] = await service.draw(model, [request])
            found[model] = state["picture"]
            assert (await engine.states())[model] == "hot"
        await engine.close()
        return found

    found = asyncio.run(main())
    assert books.most == 2 and len(books.evicted) >= 4
    for model in NAMES:
        assert np.abs(found[model].astype(int) - alone(tiny, model, request)).max() <= 1
    assert not np.array_equal(found["tiny"], found["other"])


def test_requests_of_more_models_than_fit_at_once_are_all_answered(tiny):
    books = Books(int(1.5 * size(tiny)))
    residents = Residents(NAMES, tiny, books)

    async def main():
        engine, service = serving(residents)
        asked = [(model, PictureRequest(prompt="a", seed=seed, steps=8)) for seed in range(3) for model in NAMES]
        states = await asyncio.wait_for(asyncio.gather(*(service.draw(m, [request]) for m, request in asked)), 300)
        await engine.close()
        return [(model, request, state["picture"]) for (model, request), [state] in zip(asked, states, strict=True)]

    for model, request, picture in asyncio.run(main()):
        assert np.abs(picture.astype(int) - alone(tiny, model, request)).max() <= 1
    assert books.most == 1


def test_a_model_that_is_used_waits_for_no_other_and_is_not_sent_away(tiny):
    books = Books(int(1.5 * size(tiny)))
    residents = Residents(NAMES[:2], tiny, books)
    residents.take("tiny")
    taking = threading.Thread(target=residents.take, args=("other",))
    taking.start()
    time.sleep(0.1)
    assert books.there == {"tiny"} and taking.is_alive()
    time.sleep(0.3)
    assert residents.is_due("tiny")
    residents.give("tiny")
    taking.join(10)
    assert books.there == {"other"} and residents.states() == {"tiny": "cold", "other": "hot"}


def test_where_memory_is_short_others_leave_and_the_step_is_made_once_more(tiny):
    books = Books(int(2.5 * size(tiny)))
    residents = Residents(NAMES[:2], tiny, books)
    decoder = residents.stage("tiny", "decoder")
    step, failures = decoder.step, []

    def short(plans):
        if len(failures) < limit:
            failures.append(len(plans))
            raise MemoryError
        step(plans)

    decoder.step = short

    async def main():
        engine, service = serving(residents)
        try:
            return await service.draw("tiny", [PictureRequest(prompt="a")])
        finally:
            await engine.close()

    limit = 1
    [state] = asyncio.run(main())
    assert state["picture"].shape == (128, 128, 3) and books.evicted == ["other"] and failures == [1]
    limit = 100
    with pytest.raises(Busy, match="memory is full"):  # there is nothing left to send away
        asyncio.run(main())
    assert failures == [1, 1]


def test_bringing_a_model_counts_where_a_request_has_a_deadline(tiny):
    books = Books(int(1.5 * size(tiny)))
    residents = Residents(NAMES[:2], tiny, books)
    books.scheduler.restoring._measured["tiny", "cold"] = 3.0
    residents.count("other", 1000)  # so that it stays, whatever is refused

    async def main():
        engine, service = serving(residents)
        soon = asyncio.get_running_loop().time() + 2
        with pytest.raises(Late, match=r"wait for 3\.0"):
            await service.draw("tiny", [PictureRequest(prompt="a")], until=soon)
        await service.draw("other", [PictureRequest(prompt="a")], until=soon)
        await engine.close()

    asyncio.run(main())


def test_a_warm_model_comes_back_without_its_files(tiny):
    books = Books(int(1.5 * size(tiny)), host=10**9, kind="cuda")
    residents = Residents(NAMES[:2], tiny, books)
    networks = networks_of([residents._stages["tiny"]["prior"]])
    assert residents.states() == {"tiny": "warm", "other": "hot"}
    residents.take("tiny")
    assert networks_of([residents.stage("tiny", "prior")]) == networks
    assert residents.states() == {"tiny": "hot", "other": "warm"}


def test_a_model_that_never_fits_and_one_that_is_named_twice_are_refused(tiny):
    with pytest.raises(ClusterError, match="no room"):
        Residents(["tiny"], tiny, Books(size(tiny) - 1))
    with pytest.raises(UsageError, match="Two models are called 'tiny'"):
        Residents(["tiny", "tiny"], tiny, Books(10**9))


def test_a_model_that_was_refused_comes_where_that_pays_and_is_given_back(tiny):
    books = Books(int(1.5 * size(tiny)))
    residents = Residents(["tiny", "other"], tiny, books)  # the last of them is there

    async def main():
        engine, service = serving(residents)
        residents.count("other", 5)
        await engine.want("tiny")
        assert residents.states() == {"tiny": "cold", "other": "hot"}  # asked for less
        residents.count("tiny", 20)
        await engine.want("tiny")  # so soon after the last time nobody thinks about it
        assert not engine._coming
        await asyncio.sleep(0.3)
        await asyncio.gather(*(engine.want("tiny") for _ in range(5)))
        end = time.monotonic() + 30
        while residents.states()["tiny"] != "hot" or residents.held or engine._coming:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        assert not books.scheduler.leases and books.there == {"tiny"}
        await service.draw("other", [PictureRequest(prompt="a red circle")])  # its room can be had
        await engine.close()
        await engine.want("tiny")
        assert not engine._coming

    asyncio.run(main())
