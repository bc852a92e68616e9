"""What lrkit raises when its input is wrong."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence

_LONGEST_LINE = 900
_LONGEST_VALUE = 160


def cut(text: str, most: int = 2000) -> str:
    """A text of at most `most` characters: of a longer one the middle is left out."""
    if len(text) <= most:
        return text
    head = (most - 3) * 2 // 3
    return f"{text[:head]}...{text[head + 3 - most :]}"


def shown(value: object) -> str:
    """A value as an error quotes it: its ``repr`` in one short line; its type alone if it has none."""
    if isinstance(value, str) and len(value) > 4 * _LONGEST_VALUE:  # the repr of all of it is not needed
        value = value[: 2 * _LONGEST_VALUE] + value[-2 * _LONGEST_VALUE :]
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # nested without end, a number with thousands of digits inside, a plug-in's own __repr__
        return f"a {type(value).__name__} that cannot be shown"
    return cut(" ".join(text.split()) if "\n" in text else text, _LONGEST_VALUE)


class LrkitError(ValueError):
    """Bad input, told in one clear line: what was wrong, and what would be right.

    The command line prints it and exits with code 2. A failure that is not the user's stays whatever it was. The line is
    at most 900 characters long: of a longer one the middle is left out.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(cut(str(message), _LONGEST_LINE))


def nearest(word: str, choices: Iterable[str]) -> str:
    """The hint that ends an error about an unknown name.

    Returns:
        ` (did you mean "x"?)`, with a leading blank, for the choice most like `word` (case set aside), or an
        empty string if none is like it.
    """
    if len(word) > _LONGEST_VALUE:  # like no name, and compared letter by letter
        return ""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f' (did you mean "{by_lower[found[0]]}"?)' if found else ""


class LrkitWarning(UserWarning):
    """Something that would otherwise pass in silence: said once, at the moment it can first be known."""


def pattern(name: str) -> str:
    """Return a layer's name with its numbers left open, as the names of all blocks share it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "<i>", name)


def listing(names: Sequence[str]) -> str:
    """Return each name; of many, how many there are of each pattern."""
    if len(names) <= 50 and sum(map(len, names)) < 2000:
        return ", ".join(names)
    counts = Counter(pattern(name) for name in names)
    return ", ".join(f"{name} ({count} layers)" if count > 1 else name for name, count in counts.items())[:2000]
