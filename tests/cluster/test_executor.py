"""RayExecutor keeps the executor's laws, and keeps them when workers die. One real Ray for all."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from oneira.cluster import executor as executor_module
from oneira.platform.errors import ClusterError, DataError
from oneira.platform.executor import SerialExecutor


def double(shared, unit):
    return 2 * unit


def train(shared, unit):
    """A little training: enough arithmetic for a different order of summation to show."""
    import torch

    torch.manual_seed(unit["seed"])
    layer = torch.nn.Linear(shared["x"].shape[1], 7)
    x = torch.from_numpy(shared["x"].copy())
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    return {"weight": layer.weight.detach().numpy(), "seed": unit["seed"]}


def look(shared, unit):
    import torch

    return {
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "omp": os.environ["OMP_NUM_THREADS"],
        "read_only": not shared["big"].flags.writeable and not shared["small"].flags.writeable,
        "copied": shared["big"].flags.owndata,
        "total": float(shared["big"].sum()),
    }


def fail(shared, unit):
    if unit == "data":
        raise DataError("shard 7 is not an array")
    raise KeyError(f"no {unit}")


def die_once(shared, unit):
    """Ends its own process the first time that it sees unit 3, in the middle of the work."""
    flag = Path(shared["folder"]) / "died"
    if unit == 3 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return unit * np.ones(4)


def die(shared, unit):
    os.kill(os.getpid(), signal.SIGKILL)


def hunger(shared, unit):
    """Unit 3 finds too little memory the first time, and unit 5 each time."""
    if unit == 5 or (unit == 3 and started(shared, unit) == 1):
        np.ones(1 << 50)
    return os.getpid()


def sleep(shared, unit):
    time.sleep(unit)
    return unit


def test_results_come_in_the_order_of_the_units(executor):
    assert list(executor.map(double, None, range(50))) == [2 * unit for unit in range(50)]


def test_wait_gives_a_finished_handle_before_the_slow_one(executor):
    slow = executor.submit(sleep, None, 1.0)
    quick = executor.submit(sleep, None, 0.0)
    assert executor.wait([slow, quick]) is quick
    assert slow.result() == 1.0


def test_serial_and_ray_agree_byte_for_byte(executor):
    shared = {"key": "x", "x": np.random.default_rng(0).standard_normal((200, 31)).astype(np.float32)}
    units = [{"seed": seed} for seed in range(4)]
    with SerialExecutor() as serial:
        expected = list(serial.map(train, serial.share(shared), units))
    for ours, theirs in zip(executor.map(train, executor.share(shared), units), expected, strict=True):
        assert ours["seed"] == theirs["seed"]
        assert ours["weight"].tobytes() == theirs["weight"].tobytes()
        assert ours["weight"].flags.writeable


def test_shared_arrays_are_read_only_and_not_copied_and_threads_are_as_asked(executor):
    cores = len(os.sched_getaffinity(0))
    shared = executor.share({"big": np.ones((300, 1000)), "small": np.zeros(2)})
    workers = list(executor.map(look, shared, range(8)))
    trainer = executor.submit(look, shared, 0, threads=0).result()
    assert {seen["threads"] for seen in workers} == {1} and {seen["omp"] for seen in workers} == {"1"}
    assert trainer["threads"] == cores and trainer["omp"] == str(cores)
    assert trainer["pid"] not in {seen["pid"] for seen in workers}
    assert all(seen["read_only"] and not seen["copied"] and seen["total"] == 300_000 for seen in [*workers, trainer])


def test_an_oneira_error_arrives_as_itself_and_others_with_the_workers_traceback(executor):
    with pytest.raises(DataError, match="shard 7 is not an array") as caught:
        executor.submit(fail, None, "data").result()
    assert any("in fail" in note for note in caught.value.__notes__)
    with pytest.raises(RuntimeError, match=re.compile("KeyError.*no luck.*in fail", re.DOTALL)):
        executor.submit(fail, None, "luck").result()
    assert executor.submit(double, None, 4).result() == 8


def test_a_killed_worker_changes_no_result(executor, tmp_path):
    results = list(executor.map(die_once, executor.share({"folder": str(tmp_path)}), range(8)))
    assert (tmp_path / "died").exists()
    assert [float(result[0]) for result in results] == list(range(8))


@pytest.mark.slow
def test_a_unit_that_rays_memory_monitor_kills_runs_again(tmp_path):
    """Whoever works beside it dies with it, as Ray chooses; each runs again, and comes to its end."""
    memory = psutil.virtual_memory()
    if memory.available < 12e9:
        pytest.skip("it takes 8 GiB, and 4 should be left")
    share = (memory.total - memory.available + 5e9) / memory.total
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"ONEIRA_HOME": str(tmp_path), "RAY_memory_usage_threshold": f"{share:.4f}"}
    words = [sys.executable, str(Path(__file__).with_name("greedy.py")), str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    [found] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found["first"] != found["then"] and not psutil.pid_exists(found["first"])


@pytest.mark.slow
def test_a_unit_that_always_kills_its_worker_is_named(executor):
    with pytest.raises(ClusterError, match=r"unit \d+ of .*:die \('poison'\)"):
        executor.submit(die, None, "poison").result()


def test_a_unit_that_runs_out_of_memory_runs_again_in_a_new_process(executor, tmp_path):
    shared = executor.share({"folder": str(tmp_path)})
    pids = list(executor.map(hunger, shared, range(5)))
    assert int((tmp_path / "3-1").read_text()) == pids[3] != int((tmp_path / "3-0").read_text())
    with pytest.raises(ClusterError, match=r"unit \d+ of .*:hunger \(5\) ended its worker 4 times.*Unable to allocate"):
        executor.submit(hunger, shared, 5).result()
    assert executor.submit(double, None, 4).result() == 8


def test_close_ends_the_workers_and_what_waits(ray_cluster):
    with executor_module.RayExecutor() as mine:
        pid = mine.submit(look, mine.share({"big": np.ones(9), "small": np.ones(1)}), 0).result()["pid"]
        left = mine.submit(sleep, None, 100.0)
    with pytest.raises(ClusterError, match="closed before unit"):
        left.result()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert not psutil.pid_exists(pid)


def started(shared, unit):
    """How often a unit has begun, this time counted, in any process. Its processes are told in files."""
    for number in range(9):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(f"{shared['folder']}/{unit}-{number}", os.O_CREAT | os.O_EXCL))
            Path(f"{shared['folder']}/{unit}-{number}").write_text(str(os.getpid()))
            return number + 1
    raise AssertionError("begun ten times")


def freeze_once(shared, unit):
    """The first process that has unit 3 stops, as if frozen; whoever gets it after that does it."""
    if started(shared, unit) == 1 and unit == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.01)
    return unit


def answer_late_the_second_time(shared, unit):
    """Unit 3 takes four seconds, and for whoever begins it later, for ever."""
    begun = started(shared, unit)
    time.sleep(0.01 if unit != 3 else 4 if begun == 1 else 600)
    return unit


def answer_and_die(shared, unit):
    """The answer to unit 3 is made and lost: its process dies before anybody could have read it."""
    if started(shared, unit) == 1 and unit == 3:
        threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
        time.sleep(0.2)
    return unit


@pytest.mark.parametrize("work", [freeze_once, answer_late_the_second_time])
def test_a_straggler_is_sent_again_and_the_first_answer_counts(executor, tmp_path, monkeypatch, capfd, work):
    if executor.num_workers < 2:
        pytest.skip("one worker has nobody to help it")
    seconds = 10.0
    while seconds > 1:  # until no worker is just beginning
        began = time.monotonic()
        list(executor.map(sleep, None, [0.1] * 4))
        seconds = time.monotonic() - began
    monkeypatch.setattr(executor_module, "SLOW_SECONDS", 1.0)
    assert list(executor.map(work, executor.share({"folder": str(tmp_path)}), range(12))) == list(range(12))
    assert len(re.findall(r"\(3\) takes .* sent to another worker as well", capfd.readouterr().err)) == 1
    assert sorted(file.name for file in tmp_path.glob("3-*")) == ["3-0", "3-1"]
    late = int((tmp_path / ("3-0" if work is freeze_once else "3-1")).read_text())
    psutil.wait_procs([psutil.Process(late)] if psutil.pid_exists(late) else [], timeout=20)
    assert not psutil.pid_exists(late)  # whoever was not first has been replaced
    assert list(executor.map(double, None, range(20))) == [2 * unit for unit in range(20)]


def test_a_lost_answer_is_made_again(executor, tmp_path):
    assert list(executor.map(answer_and_die, executor.share({"folder": str(tmp_path)}), range(8))) == list(range(8))
    assert (tmp_path / "3-1").exists()
