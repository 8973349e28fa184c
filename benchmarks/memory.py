"""Memory of a whole run on many frames: anonymous and shared memory of every process, Ray's included, against the frames' own size.

    python benchmarks/memory.py --frames 1000000          needs 15 GB of disk; minutes

A run collects the frames, trains V and M on them and breeds controllers in both worlds, on the Ray executor, while this process adds
up the proportional shares (PSS, so that shared pages count once) of its descendants and of the cluster that it started.
The peer is what holding the frames as uint8 in memory would cost, once.
"""

import argparse
import os
import tempfile
import threading
from pathlib import Path

import psutil


def shares(home: str) -> tuple[int, int]:
    """(anonymous, shared) bytes of all processes that were started with this ONEIRA_HOME."""
    anonymous = shared = 0
    for process in psutil.process_iter():
        try:
            if process.environ().get("ONEIRA_HOME") != home and process.pid != os.getpid():
                continue
            lines = dict(
                line.split(":", 1) for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            )
            anonymous += int(lines["Pss_Anon"].split()[0]) * 1024
            shared += int(lines["Pss_Shmem"].split()[0]) * 1024
        except (psutil.Error, OSError, KeyError):
            continue  # it ended while we looked
    return anonymous, shared


def make_config(frames: int):
    from oneira.agents.presets import _MEMORY, _VISION, _dream, _learn, _real
    from oneira.agents.settings import CollectConfig, RoundConfig, WorldModelConfig

    collect = CollectConfig(wandering=-(-frames // 1001), max_steps=1000)
    populations = (_real(3), _dream(3, popsize=32, unit=16))
    plan = RoundConfig(collect=collect, vision=_learn(500), memory=_learn(200, batch=64), populations=populations)
    return WorldModelConfig(vision=_VISION, memory=_MEMORY, checks=4, check_episodes=0, film_steps=0, rounds=(plan,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1_000_000)
    frames = parser.parse_args().frames
    with tempfile.TemporaryDirectory() as folder:
        home = os.environ["ONEIRA_HOME"] = f"{folder}/home"
        measure(frames, Path(folder) / "run", home)


def measure(frames: int, folder: Path, home: str) -> None:
    from oneira.agents.stages import store_of
    from oneira.cluster.executor import RayExecutor
    from oneira.platform.runs import Run

    config = make_config(frames)
    run = Run.create(folder, "carracing-quick", config)
    peak, over = {}, threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            anonymous, shared = shares(home)
            stage = next((line["name"] for line in reversed(list(run.metrics("stage")))), "start")
            peak[stage] = max(peak.get(stage, (0, 0, 0)), (anonymous + shared, anonymous, shared))

    watcher = threading.Thread(target=watch)
    with RayExecutor() as executor:
        watcher.start()
        config.train(run, executor)
        over.set()
        watcher.join()
    held = store_of(run).num_frames
    size = held * 64 * 64 * 3
    for stage, (total, anonymous, shared) in peak.items():
        print(f"after {stage:8s}: {total / 1e9:.2f} GB ({anonymous / 1e9:.2f} anonymous, {shared / 1e9:.2f} shared)")
    top = max(total for total, _, _ in peak.values())
    print(f"peak {top / 1e9:.2f} GB on {held:,} frames, which alone are {size / 1e9:.2f} GB: {top / size:.2f} of them")


if __name__ == "__main__":
    main()
