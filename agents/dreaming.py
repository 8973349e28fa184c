"""DreamModel: M packed for sampling, fast on one CPU thread (Ha & Schmidhuber 2018, sections 4.2 and A.2).

Weights are packed once: one product [z, h, a, r] -> gates, one h -> mixtures, both in bf16; biases, cell states,
features, rewards and termination stay float32. A rollout runs in place in one workspace and costs little more than its
two products.

All chance comes from counters: what happens to a row is fixed by its key and its step, so a rollout is fixed by its
seed. In `rollout`, r has the same start, the same noise and the same ensemble member for every candidate (common random
numbers: candidates are compared under the same luck), whatever the number of candidates that share the call.

Legend: B rows, K candidates, R rollouts per candidate, Z latent, A action dimensions, H hidden units, F = Z + H.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oneira.platform.errors import DataError, UsageError, did_you_mean

from . import kernels
from .memory import MDNRNN, MemoryConfig, pack_state_dict, read_actions

Array = np.ndarray
Policy = Callable[[Tensor], "Tensor | Array"]
TERMINATION = ("sampled", "threshold", "never")
PROGRESS = 1.0  # reward by which a dream's return must rise for its row to count as getting on (`rollout`'s `stuck`)


class Noise(NamedTuple):
    """One step's chance for R rows; B rows may share it in equal consecutive groups of B // R."""

    uniform: Array  # [R, Z] picks the mixture components
    normal: Array  # [R, Z]
    done: Array  # [R] in [0, 1): a row ends where it is below the done probability

    @classmethod
    def empty(cls, rows: int, z: int) -> "Noise":
        return cls(np.empty((rows, z), np.float32), np.empty((rows, z), np.float32), np.empty(rows, np.float32))

    @classmethod
    def draw(cls, keys: Array, steps: Array, z: int) -> "Noise":
        """Noise of rows with keys uint64 [R] (`kernels.row_keys`) at steps int64 [R]."""
        noise = cls.empty(len(keys), z)
        kernels.draw_noise(keys, steps, *noise)
        return noise


class Dreams(NamedTuple):
    """Outcome of a rollout: returns float32 [K, R], lengths int64 [K, R] in steps, and which were cut because they were stuck, bool [K, R]."""

    returns: Array
    lengths: Array
    lost: Array


class _Member:
    """One member's weights in the order and precision the products want."""

    def __init__(self, tensors: Mapping[str, Tensor], config: MemoryConfig) -> None:
        z, last = config.z, 3 * config.mixtures * config.z
        weight_in = tensors["lstm.weight_ih_l0"]
        # Columns [z | h | a, r]: z and h side by side are also the controller's features.
        gates = torch.cat([weight_in[:, :z], tensors["lstm.weight_hh_l0"], weight_in[:, z:]], 1)
        self.gates = gates.t().contiguous().bfloat16()
        self.gates_bias = (tensors["lstm.bias_ih_l0"] + tensors["lstm.bias_hh_l0"]).numpy()
        self.mixture = tensors["mixture.weight"].t().contiguous().bfloat16()
        self.mixture_bias = tensors["mixture.bias"].numpy()
        self.outcome = tensors["outcome.weight"].contiguous().numpy()
        self.outcome_bias = tensors["outcome.bias"].numpy() - np.array([0, config.done_bias], np.float32)
        if self.gates.shape != (config.inputs + config.hidden, 4 * config.hidden) or len(self.mixture_bias) != last:
            raise DataError(f"memory: the weights have shape {tuple(self.gates.shape)}, which is not that of {config}.")


class _Workspace:
    """Everything a rollout of `rows` rows touches, allocated once."""

    def __init__(self, config: MemoryConfig, rows: int) -> None:
        columns = config.z + config.hidden + config.action + int(config.reward_input)
        self.low = torch.zeros(rows, columns, dtype=torch.bfloat16)  # input of both products: [z | h | a | r]
        self.features = torch.zeros(rows, config.z + config.hidden)  # [z | h] in float32
        self.gates = torch.empty(rows, 4 * config.hidden, dtype=torch.bfloat16)
        self.mixture = torch.empty(rows, 3 * config.mixtures * config.z, dtype=torch.bfloat16)
        self.cell = np.zeros((rows, config.hidden), np.float32)
        self.reward, self.done = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        self.outer = torch.zeros(rows, columns - config.z - config.hidden)  # [a | r] in float32
        self.views = [kernels.bits(x) for x in (self.low, self.features, self.gates, self.mixture)]


