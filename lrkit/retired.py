"""Members that lrkit 0.1.0 asked components for and that nobody asks for now.

A class that still writes one was written for the old protocol. Ignoring the member in silence could change what a run
computes, so the class is refused.
"""

from collections.abc import Mapping, Sequence

RETIRED: Mapping[str, Sequence[str]] = {
    "parameterization": ("units", "grows"),
    "action": (),
}
"""By kind, the members that are retired. CHANGELOG.md says what takes the place of each."""


def outdated(kind: str, cls: type) -> str | None:
    """Return what follows a component's name in the refusal of a class that was written for lrkit 0.1.0, or None.

    Members count if the class, or a base that is not lrkit's own, has them under a retired name: as a method, a property,
    a constant or a setting.
    """
    foreign = [base for base in cls.__mro__ if str(base.__module__).partition(".")[0] != "lrkit"]
    found = [name for name in RETIRED.get(kind, ()) if any(name in vars(base) for base in foreign)]
    if not found:
        return None
    asked = "is no longer asked for" if len(found) == 1 else "are no longer asked for"
    names = ", ".join(f"`{name}`" for name in found)
    return f"was written for lrkit 0.1.0: {names} {asked}; CHANGELOG.md has a table of what takes their place"
