"""The stages of a round before evolution: collect data, fit V, see all frames with it, fit M, gather the starts of dreams.

Each is entered with whatever the run already holds and commits its result as one checkpoint (or shard) before the next begins, so a
stopped run goes on where it was. The fits run as one unit with all cores (`threads=0`) on whichever process the executor gives.

Shapes: T steps of an episode, Z latent, H hidden, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from oneira.generative.training import TrainSettings, fit
from oneira.generative.vae import VAE, fast_encoder
from oneira.platform.devices import device_here
from oneira.platform.executor import Executor
from oneira.platform.runs import Run

from .batches import frame_batches, sequence_batches
from .collecting import collect_unit
from .dreaming import PROGRESS
from .environments import make_world
from .evolving import seed_of, track_seeds
from .memory import MDNRNN
from .rollouts import Episode, RolloutStore
from .settings import CollectConfig, WorldModelConfig
from .worldmodel import digest, load_into, pack

COLLECT_UNIT = 8  # episodes of one unit of work, and of one shard


def store_of(run: Run) -> RolloutStore:
    """The run's rollouts."""
    return RolloutStore(run.data("rollouts"))


def round_store(run: Run, config: WorldModelConfig, round_index: int) -> RolloutStore:
    """The data that a round learns from: shards of its last `recent` rounds, whatever later rounds have added."""
    first = max(0, round_index + 1 - (config.rounds[round_index].recent or round_index + 1))
    rounds = [f"{r:02d}-" for r in range(first, round_index + 1)]
    return RolloutStore(run.data("rollouts"), select=lambda shard: shard.startswith(tuple(rounds)))


def collect(
    config: WorldModelConfig, round_index: int, run: Run, executor: Executor, shared: Any, controllers: list[np.ndarray]
) -> None:
    """Drive, and keep what was seen: one shard a unit, so that a crash loses at most the units under way.

    Args:
        shared: packed world model of the round before, None in the first: random controllers then look through a V and an M as drawn.
        controllers: float32 [P] each, for the noisy episodes.
    """
    plan = config.rounds[round_index].collect
    if shared is None and plan.random:
        shared = executor.share(drawn_model(config))
    store = store_of(run)
    store.clean()
    units = [u for u in _collect_units(config, round_index, plan, controllers) if u["shard"] not in store.shards]
    world = make_world(config.world)
    for index, (unit, episodes) in enumerate(zip(units, executor.map(collect_unit, shared, units), strict=True)):
        meta = {
            "policy": unit["policy"],
            "env_id": world.env_id,
            "simulator": world.simulator,
            "preprocessing": world.preprocessing,
        }
        with store.writer(unit["shard"], **meta) as writer:
            for e in episodes:
                writer.add_episode(
                    e["frames"],
                    e["actions"],
                    e["rewards"],
                    terminated=e["terminated"],
                    truncated=e["truncated"],
                    seed=e["seed"],
                )
        run.log(
            "collect", round_index * 1000 + index, round=round_index, policy=unit["policy"],
            env_steps=int(sum(len(e["rewards"]) for e in episodes)),
            mean_return=float(np.mean([e["rewards"].sum() for e in episodes])), at=index + 1, total=len(units),
        )  # fmt: skip