class _WithCell:
    """[z | c | h] of a workspace's rows, for controllers that see the cell state too."""

    def __init__(self, work: _Workspace, size_z: int) -> None:
        self.zch = torch.empty(len(work.cell), size_z + 2 * work.cell.shape[1])
        self._work, self._z, self._h = work, size_z, size_z + work.cell.shape[1]

    def refresh(self) -> None:
        """Copy the rows as they are now."""
        self.zch[:, : self._z] = self._work.features[:, : self._z]
        self.zch[:, self._z : self._h] = torch.from_numpy(self._work.cell)
        self.zch[:, self._h :] = self._work.features[:, self._z :]


class DreamModel:
    """A sampler of imagined steps.

    Args:
        members: one MDNRNN or state dict, or several of one config (an ensemble).
        config: their config.
    """

    def __init__(self, members: Sequence[MDNRNN | Mapping[str, Tensor | Array]], config: MemoryConfig) -> None:
        if not members:
            raise DataError("a dream needs at least one memory; got an empty list.")
        self.config = config
        self._members = [_Member(pack_state_dict(member), config) for member in members]
        self._workspaces: dict[int, _Workspace] = {}

    @property
    def num_members(self) -> int:
        return len(self._members)

    def step(
        self,
        z: Array,
        action: Array,
        reward_prev: Array,
        h: Array,
        c: Array,
        tau: float,
        noise: Noise,
        *,
        member: int = 0,
    ) -> tuple[Array, Array, Array, Array, Array]:
        """One imagined step of B rows.

        Args:
            z [B, Z], action [B, A] (discrete: int64 [B]), reward_prev [B], h [B, H], c [B, H]: the rows now.
            tau: temperature; 0 gives the likeliest component's mean, 1 the model's own distribution.
            noise: of R rows, R dividing B. member: whose dream it is.

        Returns:
            z' [B, Z], reward [B] (the world's units), done probability [B], h' [B, H], c' [B, H]: float32,
            the caller's own.
        """
        size_z = self.config.z
        work = self._workspace(len(z))
        self._enter(work, z, h, c)
        self._advance(
            work, 0, len(z), read_actions(action, self.config), reward_prev, tau, noise, self._members[member]
        )
        features = work.features.numpy()
        return (
            features[:, :size_z].copy(),
            work.reward.copy(),
            work.done.copy(),
            features[:, size_z:].copy(),
            work.cell.copy(),
        )

    @torch.no_grad()
    def rollout(
        self,
        starts: Mapping[str, Array],
        policy: Policy,
        horizon: int,
        tau: float = 1.0,
        seed: int = 0,
        *,
        candidates: int = 1,
        termination: Literal["sampled", "threshold", "never"] = "sampled",
        stuck: int = 0,
        with_cell: bool = False,
    ) -> Dreams:
        """Dream R rollouts for each of K candidates and add up their rewards.

        Args:
            starts: z [R, Z], h [R, H], c [R, H] and reward_prev [R]; every candidate starts from each of them.
            policy: features float32 [K, R, F] -> actions [K, R, A] (discrete: int64 [K, R]); called once a step, with a
                view that the next step overwrites.
            with_cell: the policy sees [z, c, h] instead of [z, h].
            horizon: steps. tau: temperature. seed: of all chance.
            termination: a row ends with the done probability ("sampled"), when that is above 1/2 ("threshold"), or
                "never". The step that ends it still pays; later ones do not.
            stuck: a row also ends when its return has not risen by `PROGRESS` within that many steps (0: never). M has seen little of what
                comes after a crash, and what it then makes up must not pay.
        """
        if termination not in TERMINATION:
            raise UsageError(f"termination {termination!r} is unknown. {did_you_mean(termination, TERMINATION)}")
        rollouts, size_z = len(starts["z"]), self.config.z
        rows = (
            rollouts * candidates
        )  # row = r * K + k: rows of one r, hence of one member and one noise, are neighbours
        work = self._workspace(rows)
        self._enter(work, *(np.repeat(starts[name], candidates, 0) for name in ("z", "h", "c")))
        known = _WithCell(work, size_z) if with_cell else None
        features = (known.zch if known else work.features).view(rollouts, candidates, -1).transpose(0, 1)
        reward = np.repeat(np.asarray(starts["reward_prev"], np.float32), candidates)
        keys, noise = kernels.row_keys(seed, rollouts), Noise.empty(rollouts, size_z)
        shares = self._shares(rollouts)
        returns, lengths, alive = np.zeros(rows, np.float32), np.zeros(rows, np.int64), np.ones(rows, bool)
        mark, marked = (
            np.zeros(rows, np.float32),
            np.zeros(rows, np.int64),
        )  # the return at the last progress, and its step
        lost = np.zeros(rows, bool)
        for t in range(horizon):
            kernels.draw_noise(keys, np.full(rollouts, t), *noise)
            if known:
                known.refresh()
            action = read_actions(policy(features), self.config).transpose(0, 1).reshape(rows, -1)
            for low, high, member in shares:
                part = Noise(*(x[low:high] for x in noise))
                span = slice(low * candidates, high * candidates)
                self._advance(work, span.start, span.stop, action[span], reward[span], tau, part, member)
            reward[:] = work.reward
            returns += np.where(alive, reward, np.float32(0))
            lengths += alive
            if termination != "never":
                bound = np.repeat(noise.done, candidates) if termination == "sampled" else 0.5
                alive &= work.done <= bound
            if stuck:
                rose = returns >= mark + PROGRESS
                mark, marked = np.where(rose, returns, mark), np.where(rose, t, marked)
                lost |= alive & (t - marked >= stuck)
                alive &= ~lost
            if not alive.any():
                break
        shape = (rollouts, candidates)
        return Dreams(*(np.ascontiguousarray(x.reshape(shape).T) for x in (returns, lengths, lost)))

    def _shares(self, rollouts: int) -> list[tuple[int, int, _Member]]:
        """(first r, last r + 1, member): rollouts split evenly among members."""
        bounds = [rollouts * m // self.num_members for m in range(self.num_members + 1)]
        return [part for part in zip(bounds, bounds[1:], self._members, strict=False) if part[0] < part[1]]

    def _workspace(self, rows: int) -> _Workspace:
        if rows not in self._workspaces:
            self._workspaces = {rows: _Workspace(self.config, rows)}  # one at a time: shapes rarely change
        return self._workspaces[rows]

    def _enter(self, work: _Workspace, z: Array, h: Array, c: Array) -> None:
        size_z = self.config.z
        work.features[:, :size_z] = torch.as_tensor(z)
        work.features[:, size_z:] = torch.as_tensor(h)
        work.low[:, : work.features.shape[1]] = work.features
        work.cell[:] = c

    def _advance(
        self,
        work: _Workspace,
        low: int,
        high: int,
        action: Tensor,
        reward_prev: Array,
        tau: float,
        noise: Noise,
        member: _Member,
    ) -> None:
        """Rows low..high of the workspace, one step, in place."""
        config, size_z, width = self.config, self.config.z, work.features.shape[1]
        outer = work.outer[low:high]
        outer[:, : config.action] = action
        if config.reward_input:
            outer[:, -1] = torch.from_numpy(reward_prev) / config.reward_scale
        x = work.low[low:high]
        x[:, width:] = outer
        low_view, features, gates, mixture = (view[low:high] for view in work.views)
        torch.mm(x, member.gates, out=work.gates[low:high])
        kernels.lstm_dream(gates, member.gates_bias, work.cell[low:high], features, low_view, size_z)
        torch.mm(x[:, size_z:width], member.mixture, out=work.mixture[low:high])
        reward, done = work.reward[low:high], work.done[low:high]
        kernels.outcome_dream(
            features, member.outcome, member.outcome_bias, size_z, np.float32(config.reward_scale), reward, done
        )
        arguments = (config.mixtures, size_z, np.float32(tau), noise.uniform, noise.normal)
        kernels.sample_mixture(mixture, member.mixture_bias, *arguments, features, low_view)
