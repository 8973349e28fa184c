"""The scheduler under a clock of the test's: its rules one by one, and all of them at once under random use."""

import copy
import math

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from oneira.cluster.scheduling.client import Busy
from oneira.cluster.scheduling.leases import CAN_WAIT, Cancelled, Drop, Granted, Move, Refused, Wanted
from oneira.cluster.scheduling.ledger import Ledger, Overdrawn, Working
from oneira.cluster.scheduling.placing import Soonest
from oneira.cluster.scheduling.residency import Demand, Host, cheapest
from oneira.cluster.scheduling.scheduler import Scheduler
from oneira.platform.errors import UsageError


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def make(memory=100, slots=1, models=(), **more):
    clock = Clock()
    scheduler = Scheduler(clock)
    scheduler.add_device("d", memory=memory, slots=slots, **more)
    for name, size in dict(models).items():
        scheduler.add_model(name, size)
    return clock, scheduler


def kinds(events):
    return [(type(event).__name__, event.lease) for event in events if not isinstance(event, Move)]


# Parts ----------------------------------------------------------------------------------------------------------------


def test_the_ledger_never_overdraws_and_a_pause_keeps_bytes():
    ledger = Ledger(100, 2)
    ledger.put("m", 60, "a")
    ledger.hold(1, 30, 2)
    for wrong in (lambda: ledger.put("n", 11, "a"), lambda: ledger.hold(2, 11, 0), lambda: ledger.hold(2, 0, 1)):
        with pytest.raises(Overdrawn):
            wrong()
    ledger.pause(1)
    assert (ledger.free, ledger.slots_free) == (10, 2)
    ledger.hold(1, 30, 1)
    ledger.let_go(1)
    ledger.drop("m")
    assert (ledger.used, ledger.slots_taken) == (0, 0)


def test_working_memory_is_that_of_the_next_batch_measured():
    working = Working()
    assert working.bytes("m", 4) == 0
    working.measure("m", 4, 100)
    working.measure("m", 1, 40)
    working.measure("m", 4, 90)
    assert [working.bytes("m", rows) for rows in (1, 2, 4, 8)] == [40, 100, 100, 200]


@pytest.mark.parametrize("count", [6, 14])
def test_the_set_that_costs_least_gives_way(count):
    models = [(f"m{i}", 10 + i, float(i)) for i in range(count)]
    going = cheapest(models, 30)
    assert going == ["m0", "m1", "m2"] or sorted(going) == ["m0", "m1", "m2"]
    assert cheapest(models, 0) == [] and cheapest(models, 10_000) is None
    one_dear_or_two_cheap = [("dear", 50, 5.0), ("a", 25, 1.0), ("b", 25, 1.0), ("c", 60, 2.5)]
    assert sorted(cheapest(one_dear_or_two_cheap, 50)) == ["a", "b"]
    assert cheapest(one_dear_or_two_cheap, 55) == ["c"]


def test_busy_comes_back_whole_from_another_process():
    error = copy.copy(Busy("its memory is full", 2.5))  # made anew as a message of Ray makes it
    assert error.retry_after == 2.5 and str(error) == str(Busy("its memory is full", 2.5))


def test_demand_fades():
    demand = Demand()
    for second in range(300):
        demand.count("m", second)
    assert demand.rate("m", 300) == pytest.approx(1.0, rel=0.05)
    assert demand.rate("m", 330) == pytest.approx(0.5, rel=0.05) and demand.rate("n", 300) == 0


def test_a_node_keeps_what_costs_more_to_lose():
    host = Host(100)
    assert host.keep("a", 60, [], 1.0) == [] and host.keep("a", 60, [], 1.0) == []
    assert host.keep("b", 60, [("a", 60, 1.0)], 0.5) is None
    assert host.keep("b", 60, [("a", 60, 1.0)], 2.0) == ["a"] and host.used == 60


