"""Actions: what happens to the units that lose."""

from collections.abc import Mapping

from lrkit.actions.base import Action, Ballot, Fate, Verdict, best
from lrkit.actions.freeze import Freeze
from lrkit.actions.prune import Prune
from lrkit.actions.zero import Zero
from lrkit.hookspecs import hookimpl


@hookimpl
def lrkit_actions() -> Mapping[str, type[Action]]:
    """Offer the built-in actions."""
    return {"prune": Prune, "freeze": Freeze, "zero": Zero}


__all__ = ["Action", "Ballot", "Fate", "Freeze", "Prune", "Verdict", "Zero", "best"]
