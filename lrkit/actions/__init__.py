"""Actions: what happens to the units that lose."""

from lrkit.actions.base import Action
from lrkit.actions.freeze import Freeze
from lrkit.actions.prune import Prune

__all__ = ["Action", "Freeze", "Prune"]