# Leases ---------------------------------------------------------------------------------------------------------------


def test_interactive_takes_the_device_at_the_next_step_and_gives_it_back():
    clock, scheduler = make()
    train = scheduler.ask("t", "train", bytes=50)
    clock.now = 100.0
    quick = scheduler.ask("i", "interactive", bytes=50)
    assert scheduler.events() == [
        Granted(train, "t", "d"), Wanted(train, "t", pause=True),
    ]  # fmt: skip
    scheduler.pause(train)
    assert kinds(scheduler.events()) == [("Granted", quick), ("Wanted", quick)]  # the second: somebody waits
    clock.now += 2.0
    scheduler.release(quick)
    assert kinds(scheduler.events()) == [("Granted", train)]
    waits = scheduler.report()["waits"]
    assert (
        waits["train"] == waits["interactive"] == {"leases": 1, "seconds": 0.0}
    )  # going on after a pause is no new wait


def test_equals_take_turns_and_nobody_is_paused_before_a_quantum():
    clock, scheduler = make()
    first, second = scheduler.ask("a", "train"), scheduler.ask("b", "train")
    assert [event.pause for event in scheduler.events() if isinstance(event, Wanted)] == [False]
    clock.now = CAN_WAIT["train"] - 0.1
    scheduler.tick()
    assert not scheduler.events()
    clock.now = CAN_WAIT["train"]
    scheduler.tick()
    assert scheduler.events() == [Wanted(first, "a", pause=True)]
    scheduler.pause(first)
    assert kinds(scheduler.events())[0] == ("Granted", second)
    quick = scheduler.ask("i", "interactive")
    assert Wanted(second, "b", pause=True) not in scheduler.events()  # its turn had come, so it has its quantum
    clock.now += 1.0
    scheduler.tick()
    assert Wanted(second, "b", pause=True) in scheduler.events()
    scheduler.pause(second)
    assert kinds(scheduler.events())[0] == ("Granted", quick)


def test_batch_is_passed_for_a_minute_and_not_longer():
    clock, scheduler = make()
    running = scheduler.ask("i", "interactive", seconds=1.0)
    batch = scheduler.ask("b", "batch", seconds=1.0)
    granted_at = None
    while granted_at is None and clock.now < 100:
        clock.now += 1.0
        scheduler.ask("i", "interactive", seconds=1.0)  # always somebody more urgent
        scheduler.release(running)
        for event in scheduler.events():
            if isinstance(event, Granted):
                running = event.lease
                granted_at = clock.now if event.lease == batch else granted_at
    assert CAN_WAIT["batch"] <= granted_at <= CAN_WAIT["batch"] + 2


def test_a_wide_lease_is_passed_until_its_turn_and_then_gets_all_cores():
    clock, scheduler = make(slots=4)
    narrow = [scheduler.ask("a", "dream", slots=2) for _ in range(2)]
    wide = scheduler.ask("b", "train", slots=4)
    scheduler.release(narrow[0])
    passing = scheduler.ask("a", "dream", slots=1)
    assert ("Granted", passing) in kinds(scheduler.events())
    clock.now = CAN_WAIT["train"] + 1
    scheduler.tick()
    late = scheduler.ask("a", "dream", slots=1)
    paused = [event.lease for event in scheduler.events() if isinstance(event, Wanted) and event.pause]
    assert sorted(paused) == sorted([narrow[1], passing])
    for lease in paused:
        scheduler.pause(lease)
    assert kinds(scheduler.events())[0] == ("Granted", wide) and late in scheduler.leases


