"""Members that lrkit 0.1.0 asked components for, and that nobody asks for now, or asks for with other arguments.

A class that still writes one was written for the old protocol. Ignoring the member in silence could change what a run
computes, so the class is refused.
"""

import inspect
from collections.abc import Mapping, Sequence

RETIRED: Mapping[str, Sequence[str]] = {
    "parameterization": ("units", "grows", "adapt_model"),
    "scheduler": ("bounds", "budget", "share", "due", "decisions", "observes", "end"),
    "action": ("reversible", "freezes", "budgeted", "retains", "select", "cuts", "grow", "hold", "restore"),
}
"""By kind, the members that are retired. CHANGELOG.md says what takes the place of each."""

CHANGED: Mapping[str, Mapping[str, Sequence[str]]] = {
    "parameterization": {
        "adapt": ("model", "targets"),
        "fresh": ("module", "count", "generator", "memory"),
    },
}
"""By kind, the methods that are called with these arguments now, and were called with others."""

BY_NAME = ("fresh",)
"""Those that took as many arguments before, so that only the arguments' names tell."""


def outdated(kind: str, cls: type) -> str | None:
    """Return what follows a component's name in the refusal of a class that was written for lrkit 0.1.0, or None.

    Members count if the class, or a base that is not lrkit's own, has them under a retired name: as a method, a property
    or a constant. A scheduler's setting may be called so.
    """
    foreign = [vars(base) for base in cls.__mro__ if str(base.__module__).partition(".")[0] != "lrkit"]
    plain = kind == "scheduler"
    found = [
        name
        for name in RETIRED.get(kind, ())
        if any(name in members and (not plain or inspect.isroutine(members[name])) for members in foreign)
    ]
    reasons = []
    if found:
        asked = "is no longer asked for" if len(found) == 1 else "are no longer asked for"
        reasons.append(f"{', '.join(f'`{name}`' for name in found)} {asked}")
    for name, arguments in CHANGED.get(kind, {}).items():
        if any(name in members and not _takes(members[name], arguments, name in BY_NAME) for members in foreign):
            reasons.append(f"`{name}` takes ({', '.join(arguments)})")
    if not reasons:
        return None
    return f"was written for lrkit 0.1.0: {', '.join(reasons)}; CHANGELOG.md has a table of what takes their place"


def _takes(function: object, arguments: Sequence[str], by_name: bool) -> bool:
    """Return whether a method can be called with so many arguments, whatever it calls them, or with those of these names."""
    named, placed = (dict.fromkeys(arguments), ()) if by_name else ({}, arguments)
    try:
        inspect.signature(function).bind(None, *placed, **named)  # type: ignore[arg-type]
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True
