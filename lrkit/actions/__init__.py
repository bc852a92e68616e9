"""Actions: what happens to the units that lose."""

from lrkit.actions.base import Action, Ballot, Fate, Verdict, best
from lrkit.actions.freeze import Freeze
from lrkit.actions.prune import Prune
from lrkit.actions.zero import Zero

__all__ = ["Action", "Ballot", "Fate", "Freeze", "Prune", "Verdict", "Zero", "best"]
