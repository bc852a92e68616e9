"""What lrkit raises when its input is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LrkitError(ValueError):
    """Bad input, told in one clear line: what was wrong, and what would be right.

    The command line prints it and exits with code 2. A failure that is not the user's stays whatever it was.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """The hint that ends an error about an unknown name.

    Returns:
        ` (did you mean "x"?)`, with a leading blank, for the choice most like `word` (case set aside), or an
        empty string if none is like it.
    """
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f' (did you mean "{by_lower[found[0]]}"?)' if found else ""


def short(text: str, limit: int = 2000) -> str:
    """A text of at most about `limit` characters: of a longer one the beginning and the end, and how much is left out."""
    if len(text) <= limit:
        return text
    head, tail = limit * 3 // 4, limit // 4
    return f"{text[:head]} ... ({len(text) - head - tail:,} characters left out) ... {text[-tail:]}"


class LrkitWarning(UserWarning):
    """Something that would otherwise pass in silence: said once, at the moment it can first be known."""
