"""Errors and warnings of lrkit, and the words that they are made of."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

_LONGEST_LINE = 900
_LONGEST_VALUE = 160


def cut(text: str, most: int = 2000) -> str:
    """Shorten a text to at most `most` characters, leaving out its middle."""
    if len(text) <= most:
        return text
    head = (most - 3) * 2 // 3
    return f"{text[:head]}...{text[head + 3 - most :]}"


def shown(value: object) -> str:
    """Return a value as an error quotes it: its ``repr`` in one short line, or its type alone if it has none."""
    if isinstance(value, str) and len(value) > 4 * _LONGEST_VALUE:  # the repr of all of it is not needed
        value = value[: 2 * _LONGEST_VALUE] + value[-2 * _LONGEST_VALUE :]
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # nested without end, a number with thousands of digits inside, a plug-in's own __repr__
        return f"a {type(value).__name__} that cannot be shown"
    return cut(" ".join(text.split()) if "\n" in text else text, _LONGEST_VALUE)


def quoted(name: object) -> str:
    """Return a name that was given, in quotes and shortened."""
    return f'"{cut(str(name), _LONGEST_VALUE)}"'


def listing(names: Sequence[str]) -> str:
    """List names of layers. If there are many, list their patterns, with how many layers each stands for."""
    if len(names) <= 50 and sum(map(len, names)) < 2000:
        return ", ".join(names)
    counts = Counter(pattern(name) for name in names)
    return ", ".join(f"{name} ({count} layers)" if count > 1 else name for name, count in counts.items())[:2000]


def pattern(name: str) -> str:
    """Leave the numbers in a layer's name open. For example, ``layers.3.query`` becomes ``layers.<i>.query``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "<i>", name)


class LrkitError(ValueError):
    """Bad input, told in one clear line: what was wrong, and what would be right.

    The command line prints it and exits with code 2. Failures that are not the user's keep their own classes. The line is
    at most 900 characters long; the middle of a longer one is left out.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(cut(str(message), _LONGEST_LINE))


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the hint that ends an error about an unknown name.

    Returns:
        ` (did you mean "x"?)`, with a leading blank, for the choice most like `word` (case set aside), or an
        empty string if none is like it.
    """
    if len(word) > _LONGEST_VALUE:  # like no name, and compared letter by letter
        return ""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f' (did you mean "{by_lower[found[0]]}"?)' if found else ""


class Once:
    """Says each warning once, by its key."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, key: str, message: str) -> None:
        """Warn, unless this key has been said. A warning that a filter makes an error counts as not said."""
        if key not in self._said:
            warnings.warn(message, LrkitWarning, stacklevel=3)
            self._said.add(key)


class LrkitWarning(UserWarning):
    """Something that would otherwise pass in silence, said once, as soon as it can be known."""
