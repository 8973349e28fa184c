"""M, the memory of the world model: an LSTM with mixture-density outputs (Ha & Schmidhuber 2018, sections 2.3 and A.2).

At time t it reads [z_t, a_t, r_(t-1)] and turns its state (h_t, c_t) into (h_(t+1), c_(t+1)), from which it predicts
z_(t+1), as one Gaussian mixture per latent dimension; the expected reward r_t; and whether the episode terminates at t.
The controller at time t sees [z_t, h_t], where h_t comes from inputs up to t - 1.

Legend: B sequences, T steps, Z latent dimensions, A action dimensions, H hidden units, K mixtures.

On the CPU the recurrence is one autograd function: the products of a whole sequence that do not depend on the state are
one matrix product each, in bf16 under autocast, and the rest is fused (`kernels`). Elsewhere it is torch's own LSTM.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneira.platform.errors import ConfigError

from . import kernels

State = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Shape and loss of M. Ensembles are several MDNRNNs of one config, trained from different seeds.

    Args:
        action: numbers of an action that M reads. discrete: actions are whole numbers below `action`, and M reads them as one-hot
            vectors, which say nothing of an order or a distance between them (`read_actions`).
        reward_input: whether M reads the previous reward; without it the input is the paper's [z, a].
        reward_scale: the rewards of the world are divided by this before M sees or predicts them.
        done_weight: weight of the termination loss.
        done_positive_weight: of terminating steps within it, as in the paper's Doom code. A weight w makes M believe in odds w
            times the true ones; predictions and dreams take that back, so that their probabilities are those of the data.
        dropout: chance of zeroing an output feature of the LSTM while training.
    """

    z: int = 32
    action: int = 3
    discrete: bool = False
    hidden: int = 256
    mixtures: int = 5
    reward_input: bool = True
    reward_scale: float = 1.0
    reward_weight: float = 1.0
    done_weight: float = 1.0
    done_positive_weight: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("z", "action", "hidden", "mixtures"):
            if getattr(self, name) < 1:
                raise ConfigError(f"memory: {name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("reward_scale", "done_positive_weight"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"memory: {name} is {getattr(self, name)}; it must be above 0.")
        for name in ("reward_weight", "done_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"memory: {name} is {getattr(self, name)}; it must be at least 0.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"memory: dropout is {self.dropout}; it must be in [0, 1).")

    @property
    def done_bias(self) -> float:
        """What the weight of terminating steps adds to the logit of termination."""
        return math.log(self.done_positive_weight)

    @property
    def inputs(self) -> int:
        return self.z + self.action + int(self.reward_input)


def read_actions(actions: np.ndarray | Tensor, config: MemoryConfig) -> Tensor:
    """Actions as M reads them, float32 [..., A].

    Args:
        actions: [..., A]; discrete ones int64 [...], or as a rollout store keeps them, float32 [..., 1].
    """
    given = torch.as_tensor(actions)
    if not config.discrete:
        return given.float()
    whole = given[..., 0].long() if given.is_floating_point() else given
    return F.one_hot(whole, config.action).float()


class Prediction(NamedTuple):
    """What M expects next; leading dimensions [B, T]. Reward is in the world's units."""

    log_weights: Tensor  # [B, T, K, Z], normalised over K
    means: Tensor  # [B, T, K, Z]
    log_sigmas: Tensor  # [B, T, K, Z]
    reward: Tensor  # [B, T]
    done_logit: Tensor  # [B, T]


class MDNRNN(nn.Module):
    """One memory. Its parameters are fp32; under `torch.autocast` the products run in the autocast precision."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.lstm = nn.LSTM(config.inputs, config.hidden, batch_first=True)
        self.mixture = nn.Linear(config.hidden, 3 * config.mixtures * config.z)
        self.outcome = nn.Linear(config.hidden, 2)
        # Chrono-style bias: a forget gate that starts open remembers over tens of steps from the first update on.
        with torch.no_grad():
            self.lstm.get_parameter("bias_ih_l0")[config.hidden : 2 * config.hidden].fill_(1.0)

    def initial_state(self, batch: int) -> State:
        zeros = torch.zeros(batch, self.config.hidden, device=self.mixture.weight.device)
        return zeros, zeros.clone()

    def forward(
        self, z: Tensor, action: Tensor, reward_prev: Tensor, state: State | None = None
    ) -> tuple[Prediction, State]:
        """Predict along real inputs.

        Args:
            z: [B, T, Z]. action: [B, T, A], or as `read_actions` takes them. reward_prev: [B, T], the reward that came before each step.
            state: of step 0; zeros if None.

        Returns:
            What is expected after each input, and the state after the last.
        """
        hidden, cell = self._recur(self._inputs(z, action, reward_prev), state)
        return self._predict(hidden[:, 1:]), (hidden[:, -1], cell[:, -1])

    @torch.no_grad()
    def observe(self, z: Tensor, action: Tensor, reward: Tensor, state: State | None = None) -> State:
        """States along real sequences that start episodes (or go on from `state`, whose previous reward counts as 0).

        Args:
            z: [B, T, Z]. action: see `forward`. reward: [B, T], the reward r_t each action brought.

        Returns:
            h and c, both float32 [B, T + 1, H]: index t is the state at time t, made of inputs up to t - 1.
        """
        return self._recur(self._inputs(z, action, _shift(reward)), state)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> tuple[Tensor, dict]:
        """Negative log-likelihood per latent dimension, plus weighted reward and termination terms.

        Args:
            batch: mu, logvar [B, T+1, Z]: the encoder's posterior, sampled anew at every call (section A.2);
                action [B, T, A], or as `read_actions` takes them; reward, done, valid [B, T].
                Steps with valid 0 count nothing; they must follow the valid ones.

        Returns:
            The scalar, and its terms: nll (nats per latent dimension), reward_mse (in units of reward_scale), done_bce.
        """
        config = self.config
        device = self.mixture.weight.device
        batch = {**batch, "action": read_actions(batch["action"], config)}
        batch = {name: torch.as_tensor(value).to(device).float().transpose(0, 1) for name, value in batch.items()}
        mu, reward, valid = batch["mu"], batch["reward"] / config.reward_scale, batch["valid"]
        noise = torch.randn(mu.shape, generator=generator, device=device)
        z = mu + torch.exp(0.5 * batch["logvar"]) * noise
        before = torch.cat([torch.zeros_like(reward[:1]), reward[:-1]])
        inputs = torch.cat([z[:-1], batch["action"], *([before.unsqueeze(-1)] if config.reward_input else [])], -1)
        hidden = self._hidden_for_training(inputs)  # time-major, as everything here
        if self.training and config.dropout:
            keep = torch.rand(hidden.shape, generator=generator, device=device) >= config.dropout
            hidden = hidden * keep / (1 - config.dropout)

        weight = valid / valid.sum().clamp(min=1)
        raw = self.mixture(hidden).flatten(0, 1)
        nll = mixture_nll(raw, z[1:].flatten(0, 1), weight.flatten(), config.mixtures) / config.z
        expected, done_logit = self._outcome(hidden).unbind(-1)
        reward_mse = (weight * (expected - reward) ** 2).sum()
        positive = torch.tensor(config.done_positive_weight, device=device)
        done = F.binary_cross_entropy_with_logits(
            done_logit, batch["done"], weight, reduction="sum", pos_weight=positive
        )
        total = nll + config.reward_weight * reward_mse + config.done_weight * done
        return total, {"nll": nll.detach(), "reward_mse": reward_mse.detach(), "done_bce": done.detach()}

    def _inputs(self, z: Tensor, action: Tensor, reward_prev: Tensor) -> Tensor:
        parts = [z, read_actions(action, self.config)]
        if self.config.reward_input:
            parts.append((reward_prev / self.config.reward_scale).unsqueeze(-1))
        return torch.cat([part.float() for part in parts], -1)

    def _outcome(self, hidden: Tensor) -> Tensor:
        # Two columns cost nothing in fp32, and rewards are summed over a thousand steps: no rounding to 8 bits here.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.outcome(hidden.float())

    def _predict(self, hidden: Tensor) -> Prediction:
        shape = (*hidden.shape[:-1], 3, self.config.mixtures, self.config.z)
        logits, means, log_sigmas = self.mixture(hidden).float().view(shape).unbind(-3)
        reward, done_logit = self._outcome(hidden).unbind(-1)
        log_sigmas = log_sigmas.clamp(min=kernels.LOG_SIGMA_MIN)
        return Prediction(
            F.log_softmax(logits, -2),
            means,
            log_sigmas,
            reward * self.config.reward_scale,
            done_logit - self.config.done_bias,
        )

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        weight_in, weight_rec, bias_in, bias_rec = self._cell()
        return weight_in, weight_rec, bias_in + bias_rec

    def _cell(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        get = self.lstm.get_parameter
        return get("weight_ih_l0"), get("weight_hh_l0"), get("bias_ih_l0"), get("bias_hh_l0")

    def _hidden_for_training(self, inputs: Tensor) -> Tensor:
        """[T, B, inputs] -> hidden states after each step, [T, B, H]."""
        state = self.initial_state(inputs.shape[1])
        if inputs.device.type == "cpu":
            return _FusedLSTM.apply(inputs, *state, *self._weights())[0][1:]
        return self.lstm(inputs.transpose(0, 1))[0].transpose(0, 1)

    def _recur(self, inputs: Tensor, state: State | None) -> State:
        """[B, T, inputs] -> all states h, c [B, T + 1, H], the given one first."""
        h, c = self.initial_state(inputs.shape[0]) if state is None else state
        if inputs.device.type == "cpu":
            hidden, cell = _FusedLSTM.apply(inputs.transpose(0, 1), h, c, *self._weights())
            return hidden.transpose(0, 1), cell.transpose(0, 1)
        states = [(h, c)]
        for x in inputs.unbind(1):
            states.append(torch.lstm_cell(x, states[-1], *self._cell()))
        return torch.stack([s[0] for s in states], 1), torch.stack([s[1] for s in states], 1)


def _shift(reward: Tensor) -> Tensor:
    """r_t -> r_(t-1), 0 before the first."""
    return torch.cat([torch.zeros_like(reward[:, :1]), reward[:, :-1]], 1)


class _FusedLSTM(torch.autograd.Function):
    """torch's LSTM on the CPU, time-major, returning every cell state too.

    Gradients reach the weights only: inputs and initial state are data, cell states are for reading.
    """

    @staticmethod
    def forward(ctx, inputs, h, c, weight_in, weight_rec, bias):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        steps, batch, _ = inputs.shape
        size = h.shape[1]
        low = inputs.to(dtype).reshape(steps * batch, -1)
        pre = torch.addmm(bias.to(dtype), low, weight_in.to(dtype).t()).view(steps, batch, 4 * size)
        recurrent = weight_rec.to(dtype).t()
        activation = torch.empty(steps, batch, 4 * size)
        hidden, cell = torch.empty(steps + 1, batch, size), torch.empty(steps + 1, batch, size)
        hidden[0], cell[0] = h, c
        hidden_low = torch.empty(steps + 1, batch, size, dtype=dtype)
        hidden_low[0] = h
        arrays = [kernels.bits(x) for x in (activation, cell, hidden, hidden_low)]
        pre_bits = kernels.bits(pre)
        for t in range(steps):
            pre[t].addmm_(hidden_low[t], recurrent)
            kernels.lstm_train_forward(pre_bits[t], t, *arrays)
        ctx.save_for_backward(low, weight_rec, activation, cell, hidden_low)
        ctx.mark_non_differentiable(cell)
        return hidden, cell

    @staticmethod
    def backward(ctx, grad_hidden, _):
        low, weight_rec, activation, cell, hidden_low = ctx.saved_tensors
        dtype, (steps, batch, width) = low.dtype, activation.shape
        size = width // 4
        recurrent = weight_rec.to(dtype)
        grad_pre = torch.empty(steps, batch, width, dtype=dtype)
        later, grad_cell = torch.zeros(batch, size, dtype=dtype), torch.zeros(batch, size)
        above = kernels.bits(grad_hidden[1:].contiguous().float())
        act, cells, out = kernels.bits(activation), kernels.bits(cell), kernels.bits(grad_pre)
        later_bits, grad_cell_bits = kernels.bits(later), kernels.bits(grad_cell)
        for t in reversed(range(steps)):
            kernels.lstm_train_backward(above, later_bits, t, act, cells, grad_cell_bits, out)
            if t:
                torch.mm(grad_pre[t], recurrent, out=later)
        flat = grad_pre.view(steps * batch, width)
        grad_in = flat.t().mm(low).float()
        grad_rec = flat.t().mm(hidden_low[:-1].view(steps * batch, size)).float()
        return None, None, None, grad_in, grad_rec, flat.sum(0, dtype=torch.float32)


class _FusedMixtureNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, target, weight, mixtures):
        grad = torch.empty_like(raw)
        arrays = (kernels.bits(raw), target.contiguous().numpy(), weight.contiguous().numpy())
        loss = kernels.mixture_nll(*arrays, mixtures, kernels.bits(grad))
        ctx.save_for_backward(grad)
        return torch.tensor(loss, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_loss):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None


def mixture_nll(raw: Tensor, target: Tensor, weight: Tensor, mixtures: int) -> Tensor:
    """sum_n weight_n sum_z -log sum_k w_k N(target_nz; mean_k, sigma_k), section A.2; differentiable in raw.

    Args:
        raw: [N, 3*K*Z]: logits, means, log-sigmas, each [K, Z]. target: [N, Z]. weight: [N].
    """
    if raw.device.type == "cpu":
        return _FusedMixtureNLL.apply(raw.contiguous(), target, weight, mixtures)
    logits, means, log_sigmas = raw.float().view(len(raw), 3, mixtures, -1).unbind(1)
    log_sigmas = log_sigmas.clamp(min=kernels.LOG_SIGMA_MIN)
    error = (target.unsqueeze(1) - means) * torch.exp(-log_sigmas)
    log_density = F.log_softmax(logits, 1) - log_sigmas - 0.5 * error**2
    per_row = 0.5 * math.log(2 * math.pi) * target.shape[1] - torch.logsumexp(log_density, 1).sum(1)
    return (weight * per_row).sum()


def pack_state_dict(member: "MDNRNN | Mapping[str, Tensor | np.ndarray]") -> dict[str, Tensor]:
    """A member's parameters as detached float32 CPU tensors, whichever way it was given."""
    tensors = member.state_dict() if isinstance(member, MDNRNN) else member
    return {name: torch.as_tensor(value).detach().to("cpu", torch.float32) for name, value in tensors.items()}
