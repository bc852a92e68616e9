"""Compile regular expressions of others, and refuse those that could be matched for ever before they are tried.

Python's engine tries every way in which repetitions can share a text out among them. If a group that repeats can match
one text in several ways, as in ``(a|a)*b``, the ways double per letter; if many repetitions stand side by side, as in
``.*.*.*x``, their number is a power of the length. Both can be seen in the pattern itself.
"""

import functools
import math
import re
import warnings

from lrkit.errors import LrkitError, cut, shown

_LONGEST = 4000
_WAYS = 2e7
_NAME = 60
_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?#[^)]*\)|\(\?P=\w+\)|\(\?P?[=<!:>][=!]?|\(\??|\)|\||[*+?][?+]?"
    r"|\{(\d*)(,?)(\d*)\}[?+]?|\s|.",
    re.DOTALL,
)
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str, name: str, around: str = "{}") -> re.Pattern[str]:
    """Compile a regular expression that is known to come to an end.

    Args:
        pattern: as it was given.
        name: its name in errors.
        around: the expression that it is used in, with ``{}`` in its place, such as ``^({})$``.

    Raises:
        LrkitError: it is no regular expression, alone or in its place, or may take for ever.
    """
    if not isinstance(pattern, str):
        raise LrkitError(f"{name} must be a regular expression, not {shown(pattern)}")
    why, told = _endless(pattern), cut(pattern, 160)
    if why is not None:
        raise LrkitError(f'{name}="{told}" could be matched for ever: a pattern {why}; write it more plainly')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of changes in later versions of Python
            re.compile(pattern)
            return re.compile(around.replace("{}", pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise LrkitError(f'{name}="{told}" is not a regular expression: {error}') from None


def _endless(pattern: str) -> str | None:
    """Say why a pattern may take for ever; None if it does not."""
    if len(pattern) > _LONGEST:
        return f"of {len(pattern):,} characters"
    if _VERBOSE.search(pattern):
        return "in which blanks are passed over"
    repetitions, ways = 0, 1.0
    inside = [1]  # for each open group the alternatives in it, or 2 where it can match one text in several ways
    closed = 1  # the same of the group that has just been closed
    for token in _TOKEN.finditer(pattern):
        text = token[0]
        if text.isspace() or text.startswith("(?#"):
            continue
        group, closed = closed, 1
        if text.startswith("(") and not text.startswith("(?P="):
            inside.append(1)
            if len(inside) > 64:
                return "of groups within groups without end"
        elif text == ")" and len(inside) > 1:
            closed = inside.pop()
            ways *= closed
            inside[-1] = max(inside[-1], min(closed, 2))
        elif text == "|":
            inside[-1] += 1
        elif text[0] in "*+?" or token[2] is not None:
            if group > 1 and text[0] != "?":
                return "in which a group that repeats can match one text in several ways"
            repetitions += text[0] != "?" and token[2] != ""
            ways *= 2 if text[0] == "?" else 1
            inside[-1] = max(inside[-1], 2)
    ways *= inside[0] * _NAME**repetitions / math.factorial(repetitions) if repetitions < 10 else math.inf
    return "with too many repetitions and alternatives" if ways > _WAYS else None