def test_the_wait_is_told_and_a_deadline_that_cannot_be_met_is_refused_at_once():
    clock, scheduler = make(models={"m": 10})
    for _ in range(3):
        scheduler.ask("i", "interactive", model="m", seconds=2.0)
    restore = scheduler.restoring.seconds("m", "cold", 10)
    refused = scheduler.ask("i", "interactive", model="m", seconds=2.0, deadline=5.0)
    [event] = [event for event in scheduler.events() if isinstance(event, Refused)]
    assert event.lease == refused and event.retry_after == pytest.approx(3.0, abs=3 * restore + 0.01)
    kept = scheduler.ask("i", "interactive", model="m", seconds=2.0, deadline=8.1)
    assert kept in scheduler.leases
    clock.now = 7.0  # the others take longer than they said
    scheduler.tick()
    assert kept not in scheduler.leases and ("Refused", kept) in kinds(scheduler.events())


def test_durations_and_working_memory_are_measured():
    clock, scheduler = make(models={"m": 10})
    for _ in range(3):
        lease = scheduler.ask("i", "interactive", model="m", rows=4)
        clock.now += 3.0
        scheduler.release(lease)
    scheduler.ask("i", "interactive", model="m", rows=4)
    refused = scheduler.ask("i", "interactive", model="m", rows=4, deadline=4.0)
    assert ("Refused", refused) in kinds(scheduler.events())
    scheduler.working.measure("m", 8, 30)
    assert scheduler.leases[scheduler.ask("i", "interactive", model="m", rows=8)].bytes == 30


def test_what_can_never_fit_is_refused_for_good_and_names_are_checked():
    _, scheduler = make(models={"m": 60})
    scheduler.announce("a", "m", 60, "d")
    scheduler.pin("m", "d")
    scheduler.ask("i", "train", bytes=41)
    [event] = scheduler.events()
    assert isinstance(event, Refused) and event.retry_after is None
    for wrong in ({"priority": "dreams"}, {"device": "e"}, {"model": "n"}):
        with pytest.raises(UsageError, match="Unknown"):
            scheduler.ask("i", **{"priority": "train", **wrong})


# Residency ------------------------------------------------------------------------------------------------------------


def test_the_model_that_is_asked_for_least_gives_way_and_its_owner_says_when():
    _, scheduler = make(models={"a": 40, "b": 40, "c": 40})
    for model, times in (("a", 5), ("b", 2)):
        for _ in range(times):
            scheduler.release(scheduler.ask("host", "interactive", model=model))
    scheduler.events()
    lease = scheduler.ask("host", "interactive", model="c")
    assert scheduler.events() == [Move("b", "host", "d", "cold")]  # no grant before it is gone
    scheduler.moved("b", "d")
    assert scheduler.events() == [Granted(lease, "host", "d", load="c")]
    assert scheduler.state("a", "d") == scheduler.state("c", "d") == "hot" and scheduler.state("b", "d") == "cold"


def test_a_model_that_cannot_be_moved_stays_and_holds_up_only_who_needs_its_room():
    _, scheduler = make(memory=100, slots=2, models={"m": 60, "n": 50}, host=100)
    assert scheduler.announce("a", "m", 60, "d")
    large = scheduler.ask("b", "interactive", device="d", model="n")
    small = scheduler.ask("c", "interactive", device="d", bytes=30)
    (move,) = scheduler.events()
    assert isinstance(move, Move) and scheduler.state("m", "d") == "hot"
    scheduler.stayed("m", "d")
    refused, granted = scheduler.events()
    assert isinstance(refused, Refused) and (refused.lease, refused.retry_after) == (large, None)
    assert "'m' could not be moved" in refused.why
    assert isinstance(granted, Granted) and granted.lease == small
    scheduler.ask("b", "interactive", device="d", model="n")
    assert isinstance(scheduler.events()[0], Refused)
    scheduler.forget("a")  # its process ends, and with it the model
    scheduler.ask("b", "interactive", device="d", model="n")
    assert isinstance(scheduler.events()[0], Granted) and "m" not in scheduler.places["d"].host.models


