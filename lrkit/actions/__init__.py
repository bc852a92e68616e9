"""Actions: what happens to the units that lose."""

from collections.abc import Mapping
from typing import Any

from lrkit.actions.base import BY, Action, Ballot, By, Fate, Verdict, best, unsound, worth
from lrkit.actions.freeze import Freeze
from lrkit.actions.prune import Prune
from lrkit.actions.switch import Switch
from lrkit.actions.zero import Zero
from lrkit.hookspecs import hookimpl


@hookimpl
def lrkit_actions() -> Mapping[str, type[Action]]:
    """Offer the built-in actions."""
    return {"prune": Prune, "freeze": Freeze, "switch": Switch, "zero": Zero}


def __getattr__(name: str) -> Any:
    if name == "Growth":
        raise ImportError(
            "lrkit.actions.Growth is a Verdict now; CHANGELOG.md has a table of what takes the place of old members"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BY",
    "Action",
    "Ballot",
    "By",
    "Fate",
    "Freeze",
    "Prune",
    "Switch",
    "Verdict",
    "Zero",
    "best",
    "unsound",
    "worth",
]
