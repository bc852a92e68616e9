"""Members that lrkit 0.1.0 asked components for and that nobody asks for now.

A class that still writes one was written for the old protocol. Ignoring the member in silence could change what a run
computes, so the class is refused.
"""

import inspect
from collections.abc import Mapping, Sequence

RETIRED: Mapping[str, Sequence[str]] = {
    "parameterization": ("units", "grows"),
    "metric": ("kernel",),
    "scheduler": ("bounds", "share", "due", "decisions", "observes", "end"),
    "action": ("reversible", "freezes", "budgeted", "retains", "select", "cuts", "grow", "hold", "restore"),
}
"""By kind, the members that are retired. CHANGELOG.md says what takes the place of each."""


def outdated(kind: str, cls: type) -> str | None:
    """Return what follows a component's name in the refusal of a class that was written for lrkit 0.1.0, or None.

    Members count if the class, or a base that is not lrkit's own, has them under a retired name: as a method, a property
    or a constant. A setting of a metric or a scheduler may be called so.
    """
    foreign = [base for base in cls.__mro__ if str(base.__module__).partition(".")[0] != "lrkit"]
    plain = kind in ("metric", "scheduler")
    found = [
        name
        for name in RETIRED.get(kind, ())
        if any(name in vars(base) and (not plain or inspect.isroutine(vars(base)[name])) for base in foreign)
    ]
    if not found:
        return None
    asked = "is no longer asked for" if len(found) == 1 else "are no longer asked for"
    names = ", ".join(f"`{name}`" for name in found)
    return f"was written for lrkit 0.1.0: {names} {asked}; CHANGELOG.md has a table of what takes their place"
