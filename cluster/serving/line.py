"""Who may be under way, who waits, and who is sent away.

A request asks for one or more pictures; each takes a place of its own. At most `places` are taken. A place that falls free
goes to the waiting request that has the fewest of them, the earliest among equals: so a request for ten pictures that came
first does not hold up one for a single picture behind it, and moves on itself. At most `limit` pictures wait.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

SMOOTHING = 0.2  # of the seconds a picture takes; the last five or so count


class Full(Exception):
    """Too many wait. `retry_after`: seconds until there should be room, at least 1."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"Too many pictures are waiting; there should be room in {retry_after} s.")
        self.retry_after = retry_after


@dataclass(eq=False)
class Ticket:
    """A request in the line: places it has, pictures of it that wait."""

    taken: int = 0
    waiting: list[asyncio.Future] = field(default_factory=list)
    promised: int = 0  # pictures that have not asked for their place yet


class Line:
    """The line of one server. Belongs to one event loop."""

    def __init__(self, places: int = 16, limit: int = 64) -> None:
        self.places, self.limit = places, limit
        self.taken = 0
        self._tickets: list[Ticket] = []
        self._seconds = 1.0  # of the stages' time for one picture, as measured

    @property
    def waiting(self) -> int:
        """Pictures that wait."""
        return sum(len(ticket.waiting) + ticket.promised for ticket in self._tickets)

    def wait(self, pictures: int) -> float:
        """Seconds until so many more would have their places."""
        return max(0, self.waiting + pictures - max(self.places - self.taken, 0)) * self._seconds

    def measure(self, seconds: float) -> None:
        """Tells what a finished picture has cost of the stages' time."""
        self._seconds += SMOOTHING * (seconds - self._seconds)

    def check(self, pictures: int) -> None:
        """Raises Full where a request for so many would be sent away now, before anything is done for it."""
        excess = self.waiting + pictures - max(self.places - self.taken, 0) - self.limit
        if excess > 0:
            raise Full(max(1, math.ceil(excess * self._seconds)))

    @asynccontextmanager
    async def request(self, pictures: int) -> AsyncIterator[Ticket]:
        """A place in the line for a request, for as long as the block lasts.

        Raises:
            Full: with it more than `limit` would wait.
        """
        self.check(pictures)
        ticket = Ticket(promised=pictures)
        self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            self._tickets.remove(ticket)

    @asynccontextmanager
    async def place(self, ticket: Ticket) -> AsyncIterator[None]:
        """Waits for one of the request's places, and holds it for as long as the block lasts."""
        turn = asyncio.get_running_loop().create_future()
        ticket.promised -= 1
        ticket.waiting.append(turn)
        self._give()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                ticket.taken -= 1
                self.taken -= 1
            elif turn in ticket.waiting:
                ticket.waiting.remove(turn)
            self._give()

    def _give(self) -> None:
        while self.taken < self.places:
            asking = [ticket for ticket in self._tickets if ticket.waiting]
            if not asking:
                return
            ticket = min(asking, key=lambda ticket: ticket.taken)
            turn = ticket.waiting.pop(0)
            if not turn.done():
                turn.set_result(None)
                ticket.taken += 1
                self.taken += 1