def test_a_model_is_worth_bringing_when_it_is_asked_for_more_than_what_leaves_for_it():
    _, scheduler = make(memory=100, models={"m": 60, "n": 60, "huge": 200})
    assert scheduler.announce("a", "m", 60, "d")
    scheduler.count("m", 10)
    scheduler.count("n", 10)
    scheduler.count("stranger", 10)
    assert not scheduler.is_worth("m", "d") and not scheduler.is_worth("n", "d") and not scheduler.is_worth("huge", "d")
    scheduler.count("n", 10)
    assert scheduler.is_worth("n", "d") and not scheduler.leases
    use = scheduler.ask("a", "interactive", device="d", model="m", slots=0)
    assert not scheduler.is_worth("n", "d")  # what is in use cannot leave
    scheduler.release(use)
    assert scheduler.is_worth("n", "d")


def test_models_stay_in_the_nodes_memory_where_there_is_room():
    _, scheduler = make(models={"a": 80, "b": 80}, host=100)
    scheduler.release(scheduler.ask("host", "interactive", model="a"))
    first = scheduler.ask("host", "interactive", model="b")
    [move] = [event for event in scheduler.events() if isinstance(event, Move)]
    assert move.to == "warm"
    scheduler.moved("a", "d")
    assert scheduler.state("a", "d") == "warm"
    scheduler.release(first)
    for _ in range(9):
        scheduler.release(scheduler.ask("host", "interactive", model="b"))
    scheduler.ask("other", "interactive", model="a")
    assert Drop("a", "host") in scheduler.events()  # there is room for one, and b is asked for more
    scheduler.moved("b", "d")
    assert (scheduler.state("a", "d"), scheduler.state("b", "d")) == ("hot", "warm")


def test_a_lease_without_slots_keeps_a_model_and_takes_no_time():
    _, scheduler = make(models={"a": 60, "b": 60})
    train = scheduler.ask("t", "train")
    keep = scheduler.ask("host", "interactive", model="a", slots=0)
    assert kinds(scheduler.events()) == [("Granted", train), ("Granted", keep)]
    quick = scheduler.ask("host", "interactive")
    assert kinds(scheduler.events()) == [("Wanted", train)]  # the model's lease would give it no time
    scheduler.pause(train)
    other = scheduler.ask("host", "interactive", model="b", slots=0)
    assert ("Wanted", keep) in kinds(scheduler.events())
    scheduler.release(keep)
    [move] = scheduler.events()
    scheduler.moved(move.model, "d")
    assert kinds(scheduler.events()) == [("Granted", other)] and quick in scheduler.leases


def test_the_lowest_limit_of_a_devices_memory_counts_for_as_long_as_its_client_lives():
    _, scheduler = make(models={"a": 60})
    scheduler.limit("one", "d", 70)
    scheduler.limit("two", "d", 50)
    refused = scheduler.ask("c", "train", bytes=60)
    assert kinds(scheduler.events()) == [("Refused", refused)]
    scheduler.forget("two")
    first, second = (scheduler.ask("c", "train", bytes=bytes, slots=0) for bytes in (60, 20))
    assert ("Granted", first) in (events := kinds(scheduler.events())) and ("Granted", second) not in events
    scheduler.forget("one")
    assert kinds(scheduler.events()) == [("Granted", second)]


def test_what_a_request_would_wait_for_is_said_and_changes_nothing():
    clock, scheduler = make(models={"a": 60, "huge": 101})
    assert scheduler.expect("c", "d") == 0
    train = scheduler.ask("t", "train")
    scheduler.stepped(train, 2.0)
    clock.now = 1.0
    scheduler.events()
    assert scheduler.expect("c", "d") == 2.0 and scheduler.expect("c", "d", slots=0) == 0
    scheduler.loaded(scheduler.ask("host", "interactive", model="a", slots=0), 3.0, "cold")
    assert scheduler.expect("c", "d", model="a") == 2.0
    scheduler.forget("host")
    assert scheduler.expect("c", "d", model="a") == 5.0
    assert scheduler.expect("c", "d", model="huge") == scheduler.expect("c", "d", slots=2) == math.inf
    scheduler.release(train)
    scheduler.ask("other", "interactive")
    assert scheduler.expect("c", "d") == pytest.approx(2.0)  # a step, as the device's last ones: it ends soon
    assert len(scheduler.leases) == 1


