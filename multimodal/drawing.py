"""What every model of text to image is, ours or others': named stages, and prompts taken through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from oneira.platform.errors import UsageError

from .stages import PictureRequest, Stage, through

MOST_GUIDANCE = 100
Picture = Any  # a PIL image, or uint8 [H, W, 3]


class Drawing:
    """Stages and a name. Picture k of a call has the noise of seed + k.

    Args:
        name: by which `oneira serve` offers it: "builtin", or that of its folder.
        notes: what is done otherwise than a folder that others made says, a sentence each.
    """

    def __init__(self, stages: Sequence[Stage], name: str, notes: Sequence[str] = ()):
        self.stages, self.name, self.notes = list(stages), name, tuple(notes)

    def __call__(
        self, prompts: Sequence[str], *, seed: int = 0, steps: int | None = None, guidance: float | None = None
    ) -> list[Any]:
        """One PIL image a prompt. Raises UsageError for an empty prompt, a negative seed, steps outside [1, 1000],
        or guidance outside [0, 100]."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for prompt in prompts:
            require(bool(prompt.strip()), "The prompt is empty.")
        return self.draw(
            [PictureRequest(prompt=p, seed=seed + k, steps=steps, guidance=guidance) for k, p in enumerate(prompts)]
        )

    def variations(self, picture: Picture, n: int = 1, *, seed: int = 0, steps: int | None = None) -> list[Any]:
        """Pictures that CLIP finds alike: its embedding of the picture drawn anew, without the prior.

        Raises UsageError where the model has no CLIP for pictures.
        """
        array = as_array(picture)
        return self.draw(
            [PictureRequest(task="variation", picture=array, seed=seed + k, steps=steps) for k in range(n)]
        )  # fmt: skip

    def edit(
        self, picture: Picture, mask: np.ndarray, prompt: str, n: int = 1, *, seed: int = 0, steps: int | None = None,
        guidance: float | None = None,
    ) -> list[Any]:  # fmt: skip
        """Pictures that fit the prompt, which says what all of the picture shall show, and differ only where the mask does.

        mask: bool [H, W], of the picture's size; True is drawn anew, the rest stays as it is.
        """
        array, mask = as_array(picture), np.asarray(mask, bool)
        if mask.shape != array.shape[:2]:
            raise UsageError(
                f"The mask is of {mask.shape}, the picture of {array.shape[:2]}; they must be of one size."
            )
        one = PictureRequest(task="edit", prompt=prompt, picture=array, mask=mask, steps=steps, guidance=guidance)
        return self.draw([replace(one, seed=seed + k) for k in range(n)])

    def draw(self, requests: Sequence[PictureRequest]) -> list[Any]:
        """PIL images of any requests."""
        from PIL import Image

        for request in requests:
            require(0 <= request.seed < 2**63, f"The seed is {request.seed}; it must be in [0, 2^63).")
            guidance = request.guidance
            require(
                guidance is None or 0 <= guidance <= MOST_GUIDANCE,
                f"The guidance is {guidance}; it must be in [0, {MOST_GUIDANCE}].",
            )
        return [Image.fromarray(state["picture"]) for state in through(self.stages, requests)]


def require(holds: bool, message: str) -> None:
    """Raises UsageError with the message unless it holds."""
    if not holds:
        raise UsageError(message)


def as_array(picture: Picture) -> np.ndarray:
    """A PIL image or array as uint8 [H, W, 3]. Raises UsageError for anything else."""
    array = np.array(picture.convert("RGB")) if hasattr(picture, "convert") else np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UsageError(f"A picture must be a PIL image or uint8 [H, W, 3], not {array.dtype} {list(array.shape)}.")
    return array
