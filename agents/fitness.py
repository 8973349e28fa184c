"""Units of work of evolution: a few controllers, a few episodes, one batched forward pass a step.

A unit is fixed by its contents (parameters, seeds, sizes), never by who runs it or with whom, so that a generation's fitness does not
depend on the number of workers or the order of their answers. `real_unit` drives the fast twin of the real world, `dream_unit` the
dream of V and M.

Shapes: K candidates, S episodes for each, n = K * S rows, P parameters, F features, A actions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from oneira.platform.devices import device_here

from .controller import Controller, squash
from .environments import make_world
from .worldmodel import Senses, dream_model, unpack

STUCK = 35  # steps without a new tile after which a training episode is cut (0: never)


class RowControllers:
    """K linear or one-hidden-layer controllers, each on its own rows, while rows end one by one."""

    def __init__(self, controller: Controller, params: np.ndarray, rows_each: int) -> None:
        self.controller = controller
        self.params = torch.from_numpy(np.ascontiguousarray(params, np.float32))
        self.rows_each = rows_each
        self._full = torch.zeros(len(params) * rows_each, controller.config.num_features)

    def act(self, features: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """features float32 [n, F] of these rows -> actions [n, A]; the product always has the full shape [K, S, F]."""
        self._full[torch.from_numpy(rows)] = torch.from_numpy(features)
        outputs = self.controller.outputs(self.params, self._full.view(len(self.params), self.rows_each, -1))
        return squash(
            outputs.reshape(len(self._full), -1)[torch.from_numpy(rows)], self.controller.config.action_space
        ).numpy()


@torch.inference_mode()
def real_unit(shared: dict[str, Any], unit: dict[str, Any]) -> dict[str, Any]:
    """Drive K candidates on S tracks each.

    Args:
        shared: a packed world model. unit: params float32 [K, P], seeds list of S, max_steps, stuck (see `STUCK`).

    Returns:
        returns float64 [K, S], env_steps int.
    """
    model = unpack(shared)
    params, seeds = np.asarray(unit["params"]), list(unit["seeds"])
    count = len(seeds)
    batch = make_world(model.world).batch(seeds, np.tile(np.arange(count), len(params)))
    policy = RowControllers(Controller(model.controller), params, count)
    senses = Senses(model, batch.num_envs)
    returns = np.zeros(batch.num_envs)
    rows, frames, steps = np.arange(batch.num_envs), batch.reset(), 0
    with device_here("cpu").lease(priority="train") as lease:
        for _ in range(unit["max_steps"]):
            lease.step()
            actions = policy.act(senses.see(frames), rows)
            frames, rewards, terminated, truncated = batch.step(actions, rows)
            senses.remember(actions, rewards)
            returns[rows] += rewards
            steps += len(rows)
            over = terminated | truncated
            if unit["stuck"]:
                over |= batch.steps_since_tile[rows] >= unit["stuck"]
            if over.any():
                rows, frames = rows[~over], frames[~over]
                senses.keep(~over)
                if not len(rows):
                    break
    return {"returns": returns.reshape(len(params), count), "env_steps": steps}


@torch.inference_mode()
def dream_unit(shared: dict[str, Any], unit: dict[str, Any]) -> dict[str, Any]:
    """Dream K candidates, S rollouts each, from starts and with noise that all candidates share.

    Args:
        shared: a packed world model with "starts": z, h, c, reward_prev of moments in the data.
        unit: params float32 [K, P], seed, rollouts S, horizon, tau, stuck (see `DreamModel.rollout`), lost_cost (see `PopulationConfig`).

    Returns:
        returns float64 [K, S], env_steps int.
    """
    model = unpack(shared)
    params = torch.from_numpy(np.ascontiguousarray(unit["params"], np.float32))
    count = unit["rollouts"]
    pool = shared["starts"]
    picked = np.random.default_rng(unit["seed"]).integers(0, len(pool["z"]), count)
    starts = {name: np.asarray(value)[picked] for name, value in pool.items()}
    controller = Controller(model.controller)

    with device_here("cpu").lease(priority="dream") as lease:

        def policy(features_KRF: torch.Tensor) -> torch.Tensor:
            lease.step()  # it is called once a step
            return controller.act(params, features_KRF)

        dreams = dream_model(model).rollout(
            starts, policy, unit["horizon"], unit["tau"], unit["seed"], candidates=len(params),
            stuck=unit["stuck"], with_cell=model.controller.features == "zch",
        )  # fmt: skip
    returns = dreams.lengths if make_world(model.world).survival else dreams.returns
    returns = returns - unit["lost_cost"] * dreams.lost
    return {"returns": returns.astype(np.float64), "env_steps": int(dreams.lengths.sum())}
