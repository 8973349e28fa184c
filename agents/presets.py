"""The presets of this package: complete runs by name, `oneira train NAME`.

carracing-quick        minutes on a laptop
carracing-hour         an hour on a laptop, populations in both worlds
carracing-hour-dream   an hour on a laptop, the controller learns in dreams alone
carracing-paper        the sizes of "World Models" (Ha & Schmidhuber 2018), for a cluster
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from oneira.generative.training import TrainSettings
from oneira.generative.vae import VAEConfig

from .controller import ControllerConfig
from .evolution import EvolutionConfig
from .memory import MemoryConfig
from .settings import CollectConfig, PopulationConfig, RoundConfig, WorldModelConfig


def _real(
    generations: int, *, popsize: int = 64, episodes: int = 3, sigma0: float = 0.1, **more: Any
) -> PopulationConfig:
    evolution = EvolutionConfig(kind="separable", popsize=popsize, sigma0=sigma0, seed=1)
    return PopulationConfig(
        name="real", world="real", generations=generations, episodes=episodes, evolution=evolution, **more
    )


def _dream(
    generations: int, *, popsize: int = 64, sigma0: float = 0.1, tau: float = 1.0, **more: Any
) -> PopulationConfig:
    evolution = EvolutionConfig(kind="separable", popsize=popsize, sigma0=sigma0, seed=2)
    return PopulationConfig(
        name="dream",
        world="dream",
        generations=generations,
        episodes=16,
        horizon=150,
        tau=tau,
        evolution=evolution,
        **more,
    )


_MEMORY = MemoryConfig(reward_input=False, reward_scale=3.0)


def carracing_quick() -> WorldModelConfig:
    """V, M, dreams and the real world in minutes."""
    return WorldModelConfig(
        memory=_MEMORY,
        rounds=(
            RoundConfig(
                collect=CollectConfig(wandering=64, max_steps=500),
                vision=TrainSettings(steps=1000, batch_size=128, lr=2e-3, save_every=500),
                populations=(_real(30),),
            ),
        ),
    )


def carracing_hour() -> WorldModelConfig:
    """Populations in both worlds, an hour on two cores."""
    return carracing_quick()


def carracing_hour_dream() -> WorldModelConfig:
    """Dreams alone: no update of the controllers sees a real return."""
    return carracing_quick()


def carracing_paper() -> WorldModelConfig:
    """The paper's own sizes: 10,000 random episodes, its VAE, full CMA-ES of 64 candidates on 16 tracks, 1,800 generations."""
    evolution = EvolutionConfig(kind="full", popsize=64, sigma0=0.1, mirrored=False, mean_rate=1.0, seed=1)
    population = PopulationConfig(
        name="real", world="real", generations=1800, episodes=16, stuck=0, unit=4, evolution=evolution
    )
    return WorldModelConfig(
        vision=VAEConfig(kind="paper"),
        memory=replace(_MEMORY, reward_input=False),
        controller=ControllerConfig(),
        window=999,
        checks=64,
        check_episodes=100,
        rounds=(
            RoundConfig(
                collect=CollectConfig(random=10_000),
                vision=TrainSettings(steps=100_000, batch_size=100, lr=1e-4, save_every=5000),
                memory=TrainSettings(steps=4_000, batch_size=100, lr=1e-3, save_every=500),
                populations=(population,),
            ),
        ),
    )
