"""The scheduler's actor and its client without a cluster: signs of life, and a model that cannot be moved."""

import asyncio
import copy
import random
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import ray
import torch

from oneira.cluster.scheduling import actor, client
from oneira.cluster.scheduling.client import _Model, _of_this_process, _Session


@pytest.mark.parametrize("beats", [True, False])
def test_a_client_elsewhere_that_is_busy_keeps_its_leases_as_long_as_it_beats(monkeypatch, beats):
    monkeypatch.setattr(actor, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(actor, "TICK_SECONDS", 0.05)

    async def story():
        desk = actor.Desk(restarted=False)
        device = {"name": "there/cpu", "memory": 1000, "slots": 1, "node": "there", "kind": "cpu", "host": 0}
        await desk.join({"id": "far", "host": "there", "pid": 1, "born": 0.0}, [device], [], [])
        await desk.ask("far", 1, "train", "there/cpu", 10, 1, None, None)
        assert [letter["kind"] for letter in await desk.listen("far", {}, {1: "waiting"}, 0, {})] == ["Granted"]
        for _ in range(20):  # it is busy with a letter, and does not listen
            await asyncio.sleep(0.05)
            if beats:
                await desk.beat("far")
        kept = len(desk.scheduler.leases)
        await desk.beat("nobody")
        return kept

    assert asyncio.run(story()) == (1 if beats else 0)


class Desk:
    """Counts what a session tells."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        told = self.told

        class Method:
            def remote(self, *arguments):
                told.append((name, *arguments))

        return Method()


@pytest.mark.parametrize("fails", [True, False])
def test_a_model_that_cannot_be_moved_ends_no_listener_and_stays_in_the_books(caplog, fails):
    def leave(to):
        if fails:
            raise RuntimeError("no memory")

    session = object.__new__(_Session)
    session.desk = Desk()
    name = _of_this_process("heavy")
    session._models = {name: _Model(name, 10, "here/cpu", leave, here=True)}
    session._send_away({"kind": "Move", "model": name, "device": "here/cpu", "to": "cold"})
    assert session._models[name].here == fails
    assert session.desk.told == [("stayed" if fails else "moved", name, "here/cpu")]
    assert ("could not be moved" in caplog.text) == fails


def test_a_gpu_is_the_same_one_whatever_number_a_process_sees_it_by(monkeypatch):
    """Two processes, each of which sees one GPU as its first, and a third that sees both."""
    chips = {"a": "11111111-2222-3333-4444-555555555555", "b": "66666666-2222-3333-4444-555555555555"}
    seen = {}
    for process, visible in (("one", "a"), ("two", "b"), ("both", "ba")):
        monkeypatch.setattr(client, "pick_device", lambda name="auto": torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: len(visible))
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda index, visible=visible: SimpleNamespace(uuid=chips[visible[index]], total_memory=100),
        )
        seen[process] = [device["name"] for device in client._devices("host") if device["kind"] == "cuda"]
    assert seen["one"] != seen["two"] and seen["both"] == seen["two"] + seen["one"]
    assert client._kind_of(torch.device("cuda")) == seen["both"][0].removeprefix("host/")


def test_copies_of_two_machines_have_two_names(monkeypatch):
    names = set()
    for host in ("a", "b"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        names.add(_of_this_process("stable@home"))
    assert len(names) == 2 and {name.rpartition("@")[0] for name in names} == {"stable@home"}


class Wire:
    """To an actor in a loop of another thread. Loses one call in five on its way there, and one answer in five on the way back."""

    def __init__(self, loop, desk):
        self.loop, self.desk, self.chance, self.lost = loop, desk, random.Random(0), 0
        self.lock = threading.Lock()

    def __getattr__(self, name):
        def remote(*arguments):
            with self.lock:
                lot = self.chance.random()
                self.lost += lot < 0.4
            answer, failed = Future(), ray.exceptions.ActorUnavailableError("a cable is loose", None)
            if name == "join" or lot >= 0.4:
                return self.send(name, arguments)
            if lot >= 0.2:
                self.send(name, arguments)
            threading.Timer(0.02, answer.set_exception, [failed]).start()
            return answer

        return SimpleNamespace(remote=remote)

    def send(self, name, arguments):
        async def call():
            return copy.deepcopy(await getattr(self.desk, name)(*copy.deepcopy(arguments)))

        return asyncio.run_coroutine_threadsafe(call(), self.loop)


@pytest.fixture
def wire(monkeypatch):
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def make():
        return actor.Desk(restarted=False)

    found = Wire(loop, asyncio.run_coroutine_threadsafe(make(), loop).result())
    monkeypatch.setattr(actor, "LISTEN_SECONDS", 0.05)
    for key, value in (("RETRY_SECONDS", 0.01), ("LINGER_SECONDS", 0.05), ("find_desk", lambda: found)):
        monkeypatch.setattr(client, key, value)
    monkeypatch.setattr(ray, "get", lambda answer, timeout=None: answer.result(timeout))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    yield found

    async def end():
        found.desk._ticking.cancel()

    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_lost_calls_and_answers_leave_nobody_waiting_and_nothing_behind(wire):
    session = _Session()
    device, cores = session.devices[0]["name"], session.devices[0]["slots"]
    done, refused = [], []

    def work(number):
        priority = "interactive" if number % 2 else "train"
        for block in range(8):
            fields = {"priority": priority, "device": device, "bytes": number, "slots": cores, "model": None}
            deadline = 0.0 if block == 7 else None
            try:
                lease = session.take(fields, deadline)
            except client.Busy:
                refused.append(number)
                continue
            for _ in range(5):
                lease.step()
                time.sleep(0.005)
            session.leave(lease)
        done.append(number)

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(6)]
    for worker in workers:
        worker.start()
    end = time.monotonic() + 60
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
    assert sorted(done) == [0, 1, 2, 3, 4, 5], wire.desk.scheduler.report()
    while (session._leases or wire.desk.scheduler.leases or wire.desk._ids) and time.monotonic() < end:
        time.sleep(0.02)
    assert not session._leases and not wire.desk.scheduler.leases and not wire.desk._ids
    assert wire.lost > 50 and refused
    session.close()
