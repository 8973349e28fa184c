"""One tree of errors for all of Oneira. The exit code of a command is that of the error which ended it.

    OneiraError                 1
    ├─ UsageError               2   a wrong argument, name or option
    │  └─ ConfigError           2   a wrong key or value in a config
    ├─ DataError                3   a folder or file that is not what it should be
    │  ├─ CheckpointError       3   no whole checkpoint, or no room to write one
    │  └─ NumericalError        3   a loss became NaN or infinite
    ├─ EnvironmentMissing       4   something is not installed on this machine; the message says what to install
    ├─ ClusterError             4   the Ray cluster cannot be reached or cannot hold the work
    └─ Interrupted             75   stopped from outside; `oneira resume` continues

A message names the bad value, what is allowed, and the nearest match.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_NAMED = 24  # names that a message lists whole
FEW_NAMED = 8  # of more


class OneiraError(Exception):
    """The root of the tree: everything that Oneira raises on purpose."""

    exit_code = 1


class UsageError(OneiraError):
    """A wrong argument, name or option."""

    exit_code = 2


class ConfigError(UsageError):
    """An unknown key, or a value of the wrong type or outside its range, in a config."""


class DataError(OneiraError):
    """A folder or file is missing, damaged, or not what it should be."""

    exit_code = 3


class CheckpointError(DataError):
    """No whole checkpoint could be read, or one could not be written."""


class NumericalError(DataError):
    """A number that must be finite is not; names the step at which it happened."""


class EnvironmentMissing(OneiraError):
    """Something is missing on this machine; the message says what to install."""

    exit_code = 4


class ClusterError(OneiraError):
    """The cluster cannot be reached, or has not the resources asked for."""

    exit_code = 4


class Interrupted(OneiraError):
    """Work was stopped from outside and can be resumed."""

    exit_code = 75


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: "Did you mean 'x'? Allowed: a, b, x."; of many, the most alike."""
    names = sorted(set(allowed))
    if not names:
        return "Nothing is allowed here."
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{nearest[0]}'? " if nearest else ""
    shown = names if len(names) <= MOST_NAMED else sorted(difflib.get_close_matches(name, names, FEW_NAMED, cutoff=0))
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{hint}Allowed: {', '.join(shown)}{more}."
