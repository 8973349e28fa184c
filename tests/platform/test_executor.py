from __future__ import annotations

import numpy as np
import pytest
import torch

from oneira.platform.errors import NumericalError
from oneira.platform.executor import SerialExecutor


def add(shared: dict, unit: dict) -> dict:
    return {"sum": shared["base"] + unit["x"], "threads": torch.get_num_threads()}


def scribble(shared: dict, unit: int) -> None:
    shared["base"][0] = unit


def fail(shared: None, unit: str) -> None:
    if unit == "ours":
        raise NumericalError("loss is nan at step 3")
    raise KeyError("weights")


def test_results_come_in_the_order_of_the_units() -> None:
    with SerialExecutor() as executor:
        shared = executor.share({"base": np.arange(3)})
        results = executor.map(add, shared, [{"x": x} for x in range(5)])
        assert [list(result["sum"]) for result in results] == [[x, x + 1, x + 2] for x in range(5)]


def test_every_handle_is_waited_for_once() -> None:
    executor = SerialExecutor()
    shared = executor.share({"base": np.zeros(1)})
    handles = [executor.submit(add, shared, {"x": x}) for x in range(4)]
    seen = []
    while handles:
        handle = executor.wait(handles)
        handles.remove(handle)
        seen.append(float(handle.result()["sum"][0]))
    assert sorted(seen) == [0, 1, 2, 3]


def test_arguments_are_those_of_the_moment_they_were_given() -> None:
    executor, base, unit = SerialExecutor(), np.ones(2), {"x": np.ones(2)}
    handle = executor.submit(add, executor.share({"base": base}), unit)
    base[:] = 7
    unit["x"][:] = 7
    assert list(handle.result()["sum"]) == [2, 2]


def test_shared_arrays_are_read_only() -> None:
    executor = SerialExecutor()
    with pytest.raises(RuntimeError, match="read-only"):
        executor.submit(scribble, executor.share({"base": np.ones(2)}), 3).result()


def test_threads_are_those_asked_for_and_are_put_back() -> None:
    executor, before = SerialExecutor(), torch.get_num_threads()
    shared = executor.share({"base": np.zeros(1)})
    try:
        torch.set_num_threads(2)
        assert executor.submit(add, shared, {"x": 0}, threads=1).result()["threads"] == 1
        assert torch.get_num_threads() == 2
        assert executor.submit(add, shared, {"x": 0}, threads=0).result()["threads"] >= 1
    finally:
        torch.set_num_threads(before)


def test_our_errors_come_as_themselves_and_others_with_the_traceback() -> None:
    executor = SerialExecutor()
    with pytest.raises(NumericalError, match="step 3"):
        executor.submit(fail, None, "ours").result()
    handle = executor.wait([executor.submit(fail, None, "theirs")])  # waiting does not raise
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)KeyError.*in fail"):
            handle.result()


def test_what_other_processes_could_not_take_is_refused_here_as_well() -> None:
    executor = SerialExecutor()
    with pytest.raises(TypeError, match="top of a module"):
        executor.submit(lambda shared, unit: None, None, 1)
    with pytest.raises(TypeError, match=r"unit\['model'\]\[0\] is a Linear"):
        executor.submit(add, None, {"model": [torch.nn.Linear(1, 1)]})
    with pytest.raises(TypeError, match="Python objects"):
        executor.share({"x": np.array([object()])})


def nap(shared, unit):
    import time

    time.sleep(unit)


def test_the_seconds_of_units_are_counted_once_for_each_thread() -> None:
    executor = SerialExecutor()
    for _ in executor.map(nap, None, [0.05, 0.05]):
        pass
    assert 0.1 <= executor.core_seconds < 0.3
    executor.submit(nap, None, 0.05, threads=3).result()
    assert 0.25 <= executor.core_seconds < 0.6
