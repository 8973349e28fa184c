from __future__ import annotations

import json

import pytest

from oneira.platform.console import json_on_stdout, json_text, print_table, show, show_seconds


def test_json_is_strict() -> None:
    text = json_text({"a": float("nan"), "b": [float("inf"), 1.5], 3: None})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5], "3": None}


def test_only_the_document_reaches_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    with json_on_stdout(True) as emit:
        print("noise")
        os.write(1, b"deeper noise\n")
        emit({"x": 1})
    print("after")
    out, err = capfd.readouterr()
    assert json.loads(out.removesuffix("after\n")) == {"x": 1} and "deeper noise" in err


def test_after_an_error_stdout_is_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), json_on_stdout(True):
        raise ValueError
    print("here")
    assert capfd.readouterr().out == "here\n"


def test_texts_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert [show(value) for value in (None, True, 0.123456, 123456.0, "x", [1, 2.5])] == [
        "-", "yes", "0.1235", "123456", "x", "1, 2.5"
    ]  # fmt: skip
    assert [show_seconds(seconds) for seconds in (5, 75, 3700)] == ["5s", "1m 15s", "1h 01m"]
    print_table(["name", "step"], [["a", 5], ["longer", None]])
    assert capsys.readouterr().out == "name    step\na          5\nlonger     -\n"