def test_a_model_that_somebody_uses_stays_and_a_small_lease_passes_one_without_room():
    _, scheduler = make(slots=2, models={"a": 60, "b": 60})
    user = scheduler.ask("x", "train", model="a")
    blocked = scheduler.ask("y", "interactive", model="b")
    small = scheduler.ask("z", "batch", bytes=10)
    assert kinds(scheduler.events()) == [("Granted", user), ("Wanted", user), ("Granted", small)]
    scheduler.release(user)
    scheduler.moved("a", "d")
    assert ("Granted", blocked) in kinds(scheduler.events())


def test_leases_of_memory_do_not_pass_a_large_one_for_ever():
    clock, scheduler = make(slots=8)
    small = [scheduler.ask("a", "interactive", bytes=30) for _ in range(3)]
    large = scheduler.ask("b", "dream", bytes=90)
    for _ in range(40):
        clock.now += 0.5
        small.append(scheduler.ask("a", "interactive", bytes=30))
        scheduler.release(small.pop(0))
        if ("Granted", large) in kinds(scheduler.events()):
            break
    assert CAN_WAIT["dream"] <= clock.now <= CAN_WAIT["dream"] + 3


def test_a_lease_goes_to_the_device_that_has_its_model_unless_the_wait_is_longer_than_bringing_it_elsewhere():
    clock = Clock()
    scheduler = Scheduler(clock)
    for name in ("d0", "d1"):
        scheduler.add_device(name, memory=int(10e9))
    scheduler.add_model("m", int(2e9))  # two seconds from disk
    devices = []
    scheduler.release(scheduler.ask("i", "interactive", model="m"))
    for _ in range(5):
        lease = scheduler.ask("i", "interactive", model="m", seconds=0.9)
        devices.append(scheduler.leases[lease].device)
    assert devices == ["d0", "d0", "d0", "d1", "d0"]  # the fourth would wait 2.7 s


def test_a_process_takes_its_own_copies_of_models_with_it_wherever_they_are():
    _, scheduler = make(memory=50, host=100, models={"shared": 10})
    scheduler.add_model("hot@c", 40, "c")
    scheduler.add_model("warm@c", 45, "c")
    scheduler.add_model("cold@c", 20, "c")
    scheduler.release(scheduler.ask("c", "interactive", model="warm@c"))
    held = scheduler.ask("c", "interactive", model="hot@c")
    [leaving] = [event.model for event in scheduler.events() if isinstance(event, Move)]
    scheduler.moved(leaving, "d")
    scheduler.release(held)
    states = {model["name"]: model["state"] for model in scheduler.report()["models"]}
    assert states == {"shared": "cold", "hot@c": "hot", "warm@c": "warm", "cold@c": "cold"}
    waiting = scheduler.ask("other", "interactive", model="shared")
    scheduler.forget("c")
    assert [model["name"] for model in scheduler.report()["models"]] == ["shared"]
    host = scheduler.places["d"].host
    assert (host.used, host.models) == (0, {}) and scheduler.places["d"].ledger.residents.keys() <= {"shared"}
    assert scheduler.leases[waiting].state == "running"
    scheduler.add_model("hot@c", 40, "c")  # it was only silent, and tells again what it has
    assert scheduler.ask("c", "interactive", model="hot@c")


