"""A whole run, tiny: every stage works, a killed run continues to the same bytes, and what a run gives to others works."""

import json
import os
import random
import signal
import subprocess
import time

import gymnasium
import numpy as np
import pytest

from oneira.agents import load_agent, make_dream
from oneira.agents.pipeline import alarm
from oneira.platform.errors import ConfigError, DataError, UsageError
from oneira.platform.presets import load_preset
from oneira.platform.runs import Run


def kill_and_resume(command, folder, after):
    process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (folder / "config.json").exists():  # killed before there was a run
        return subprocess.run(command(folder), capture_output=True, text=True, timeout=800)
    return subprocess.run(
        command(folder, "resume", str(folder), "--executor", "serial"), capture_output=True, text=True, timeout=800
    )


@pytest.mark.parametrize("trial", range(2))
def test_a_killed_run_continues_to_the_same_bytes(undisturbed, command, weights, tmp_path, trial):
    whole, seconds = undisturbed
    after = seconds * random.Random(f"{os.getpid()} {trial}").uniform(0.3, 0.95)
    done = kill_and_resume(command, tmp_path / "run", after)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run") == weights(whole), f"killed after {after:.1f} s of {seconds:.1f} s"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("trial", range(10))
def test_a_killed_run_continues_to_the_same_bytes_ten_times(undisturbed, command, weights, tmp_path, trial):
    test_a_killed_run_continues_to_the_same_bytes(undisturbed, command, weights, tmp_path, 100 + trial)


def test_every_stage_left_its_result(undisturbed):
    run = Run.open(undisturbed[0])
    names = run.checkpoints.names()
    for index, plan in enumerate(run.config.rounds):
        assert f"{index:02d}-memory" in names and f"{index:02d}-check" in names
        assert (f"{index:02d}-vision" in names) == (plan.vision is not None)
    stages = {line["stage"] for line in run.metrics()}
    assert {"collect", "vision", "evolve-real", "check", "candidate", "stage"} <= stages
    assert (run.path / "report.html").stat().st_size > 10_000


def test_the_agent_acts_on_reference_frames(undisturbed):
    agent = load_agent(str(undisturbed[0]))
    env = gymnasium.make("CarRacing-v3")
    frame, _ = env.reset(seed=1)
    agent.reset(2)
    frames = np.stack([frame, frame])
    first = agent.act(frames)
    assert first.shape == (2, 3) and first.dtype == np.float32 and env.action_space.contains(first[0])
    second = agent.act(frames)
    agent.reset(2, mask=np.array([True, False]))
    third = agent.act(frames)
    assert np.array_equal(third[0], first[0])  # it began anew
    env.close()
    assert second.shape == third.shape
    with pytest.raises(UsageError, match="3 frames"):
        agent.act(np.zeros((3, 96, 96, 3), np.uint8))


def test_the_run_is_a_gymnasium_environment(undisturbed):
    env = gymnasium.make("oneira.agents:oneira/Dream-v0", run=str(undisturbed[0]))
    seen, _ = env.reset(seed=0)
    assert env.observation_space.contains(seen)
    seen, reward, *_ = env.step(env.action_space.sample())
    assert env.observation_space.contains(seen) and np.isfinite(reward)
    vector = make_dream(str(undisturbed[0]), num_envs=3, obs="pixels", seed=4)
    frames, _ = vector.reset()
    assert frames.shape == (3, 64, 64, 3) and frames.dtype == np.uint8


def test_a_film_shows_both_worlds(undisturbed, tmp_path):
    import imageio.v3 as iio

    from oneira.agents.showing import film

    frames = film(Run.open(undisturbed[0]), tmp_path / "both.mp4", steps=12)
    seen = iio.imread(tmp_path / "both.mp4")
    assert frames == 12 and len(seen) == 12 and seen.shape[2] > seen.shape[1]  # side by side
    assert np.abs(np.diff(seen.astype(int), axis=0)).max() > 10  # they move


def test_evaluate_in_the_dream_gives_the_promised_json(undisturbed, command):
    arguments = ["evaluate", str(undisturbed[0]), "--world", "dream", "--episodes", "3", "--seed", "5", "--json"]
    done = subprocess.run(command(None, *arguments), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)
    wanted = {
        "mean",
        "std",
        "ci95",
        "episodes",
        "returns",
        "seeds",
        "env_id",
        "env_version",
        "stage",
        "wall_s",
        "env_steps",
    }
    assert wanted <= set(score) and score["seeds"] == [5, 6, 7] and len(score["returns"]) == 3
    assert score["mean"] == pytest.approx(np.mean(score["returns"])) and score["std"] == pytest.approx(
        np.std(score["returns"], ddof=1)
    )


def test_a_run_without_controllers_says_so(tmp_path):
    run = Run.create(tmp_path / "new", "carracing-quick", load_preset("carracing-quick"))
    with pytest.raises(DataError, match="oneira resume"):
        load_agent(run)
    with pytest.raises(UsageError, match="best"):
        load_agent(run, stage="bets")


def test_presets_are_whole_and_shrink():
    for name in ("carracing-quick", "carracing-hour", "carracing-hour-dream", "carracing-paper"):
        config = load_preset(name)
        small = config.smoke()
        assert type(small) is type(config)
        assert sum(r.collect.episodes for r in small.rounds) <= 20
        assert all(p.generations <= 2 for r in small.rounds for p in r.populations)


def test_impossible_settings_are_named():
    from oneira.platform.config import override

    config = load_preset("carracing-quick")
    with pytest.raises(ConfigError, match="carracing"):
        override(config, {"world": "carracin"})
    with pytest.raises(ConfigError, match="z differs"):
        override(config, {"memory.z": "16"})


def test_the_alarm_rings_when_the_dream_orders_candidates_wrongly_or_promises_too_much():
    assert alarm(-0.4, 0.9, 0.9) and alarm(0.0, 0.9, 0.9) and not alarm(0.3, 0.9, 0.9)
    assert alarm(0.5, 0.8, -0.06) and not alarm(0.5, 0.2, -0.06)
