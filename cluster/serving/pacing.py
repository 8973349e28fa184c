"""How long requests take, as measured, and who is told at once that there is no time for theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from oneira.multimodal.stages import PictureRequest

from .sampling import SampleRequest

SMOOTHING = 0.3  # of measured seconds
DOUBT = 0.9  # of what was measured is believed after each refusal that it led to
UNKNOWN_WAIT = 30.0  # seconds, told where nobody knows when there will be room

Asked = tuple[int | None, int]  # (steps, None where the model's own number was meant; rows that are made together)


class Late(Exception):
    """There is no time left for a request. `retry_after`: seconds until asking again should do, at least 1."""

    def __init__(self, why: str, seconds: float) -> None:
        self.retry_after = max(1, math.ceil(min(seconds, UNKNOWN_WAIT)))
        super().__init__(f"The request cannot be done by its deadline: {why}.")


def asked_of(requests: Sequence[PictureRequest | SampleRequest]) -> Asked:
    """What the time of one HTTP request depends on."""
    first = requests[0]
    if isinstance(first, SampleRequest):
        return first.params.get("steps"), first.n
    return first.steps, len(requests)


class Pace:
    """Seconds that a stage works on a request, others in its batch included."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], dict[Asked, float]] = {}
        self._made: dict[tuple[str, str], int] = {}  # steps of the last request

    def measure(self, model: str, stage: str, asked: Asked, seconds: float, steps: int) -> None:
        """Tells what one request has taken, and how many steps the stage made of it."""
        of = self._seconds.setdefault((model, stage), {})
        before = of.pop(asked, seconds)
        of[asked] = before + SMOOTHING * (seconds - before)
        self._made[model, stage] = steps

    def took_longer(self, model: str, stages: Sequence[str], asked: Asked, seconds: float) -> None:
        """A request had not gone through these stages after so many seconds. Else one that never ends in time would never be
        measured, and be let in again and again: what is missing is put down to the stage that is known to take longest."""
        known = {stage: self.seconds(model, stage, asked) for stage in stages}
        missing = seconds - sum(known.values())
        if known and missing > 0:
            longest = max(reversed(known), key=known.__getitem__)  # where none is known: the last
            self._seconds.setdefault((model, longest), {})[asked] = known[longest] + missing

    def doubt(self, model: str, stage: str, asked: Asked) -> None:
        """A request was refused for what such ones took. It may have been the load of that hour, and nobody would measure again."""
        if of := self._seconds.get((model, stage)):
            of[asked if asked in of else next(reversed(of))] *= DOUBT

    def seconds(self, model: str, stage: str, asked: Asked) -> float:
        """What such a request should take: as measured, else as the last one, by its steps where the stage makes as many as it
        is asked for. 0 where there was none."""
        of = self._seconds.get((model, stage))
        if not of:
            return 0.0
        if asked in of:
            return of[asked]
        last = next(reversed(of))
        obeys = last[0] is not None and last[0] == self._made.get((model, stage), 0) > 1
        return of[last] * (asked[0] / last[0] if asked[0] and last[0] and obeys else 1.0)
