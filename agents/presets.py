"""The presets of this package: complete runs by name, `oneira train NAME`.

carracing-quick        minutes on a laptop
carracing-hour         an hour on a laptop, populations in both worlds
carracing-hour-dream   an hour on a laptop, the controller learns in dreams alone
carracing-paper        the sizes of "World Models" (Ha & Schmidhuber 2018), for a cluster
"""

from __future__ import annotations

from dataclasses import replace

from oneira.generative.training import TrainSettings
from oneira.generative.vae import VAEConfig

from .controller import ControllerConfig
from .evolution import EvolutionConfig
from .memory import MemoryConfig
from .settings import CollectConfig, PopulationConfig, RoundConfig, WorldModelConfig


def _real(generations: int, *, episodes: int = 3) -> PopulationConfig:
    evolution = EvolutionConfig(kind="separable", popsize=64, sigma0=0.1, seed=1)
    return PopulationConfig(name="real", world="real", generations=generations, episodes=episodes, evolution=evolution)


def _dream(generations: int, *, name: str = "dream", seed: int = 2, horizon: int = 250) -> PopulationConfig:
    evolution = EvolutionConfig(kind="separable", popsize=32, sigma0=0.1, seed=seed)
    return PopulationConfig(
        name=name,
        world="dream",
        generations=generations,
        episodes=16,
        horizon=horizon,
        lost_cost=400.0,
        unit=16,
        evolution=evolution,
    )


_MEMORY = MemoryConfig(reward_input=False, reward_scale=3.0)
# The paper's floor of 0.5 nats leaves z a posterior deviation of 0.64: the dream of so vague a z is mostly noise. 2 nats leave 0.15.
_VISION = VAEConfig(kl_floor=2.0)
_WANDERING = CollectConfig(wandering=128, max_steps=500, stuck=150)


def _learn(steps: int, *, batch: int = 32, lr: float = 4e-3) -> TrainSettings:
    return TrainSettings(steps=steps, batch_size=batch, lr=lr, save_every=500)


def _first_round(generations: int) -> RoundConfig:
    """V from wandering; M as it was drawn (an echo state network) is memory enough for a first driver, whose errors are good data."""
    return RoundConfig(collect=_WANDERING, vision=_learn(3000), populations=(_real(generations),))


def _next_round(
    noisy: int, vision: int, memory: int, generations: int, segments: int, *, episodes: int = 3
) -> RoundConfig:
    """V and M from driving; populations in both worlds, new ones because h means something else now."""
    return RoundConfig(
        collect=CollectConfig(noisy=noisy, max_steps=700, stuck=100),
        vision=_learn(vision, lr=2e-3),
        memory=_learn(memory, batch=64, lr=2e-3),
        restart=True,
        segments=segments,
        populations=(_real(generations, episodes=episodes), _dream(generations)),
    )


def carracing_quick() -> WorldModelConfig:
    """Two rounds in minutes: a first driver on an untrained memory, then V, M and populations in both worlds."""
    return WorldModelConfig(
        vision=_VISION,
        memory=_MEMORY,
        film_steps=300,
        rounds=(_first_round(16), _next_round(192, 1500, 600, 40, 5)),
    )


def carracing_hour() -> WorldModelConfig:
    """The same, larger, and once more from what the better driver sees."""
    rounds = (
        _first_round(20),
        _next_round(256, 3000, 1500, 60, 6),
        _next_round(256, 3000, 2000, 60, 6, episodes=4),
    )
    return WorldModelConfig(vision=_VISION, memory=_MEMORY, checks=64, rounds=rounds)


def carracing_hour_dream() -> WorldModelConfig:
    """Dreams alone: no update of the controllers sees a real return. Each round drives as the last dream taught, and M learns what undid it.

    A population outgrows its dream sooner or later, so a new one begins every third round (docs/LOG.md).
    """

    def dreamers(number: int, generations: int, horizon: int = 250) -> PopulationConfig:
        return _dream(generations, name=f"dream-{number}", seed=2 + number, horizon=horizon)

    first = RoundConfig(
        collect=CollectConfig(wandering=512, random=128, max_steps=500, stuck=50),
        vision=_learn(3000),
        memory=_learn(1000, batch=64, lr=2e-3),
        populations=(dreamers(0, 30, horizon=150),),
    )
    later = RoundConfig(
        collect=CollectConfig(noisy=64, max_steps=1000, stuck=50), memory=_learn(300, batch=96, lr=1e-3), fresh=0.5
    )
    seeing = replace(later, vision=_learn(2000, lr=2e-3), memory=_learn(1000, batch=64, lr=2e-3), restart=True)

    def turn(number: int, begin: RoundConfig) -> tuple[RoundConfig, ...]:
        onward = replace(later, populations=(dreamers(number, 15),))
        return replace(begin, populations=(dreamers(number, 40),)), onward, onward

    rounds = (first, *turn(1, later), *turn(2, seeing), *turn(3, later), *turn(4, later))
    return WorldModelConfig(vision=_VISION, memory=_MEMORY, checks=32, rounds=rounds)


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
