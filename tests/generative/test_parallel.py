"""Two processes that train together: their steps are those of one with the whole batch, and a kill changes nothing."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from oneira.generative.parallel import rank_and_size, share_of
from oneira.generative.training import TrainSettings, fit
from oneira.platform.checkpoints import Checkpoints
from oneira.platform.errors import ConfigError, NumericalError

SETTINGS = TrainSettings(steps=12, batch_size=8, lr=0.01, ema=0.9, save_every=5, precision="fp32")
ROWS = np.random.default_rng(0).normal(size=(12, 8, 3)).astype(np.float32)


class Line(nn.Module):
    """A line through points; `noisy` adds noise to them, `first` sets the weight by the first rows it sees, as actnorm does."""

    def __init__(self, noisy=False, first=False):
        super().__init__()
        self.first, self.noisy = first, noisy
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0]))
        self.register_buffer("seen", torch.zeros(2))

    def loss(self, batch, generator):
        x = batch["x"]
        if self.first:
            self.first, self.weight.data = False, x[0, :2].clone()
        if self.noisy:
            noise = torch.randn(x.shape, generator=generator)
            self.seen += noise[0, :2]
            x = x + noise
        return (x[:, :2] @ self.weight - x[:, 2]).square().mean(), {}


def batch_at(step):
    return {"x": ROWS[step]}


def stopping(step):
    if step == 8:
        raise KeyboardInterrupt
    return batch_at(step)


def join(rank, place):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )


def leave():
    """Together, so that none is gone while another still speaks to it."""
    dist.barrier()
    dist.destroy_process_group()


def work(rank, folder):
    """What each of the two processes does, one experiment after another."""
    join(rank, folder / "meet")
    found = {}
    for name, noisy in (("plain", False), ("noisy", True)):
        model = Line(noisy)
        model.weight.data += rank  # where weights differ at first, the first process's count
        found |= {f"{name}.{key}": value.clone() for key, value in fit(model, batch_at, SETTINGS).state_dict().items()}
    kept = Checkpoints(folder / "checkpoints")
    model = Line(first=True)
    found |= {f"first.{key}": value.clone() for key, value in fit(model, batch_at, SETTINGS).state_dict().items()}
    with suppress(KeyboardInterrupt):
        fit(Line(True), stopping, SETTINGS, checkpoints=kept)
    save_file(found, folder / f"first-{rank}.safetensors")
    leave()


def resume(rank, folder):
    join(rank, folder / "again")
    resumed = fit(Line(True), batch_at, SETTINGS, checkpoints=Checkpoints(folder / "checkpoints")).state_dict()
    found = {f"resumed.{key}": value.clone() for key, value in resumed.items()}
    bad = ROWS.copy()
    bad[3, -1] = np.nan  # a row of the second process
    try:
        fit(Line(), lambda step: {"x": bad[step]}, SETTINGS)
    except NumericalError:
        found["told"] = torch.ones(1)
    try:
        share_of(np.zeros(3))
    except ConfigError:
        found["refused"] = torch.ones(1)
    found["whole"] = torch.from_numpy(share_of({"x": ROWS[0]})["x"])
    save_file(found, folder / f"second-{rank}.safetensors")
    leave()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("parallel")
    for function in (work, resume):
        torch.multiprocessing.spawn(function, (folder,), nprocs=2)
    return [
        load_file(folder / f"first-{rank}.safetensors") | load_file(folder / f"second-{rank}.safetensors")
        for rank in range(2)
    ]


def test_two_processes_make_the_steps_of_one(found):
    alone = fit(Line(), batch_at, SETTINGS)
    for its in found:
        assert torch.allclose(its["plain.weight"], alone.weight, atol=1e-5)
    assert torch.equal(found[0]["whole"], torch.from_numpy(ROWS[0, :4])) and len(found[1]["whole"]) == 4
    assert torch.equal(torch.cat([its["whole"] for its in found]), torch.from_numpy(ROWS[0]))


def test_all_end_with_the_same_weights_and_buffers(found):
    for key in ("noisy.weight", "noisy.seen", "first.weight"):
        assert torch.equal(found[0][key], found[1][key])
    assert found[0]["noisy.seen"].abs().max() > 1


def test_a_killed_group_goes_on_to_the_same_bytes(found):
    for its in found:
        for key in ("weight", "seen"):
            assert torch.equal(its[f"resumed.{key}"], its[f"noisy.{key}"])


def test_all_hear_of_one_bad_row(found):
    assert all("told" in its and "refused" in its for its in found)


def test_alone_there_is_no_group():
    assert rank_and_size() == (0, 1) and share_of({"x": ROWS})["x"] is ROWS
