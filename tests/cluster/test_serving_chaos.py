"""A real server under load while its processes are killed and frozen, and with ten times the load that it can bear.

All slow. What is measured is printed; docs/RELIABILITY.md has the figures.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import random
import signal
import threading
import time
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SEEDS = 4


@dataclass
class Answer:
    """One request: when it was asked and answered (seconds, monotonic), and "right", "wrong ...", or the error."""

    asked: float
    answered: float
    outcome: str


def pixels(document):
    return np.array(Image.open(io.BytesIO(base64.b64decode(document)))).astype(int)


class Load:
    """Clients in threads that ask for pictures without pause, each picture one whose right pixels are known."""

    def __init__(self, server, clients, retries, model="tiny", steps=2):
        import openai

        self.client = openai.OpenAI(api_key="any", base_url=f"{server.url}/v1", max_retries=retries, timeout=60)
        self.model, self.steps = model, steps
        self.right = [self.ask(seed) for seed in range(SEEDS)]
        self.answers: list[Answer] = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.work, args=(number,)) for number in range(clients)]

    def ask(self, seed):
        body = {"seed": seed, "steps": self.steps}
        answer = self.client.images.generate(model=self.model, prompt="a red circle", extra_body=body)
        return pixels(answer.data[0].b64_json)

    def work(self, number):
        import openai

        chance = random.Random(number)
        while not self.ended.is_set():
            seed, began = chance.randrange(SEEDS), time.monotonic()
            try:
                far = int(np.abs(self.ask(seed) - self.right[seed]).max())
                outcome = "right" if far <= 1 else f"wrong by {far}"
            except openai.APIStatusError as error:
                outcome = str(error.status_code)
            except openai.APIConnectionError as error:
                outcome = type(error).__name__
            self.answers.append(Answer(began, time.monotonic(), outcome))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def share_right(self):
        return sum(answer.outcome == "right" for answer in self.answers) / len(self.answers)

    def outcomes(self):
        return counted(self.answers)

    def wrong(self):
        return [answer.outcome for answer in self.answers if answer.outcome.startswith("wrong")]

    def outage(self, since):
        """The longest time after `since` in which no right answer came, seconds."""
        moments = [since, *sorted(a.answered for a in self.answers if a.outcome == "right" and a.answered > since)]
        return max(after - before for before, after in itertools.pairwise(moments))

    def until_right(self, count, seconds):
        """Waits for so many right answers more."""
        have, end = sum(a.outcome == "right" for a in self.answers), time.monotonic() + seconds
        while sum(a.outcome == "right" for a in self.answers) < have + count:
            assert time.monotonic() < end, self.outcomes()
            time.sleep(0.1)


def counted(answers):
    found = [answer.outcome for answer in answers]
    return {outcome: found.count(outcome) for outcome in sorted(set(found))}


def processes(server, name):
    """The server's processes of that name, which may be cut off."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(name):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def start(serving, tmp_path):
    started = []

    def begin(*arguments):
        started.append(serving(tmp_path, *arguments))
        return started[-1]

    yield begin
    for server in started:
        code, _ = server.stop()
        assert code == 0


def test_a_replica_of_two_is_killed_every_twenty_seconds(start, capsys):
    server = start("--model", "tiny", "--layout", "split", "--replicas", "2")
    chance, kills = random.Random(3), []
    with Load(server, clients=4, retries=2) as load:
        load.until_right(20, 120)
        end = time.monotonic() + 300
        while time.monotonic() < end:
            replicas = [p for p in processes(server, "ray::ServeReplica:oneira") if "ingress" not in p.cmdline()[0]]
            victim = chance.choice(replicas)
            kills.append(victim.cmdline()[0].split(":")[3].partition(".")[0])
            victim.kill()
            time.sleep(20)
    with capsys.disabled():
        print(
            f"\n{len(kills)} replicas killed ({kills}): {load.share_right():.3%} of {len(load.answers)}, {load.outcomes()}"
        )
    assert load.share_right() >= 0.995 and not load.wrong()


DYING = [
    ("ray::ProxyActor", signal.SIGKILL),
    ("ray::ServeController", signal.SIGKILL),
    ("ray::ServeReplica:oneira:fused", signal.SIGKILL),
    ("ray::ServeReplica:oneira:fused", signal.SIGSTOP),  # nobody looks after a frozen proxy or controller
]


@pytest.mark.parametrize(("name", "number"), DYING)
def test_the_outage_when_a_process_of_the_server_dies_or_freezes(start, capsys, name, number):
    server = start("--model", "tiny")
    with Load(server, clients=2, retries=2) as load:
        load.until_right(10, 120)
        [victim] = processes(server, name)
        since = time.monotonic()
        victim.send_signal(number)
        time.sleep(1)
        load.until_right(20, 240)
    if victim.is_running():
        victim.kill()
    with capsys.disabled():
        print(
            f"\n{name} {signal.Signals(number).name}: {load.outage(since):.1f} s without an answer, {load.outcomes()}"
        )
    assert not load.wrong()
    assert load.outage(since) < (30 if number == signal.SIGKILL else 90)


async def flood(url, rate, seconds):
    """Requests at that rate, each of another seed, whoever has answered meanwhile."""
    import openai

    answers, asked = [], []

    async def ask(client, number):
        began, outcome = time.monotonic(), "200"
        try:
            body = {"seed": number, "steps": 20}
            await client.images.generate(model="patient", prompt="a red circle", extra_body=body)
        except openai.APIStatusError as error:
            outcome = str(error.status_code)
        except openai.APIConnectionError as error:
            outcome = type(error).__name__
        answers.append(Answer(began, time.monotonic(), outcome))

    async with openai.AsyncOpenAI(api_key="any", base_url=f"{url}/v1", max_retries=0, timeout=120) as client:
        began = time.monotonic()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            asked.append(asyncio.create_task(ask(client, number)))
        await asyncio.gather(*asked)
    return answers


def test_ten_times_too_many_are_refused_at_once_and_cost_no_memory(start, capsys):
    """The model takes 50 ms a step whatever it draws: what is measured is the server, not how it shares cores with its clients."""
    server = start("--model", "patient")
    [replica] = processes(server, "ray::ServeReplica:oneira:fused")
    full = asyncio.run(flood(server.url, 8, 20))  # some wait, and some are refused
    done = sorted(answer.answered for answer in full if answer.outcome == "200")
    capacity = (len(done) - 1) / (done[-1] - done[0])
    before = replica.memory_info().rss
    answers = asyncio.run(flood(server.url, 10 * capacity, 60))
    after = replica.memory_info().rss
    refused = sorted(answer.answered - answer.asked for answer in answers if answer.outcome == "429")
    p50, p99 = (refused[len(refused) * share // 100] for share in (50, 99))
    with capsys.disabled():
        print(f"\n{capacity:.1f} pictures/s, asked for {10 * capacity:.0f}: {counted(answers)}; refusals p50 {1000 * p50:.0f} ms, p99 "
              f"{1000 * p99:.0f} ms; memory {before / 2**20:.0f} -> {after / 2**20:.0f} MiB ({after / before - 1:+.1%})")  # fmt: skip
    assert set(counted(answers)) == {"200", "429"}
    assert p99 <= 1.0 and after <= 1.1 * before  # 0.1 s is what it should be where nothing else runs