def _collect_units(
    config: WorldModelConfig, round_index: int, plan: CollectConfig, controllers: list[np.ndarray]
) -> list[dict[str, Any]]:
    units = []
    for policy, count in (("wandering", plan.wandering), ("random", plan.random), ("noisy", plan.noisy)):
        for first in range(0, count, COLLECT_UNIT):
            number = min(COLLECT_UNIT, count - first)
            place = (config.seed, "collect", round_index, policy, first)
            unit = {
                "world": config.world, "policy": policy, "shard": f"{round_index:02d}-{policy}-{first:04d}", "seed": seed_of(*place),
                "seeds": track_seeds(number, *place), "max_steps": plan.max_steps, "stuck": plan.stuck,
            }  # fmt: skip
            if policy == "noisy":
                unit["params"] = np.asarray(controllers[(first // COLLECT_UNIT) % len(controllers)], np.float32)
            units.append(unit)
    return units


def fit_vision(shared: Any, unit: dict[str, Any]) -> dict[str, Any]:
    """Train V on a round's frames. Unit: run (path), round, precursor (checkpoint to begin from, or "")."""
    run = Run.open(unit["run"])
    config, index = run.config, unit["round"]
    settings = config.rounds[index].vision
    batches = frame_batches(
        round_store(run, config, index), batch_size=settings.batch_size, seed=seed_of(config.seed, "vision", index)
    )
    torch.manual_seed(seed_of(config.seed, "vision-weights", index) % 2**31)
    model = VAE(config.vision)
    if unit["precursor"]:
        model.load_state_dict(run.checkpoints.load(unit["precursor"]).tensors)
    log = _logger(run, "vision", index, settings.steps, settings.batch_size, "frames_per_s")
    name = f"{index:02d}-vision-fit"
    model = fit(model, batches, settings, checkpoints=run.checkpoints, name=name, log=log)
    run.checkpoints.save(f"{index:02d}-vision", model.state_dict(), {"round": index})
    if run.checkpoints.exists(name):
        run.checkpoints.delete(name)
    return {}


@torch.inference_mode()
def see_all(run: Run, config: WorldModelConfig, round_index: int, vision: VAE, key: str) -> None:
    """Encode every frame of the round's data that this V has not seen yet: (mu, logvar) beside the frames."""
    store = round_store(run, config, round_index)
    store.drop_derived(key)  # what an earlier V saw, nobody asks for again
    encode = fast_encoder(vision)
    with device_here("cpu").lease(priority="train") as lease:
        for shard in store.latents(key).missing():
            parts = []
            for frames in store.chunks(shard):
                lease.step()
                parts.append(tuple(np.asarray(x, np.float32) for x in encode(frames)))
            store.put_latents(shard, key, np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))


def fit_memory(shared: Any, unit: dict[str, Any]) -> dict[str, Any]:
    """Train M (every member of the ensemble) on what V sees, then gather starts. Unit: run, round, vision, precursor (checkpoints)."""
    run = Run.open(unit["run"])
    config, index = run.config, unit["round"]
    weights = run.checkpoints.load(unit["vision"]).tensors
    vision = load_into(VAE(config.vision), weights)
    key = digest({k: v.numpy() for k, v in weights.items()})[:16]
    see_all(run, config, index, vision, key)
    store = round_store(run, config, index)
    settings = config.rounds[index].memory
    kept = run.checkpoints.load(unit["precursor"]).tensors if unit["precursor"] else {}
    members = []
    for m in range(config.ensemble):
        member = new_memory(config, m)
        if kept:
            member.load_state_dict({k.removeprefix(f"{m}."): v for k, v in kept.items() if k.startswith(f"{m}.")})
        if settings is not None:
            member = _fit_member(run, settings, index, m, member, store, key)
        members.append(member.eval())
    tensors = {f"{m}.{k}": v for m, member in enumerate(members) for k, v in member.state_dict().items()}
    starts = gather_starts(store, key, members[0], config, index)
    tensors |= {f"starts.{k}": torch.from_numpy(v) for k, v in starts.items()}
    run.checkpoints.save(f"{index:02d}-memory", tensors, {"round": index, "vision": unit["vision"], "latents": key})
    for m in range(config.ensemble):
        if run.checkpoints.exists(f"{index:02d}-memory-fit-{m}"):
            run.checkpoints.delete(f"{index:02d}-memory-fit-{m}")
    return {}


def new_memory(config: WorldModelConfig, member: int) -> MDNRNN:
    """M as it is drawn before any training, from the run's seed."""
    torch.manual_seed(seed_of(config.seed, "memory-weights", member) % 2**31)
    return MDNRNN(config.memory)


def _fit_member(
    run: Run, settings: TrainSettings, index: int, m: int, member: MDNRNN, store: RolloutStore, key: str
) -> MDNRNN:
    config: WorldModelConfig = run.config
    seed = seed_of(config.seed, "memory", index, m)
    batches = sequence_batches(
        store, key, length=config.window, batch_size=settings.batch_size, seed=seed,
        newest=f"{index:02d}-", fresh=config.rounds[index].fresh,
    )  # fmt: skip
    log = _logger(run, "memory", index, settings.steps, settings.batch_size * config.window, "transitions_per_s", m)
    return fit(member, batches, settings, checkpoints=run.checkpoints, name=f"{index:02d}-memory-fit-{m}", log=log)


def _logger(run: Run, stage: str, index: int, steps: int, batch: int, rate: str, member: int = 0) -> Any:
    import time

    last = [time.perf_counter(), 0]

    def log(step: int, **values: float) -> None:
        now = time.perf_counter()
        speed = (step - last[1]) * batch / max(now - last[0], 1e-9) if last[1] else 0.0
        last[:] = [now, step]
        extra = {rate: speed} if speed else {}
        run.log(
            stage,
            index * 1_000_000 + member * 100_000 + step,
            round=index,
            member=member,
            total=steps,
            at=step,
            **values,
            **extra,
        )

    return log


START_EPISODES = 256  # episodes that are walked through for starts, at most


@torch.inference_mode()
def gather_starts(
    store: RolloutStore, key: str, memory: MDNRNN, config: WorldModelConfig, index: int
) -> dict[str, np.ndarray]:
    """Moments in the data at which dreams may begin, with what M remembers there.

    Half of the episodes are of this round's own data, where there is any: what the controllers of now get into.

    Returns:
        z float32 [N, Z] (sampled from V's posterior), h, c [N, H], reward_prev [N].
    """
    rng = np.random.default_rng(seed_of(config.seed, "starts", index))
    everything = store.episodes()
    own = [e for e in everything if e.shard.startswith(f"{index:02d}-")]
    episodes = [own[i] for i in rng.permutation(len(own))[: START_EPISODES // 2]]
    episodes += [everything[i] for i in rng.permutation(len(everything))[: START_EPISODES - len(episodes)]]
    each = -(-config.starts // len(episodes))
    found: dict[str, list[np.ndarray]] = {"z": [], "h": [], "c": [], "reward_prev": []}
    survival = make_world(config.world).survival
    for e, (z, rewards, h, c) in zip(episodes, _remembered(store, key, memory, episodes, rng), strict=True):
        at = _moments(rewards, each, rng, died=survival and e.terminated)
        before = np.concatenate([[np.float32(0)], rewards])
        for name, value in (("z", z[at]), ("h", h[at]), ("c", c[at]), ("reward_prev", before[at])):
            found[name].append(np.asarray(value, np.float32))
    joined = {name: np.concatenate(values) for name, values in found.items()}
    chosen = np.sort(rng.permutation(len(joined["z"]))[: config.starts])
    return {name: value[chosen] for name, value in joined.items()}


def _moments(rewards: np.ndarray, count: int, rng: np.random.Generator, died: bool = False) -> np.ndarray:
    """Steps int [count] of an episode at which dreams may begin.

    A quarter are of its first second, the others are drawn from wherever the agent was getting on: where it has long lost its way there is
    nothing to learn but to wait. If it died or lost its way in the end, a half of the others are of the second and a half before that: what
    undid it is in sight by then, and need not be dreamt up, which M does too seldom.
    """
    under_way = _under_way(rewards)
    places = np.flatnonzero(under_way)
    at = places[rng.integers(0, len(places), count)]
    if died or not under_way[-1]:
        last = int(np.flatnonzero(rewards > 0)[-1]) if (rewards > 0).any() else 0
        at = np.where(rng.random(count) < 0.5, rng.integers(max(0, last - 75), last + 1, count), at)
    return np.where(rng.random(count) < 0.25, rng.integers(0, min(50, len(rewards)), count), at)


def _under_way(rewards: np.ndarray, window: int = 35) -> np.ndarray:
    """bool [T]: has the return risen by `PROGRESS` in the `window` steps before, or is it too early to say?"""
    total = np.concatenate([[0.0], np.cumsum(rewards, dtype=np.float64)])[:-1]
    before = np.concatenate([np.full(min(window, len(total)), -np.inf), total[:-window]])[: len(total)]
    return total - before >= PROGRESS


def _remembered(
    store: RolloutStore, key: str, memory: MDNRNN, episodes: list[Episode], rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each episode: (z [T+1, Z] sampled from V's posterior, rewards [T], h, c [T+1, H]), 32 episodes at a time through M."""
    latents = store.latents(key)
    for first in range(0, len(episodes), 32):
        part = episodes[first : first + 32]
        longest = max(e.length for e in part)
        z = np.zeros((len(part), longest + 1, memory.config.z), np.float32)
        actions = np.zeros((len(part), longest, *store.actions.shape[1:]), np.float32)
        rewards = np.zeros((len(part), longest), np.float32)
        for i, e in enumerate(part):
            rows = latents.gather(np.arange(e.first_frame, e.first_frame + e.length + 1))
            mu, logvar = np.asarray(rows["mu"], np.float32), np.asarray(rows["logvar"], np.float32)
            z[i, : e.length + 1] = mu + np.exp(0.5 * logvar) * rng.standard_normal(mu.shape, dtype=np.float32)
            actions[i, : e.length] = store.actions[e.first_step : e.first_step + e.length]
            rewards[i, : e.length] = store.rewards[e.first_step : e.first_step + e.length]
        z_BTZ, actions_BTA, rewards_BT = (torch.from_numpy(x) for x in (z[:, :-1], actions, rewards))
        h, c = (x.numpy() for x in memory.observe(z_BTZ, actions_BTA, rewards_BT))
        for i, e in enumerate(part):
            yield z[i, : e.length + 1], rewards[i, : e.length], h[i, : e.length + 1], c[i, : e.length + 1]


def drawn_model(config: WorldModelConfig) -> dict[str, Any]:
    """A packed world model before any training, from the run's seed."""
    torch.manual_seed(seed_of(config.seed, "vision-weights", 0) % 2**31)
    return pack(config.world, VAE(config.vision).eval(), [new_memory(config, 0).eval()], config.controller)


def packed_model(run: Run, config: WorldModelConfig, memory: str) -> dict[str, Any]:
    """The packed world model of a memory checkpoint, with its starts: what evolution's units share."""
    kept = run.checkpoints.load(memory)
    vision = load_into(VAE(config.vision), run.checkpoints.load(kept.meta["vision"]).tensors)
    members = []
    for m in range(config.ensemble):
        weights = {k.removeprefix(f"{m}."): v for k, v in kept.tensors.items() if k.startswith(f"{m}.")}
        members.append(load_into(MDNRNN(config.memory), weights))
    tree = pack(config.world, vision, members, config.controller)
    tree["starts"] = {k.removeprefix("starts."): v.numpy() for k, v in kept.tensors.items() if k.startswith("starts.")}
    return tree