def test_a_device_with_too_few_slots_takes_neither_a_lease_nor_the_model_for_it():
    clock = Clock()
    scheduler = Scheduler(clock)
    scheduler.add_device("few", memory=100, slots=1)
    scheduler.add_device("many", memory=100, slots=4)
    scheduler.add_model("m", 50)
    scheduler.release(scheduler.ask("c", "train", device="many"))  # so that "few" is free first
    for model in (None, "m"):
        clock.now += 1
        lease = scheduler.ask("c", "train", model=model, slots=4)
        assert scheduler.leases[lease].device == "many"
        scheduler.release(lease)
    scheduler.add_model("n", 60)
    scheduler.restoring.measure("n", "cold", 10.0)
    scheduler.ask("c", "interactive", model="n", slots=4, deadline=1.0)
    assert [lease.device for lease in scheduler.leases.values()] == ["many"]  # which brings the model


def test_after_a_real_lack_of_memory_all_that_is_idle_goes_and_the_need_is_remembered():
    _, scheduler = make(slots=2, models={"a": 20, "b": 20})
    scheduler.release(scheduler.ask("host", "interactive", model="a"))
    lease = scheduler.ask("host", "interactive", model="b", rows=2, bytes=8)
    scheduler.events()
    assert scheduler.out_of_memory(lease)
    assert [event.model for event in scheduler.events()] == ["a"]
    scheduler.moved("a", "d")
    assert not scheduler.out_of_memory(lease) and scheduler.working.bytes("b", 2) > 8


def test_a_client_that_dies_leaves_nothing():
    _, scheduler = make(slots=2, models={"a": 50})
    scheduler.ask("dead", "interactive", model="a", bytes=50)
    scheduler.ask("dead", "train", bytes=10)
    waits = scheduler.ask("alive", "train", bytes=80)
    scheduler.events()
    scheduler.forget("dead")
    assert kinds(scheduler.events()) == [("Granted", waits)]
    assert scheduler.places["d"].ledger.used == 80 and scheduler.state("a", "d") == "cold"


def test_what_is_removed_leaves_nothing_in_the_order_of_devices():
    order = Soonest()
    order.put("stays", 5.0)
    for k in range(1000):
        order.put("comes and goes", float(k % 7))
        order.remove("comes and goes")
    assert len(order._heap) <= 12 and order.first(lambda name: 5.0) == ["stays"]


def test_a_machine_that_is_gone_is_forgotten_but_for_what_somebody_waits_for():
    scheduler = Scheduler(lambda: 0.0)
    for node in "ab":
        scheduler.add_device(f"{node}/cpu", memory=100, slots=2, node=node)
        scheduler.add_device(f"{node}/gpu", memory=100, node=node)
    scheduler.add_model("m", 10)
    assert scheduler.announce("c", "m", 10, "a/cpu")
    scheduler.ask("d", "train", device="a/gpu")
    scheduler.remove_machine("a")
    assert set(scheduler.places) == {"a/gpu", "b/cpu", "b/gpu"} and not scheduler.models["m"].devices
    scheduler.forget("d")
    scheduler.remove_machine("a")
    assert set(scheduler.places) == {"b/cpu", "b/gpu"} and set(scheduler.hosts) == {"b"}
    scheduler.ask("d", "train")
    assert next(lease.device for lease in scheduler.leases.values()).startswith("b/")
    scheduler.add_device("a/cpu", memory=100, slots=4, node="a")  # it comes back, otherwise
    assert scheduler.places["a/cpu"].ledger.slots == 4


def test_cancelling_ends_who_waits_now_and_who_runs_when_it_says_so():
    _, scheduler = make()
    runs, waits = scheduler.ask("a", "train"), scheduler.ask("b", "train")
    scheduler.events()
    scheduler.cancel(waits)
    scheduler.cancel(runs)
    assert kinds(scheduler.events()) == [("Cancelled", waits), ("Cancelled", runs)]
    assert scheduler.places["d"].ledger.slots_taken == 1
    scheduler.release(runs)
    assert scheduler.places["d"].ledger.slots_taken == 0 and not scheduler.leases


# All at once ----------------------------------------------------------------------------------------------------------

