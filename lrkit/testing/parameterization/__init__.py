"""Ask what every parameterization must keep, from its beginning in a model to the ways out of it."""

from lrkit.testing.parameterization.beginning import Beginning
from lrkit.testing.parameterization.computing import Computing
from lrkit.testing.parameterization.decisions import Decisions
from lrkit.testing.parameterization.learning import Learning
from lrkit.testing.parameterization.leaving import Leaving


# The last base comes first: pytest and `lrkit.testing.clauses` go from the oldest class to the youngest.
class ParameterizationContract(Decisions, Leaving, Computing, Learning, Beginning):
    """The contract of a `lrkit.Parameterization`."""


__all__ = ["ParameterizationContract"]
