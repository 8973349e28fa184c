"""Real games of DoomTakeCover: the same seed is the same episode, the reference is what it says, and nothing is left behind."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("vizdoom")

from oneira.agents.doom import processes, simulator
from oneira.agents.environments import DoomTakeCover, make_world
from oneira.agents.evaluation import drive, reference_environment
from oneira.platform.errors import EnvironmentMissing, UsageError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty directory, and leaves it empty."""
    monkeypatch.chdir(tmp_path)
    yield
    gc.collect()
    simulator.close_idle()
    assert os.listdir(tmp_path) == []
    assert not [child for child in psutil.Process().children(recursive=True) if child.name() == "vizdoom"]


def play(batch, steps=120, seed=0):
    """Frames, lengths and returns of a batch under seeded actions, the same for all its games."""
    actions = np.random.default_rng(seed).integers(0, 3, steps // 10).repeat(10)
    seen, rows = [batch.reset()], np.arange(batch.num_envs)
    lengths, returns = np.zeros(batch.num_envs, int), np.zeros(batch.num_envs)
    for t in range(steps):
        frames, rewards, terminated, truncated = batch.step(np.full(len(rows), actions[t]), rows)
        whole = seen[-1].copy()
        whole[rows] = frames
        seen.append(whole)
        lengths[rows] += 1
        returns[rows] += rewards
        rows = rows[~(terminated | truncated)]
        if not len(rows):
            break
    return np.stack(seen), lengths, returns


def test_a_seed_is_an_episode_in_fresh_and_in_used_games_however_many_there_are():
    world = DoomTakeCover()
    first = play(world.batch([3, 5, 3], np.arange(3)))
    gc.collect()  # its games go back
    again = play(world.batch([3, 5, 3], np.arange(3)))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    simulator.close_idle()
    other = play(world.batch([5, 3], np.array([1, 0, 1, 0, 1])))
    np.testing.assert_array_equal(other[0][:, :3], first[0])
    assert (first[0][:, 0] != first[0][:, 1]).any(), "seeds differ"
    np.testing.assert_array_equal(first[1], first[2])  # 1 a step, the last one too


def test_training_plays_the_reference_game_and_its_frames_are_close():
    """Tolerance of the 160x120 frames after preprocessing: 4 of 255 on average, 6 in the worst frame."""
    world = make_world("doom")
    differences, lengths = [], []
    for seed in (2**30, 2**30 + 1):
        env = reference_environment("doom")
        assert env.spec.max_episode_steps == 2100 and env.unwrapped.frame_skip == 1
        assert env.unwrapped.game.get_doom_skill() == world.conditions["skill"]
        frame, _ = env.reset(seed=seed)
        assert frame.shape == (240, 320, 3) and frame.dtype == np.uint8 and env.action_space.n == 3
        batch = world.batch([env.unwrapped.game.get_seed()], np.arange(1))
        seen, length, over = batch.reset(), 0, False
        rng, action = np.random.default_rng(seed), 0
        while not over:
            differences.append(np.abs(world.preprocess(frame[None]).astype(int) - seen).mean())
            action = action if length % 10 else rng.integers(3)
            frame, reward, terminated, truncated, _ = env.step(action)
            seen, rewards, ends, cuts = batch.step(np.array([action]))
            assert (reward, terminated, truncated) == (rewards[0], ends[0], cuts[0]) == (1.0, ends[0], False)
            over, length = terminated, length + 1
        lengths.append(length)
        env.close()
    assert min(lengths) > 60 and np.mean(differences) < 4 and np.max(differences) < 6


def test_actions_are_nothing_right_left():
    env = reference_environment("doom")
    buttons = [button.name for button in env.unwrapped.game.get_available_buttons()]
    assert buttons == ["MOVE_LEFT", "MOVE_RIGHT"]
    np.testing.assert_array_equal(np.array(env.unwrapped.button_map), simulator.BUTTONS)
    env.close()


def test_an_episode_is_truncated_at_the_limit():
    game = simulator.Game(max_steps=40)
    frame = np.zeros((64, 64, 3), np.uint8)
    game.start(1, frame)
    ends = [game.step(0, frame) for _ in range(40)]
    assert ends[:-1] == [(1.0, False, False)] * 39 and ends[-1] == (1.0, False, True)
    with pytest.raises(ValueError, match="over"):
        game.step(0, frame)
    game.close()


def test_a_used_game_takes_the_limit_of_its_new_batch():
    for limit in (5, 9):
        batch = simulator.DoomBatch([1], np.arange(1), max_steps=limit)
        batch.reset()
        ends = [bool(batch.step(np.zeros(1, int))[3][0]) for _ in range(limit)]
        assert ends == [False] * (limit - 1) + [True]
        del batch
        gc.collect()


class Still:
    """An agent that does nothing."""

    def reset(self, num_envs, mask=None):
        self.count = num_envs

    def act(self, frames):
        assert frames.shape == (self.count, 240, 320, 3)
        return np.zeros(self.count, np.int64)


def test_scores_come_from_the_reference_and_repeat():
    first, again = (drive(Still(), [2**30, 2**30 + 1], world="doom") for _ in range(2))
    assert first == again and first["returns"] == [float(length) for length in first["lengths"]]


def game_processes(folder):
    return [p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in word for word in p.info["cmdline"] or ())]


