"""The one error that a user's input causes: the command line prints it as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what is wrong, what was got, what is wanted, and how to mend it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest of `known`, or the list of all when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def listed(names: Iterable[str], most: int = 20) -> str:
    """Return names in order, joined by commas, and how many more there are beyond `most`."""
    found = [name if name.isprintable() else repr(name) for name in sorted(names)]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
