"""The checker for authors of models: what is wrong with mine?

    check_model(RealNVP(RealNVPConfig(), space), batch)      # raises ModelProblems with all that it found

What must hold of every model: the loss is a finite scalar that depends on batch, weights and generator alone; its gradient
reaches every parameter; the same seed gives the same samples, of the kind, shape and range that the space says, and whoever else
is drawn together with them; saved and
read again the model is the same to the bit; none of this touches torch's global random state. Of some:

- `invertible`: decode undoes encode, and encode decode. `transform`: its log-determinant is that of autograd's Jacobian.
- `log_prob`: one finite number a row.
- `interpolate`: the ends are the rows given, as far as the model can show them.
- `conditionals(x)` -> float32 [B, P, ...], what the model says of each token of a text, or of each number of a picture, row by
  row and channel after channel: it must not change with what is at that place or later ones, and must change with what is before.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oneira.platform.errors import DataError, UsageError

from .models import GenerativeModel, read_model

TOLERANCE = 1e-4  # float32, of what must be undone; log-determinants may be off by this share of their size, too
SHARED = 1e-2  # by how much rows may differ that were drawn in a batch of another size; of pictures, times their levels
PIXELS = 0.1  # the share of pixels that may do so
JACOBIAN = 64  # rows of more numbers are too large for a whole Jacobian here


class ModelProblems(UsageError):
    """What `check_model` found; `problems` are its sentences."""

    def __init__(self, kind: str, problems: list[str]):
        self.problems = problems
        super().__init__(f"The model '{kind}' breaks {len(problems)} rules: " + " ".join(problems))


def check_model(model: GenerativeModel, batch: dict[str, Any]) -> None:
    """Checks a model, trained or not, on a batch of its own data; raises ModelProblems with everything that is wrong.

    It works on copies whose weights are shaken a little: what is zero in a fresh network would hide from every check. The
    model must be registered under its kind (entry point `oneira.models`) to be read again.
    """
    data = {key: torch.as_tensor(value) for key, value in batch.items()}
    shaken = _shaken(model)
    before = torch.get_rng_state()
    checks: list[Callable[[GenerativeModel, dict[str, Tensor]], Iterator[str]]] = [
        _check_loss, _check_gradients, _check_samples, _check_saving, _check_inverse, _check_determinant, _check_density,
        _check_interpolation, _check_masks,
    ]  # fmt: skip
    problems = [problem for check in checks for problem in check(copy.deepcopy(shaken), data)]
    if not torch.equal(before, torch.get_rng_state()):
        problems.append("It draws from torch's global generator; everything random must come from the seed given.")
    if problems:
        raise ModelProblems(model.kind, problems)


@torch.no_grad()
def _shaken(model: GenerativeModel) -> GenerativeModel:
    model = copy.deepcopy(model).eval()
    generator = model.generator(12345)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, device=parameter.device))
    return model


def _loss(model: GenerativeModel, data: dict[str, Tensor], seed: int) -> Tensor:
    return model.loss(data, model.generator(seed))[0]


def _check_loss(model: GenerativeModel, data: dict[str, Tensor]) -> Iterator[str]:
    loss, values = model.loss(data, model.generator(1))
    if loss.dim() != 0 or not torch.isfinite(loss):
        yield f"`loss` gave {loss.tolist()}; it must be one finite number."
    for key, value in values.items():
        if torch.as_tensor(value).numel() != 1 or (isinstance(value, Tensor) and value.requires_grad):
            yield f"`loss` logs '{key}', which is not one detached number."
    if not torch.equal(loss, _loss(model, data, 1)):
        yield "`loss` differs between two calls with the same batch and seed."


def _check_gradients(model: GenerativeModel, data: dict[str, Tensor]) -> Iterator[str]:
    model.train()
    _loss(model, data, 1).backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0):
            yield f"No gradient reaches the parameter '{key}'."


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _check_samples(model: GenerativeModel, data: dict[str, Tensor]) -> Iterator[str]:
    if not model.can_sample:
        return
    first, again, other = model.sample(3, 7), model.sample(3, 7), model.sample(3, 8)
    if not _same(first, again):
        yield "`sample` gives other rows for the same seed."
    if _same(first, other):
        yield "`sample` gives the same rows for another seed."
    if model.space.kind == "text":
        if not (isinstance(first, list) and len(first) == 3 and all(isinstance(text, str) for text in first)):
            yield "`sample` must give a list of 3 texts."
        return
    wanted = torch.float32 if model.space.kind == "points" else torch.uint8
    if tuple(first.shape) != (3, *model.space.shape) or first.dtype is not wanted:
        yield f"`sample(3, seed)` gave {first.dtype} {list(first.shape)}; the space says {wanted} {[3, *model.space.shape]}."
    elif model.space.levels and int(first.max()) >= model.space.levels:
        yield f"`sample` gave the value {int(first.max())}; the space has levels 0 to {model.space.levels - 1}."
    elif not torch.isfinite(first.float()).all():
        yield "`sample` gave numbers that are not finite."
    else:
        shared = model.draw(model.noise([(3, 7), (2, 8)]))
        alone = torch.cat([first, model.sample(2, 8)])
        apart = _apart(shared, alone, model.space.levels)
        if apart:
            yield f"`draw` gives a group of rows other rows when another group is drawn with it: {apart}."


def _apart(a: Tensor, b: Tensor, levels: int) -> str:
    """How rows differ by more than last digits, or "": pixels that lay between two levels may have fallen on either."""
    difference = (a.float() - b.float()).abs().flatten(1)
    far = difference.amax(1) > (max(1.0, SHARED * levels) if levels else SHARED)
    if levels:
        far |= (difference > 0).float().mean(1) > PIXELS
    if not far.any():
        return ""
    return f"rows {far.nonzero()[:, 0].tolist()} of {len(a)}, by up to {float(difference.max()):.3g}"


def _check_saving(model: GenerativeModel, data: dict[str, Tensor]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        try:
            other = read_model(Path(folder))
        except DataError as error:
            yield f"A saved model cannot be read again: {error}"
            return
    if type(other) is not type(model) or (other.config, other.space) != (model.config, model.space):
        yield "A saved model comes back with another class, config or space."
        return
    mine, its = model.state_dict(), other.state_dict()
    if mine.keys() != its.keys() or not all(torch.equal(value, its[key]) for key, value in mine.items()):
        yield "A saved model comes back with other weights."
    if not torch.equal(_loss(model, data, 3), _loss(other, data, 3)):
        yield "A saved model comes back with another loss: something that it uses is not in its state_dict."
    elif model.can_sample and not _same(model.sample(2, 5), other.sample(2, 5)):
        yield "A saved model comes back with other samples: something that it uses is not in its state_dict."


def _check_inverse(model: Any, data: dict[str, Tensor]) -> Iterator[str]:
    if not model.invertible:
        return
    z = model.encode(data["x"])
    back = model.decode(z)
    if model.space.kind == "points":
        error = float((back - data["x"]).abs().max())
        if not error <= TOLERANCE:
            yield f"`decode` undoes `encode` only up to {error:.1e}; allowed is {TOLERANCE:.0e}."
    elif not torch.equal(back, data["x"]):
        yield f"`decode` does not undo `encode`: {int((back != data['x']).sum())} pixels differ."
    if hasattr(model, "transform"):
        x = model.to_real(data["x"], model.generator(4))
        with torch.no_grad():
            error = float((model.invert(model.transform(x)[0]) - x).abs().max())
        if not error <= TOLERANCE:
            yield f"`invert` undoes `transform` only up to {error:.1e}; allowed is {TOLERANCE:.0e}."
        z = torch.randn(z.shape, generator=model.generator(2), device=z.device)
        with torch.no_grad():
            error = float((model.transform(model.invert(z))[0] - z).abs().max())
        if not error <= 10 * TOLERANCE:  # `invert` leaves the data, where maps may be steep
            yield f"`transform` undoes `invert` only up to {error:.1e}."


def _check_determinant(model: Any, data: dict[str, Tensor]) -> Iterator[str]:
    if not hasattr(model, "transform") or model.space.dims > JACOBIAN:
        return
    x = model.to_real(data["x"][:3], model.generator(4))
    said = model.transform(x)[1].detach()
    for row, value in zip(x, said, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: model.transform(r[None])[0][0].flatten(), row)
        true = float(torch.linalg.slogdet(jacobian.reshape(model.space.dims, -1).double())[1])
        if not abs(true - float(value)) <= 10 * TOLERANCE * max(1.0, abs(true)):
            yield f"`transform` says a log-determinant of {float(value):.4f}; autograd's Jacobian has {true:.4f}."
            return


def _check_density(model: Any, data: dict[str, Tensor]) -> Iterator[str]:
    if not hasattr(model, "log_prob"):
        return
    found = model.log_prob(data["x"])
    if tuple(found.shape) != (len(data["x"]),) or not torch.isfinite(found).all():
        yield f"`log_prob` gave {list(found.shape)}, finite: {bool(torch.isfinite(found).all())}; one finite number a row is wanted."
    elif (
        not torch.allclose(found[:1], model.log_prob(data["x"][:1]), rtol=1e-4, atol=1e-3)
        and model.space.kind != "pictures"
    ):
        yield "`log_prob` of a row depends on the other rows of the batch."


def _check_interpolation(model: Any, data: dict[str, Tensor]) -> Iterator[str]:
    if not hasattr(model, "interpolate") or model.space.kind == "text":
        return
    way = model.interpolate(data["x"][0], data["x"][1], 5)
    if len(way) != 5 or tuple(way.shape[1:]) != model.space.shape:
        yield f"`interpolate(a, b, 5)` gave {list(way.shape)}; wanted is {[5, *model.space.shape]}."
    elif model.invertible and float((way[[0, -1]].float() - data["x"][:2].float()).abs().max()) > 10 * TOLERANCE:
        yield "`interpolate` does not begin and end at the rows given."


def _check_masks(model: Any, data: dict[str, Tensor]) -> Iterator[str]:
    if not hasattr(model, "conditionals"):
        return
    x = data["x"][:2]
    with torch.no_grad():
        before = model.conditionals(x)
        count = before.shape[1]
        for place in sorted({0, 1, count // 3, count // 2, count - 2}):
            after = model.conditionals(_changed(model, x, place))
            leak = float((after[:, : place + 1] - before[:, : place + 1]).abs().max())
            if leak > 1e-5:
                yield f"What `conditionals` says of place {place} or an earlier one changes by {leak:.1e} with what comes after."
                return
            if place + 1 < count and torch.equal(after[:, place + 1 :], before[:, place + 1 :]):
                yield f"`conditionals` takes no notice of place {place}: what it says of later ones stays the same."
                return


def _changed(model: Any, x: Tensor, place: int) -> Tensor:
    """x with other values at this token or number and all later ones."""
    flat = x.clone().reshape(len(x), -1)
    values = np.random.default_rng(place).integers(1, model.space.levels, flat[:, place:].shape)
    flat[:, place:] = ((flat[:, place:].long() + torch.from_numpy(values)) % model.space.levels).to(x.dtype)
    return flat.reshape(x.shape)
