"""What a world-model run is made of: frozen configs, from a collector's noise to the rounds of a whole run.

    WorldModelConfig
      vision, memory, controller      the parts V, M, C
      rounds: RoundConfig...          each: collect -> fit V -> fit M -> evolve populations -> check in reality
        populations: PopulationConfig...   each in its world, dream or real, on one pool of workers

Budgets are counts, never seconds, so that a run's result does not depend on the machine's mood.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from oneira.generative.training import TrainSettings
from oneira.generative.vae import VAEConfig
from oneira.platform.errors import ConfigError, did_you_mean

from .controller import ControllerConfig
from .environments import WORLDS
from .evolution import EvolutionConfig
from .memory import MemoryConfig


def _at_least(owner: Any, **lowest: float) -> None:
    for name, low in lowest.items():
        if getattr(owner, name) < low:
            raise ConfigError(f"{type(owner).__name__}.{name} is {getattr(owner, name)}; it must be at least {low}.")


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Data of one round. Steps are environment steps.

    Args:
        wandering: episodes of temporally correlated random driving. random: of random controllers. noisy: of the controllers bred so
            far, with correlated noise on their actions.
        max_steps: an episode's length at most. stuck: cut after that many steps without a new tile (0: never).
    """

    wandering: int = 0
    random: int = 0
    noisy: int = 0
    max_steps: int = 1000
    stuck: int = 0

    def __post_init__(self) -> None:
        _at_least(self, wandering=0, random=0, noisy=0, max_steps=1, stuck=0)

    @property
    def episodes(self) -> int:
        """How many in all."""
        return self.wandering + self.random + self.noisy


@dataclass(frozen=True, kw_only=True)
class PopulationConfig:
    """One CMA-ES search in one world.

    Args:
        name: of the population; rounds that name it again go on with it.
        world: where its candidates live. evolution: the search.
        generations: in this round. episodes: tracks or dreams for each candidate, the same for all candidates of a generation.
        horizon: steps of an episode at most. stuck: steps without progress after which an episode is cut
            (0: never): without a new tile in the real world, see `DreamModel.rollout` for the dream.
        lost_cost: reward that being cut takes from a dream. A dream of 250 steps forfeits little by a crash, a real episode hundreds, and
            the dream believes in crashes less often than they happen: what is at stake must be said. Dreams only.
        tau: temperature of the dream. unit: candidates that one unit of work takes; it must divide popsize.
        start: where it begins when it is new: "zero", or the name of the population whose mean, sigma and covariance it takes over.
        check_every: generations between two measurements of the distribution's mean.
    """

    name: str
    world: Literal["real", "dream"]
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    generations: int = 10
    episodes: int = 4
    horizon: int = 1000
    stuck: int = 35
    lost_cost: float = 0.0
    tau: float = 1.0
    unit: int = 32
    start: str = "zero"
    check_every: int = 10

    def __post_init__(self) -> None:
        _at_least(self, generations=0, episodes=1, horizon=1, stuck=0, lost_cost=0, unit=1, check_every=1)
        if self.world not in ("real", "dream"):
            raise ConfigError(
                f"population '{self.name}': unknown world '{self.world}'. {did_you_mean(self.world, ('real', 'dream'))}"
            )
        if not self.tau > 0:
            raise ConfigError(f"population '{self.name}': tau is {self.tau}; a temperature must be above 0.")
        if self.evolution.popsize % self.unit:
            raise ConfigError(
                f"population '{self.name}': unit {self.unit} does not divide popsize {self.evolution.popsize}."
            )


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """One turn of the iterative procedure ("World Models", section 5).

    Args:
        vision, memory: None keeps the V or M of the round before (M of the first round then stays as it was drawn: an echo state
            network, whose h is still a memory of the last second).
        recent: rounds of data that V and M learn from, the latest ones; 0 is all. fresh: share of M's batches, in [0, 1], that this
            round's own data fill: what undid the last controllers is little among all that was ever seen.
        restart: begin every population anew; else those of the last round go on.
        segments: parts into which the generations are cut; at the end of each, populations send their means to one another.
    """

    collect: CollectConfig = field(default_factory=CollectConfig)
    vision: TrainSettings | None = None
    memory: TrainSettings | None = None
    recent: int = 0
    fresh: float = 0.0
    restart: bool = False
    segments: int = 1
    populations: tuple[PopulationConfig, ...] = ()

    def __post_init__(self) -> None:
        _at_least(self, recent=0, segments=1, fresh=0)
        if self.fresh > 1:
            raise ConfigError(f"RoundConfig.fresh is {self.fresh}; a share is at most 1.")
        names = [p.name for p in self.populations]
        if len(set(names)) < len(names):
            raise ConfigError(f"two populations of a round share a name: {', '.join(names)}.")


