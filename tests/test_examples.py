"""The examples run, at smoke size, on a tiny run."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drive(undisturbed, capsys):
    total = load("drive").main([str(undisturbed[0]), "--seed", "3", "--steps", "20"])
    assert f"track 3: {total:.1f}" in capsys.readouterr().out


def test_ppo_in_a_dream(undisturbed):
    pytest.importorskip("stable_baselines3")
    learner = load("ppo_in_a_dream").main([str(undisturbed[0]), "--steps", "64", "--horizon", "20"])
    assert learner.num_timesteps >= 64
