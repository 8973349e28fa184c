"""Controllers: the formula by hand, the batch as a loop, ranges of actions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oneira.agents.controller import Controller, ControllerConfig, initial_parameters, layer_shapes, num_parameters
from oneira.platform.errors import ConfigError, DataError

CONFIGS = [
    ControllerConfig(),
    ControllerConfig(features="z"),
    ControllerConfig(hidden=16),
    ControllerConfig(z=8, memory=12, action_space="threshold"),
    ControllerConfig(z=8, memory=12, features="zch", bias=False, hidden=5, action_space="threshold"),
    ControllerConfig(z=8, memory=12, action_space="softmax", choices=4),
    ControllerConfig(features="z", hidden=5, action_space="softmax"),
]


def draw(config: ControllerConfig, k: int = 5, r: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = torch.randn(k, num_parameters(config), generator=generator)
    return params, torch.randn(k, r, config.num_features, generator=generator)


def by_hand(config: ControllerConfig, params: np.ndarray, features: np.ndarray) -> np.ndarray:
    """One controller, one row, in float64."""
    x, start = features.astype(np.float64), 0
    for index, (rows, columns) in enumerate(layer_shapes(config)):
        x = np.tanh(x) if index else x
        weight = params[start : start + rows * columns].reshape(rows, columns).astype(np.float64)
        start += rows * columns
        x = weight @ x
        if config.bias:
            x, start = x + params[start : start + rows], start + rows
    assert start == params.size, "every parameter has its place"
    if config.action_space == "softmax":
        return np.argmax(x)
    x = np.tanh(x)
    if config.action_space == "threshold":
        return [2, 0, 1][np.digitize(x[0], [-1 / 3, 1 / 3])]
    return np.array([x[0], (x[1] + 1) / 2, max(x[2], 0)])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_batch_of_controllers_is_each_one_by_hand(config):
    params, features = draw(config)
    actions = Controller(config).act(params, features)
    assert actions.dtype == (torch.int64 if config.discrete else torch.float32)
    assert actions.shape == ((5, 7) if config.discrete else (5, 7, 3))
    for k in range(5):
        for r in range(7):
            expected = by_hand(config, params[k].numpy(), features[k, r].numpy())
            np.testing.assert_allclose(actions[k, r].numpy(), expected, atol=2e-5)
        one = Controller(config).act_numpy(params[k].numpy(), features[k].numpy())
        np.testing.assert_allclose(one, actions[k].numpy(), atol=2e-5)


def test_sizes_are_the_papers():
    assert num_parameters(ControllerConfig()) == 867
    doom = ControllerConfig(features="zch", z=64, memory=512, action_space="threshold", bias=False)
    assert num_parameters(doom) == 1088
    assert num_parameters(ControllerConfig(features="z")) == 99
    assert num_parameters(ControllerConfig(hidden=10)) == 10 * 289 + 3 * 11


def test_carracing_actions_stay_in_their_ranges_and_zeros_coast():
    controller = Controller(ControllerConfig())
    params, features = draw(controller.config, 20, 20)
    actions = controller.act(params * 10, features)
    low, high = actions.amin((0, 1)), actions.amax((0, 1))
    assert torch.equal(low, torch.tensor([-1.0, 0, 0])) and torch.equal(high, torch.ones(3))
    np.testing.assert_array_equal(controller.act(params * 0, features)[0, 0].numpy(), [0, 0.5, 0])


def test_thresholds_are_at_a_third():
    controller = Controller(ControllerConfig(features="z", z=1, action_space="threshold"))
    params = torch.tensor([[1.0, 0.0]])
    values = torch.atanh(torch.tensor([-0.9, -0.34, -0.32, 0.0, 0.32, 0.34, 0.9]))
    assert controller.act(params, values[None, :, None])[0].tolist() == [2, 2, 0, 0, 0, 1, 1]  # left, nothing, right


def test_softmax_draws_follow_the_distribution_and_the_seed():
    controller = Controller(ControllerConfig(features="z", z=1, action_space="softmax", choices=3))
    probability = np.array([0.2, 0.5, 0.3])
    params = torch.tensor([[0.0, 0, 0, *np.log(probability)]], dtype=torch.float32)
    features = torch.zeros(1, 20000, 1)
    first, again = (controller.act(params, features, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    np.testing.assert_allclose(np.bincount(first[0].numpy()) / 20000, probability, atol=0.015)
    assert (controller.act(params, features) == 1).all()


def test_features_can_be_shared_by_all_controllers():
    controller = Controller(ControllerConfig(z=4, memory=3))
    params, features = draw(controller.config)
    shared = features[:1]
    torch.testing.assert_close(controller.act(params, shared), controller.act(params, shared.repeat(5, 1, 1)))


def test_evolution_starts_where_every_output_can_move():
    for config in CONFIGS:
        start = torch.from_numpy(initial_parameters(config))[None].requires_grad_()
        _, features = draw(config, 1)
        Controller(config).outputs(start, features).pow(2).add(1).log().sum().backward()
        assert initial_parameters(config).dtype == np.float32
        first = Controller(config).outputs(start.detach(), features)
        moved = Controller(config).outputs(start.detach() + 0.1 * draw(config, 1)[0], features)
        assert (first == 0).all() and (moved != 0).all()


def test_wrong_shapes_and_names_are_told():
    controller = Controller(ControllerConfig())
    params, features = draw(controller.config)
    with pytest.raises(DataError, match="867"):
        controller.act(params[:, 1:], features)
    with pytest.raises(DataError, match="288"):
        controller.act(params, features[..., 1:])
    with pytest.raises(ConfigError, match="softmax"):
        ControllerConfig(action_space="soft")
    with pytest.raises(ConfigError, match="-1"):
        ControllerConfig(hidden=-1)
