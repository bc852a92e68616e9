"""Chance: the control of every importance metric."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
from torch import Tensor

from lrkit.metrics.base import Metric, Parts


@attrs.frozen(kw_only=True)
class Random(Metric):
    """Each unit's score is a uniform random number in [0, 1), drawn anew at every decision. Source: lrkit's own, a control.

    It reads neither weights nor gradients, and gathers no tensor, however large the units are. A method with this metric
    keeps as many units as before, at the same steps, and chance says which: a metric that does no better has found nothing.
    The draw follows from the run's seed, the step, the policy and the unit's name (`Parts.draws`), so that a resumed run,
    and every process of one, draws alike.

    Where what lost may come back (`Prune` as it is), every decision keeps other units, and a component trains in the
    forward pass for a part of the steps only. Where losing is final (`Freeze`, ``Prune(cut="always")``), what is left is a
    random part of what was left before.

    Args:
        measure: without effect, since nothing is measured.
    """

    reads: ClassVar = "nothing"

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Zero for every entry [N], of which there are none: `reduce` draws."""
        return weight.new_zeros(weight.shape)

    def reduce(self, parts: Parts) -> Tensor:
        """One draw for each unit [blocks, units]."""
        return parts.draws
