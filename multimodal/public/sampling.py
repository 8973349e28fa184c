"""scheduler_config.json of diffusers' as our own samplers, which work row by row.

DDIM, DDPM (unCLIP's as well) and DPM-Solver++ (2M) are what they are there. Other solvers of the same equation (PNDM, Euler, Heun, LMS, UniPC,
DEIS) are replaced by DPM-Solver++ on the same schedule, which needs fewer steps than any of them; `note` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oneira.generative.diffusion import Dynamic, Prediction, Row, Sampler, Schedule, Spacing
from oneira.platform.errors import ConfigError, DataError, did_you_mean

from .folders import PublicFolder

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
NEVER = ("trained_betas", "rescale_betas_zero_snr", "use_karras_sigmas", "use_exponential_sigmas",
         "use_beta_sigmas", "use_flow_sigmas")  # fmt: skip  # settings that change the sampling in ways that are not ours
LEARNED = "learned_range"
STEPS = {"dpm++": 25, "ddim": 50, "ddpm": 100}  # where a family has no number of its own
OWN: dict[str, Sampler] = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "UnCLIPScheduler": "ddpm"}
ONLY: dict[str, dict[str, tuple[Any, ...]]] = {  # settings of the classes that are not replaced, which may be nothing else
    "DDPMScheduler": {"variance_type": ("fixed_small", "fixed_small_log", LEARNED)},
    "UnCLIPScheduler": {"variance_type": ("fixed_small_log", LEARNED)},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++",), "solver_order": (2,), "solver_type": ("midpoint",),
        "final_sigmas_type": ("zero",),
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the rows of a public model go.

    Args:
        clip: of the estimates of x_0; 0 is none. learned: whether the network tells the variance.
        note: what is done otherwise than the folder says; "" where nothing is.
    """

    schedule: Schedule
    prediction: Prediction
    sampler: Sampler
    spacing: Spacing
    clip: float | Dynamic
    learned: bool = False
    note: str = ""

    def begin(self, shape: tuple[int, ...], seed: int, steps: int, guidance: float) -> Row:
        """A row at its first step."""
        return Row.begin(
            self.schedule, shape, seed=seed, steps=steps, guidance=guidance, sampler=self.sampler, spacing=self.spacing
        )


def read_sampling(folder: PublicFolder, part: str = "scheduler") -> Sampling:
    """What a part of a folder says. Raises DataError: it asks for something that is not known here."""
    name, config, place = folder.classes[part], folder.config(part), folder.path / part
    for key in NEVER:
        if config.get(key):
            raise DataError(f"'{place}': {key} is set, which is not known here.")
    for key, allowed in ONLY.get(name, {}).items():
        if config.get(key, allowed[0]) not in allowed:
            raise DataError(f"'{place}': {key} is '{config[key]}'. Allowed: {', '.join(map(str, allowed))}.")
    sampler, karlo = OWN.get(name, "dpm++"), name == "UnCLIPScheduler"
    replaced = sampler == "dpm++" and name != "DPMSolverMultistepScheduler"
    try:
        return Sampling(
            schedule=Schedule(
                kind=_one_of(SCHEDULES, config, "beta_schedule", "squaredcos_cap_v2" if karlo else "linear"),
                timesteps=int(config.get("num_train_timesteps", 1000)),
                betas=(float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))),
                clean=sampler != "ddim" or bool(config.get("set_alpha_to_one", True)),
            ),
            prediction=_one_of(PREDICTIONS, config, "prediction_type", "epsilon"),
            sampler=sampler,
            spacing=Spacing("linspace") if karlo else _spacing(config, "linspace" if sampler == "dpm++" else "leading"),
            clip=_clip(config, sampler),
            learned=sampler == "ddpm" and config.get("variance_type") == LEARNED,
            note=f"{name} is replaced by DPM-Solver++ on the same schedule." if replaced else "",
        )
    except (ConfigError, ValueError, TypeError) as error:
        raise DataError(f"'{place}': {error}") from error


def _clip(config: Mapping[str, Any], sampler: Sampler) -> float | Dynamic:
    if config.get("thresholding"):
        return Dynamic(
            float(config.get("dynamic_thresholding_ratio", 0.995)), float(config.get("sample_max_value", 1.0))
        )  # fmt: skip
    if sampler == "dpm++" or not config.get("clip_sample", True):
        return 0.0
    return float(config.get("clip_sample_range", 1.0))


def _spacing(config: Mapping[str, Any], default: str) -> Spacing:
    kinds = {"trailing": "trailing", "leading": "leading", "linspace": "linspace"}
    return Spacing(_one_of(kinds, config, "timestep_spacing", default), int(config.get("steps_offset", 0)))


def _one_of(known: Mapping[str, Any], config: Mapping[str, Any], key: str, default: str) -> Any:
    name = str(config.get(key, default))
    if name not in known:
        raise ValueError(f"{key} is '{name}'. {did_you_mean(name, known)}")
    return known[name]
