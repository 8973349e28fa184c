"""Evolution of controllers: CMA-ES, whose every bit of state can be saved and continued.

    population = Population(EvolutionConfig(), start)        start: float [P]
    fitness = [...] for each of population.ask()             the same candidates until they are told
    population.tell(fitness)                                 maximises; a fitness that is not finite ranks last

The strategy is N. Hansen's `cma` ("The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772). This file adds a sampler
for its covariance matrix that costs less and does not depend on the number of threads, settings that suit noisy fitness
in about a thousand dimensions, migrants from another population, and `state` and `from_state`: all that decides the
future, as tensors and JSON.

Shapes: lambda candidates a generation, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import cma
import numpy as np
import torch
from cma.sampler import GaussFullSampler
from cma.sigma_adaptation import CMAAdaptSigmaCSA
from cma.utilities.utils import ElapsedWCTime

from oneira.platform.errors import CheckpointError, ConfigError, DataError, NumericalError, UsageError, did_you_mean

KINDS = ("full", "separable")


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """Settings of one population. The defaults did well on noisy toy problems with 867 parameters (docs/LOG.md).

    Args:
        kind: "full" learns a covariance matrix; "separable" one variance for each parameter, about P/3 times faster and
            at almost no cost (Ros and Hansen, "A Simple Modification in CMA-ES Achieving Linear Time and Space
            Complexity", 2008).
        popsize: lambda, candidates a generation.
        sigma0: Initial step size: standard deviation of every parameter.
        mirrored: Candidates come in pairs mean + y, mean - y.
        mean_rate: Step of the mean towards the mean of the selected, in (0, 1] (the tutorial's c_m). Less than 1
            averages noise over generations while candidates stay as far apart as before.
        seed: Of the population's random numbers.
    """

    kind: Literal["full", "separable"] = "separable"
    popsize: int = 64
    sigma0: float = 0.1
    mirrored: bool = True
    mean_rate: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"The evolution's kind is {self.kind!r}. {did_you_mean(str(self.kind), KINDS)}")
        if self.popsize < 4:
            raise ConfigError(f"The evolution's popsize is {self.popsize}; it must be at least 4.")
        if not self.sigma0 > 0:
            raise ConfigError(f"The evolution's sigma0 is {self.sigma0}; it must be positive.")
        if not 0 < self.mean_rate <= 1:
            raise ConfigError(f"The evolution's mean_rate is {self.mean_rate}; it must be in (0, 1].")
        if self.seed < 0:
            raise ConfigError(f"The evolution's seed is {self.seed}; it must not be negative.")


class Population:
    """One population of candidates and the normal distribution N(mean, sigma^2 C) that breeds them.

    Args:
        config: Its settings.
        start: Initial mean, float [P], P at least 2.
    """

    def __init__(self, config: EvolutionConfig, start: np.ndarray) -> None:
        start = np.array(start, dtype=np.float64)
        if start.ndim != 1 or start.size < 2 or not np.isfinite(start).all():
            raise DataError(f"A population starts from a finite vector of two or more numbers, not from {start.shape}.")
        self.config = config
        self.num_parameters = start.size
        self._generator = np.random.default_rng(config.seed)
        self._es = self._strategy(start, config.sigma0)
        self._born = 0  # generation of the last restart
        self._asked: np.ndarray | None = None
        self._pending = np.zeros((0, start.size))  # migrants that wait for the next ask
        self._num_migrants = 0  # migrants at the end of the asked population

    @property
    def mean(self) -> np.ndarray:
        """Mean of the distribution, float64 [P] (a copy)."""
        return self._es.mean.copy()

    @property
    def sigma(self) -> float:
        """Step size: the factor before C."""
        return float(self._es.sigma)

    @property
    def covariance(self) -> np.ndarray:
        """C without sigma^2: float64 [P, P] of a full population, the variances [P] of a separable one (a copy)."""
        scaling = np.broadcast_to(self._es.sigma_vec.scaling, self.num_parameters)
        if self.config.kind == "full":
            return self._es.sm.C * np.outer(scaling, scaling)
        return self._es.sm.variances * scaling**2

    @property
    def generation(self) -> int:
        """Number of generations told so far."""
        return self._born + self._es.countiter

    def best_mean(self) -> np.ndarray:
        """The mean as parameters for a controller, float32 [P]: under noise a better guess than any candidate."""
        return self._es.mean.astype(np.float32)

    def ask(self) -> np.ndarray:
        """The candidates of this generation, float64 [lambda, P], the same until `tell`. Migrants come last."""
        if self._asked is None:
            asked = np.array(self._es.ask())
            self._num_migrants = len(self._pending)
            if self._num_migrants:
                asked[-self._num_migrants :] = self._pending
                self._pending = self._pending[:0]
            self._asked = asked
        return self._asked.copy()

    def tell(self, fitness: np.ndarray) -> None:
        """Move to the next generation.

        Args:
            fitness: [lambda], in the order of `ask`; more is better. Only ranks count; NaN and infinities rank last.

        Raises:
            UsageError: `ask` was not called since the last `tell`.
            DataError: Not one number for each candidate.
            NumericalError: No candidate has a finite fitness.
        """
        if self._asked is None:
            raise UsageError("tell() without ask(): this generation has no candidates yet.")
        fitness = np.array(fitness, dtype=np.float64)
        if fitness.shape != (self.config.popsize,):
            raise DataError(f"Fitness has shape {fitness.shape}; this population takes ({self.config.popsize},).")
        if not np.isfinite(fitness).any():
            raise NumericalError(f"No candidate of generation {self.generation} has a finite fitness.")
        order = np.argsort(np.where(np.isfinite(fitness), -fitness, np.inf), kind="stable")
        # A migrant in the worse half is left out: its negative weight would shrink the distribution on the way to it.
        # One in the better half is told, and as cma did not draw it, cma shortens the step to it to a length that its
        # own samples could have (Hansen, "Injecting External Solutions Into CMA-ES", arXiv:1110.4181).
        first_migrant = self.config.popsize - self._num_migrants
        half = self.config.popsize // 2
        told = [index for rank, index in enumerate(order) if index < first_migrant or rank < half]
        self._es.tell([self._asked[index] for index in told], [float(rank) for rank in range(len(told))])
        self._asked = None
        self._num_migrants = 0

    def inject(self, candidates: np.ndarray) -> None:
        """Put migrants [m, P] or [P] in place of the last m candidates of the next `ask`; at most lambda / 4 wait."""
        candidates = np.atleast_2d(np.array(candidates, dtype=np.float64))
        size, most = self.num_parameters, self.config.popsize // 4
        if candidates.ndim != 2 or candidates.shape[1] != size or not np.isfinite(candidates).all():
            raise DataError(f"Migrants are {candidates.shape}; this population takes finite [m, {size}].")
        if len(self._pending) + len(candidates) > most:
            raise UsageError(f"{len(self._pending) + len(candidates)} migrants would wait; at most {most} may.")
        self._pending = np.concatenate([self._pending, candidates])

    def restart_from(self, mean: np.ndarray, sigma: float | None = None, covariance: np.ndarray | None = None) -> None:
        """Begin anew around another mean, with fresh paths; random numbers and the count of generations go on.

        Args:
            mean: float [P].
            sigma: Step size; `config.sigma0` when None.
            covariance: Variances [P] or matrix [P, P]: `covariance` of a population of either kind; identity when None.

        Raises:
            UsageError: Candidates are out: tell first.
            DataError: A shape does not fit, or a value is not finite or not positive.
        """
        if self._asked is not None:
            raise UsageError("restart_from() between ask() and tell(): tell the candidates first.")
        mean = np.array(mean, dtype=np.float64)
        sigma = self.config.sigma0 if sigma is None else float(sigma)
        size = self.num_parameters
        if mean.shape != (size,) or not np.isfinite(mean).all() or not 0 < sigma < np.inf:
            raise DataError(
                f"A restart takes a finite mean [{size}] and a positive sigma, not {mean.shape} and {sigma}."
            )
        born = self.generation
        es = self._strategy(mean, sigma)
        if covariance is not None:
            self._set_covariance(es, np.array(covariance, dtype=np.float64))
        self._es, self._born = es, born

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """All that decides the future, at any moment, also between `ask` and `tell`: (tensors, meta for JSON)."""
        es, sampler, path = self._es, self._es.sm, self._es.adapt_sigma
        tensors = {"mean": es.mean, "pc": es.pc, "pc2": es.pc2, "ps": path.ps, "pending": self._pending}
        tensors["scaling"] = np.broadcast_to(es.sigma_vec.scaling, self.num_parameters)
        meta: dict[str, Any] = {
            "kind": self.config.kind,
            "sigma": float(es.sigma),
            "countiter": es.countiter,
            "countevals": es.countevals,
            "scaled": np.size(es.sigma_vec.scaling) > 1,
            "delta": float(path.delta),
            "born": self._born,
            "num_migrants": self._num_migrants,
            "asked": self._asked is not None,
            "generator": self._generator.bit_generator.state,
        }
        if self._asked is not None:
            tensors["asked"] = self._asked
        if isinstance(sampler, CovarianceSampler):
            tensors |= {"C": sampler.C, "B": sampler.B, "D": sampler.D}
            meta |= {name: getattr(sampler, name) for name in ("last_update", "count_tell", "count_eigen")}
        elif hasattr(sampler, "standard_deviations"):
            tensors["standard_deviations"] = sampler.standard_deviations
        return {name: _array(value) for name, value in tensors.items()}, meta

    @classmethod
    def from_state(
        cls, config: EvolutionConfig, tensors: Mapping[str, np.ndarray | torch.Tensor], meta: Mapping[str, Any]
    ) -> Population:
        """The population that `state` was taken of: it goes on byte for byte as that one would.

        Raises:
            CheckpointError: The state is of another kind, or of another number of candidates or parameters.
        """
        arrays = {name: _array(value) for name, value in tensors.items()}
        if meta.get("kind") != config.kind:
            raise CheckpointError(
                f"This state is of a {meta.get('kind')!r} population; the config says {config.kind!r}"
            )
        population = cls(config, arrays["mean"])
        shape = (config.popsize, population.num_parameters)
        if meta["asked"] and arrays["asked"].shape != shape:
            raise CheckpointError(f"This state has candidates {arrays['asked'].shape}; the config says {shape}.")
        population._born, population._num_migrants = meta["born"], meta["num_migrants"]
        population._pending = arrays["pending"]
        population._restore_strategy(arrays, meta)
        if meta["asked"]:
            population._restore_asked(arrays["asked"])
        population._generator.bit_generator.state = meta["generator"]
        return population

    def _restore_strategy(self, arrays: dict[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Set what cma changes from one generation to the next; the rest follows from the config."""
        es, sampler, path = self._es, self._es.sm, self._es.adapt_sigma
        es.mean_old = es.mean.copy()
        es.pc, es.pc2 = arrays["pc"], arrays["pc2"]
        es.sigma, es.countiter, es.countevals = meta["sigma"], meta["countiter"], meta["countevals"]
        es.timer = ElapsedWCTime()  # cma's ask() makes one in the first generation only
        if meta["scaled"]:
            es.sigma_vec.scaling, es.sigma_vec.is_identity = arrays["scaling"], False
        path.ps, path.delta, path._ps_updated_iteration = arrays["ps"], meta["delta"], meta["countiter"]
        if isinstance(sampler, CovarianceSampler):
            sampler.C, sampler.B, sampler.D = arrays["C"], arrays["B"], arrays["D"]
            for name in ("last_update", "count_tell", "count_eigen"):
                setattr(sampler, name, meta[name])
        elif "standard_deviations" in arrays:
            sampler.standard_deviations = arrays["standard_deviations"]
        es._updateBDfromSM(sampler)

    def _restore_asked(self, asked: np.ndarray) -> None:
        """Bring cma to where it stands after ask(), with these candidates as the ones it drew.

        Asking sets its flags. What it draws is thrown away, and the caller puts back the random numbers it spent.
        """
        self._es.ask()
        for candidate in asked[: len(asked) - self._num_migrants]:
            self._es.sent_solutions.insert(candidate, geno=candidate.copy(), iteration=self._es.countiter)
        self._asked = asked

    def _strategy(self, mean: np.ndarray, sigma: float) -> cma.CMAEvolutionStrategy:
        options: dict[str, Any] = {
            "popsize": self.config.popsize,
            "randn": self._normal,
            "seed": np.nan,  # cma then leaves numpy's global random numbers alone
            "CMA_cmean": self.config.mean_rate,
            "CMA_mirrors": 0,
            # From 300 parameters on cma sets the step size by comparing two candidates (TPA): noise would decide it.
            "AdaptSigma": CMAAdaptSigmaCSA,
            "conditioncov_alleviate": False,  # it would move C into a change of coordinates
            "verbose": -9,
        }
        if self.config.kind == "separable":
            return cma.CMAEvolutionStrategy(mean, sigma, {**options, "CMA_diagonal": True})
        options |= {"CMA_sampler": CovarianceSampler, "CMA_sampler_options": {"randn": self._normal}}
        es = cma.CMAEvolutionStrategy(mean, sigma, options)
        # The tutorial (appendix B.2) waits for 1 / (10 P (c1 + cmu)) generations between decompositions. With twice
        # that, C changes by no more than 1 / (5 P) in between, and a generation with 867 parameters costs half.
        es.sm.lazy_update_gap = 1 / (es.sp.c1 + es.sp.cmu) / self.num_parameters / 5
        return es

    def _set_covariance(self, es: cma.CMAEvolutionStrategy, covariance: np.ndarray) -> None:
        size = self.num_parameters
        variances = np.diag(covariance) if covariance.ndim == 2 else covariance
        shaped = covariance.shape in ((size,), (size, size))
        if not shaped or not np.isfinite(covariance).all() or not (variances > 0).all():
            raise DataError(
                f"A covariance is finite, positive, [{size}] or [{size}, {size}]; this is {covariance.shape}."
            )
        if self.config.kind == "separable":
            es.sigma_vec.scaling, es.sigma_vec.is_identity = np.sqrt(variances), False
            return
        es.sm.C = np.diag(covariance) if covariance.ndim == 1 else covariance
        es.sm.update_now(-1)
        es._updateBDfromSM(es.sm)

    def _normal(self, *shape: int) -> np.ndarray:
        """Standard normal numbers; rows come in pairs z, -z when mirrored."""
        if not self.config.mirrored or shape[0] < 2:
            return self._generator.standard_normal(shape)
        half = self._generator.standard_normal(((shape[0] + 1) // 2, *shape[1:]))
        return np.stack([half, -half], axis=1).reshape(-1, *shape[1:])[: shape[0]]


class CovarianceSampler(GaussFullSampler):
    """cma's sampler of N(0, C), with one product in place of a loop over candidates.

    The decomposition runs on one thread whatever torch is set to, and B lies row by row in memory: with either
    different, the same C gives other last bits, and a continued run would part from one that was never stopped.
    """

    B: np.ndarray

    def __init__(self, dimension: np.ndarray, randn: Any) -> None:
        super().__init__(dimension, randn=randn, eigenmethod=eigh_on_one_thread)

    def update(self, vectors: np.ndarray, weights: np.ndarray, c1_times_delta_hsigma: float = 0) -> None:
        """C <- (1 - sum w) C + sum w v v^T; v of a negative weight gets length sqrt(P) (tutorial, eq. 46, 47)."""
        vectors, weights = np.asarray(vectors), np.array(weights)
        self.C *= 1 + c1_times_delta_hsigma - weights.sum()
        negative = weights < 0
        lengths = np.linalg.norm(vectors[negative] @ self.B / self.D, axis=1)
        weights[negative] *= self.dimension / (lengths + 1e-9) ** 2
        self.C += (weights[:, None] * vectors).T @ vectors
        self.count_tell += 1

    def _sortBD(self) -> None:
        super()._sortBD()
        self.B = np.ascontiguousarray(self.B)


def _array(value: np.ndarray | torch.Tensor) -> np.ndarray:
    """A copy as float64, row by row in memory."""
    return np.array(value.numpy() if isinstance(value, torch.Tensor) else value, dtype=np.float64, order="C")


def eigh_on_one_thread(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [P] and eigenvectors in columns [P, P] of a symmetric matrix."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(torch.tensor(matrix))
    finally:
        torch.set_num_threads(threads)
    return values.numpy(), vectors.numpy()