PLAY = """
import os, sys, numpy as np
from oneira.agents.doom import processes
from oneira.agents.environments import make_world
world = make_world("doom")
batch = world.batch([1, 2, 3], np.arange(3)); batch.reset()
env = world.reference(); env.reset(seed=1)
print(processes._owner.folder, flush=True)
"""
ENDINGS = {
    "killed while playing": (
        "while True: batch.reset(); [batch.step(np.zeros(3, int)) for _ in range(20)]",
        signal.SIGKILL,
    ),
    "killed while idle": ("import time; time.sleep(60)", signal.SIGKILL),
    "killed after all its children": ("import time; time.sleep(60)", "children"),
    "Ctrl-C": ("while True: batch.reset(); [batch.step(np.zeros(3, int)) for _ in range(20)]", signal.SIGINT),
    "an exception": ("raise RuntimeError", None),
    "a crash": ("os.abort()", None),
}


def start_owner(code):
    return subprocess.Popen(
        [sys.executable, "-c", PLAY + code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )  # fmt: skip


def test_no_game_outlives_its_owner():
    owners = {ending: start_owner(code) for ending, (code, _) in ENDINGS.items()}
    try:
        for ending, owner in owners.items():
            check_ending(owner, ENDINGS[ending][1])
    finally:
        for owner in owners.values():
            owner.kill()


def check_ending(owner, sent):
    folder = Path(owner.stdout.readline().strip())
    names = [path.read_text().strip() for path in folder.glob("*/instance")]
    if sent is not None:
        assert len(names) == 4
        assert len(game_processes(folder)) >= 4
        time.sleep(0.2)
    if sent == "children":  # as Ray ends its workers
        for child in psutil.Process(owner.pid).children(recursive=True):
            child.kill()
        owner.kill()
    elif sent == signal.SIGINT:
        os.killpg(owner.pid, sent)  # a terminal tells the whole group
    elif sent is not None:
        owner.send_signal(sent)
    owner.wait(timeout=60)
    owner.stdout.close()
    deadline = time.monotonic() + 120  # it takes a fraction of a second, on a busy machine longer
    while time.monotonic() < deadline and (folder.exists() or game_processes(folder)):
        time.sleep(0.05)
    assert not game_processes(folder) and not folder.exists()
    assert not [path for name in names for path in Path("/dev/shm").glob(f"ViZDoom*{name}")]


def test_a_game_that_dies_is_an_error_and_the_next_batch_plays_on():
    world = DoomTakeCover()
    batch = world.batch([1, 2], np.arange(2))
    batch.reset()
    name = (batch._games[1].folder / "instance").read_text().strip()
    shared = [path for path in Path("/dev/shm").iterdir() if path.name.endswith(name)]
    psutil.Process(int((batch._games[1].folder / "pid").read_text())).kill()
    with pytest.raises(EnvironmentMissing, match="game of seed 2 died after"):
        for _ in range(5):
            batch.step(np.zeros(2, int))
    assert shared and not any(path.exists() for path in shared)
    del batch
    gc.collect()
    assert play(world.batch([1, 2], np.arange(2)), steps=10)[1].tolist() == [10, 10]


def test_a_game_that_stands_still_is_ended_and_is_an_error(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 2.0)
    batch = DoomTakeCover().batch([1, 2], np.arange(2))
    batch.reset()
    psutil.Process(int((batch._games[1].folder / "pid").read_text())).suspend()
    with pytest.raises(EnvironmentMissing, match="game of seed 2 stood still for 2 s after"):
        batch.step(np.zeros(2, int))


def test_a_reference_game_that_stands_still_is_an_error(monkeypatch):
    env = reference_environment("doom")
    env.reset(seed=1)
    monkeypatch.setattr(processes, "PATIENCE", 2.0)
    psutil.Process(int((env._folder / "pid").read_text())).suspend()
    with pytest.raises(EnvironmentMissing, match="died"):
        env.step(0)
    assert not env._folder.exists()


FORK = """
import os, time
from pathlib import Path
from oneira.agents.doom import processes
processes.PATIENCE = 0.2
child = os.fork()
if child == 0:
    time.sleep(100)
time.sleep(0.5)
processes.end(Path("/nowhere"))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_that_never_became_the_game_is_ended():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(-signal.SIGKILL), done.stderr


def test_a_reference_game_that_dies_is_an_error():
    env = reference_environment("doom")
    env.reset(seed=1)
    psutil.Process(int((env._folder / "pid").read_text())).kill()
    with pytest.raises(EnvironmentMissing, match=r"VizdoomTakeCover-v1.* died"):
        for _ in range(5):
            env.step(0)
    assert not env._folder.exists()


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    for start in (lambda: DoomTakeCover().batch([1], np.arange(1)), lambda: reference_environment("doom")):
        with pytest.raises(EnvironmentMissing, match=r"pip install 'oneira\[doom\]'") as raised:
            start()
        assert raised.value.exit_code == 4


def test_a_game_that_cannot_run_at_all_is_an_error(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    broken = folder / "vizdoom"
    broken.write_text("#!/bin/sh\necho 'no library' >&2\nexit 127\n")
    broken.chmod(0o700)
    with pytest.raises(EnvironmentMissing, match="no library"):
        processes._require_running(broken, tmp_path_factory.mktemp("empty"))


def test_frames_of_another_world_are_refused():
    with pytest.raises(ValueError, match="DoomTakeCover frames"):
        DoomTakeCover().preprocess(np.zeros((1, 96, 96, 3), np.uint8))


def test_an_agent_of_another_world_is_refused():
    from oneira.agents.evaluation import evaluate_reference

    with pytest.raises(UsageError, match="trained in 'carracing'"):
        evaluate_reference({"model": {"world": "carracing"}}, [1], None, world="doom")
