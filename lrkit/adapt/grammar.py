"""How `targets`, `exclude` and `train_also` name modules: by a regular expression, or by a list of names or suffixes."""

from collections.abc import Callable, Sequence
from typing import Any

from lrkit.errors import LrkitError, shown
from lrkit.patterns import compiled


def entries(given: Any, what: str, choices: str, *, exact: bool = False) -> list[tuple[str, Callable[[str], bool]]]:
    """Return each entry with the test that tells if it names a module.

    Args:
        given: a regular expression, which must match a module's whole name and is one entry; or a list of names or name
            suffixes at a dot.
        what: the argument's name, for errors.
        choices: what it may be in words, for errors.
        exact: a list holds whole names only.

    Raises:
        LrkitError: it is neither, or no regular expression.
    """
    if isinstance(given, str):
        regex = compiled(given, what)
        return [(given, lambda name: regex.fullmatch(name) is not None)]
    if not isinstance(given, Sequence) or not all(isinstance(entry, str) for entry in given):
        raise LrkitError(f"{what} must be {choices}, not {shown(given)}")
    return [(entry, _named(entry, exact)) for entry in given]


def _named(entry: str, exact: bool) -> Callable[[str], bool]:
    return lambda name: name == entry or (not exact and name.endswith(f".{entry}"))
