"""The scheduler's actor and its client without a cluster: signs of life, and a model that cannot be moved."""

import asyncio
from types import SimpleNamespace

import pytest
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
        assert [letter["kind"] for letter in await desk.listen("far", {})] == ["Granted"]
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
    assert session.desk.told == ([] if fails else [("moved", name, "here/cpu")])
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
