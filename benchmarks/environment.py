"""Real 64x64 frames a second on both cores: the compiled twin of CarRacing against Gymnasium with the same resize; EnvPool beside it.

    python benchmarks/environment.py [--seconds 6] [--repeats 3]

Each contender runs in one process per core at the same time, as in training; a figure is the median over repeats of the sum over
processes. Ratios compare figures of one call, whose contenders take turns.

  gymnasium        CarRacing-v3, rows 0..83 resized to 64x64              the reference, one environment a process
  gymnasium + VMC  the same with V, M and C deciding each step
  envpool          its CarRacing, 96x96 frames                            the fastest public one; all cores of its own threads
  twin             carracing.simulator, 64 cars a process
  twin + VMC       fitness.real_unit: 32 controllers x 3 tracks, V, M and C deciding each step
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time

import numpy as np

CORES = len(os.sched_getaffinity(0))


def _action(step: int) -> np.ndarray:
    return np.array([0.1 * np.sin(step / 20), 0.4, 0.0], np.float32)


def _tree():
    import torch

    from oneira.agents.controller import ControllerConfig
    from oneira.agents.memory import MDNRNN, MemoryConfig
    from oneira.agents.worldmodel import pack
    from oneira.generative.vae import VAE, VAEConfig

    torch.manual_seed(0)
    memory = MDNRNN(MemoryConfig(reward_input=False)).eval()
    return pack("carracing", VAE(VAEConfig()).eval(), [memory], ControllerConfig())


def gymnasium_frames(seconds: float, with_agent: bool = False) -> float:
    from oneira.agents.agent import Agent
    from oneira.agents.environments import CarRacing, preprocess_carracing

    env = CarRacing().reference()
    frame, _ = env.reset(seed=1)
    agent = Agent({"model": _tree(), "params": np.zeros(867, np.float32)}) if with_agent else None
    if agent:
        agent.reset(1)
        agent.act(frame[None])
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        if agent:
            action = agent.act(frame[None])[0]
        else:
            preprocess_carracing(frame[None])
            action = _action(count)
        frame, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            frame, _ = env.reset()
        count += 1
    return count / (time.perf_counter() - began)


def twin_frames(seconds: float) -> float:
    from oneira.agents.carracing.simulator import CarRacingBatch

    batch = CarRacingBatch(range(4), np.arange(64) % 4)
    count, spent = 0, 0.0
    while spent < seconds:
        batch.reset()  # episodes of 700 steps, the zoom of the first second among them
        began = time.perf_counter()
        for step in range(700):
            batch.step(np.tile(_action(step), (64, 1)))
            count += 64
        spent += time.perf_counter() - began
    return count / spent


def twin_agent_frames(seconds: float) -> float:
    from oneira.agents.fitness import real_unit

    tree = _tree()
    unit = {"params": np.zeros((32, 867), np.float32), "seeds": [1, 2, 3], "max_steps": 700, "stuck": 0}
    real_unit(tree, {**unit, "max_steps": 3})
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += real_unit(tree, unit)["env_steps"]
    return count / (time.perf_counter() - began)


def envpool_frames(seconds: float) -> float:
    import envpool

    env = envpool.make("CarRacing-v3", env_type="gymnasium", num_envs=2 * CORES, num_threads=CORES)
    env.reset()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        env.step(np.tile(_action(count), (2 * CORES, 1)))
        count += 2 * CORES
    return count / (time.perf_counter() - began)


CONTENDERS = {
    "gymnasium": gymnasium_frames,
    "gymnasium + VMC": lambda seconds: gymnasium_frames(seconds, with_agent=True),
    "twin": twin_frames,
    "twin + VMC": twin_agent_frames,
}


def _worker(name: str, pipe) -> None:
    import torch

    torch.set_num_threads(1)
    CONTENDERS[name](0.5)  # warm-up: imports, compiled kernels, tracks
    while (seconds := pipe.recv()) is not None:
        pipe.send(CONTENDERS[name](seconds))


def measure(seconds: float, repeats: int) -> dict[str, float]:
    """Frames a second of every contender on all cores: {name: median}."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, list] = {}
    for name in CONTENDERS:
        workers[name] = []
        for _ in range(CORES):
            ours, theirs = context.Pipe()
            context.Process(target=_worker, args=(name, theirs), daemon=True).start()
            workers[name].append(ours)
    figures: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(repeats + 1):
        for name, pipes in workers.items():
            for pipe in pipes:
                pipe.send(seconds if turn else 0.5)
            total = sum(pipe.recv() for pipe in pipes)
            if turn:  # the first turn waits for imports
                figures[name].append(total)
    for pipes in workers.values():
        for pipe in pipes:
            pipe.send(None)
    return {name: statistics.median(values) for name, values in figures.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    figures = measure(options.seconds, options.repeats)
    try:
        envpool_frames(0.5)
        figures["envpool"] = statistics.median(envpool_frames(options.seconds) for _ in range(options.repeats))
    except ImportError:
        print("envpool is not installed; its row is left out")
    base = {"twin + VMC": "gymnasium + VMC"}
    for name, value in figures.items():
        against = base.get(name, "gymnasium")
        print(f"{name:16s} {value:9.0f} frames/s on {CORES} cores   {value / figures[against]:6.1f} x {against}")


if __name__ == "__main__":
    main()