@dataclass(frozen=True, kw_only=True)
class WorldModelConfig:
    """A whole run. Its method `train` is what `oneira train` calls.

    Args:
        world: environment. seed: of the run; all other seeds derive from it.
        window: steps of the sequences that M learns from. ensemble: memories in the dream. starts: moments in the data at which
            dreams may begin. checks: tracks on which the mean of each population is measured at the end of a round.
        check_episodes: tracks of the reference environment on which the run's best controllers are scored at its end.
        population_episodes: of the reference environment and of the dream on which each population of the last round is scored;
            0: none. film_steps: length of the report's film of the real world and the dream; 0 makes none.
    """

    world: str = "carracing"
    seed: int = 0
    vision: VAEConfig = field(default_factory=VAEConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    ensemble: int = 1
    window: int = 96
    starts: int = 2048
    checks: int = 32
    check_episodes: int = 16
    population_episodes: int = 0
    film_steps: int = 500
    rounds: tuple[RoundConfig, ...] = ()

    def __post_init__(self) -> None:
        _at_least(
            self,
            seed=0,
            ensemble=1,
            window=2,
            starts=1,
            checks=2,
            check_episodes=0,
            population_episodes=0,
            film_steps=0,
        )
        if self.world not in WORLDS:
            raise ConfigError(f"unknown environment '{self.world}'. {did_you_mean(self.world, WORLDS)}")
        if not (self.vision.z == self.memory.z == self.controller.z):
            raise ConfigError(
                f"z differs: vision {self.vision.z}, memory {self.memory.z}, controller {self.controller.z}."
            )
        if self.controller.memory != self.memory.hidden:
            raise ConfigError(
                f"the controller expects h of {self.controller.memory}, the memory's is {self.memory.hidden}."
            )
        if (self.memory.discrete, self.memory.action) != (
            (world := WORLDS[self.world]).discrete,
            world.action_size,
        ) or self.controller.discrete != world.discrete:
            raise ConfigError(
                f"world '{self.world}' takes {'discrete' if world.discrete else 'continuous'} actions of size {world.action_size}; "
                f"memory.discrete is {self.memory.discrete}, memory.action {self.memory.action}, controller.action_space "
                f"'{self.controller.action_space}'."
            )
        _starts_exist(self.rounds)
        if not self.rounds or not self.rounds[0].collect.episodes or self.rounds[0].vision is None:
            raise ConfigError("a run needs a first round that collects episodes and trains V.")

    def smoke(self) -> WorldModelConfig:
        """The same run with every stage tiny."""
        return replace(
            self,
            starts=64,
            checks=4,
            check_episodes=min(self.check_episodes, 2),
            population_episodes=min(self.population_episodes, 2),
            film_steps=min(self.film_steps, 50),
            rounds=tuple(_smoke_round(r) for r in self.rounds[:2]),
        )

    def train(self, run: Any, executor: Any) -> dict[str, Any]:
        """Run every stage that `run` does not hold yet. Returns the summary that `oneira train` prints."""
        from .pipeline import train

        return train(self, run, executor)

    def report(self, run: Any) -> Path:
        """Write the run's report. Returns its path."""
        from .report import build_report

        return build_report(run)


def _starts_exist(rounds: tuple[RoundConfig, ...]) -> None:
    """A population that starts from another needs that one in the round before."""
    known: set[str] = set()
    for index, plan in enumerate(rounds):
        for p in plan.populations:
            if p.start != "zero" and p.start not in known:
                raise ConfigError(
                    f"population '{p.name}' of round {index} starts from '{p.start}'. {did_you_mean(p.start, known | {'zero'})}"
                )
        known = {p.name for p in plan.populations}


def _smoke_round(r: RoundConfig) -> RoundConfig:
    collect = replace(
        r.collect,
        wandering=min(r.collect.wandering, 4),
        random=min(r.collect.random, 2),
        noisy=min(r.collect.noisy, 4),
        max_steps=min(r.collect.max_steps, 100),
    )
    populations = tuple(
        replace(
            p,
            generations=min(p.generations, 2),
            episodes=min(p.episodes, 2),
            horizon=min(p.horizon, 60),
            unit=4,
            check_every=1,
            evolution=replace(p.evolution, popsize=8),
        )
        for p in r.populations
    )
    return replace(
        r,
        collect=collect,
        vision=_smoke_training(r.vision),
        memory=_smoke_training(r.memory),
        segments=min(r.segments, 2),
        populations=populations,
    )


def _smoke_training(settings: TrainSettings | None) -> TrainSettings | None:
    if settings is None:
        return None
    return replace(
        settings, steps=min(settings.steps, 20), batch_size=min(settings.batch_size, 32), save_every=5, log_every=10
    )
