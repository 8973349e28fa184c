"""DoomTakeCover's presets: controllers that learn in the dream alone; the real game gives data and checks, no update sees its score.

doom-quick       minutes on a laptop
doom-hour        half an hour on a laptop: three rounds, each on what killed the controllers of the one before
doom-tau-sweep   V and M once, then populations at five temperatures at the same time ("World Models", section 4.4)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from oneira.generative.training import TrainSettings
from oneira.generative.vae import VAEConfig

from .controller import ControllerConfig
from .environments import DoomTakeCover
from .evolution import EvolutionConfig
from .memory import MemoryConfig
from .settings import CollectConfig, PopulationConfig, RoundConfig, WorldModelConfig

TEMPERATURES = (0.1, 0.5, 1.0, 1.15, 1.3)

# A fireball that is still far away is two pixels: without emphasis V leaves it out, and a dream without fireballs is a safe place.
# Survival is the reward, so M neither reads nor learns rewards; one step in some 200 terminates, and counts ten times.
_MEMORY = MemoryConfig(
    z=64, action=3, discrete=True, hidden=512, reward_input=False, reward_weight=0.0, done_positive_weight=10.0
)
_VISION = VAEConfig(z=64, width=64, decoder_width=64, kl_floor=4.0, emphasis=10.0)
_CONTROLLER = ControllerConfig(features="zch", z=64, memory=512, action_space="threshold", bias=False)


def _learn(steps: int, *, batch: int, lr: float) -> TrainSettings:
    return TrainSettings(steps=steps, batch_size=batch, lr=lr, save_every=500)


def _dream(
    generations: int, tau: float, *, name: str = "dream", seed: int = 1, horizon: int = DoomTakeCover.max_steps
) -> PopulationConfig:
    evolution = EvolutionConfig(kind="separable", popsize=32, sigma0=0.1, seed=seed)
    return PopulationConfig(
        name=name, world="dream", generations=generations, episodes=16, horizon=horizon, stuck=0, tau=tau,
        unit=16, evolution=evolution,
    )  # fmt: skip


def _first_round(episodes: int, vision: int, memory: int, *populations: PopulationConfig) -> RoundConfig:
    return RoundConfig(
        collect=CollectConfig(wandering=episodes, max_steps=DoomTakeCover.max_steps),
        vision=_learn(vision, batch=32, lr=3e-3),
        memory=_learn(memory, batch=64, lr=2e-3),
        populations=populations,
    )


def _run(*rounds: RoundConfig, **more: Any) -> WorldModelConfig:
    return WorldModelConfig(
        world="doom", vision=_VISION, memory=_MEMORY, controller=_CONTROLLER, window=64, rounds=rounds, **more
    )


def _next_round(episodes: int, memory: int, *populations: PopulationConfig) -> RoundConfig:
    return RoundConfig(
        collect=CollectConfig(noisy=episodes, max_steps=DoomTakeCover.max_steps),
        memory=_learn(memory, batch=64, lr=1e-3),
        fresh=0.5,
        populations=populations,
    )


def doom_quick() -> WorldModelConfig:
    """Two dreams at temperature 1.15: one of random play, one of play as the first dream taught."""
    first = _first_round(768, 2500, 500, _dream(12, 1.15, horizon=1000))
    return _run(first, _next_round(192, 300, _dream(10, 1.15, horizon=1000)), checks=32, film_steps=300)


def doom_hour() -> WorldModelConfig:
    """Dreams alone: each round plays as the last dream taught, and M learns what killed it; in the third V learns to see it, too."""
    first = _first_round(1024, 6000, 1200, _dream(15, 1.15, horizon=1000))
    later = _next_round(192, 500, _dream(25, 1.15, horizon=1000))
    seeing = replace(later, vision=_learn(2000, batch=32, lr=5e-4), memory=_learn(800, batch=64, lr=1e-3))
    return _run(first, later, seeing, checks=64, check_episodes=100)


def doom_tau_sweep() -> WorldModelConfig:
    """Five temperatures in one dream, at the same time on one pool; each population is then scored in the real game.

    V and M are made once, for all five: from random play, and from the play of a scout bred at temperature 1.15.
    """
    scout = _first_round(1024, 6000, 1200, _dream(15, 1.15, horizon=1000))
    populations = [_dream(20, tau, name=f"tau-{tau}", seed=1 + i) for i, tau in enumerate(TEMPERATURES)]
    return _run(scout, _next_round(192, 500, *populations), population_episodes=100)
