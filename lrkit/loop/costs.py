"""What the units of a policy cost, in what its schedule counts (`lrkit.schedulers.Scheduler.amount`).

A cost never changes: it follows from the shapes and flags at the start of the run, so that the whole schedule is known
beforehand, and a resumed run has the same. For example a tensor that another policy freezes on the way goes on costing.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import attrs

from lrkit.loop.pieces import as_units
from lrkit.units import Block, Part, ranked


@attrs.frozen
class Costs:
    """The costs of a policy's units.

    Args:
        each: by block what one of its units costs; None if every unit counts as one.
        first: what all units at first cost.
        whole: what the schedule's amounts are of: `first`, or as many units as there may be once some were added.
        layer: what one unit in every layer costs, rounded up: the mean over a layer's units, summed over layers.
        sizes: by block how many trainable entries one of its units has.
    """

    each: tuple[int, ...] | None
    first: int
    whole: int
    layer: int
    sizes: tuple[int, ...]

    @property
    def least(self) -> int:
        """What the cheapest unit costs: with less, none can be kept."""
        return 1 if self.each is None else min(self.each)

    def in_parameters(self, cost: int) -> tuple[int, int]:
        """Return the least and the most trainable entries that leave with units of a total cost, or by less than one more.

        What is kept falls short of its budget by less than one unit.
        """
        each = self.each or ()
        rates = [Fraction(size, one) for size, one in zip(self.sizes, each, strict=True)]
        beyond = min(cost + max(each) - 1, self.first) if cost else 0
        return math.floor(cost * min(rates)), math.ceil(beyond * max(rates))

    @classmethod
    def of(cls, amount: str, blocks: Sequence[Block], parts: Sequence[Part], capacity: int) -> "Costs":
        """Count the units, or what they cost.

        Args:
            amount: the scheduler's.
            blocks: the units at first.
            parts: all parts of the parameterization.
            capacity: how many units there may be at most.
        """
        layers: dict[int, list[tuple[int, int]]] = {}
        maps = {id(block.module): block.maps for block in blocks}
        sizes = tuple(_of_unit("parameters", block, parts) for block in blocks)
        each = [_of_unit(amount, block, parts) for block in blocks]
        for cost, block in zip(each, blocks, strict=True):
            layers.setdefault(id(block.module), []).append((cost, block.count))
        if amount == "units":
            return cls(None, sum(block.count for block in blocks), capacity, sum(maps.values()), sizes)
        first = sum(cost * block.count for cost, block in zip(each, blocks, strict=True))
        return cls(
            tuple(each), first, first, math.ceil(sum(maps[key] * _mean(units) for key, units in layers.items())), sizes
        )


def _mean(units: Sequence[tuple[int, int]]) -> Fraction:
    """The mean of a layer's costs, from cost and number of units of each of its blocks; without units, of the blocks'."""
    weights = [count for _, count in units] if any(count for _, count in units) else [1] * len(units)
    return Fraction(sum(cost * n for (cost, _), n in zip(units, weights, strict=True)), sum(weights))


def _of_unit(amount: str, block: Block, parts: Sequence[Part]) -> int:
    if amount == "units":
        return 1
    if block.kind != "component":
        return sum(tensor.numel() for tensor in block.tensors)
    spent = block.parts if amount == "parameters" else ranked(parts)
    # One slice of each tensor, whatever the rank is now.
    slices = (as_units(tuple(block.tensor(part).shape), part.axis) for part in spent)
    return sum(outer * inner for outer, _, inner in slices)
