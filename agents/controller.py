"""C, the controller: a linear map (or one hidden layer) from what the agent knows to what it does.

    features = [z, h]          a = squash(W features + b)          "World Models", section 2.3, equation (1)

A controller is only a way of reading a flat vector of parameters, so that evolution can breed thousands of them:
`Controller.act` runs K of them at once, each on its own R rows of features, as one batched matrix product.

Shapes: K controllers, R rows (episodes) for each, F features, A actions, P parameters, O outputs of the last layer.
A flat vector is laid out as [weight (O x F, row by row), bias (O, where there is one)], layer after layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from oneira.platform.errors import ConfigError, DataError, did_you_mean

OUTPUTS = {"carracing": 3, "threshold": 1}
"""Outputs of the last layer by action space; "softmax" has one for each choice."""
LEFT_NOTHING_RIGHT = (2, 0, 1)  # as ViZDoom numbers them


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """What a controller sees and what it moves.

    Args:
        features: "zh" is the latent frame and the memory's hidden state, "z" the latent frame alone, "zch" has the memory's cell
            state between the two.
        hidden: Width of one tanh layer in between; 0 is the paper's linear controller.
        z, memory: Sizes of z and h.
        bias: whether outputs have one. The paper's Doom agent has none: z 64, c and h of 512, one output, 1,088 parameters.
        action_space: "carracing" gives steering in [-1, 1], gas in [0, 1], brake in [0, 1]; "threshold" reads one
            output in (-1, 1), split at -1/3 and 1/3, as left, nothing, right (the paper's Doom agent), numbered 2, 0, 1 as
            ViZDoom does; "softmax" has one logit for each action.
        choices: Number of actions of "softmax".
    """

    features: Literal["z", "zh", "zch"] = "zh"
    hidden: int = 0
    bias: bool = True
    z: int = 32
    memory: int = 256
    action_space: Literal["carracing", "threshold", "softmax"] = "carracing"
    choices: int = 3

    def __post_init__(self) -> None:
        for name, allowed in (
            ("features", ("z", "zh", "zch")),
            ("action_space", ("carracing", "threshold", "softmax")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"The controller's {name} is {value!r}. {did_you_mean(str(value), allowed)}")
        for name, least in (("hidden", 0), ("z", 1), ("memory", 0), ("choices", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"The controller's {name} is {getattr(self, name)}; it must be at least {least}.")

    @property
    def num_features(self) -> int:
        """F: z; z and h; or z, c and h."""
        return self.z + (len(self.features) - 1) * self.memory

    @property
    def num_outputs(self) -> int:
        """O: outputs of the last layer."""
        return OUTPUTS.get(self.action_space, self.choices)

    @property
    def discrete(self) -> bool:
        """Whether actions are whole numbers (int64) rather than vectors (float32)."""
        return self.action_space != "carracing"


def layer_shapes(config: ControllerConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of every layer, the bias not counted."""
    widths = [config.num_features, *([config.hidden] if config.hidden else []), config.num_outputs]
    return list(zip(widths[1:], widths[:-1], strict=True))


def num_parameters(config: ControllerConfig) -> int:
    """P: length of the flat vector; 867 for the paper's CarRacing agent (z 32, h 256, 3 actions)."""
    return sum(outputs * (inputs + config.bias) for outputs, inputs in layer_shapes(config))


class Controller:
    """Reads flat float32 vectors as policies. It holds no parameters of its own."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self.num_parameters = num_parameters(config)

    def outputs(self, params_KP: Tensor, features_KRF: Tensor) -> Tensor:
        """The last layer before squashing.

        Args:
            params_KP: float32 [K, P].
            features_KRF: float32 [K, R, F], or [1, R, F] when all controllers look at the same rows.

        Returns:
            float32 [K, R, O].

        Raises:
            DataError: The shapes do not fit this controller.
        """
        size, width = self.num_parameters, self.config.num_features
        if params_KP.ndim != 2 or params_KP.shape[1] != size:
            raise DataError(f"Parameters are {tuple(params_KP.shape)}; this controller takes [K, {size}].")
        if features_KRF.ndim != 3 or features_KRF.shape[2] != width:
            raise DataError(f"Features are {tuple(features_KRF.shape)}; this controller takes [K, R, {width}].")
        x_KRF = features_KRF.expand(params_KP.shape[0], -1, -1)
        start = 0
        for index, (outputs, inputs) in enumerate(layer_shapes(self.config)):
            if index:
                x_KRF = torch.tanh(x_KRF)
            weight = params_KP[:, start : start + outputs * inputs].unflatten(1, (outputs, inputs))
            start += outputs * inputs
            if self.config.bias:
                bias = params_KP[:, start : start + outputs]
                x_KRF = torch.baddbmm(bias[:, None, :], x_KRF, weight.transpose(1, 2))
                start += outputs
            else:
                x_KRF = torch.bmm(x_KRF, weight.transpose(1, 2))
        return x_KRF

    def act(self, params_KP: Tensor, features_KRF: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions of K controllers on R rows each; arguments as in `outputs`.

        Args:
            generator: For "softmax" only: actions are drawn from the distribution. Without it the likeliest is taken.

        Returns:
            float32 [K, R, A] in the environment's range, or int64 [K, R] for discrete actions.
        """
        return squash(self.outputs(params_KP, features_KRF), self.config.action_space, generator)

    def act_numpy(self, params: np.ndarray, features: np.ndarray) -> np.ndarray:
        """One controller on R rows, for notebooks: params [P], features [R, F] -> float32 [R, A] or int64 [R]."""
        params_1P = torch.tensor(np.asarray(params, dtype=np.float32))[None]  # a copy: shared arrays are read-only
        features_1RF = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))[None]
        return self.act(params_1P, features_1RF)[0].numpy()


def squash(outputs: Tensor, action_space: str, generator: torch.Generator | None = None) -> Tensor:
    """From the last layer [..., O] to actions: float32 [..., A] or int64 [...]."""
    if action_space == "softmax":
        if generator is None:
            return outputs.argmax(-1)
        # Gumbel's trick: the argmax of logits plus -log(-log(u)) is a draw from the softmax.
        uniform = torch.rand(outputs.shape, generator=generator).clamp_(1e-20, 1 - 1e-7)
        return (outputs - (-uniform.log()).log()).argmax(-1)
    squashed = torch.tanh(outputs)
    if action_space == "threshold":
        value = squashed[..., 0]
        return torch.tensor(LEFT_NOTHING_RIGHT)[(value > -1 / 3).long() + (value > 1 / 3).long()]
    steer, gas, brake = squashed.unbind(-1)
    return torch.stack([steer, (gas + 1) / 2, brake.clamp(0, 1)], -1)


def initial_parameters(config: ControllerConfig) -> np.ndarray:
    """Where evolution starts, float32 [P]: zeros, and for a hidden layer small seeded weights.

    With a hidden layer all zeros is a saddle: no single weight changes what the controller does. So the weights of that
    layer are N(0, 1/inputs), the same in every run.
    """
    params = np.zeros(num_parameters(config), dtype=np.float32)
    if config.hidden:
        outputs, inputs = layer_shapes(config)[0]
        noise = np.random.default_rng(0).standard_normal(outputs * inputs)
        params[: outputs * inputs] = noise / math.sqrt(inputs)
    return params
