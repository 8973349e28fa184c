"""Data-parallel training: processes that each take a share of every batch and average their gradients (torch.distributed).

Whoever starts the processes also starts the group (`Executor.together`). In a process that is in none, all of this does
nothing. Buffers, such as the chains of an RBM, are those of the first process, as in torch's DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oneira.platform.errors import ConfigError


def rank_and_size() -> tuple[int, int]:
    """This process's number in its group, and how many there are: (0, 1) where there is no group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share_of(batch: Any) -> Any:
    """This process's rows of a batch: tensors or arrays, or dicts, lists and tuples of them, rows first.

    Raises:
        ConfigError: the rows cannot be divided equally.
    """
    rank, size = rank_and_size()
    if size == 1:
        return batch
    if isinstance(batch, dict):
        return {key: share_of(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(share_of(value) for value in batch)
    if len(batch) % size:
        raise ConfigError(f"A batch of {len(batch)} rows cannot be shared equally among {size} workers.")
    rows = len(batch) // size
    return batch[rank * rows : (rank + 1) * rows]


@torch.no_grad()
def average(parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Replaces gradients by their mean over the group, in one message. Returns the mean of the loss."""
    _, size = rank_and_size()
    if size == 1:
        return loss.detach()
    gradients = [p.grad for p in parameters if p.grad is not None]
    message = torch.cat([*(g.flatten().float() for g in gradients), loss.detach().float().reshape(1)])
    dist.all_reduce(message)
    message /= size
    place = 0
    for gradient in gradients:
        gradient.copy_(message[place : place + gradient.numel()].view_as(gradient))
        place += gradient.numel()
    return message[-1]


@torch.no_grad()
def copy_from_first(values: Iterable[Tensor]) -> None:
    """Gives every process the first one's tensors, in place."""
    if rank_and_size()[1] > 1:
        for value in values:
            dist.broadcast(value, 0)


def kept_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers that a model's state_dict holds."""
    parameters = dict(model.named_parameters())
    return [value for key, value in model.state_dict().items() if key not in parameters]
