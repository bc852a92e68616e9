"""Ask what every action must keep: whom it chooses, what it does to them, and how it runs."""

from lrkit.testing.action.acting import Acting
from lrkit.testing.action.choosing import Choosing
from lrkit.testing.action.running import Running


# The last base comes first: pytest and `lrkit.testing.clauses` go from the oldest class to the youngest.
class ActionContract(Running, Acting, Choosing):
    """The contract of a `lrkit.Action`."""


__all__ = ["ActionContract"]