DEVICES = {"gpu": (100, 1), "cpu": (120, 4)}
MODELS = {"a": 10, "b": 25, "c": 40, "d": 60, "e": 95}
CLIENTS = ("x", "y", "z")


class Scheduling(RuleBasedStateMachine):
    """Clients that ask, pause, end, die and lie dead, keeping books of their own from what they are told."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.begin()
        self.asked, self.running, self.paused = {}, {}, {}  # lease -> (client, device or None, bytes, slots)
        self.where = {}  # device of those that were granted
        self.told = set()  # leases told to pause
        self.moves = []
        self.here = {}  # (model, device) -> owner

    def begin(self):
        self.scheduler = Scheduler(self.clock)
        for name, (memory, slots) in DEVICES.items():
            self.scheduler.add_device(name, memory=memory, slots=slots, host=50)
        for name, size in MODELS.items():
            self.scheduler.add_model(name, size)

    def listen(self):
        for event in self.scheduler.events():
            if isinstance(event, Granted):
                if event.load is not None and self.scheduler.models[event.load].coming == event.lease:
                    lease = self.scheduler.leases[event.lease]  # a model is brought that was refused for want of time
                    self.asked.setdefault(event.lease, (event.client, event.device, 0, lease.slots))
                waiting = self.asked if event.lease in self.asked else self.paused
                assert event.lease in waiting and event.lease not in self.running, "granted twice"
                self.running[event.lease] = waiting.pop(event.lease)
                self.where[event.lease] = event.device
                if event.load is not None:
                    assert (event.load, event.device) not in self.here
                    self.here[event.load, event.device] = event.client
            elif isinstance(event, Wanted):
                assert event.lease in self.running
                if event.pause:
                    self.told.add(event.lease)
            elif isinstance(event, Refused):
                self.asked.pop(event.lease, None)
            elif isinstance(event, Cancelled):
                if self.asked.pop(event.lease, None) is None:
                    self.end(event.lease)
            elif isinstance(event, Move):
                assert self.here[event.model, event.device] == event.client
                self.moves.append(event)

    def end(self, lease):
        self.running.pop(lease, None)
        self.paused.pop(lease, None)
        self.told.discard(lease)
        self.scheduler.release(lease)
        self.listen()

    @rule(
        client=st.sampled_from(CLIENTS), priority=st.sampled_from(sorted(CAN_WAIT)), device=st.sampled_from([None, *DEVICES]),
        model=st.sampled_from([None, *MODELS]), bytes=st.integers(0, 70), slots=st.integers(0, 5),
        seconds=st.sampled_from([None, 0.1, 3.0]), deadline=st.sampled_from([None, None, 0.5, 10.0]),
    )  # fmt: skip
    def ask(self, client, priority, device, model, bytes, slots, seconds, deadline):
        ask = {"device": device, "model": model, "bytes": bytes, "slots": slots}
        lease = self.scheduler.ask(client, priority, seconds=seconds, deadline=deadline, **ask)
        self.asked[lease] = (client, device, bytes, slots)
        self.listen()

    @rule(seconds=st.sampled_from([0.01, 0.3, 2.0, 20.0]))
    def time_passes(self, seconds):
        self.clock.now += seconds
        self.scheduler.tick()
        self.listen()

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def a_step_ends(self, data):
        self.stop(data.draw(st.sampled_from(sorted(self.told))))

    def stop(self, lease):
        self.told.discard(lease)
        self.paused[lease] = self.running.pop(lease)
        self.scheduler.pause(lease)
        self.listen()

    @precondition(lambda self: self.running or self.paused or self.asked)
    @rule(data=st.data(), cancel=st.booleans())
    def a_lease_ends(self, data, cancel):
        lease = data.draw(st.sampled_from(sorted([*self.running, *self.paused, *self.asked])))
        if cancel:
            self.scheduler.cancel(lease)
            self.listen()
        else:
            self.asked.pop(lease, None)
            self.end(lease)

    @precondition(lambda self: self.moves)
    @rule()
    def a_model_has_left(self):
        move = self.moves.pop(0)
        if self.here.pop((move.model, move.device), None) is not None:
            self.scheduler.moved(move.model, move.device)
            self.listen()

    @precondition(lambda self: self.moves)
    @rule()
    def a_model_cannot_leave(self):
        move = self.moves.pop(0)
        self.scheduler.stayed(move.model, move.device)
        self.listen()

    @rule(client=st.sampled_from(CLIENTS))
    def a_client_dies(self, client):
        for leases in (self.asked, self.running, self.paused):
            for lease in [lease for lease, held in leases.items() if held[0] == client]:
                del leases[lease]
                self.told.discard(lease)
        self.here = {key: owner for key, owner in self.here.items() if owner != client}
        self.moves = [move for move in self.moves if move.client != client]
        self.scheduler.forget(client)
        self.listen()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def memory_is_short(self, data):
        self.scheduler.out_of_memory(data.draw(st.sampled_from(sorted(self.running))))
        self.listen()

    @invariant()
    def nothing_is_oversubscribed_and_nothing_leaks(self):
        for name, (memory, slots) in DEVICES.items():
            held = [lease for lease in [*self.running, *self.paused] if self.where[lease] == name]
            running = [lease for lease in self.running if self.where[lease] == name]
            bytes = sum(self.scheduler.leases[lease].bytes for lease in held)
            models = sum(MODELS[model] for model, device in self.here if device == name)
            ledger = self.scheduler.places[name].ledger
            assert ledger.used == bytes + models <= memory
            assert ledger.slots_taken == sum(self.running[lease][3] for lease in running) <= slots
            assert set(ledger.residents) == {model for model, device in self.here if device == name}
        ours = {*self.asked, *self.running, *self.paused}
        coming = {model.coming for model in self.scheduler.models.values()} & set(self.scheduler.leases)
        assert ours <= set(self.scheduler.leases) <= ours | coming

    def teardown(self):
        """Now everybody behaves, somebody more urgent always comes, and yet everyone gets a turn."""
        start, waits = self.clock.now, {*self.asked, *self.paused}
        limit = max(CAN_WAIT.values()) + 4 * (len(self.scheduler.leases) + 10)
        ran = {}
        while waits and self.clock.now < start + limit:
            self.clock.now += 0.25
            for lease in sorted(self.running):
                ran[lease] = ran.get(lease, 0.0) + 0.25
                if ran[lease] >= 1.0 or self.running[lease][0] == "new":
                    self.end(lease)
            self.scheduler.tick()
            lease = self.scheduler.ask("new", "interactive", device="gpu", bytes=5, seconds=0.2)
            self.asked[lease] = ("new", "gpu", 5, 1)
            self.listen()
            while self.moves:
                self.a_model_has_left()
            for lease in sorted(self.told):
                self.stop(lease)
            waits &= {*self.asked, *self.paused}
            self.nothing_is_oversubscribed_and_nothing_leaks()
        assert not waits, f"starved: {waits} {self.scheduler.report()}"
        assert math.isfinite(self.clock.now)


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.reuse, Phase.generate]}


class TestScheduling(Scheduling.TestCase):
    settings = settings(max_examples=40, stateful_step_count=40, **COMMON)


class Counted(Scheduling):
    """Counts its steps, over all histories."""

    steps = histories = 0

    def __init__(self):
        super().__init__()
        Counted.histories += 1
        Counted.steps -= 1  # invariants are also looked at before the first step

    @invariant()
    def a_step_was_made(self):
        Counted.steps += 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_steps():
    while Counted.steps < 100_000:
        run_state_machine_as_test(Counted, settings=settings(max_examples=200, stateful_step_count=100, **COMMON))
    print(f"{Counted.steps} steps in {Counted.histories} histories")
