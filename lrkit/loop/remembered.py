"""Things that all kinds of statistics share: the outcome of an observation, and numbers of units that follow a resize."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import attrs
import torch
from torch import Tensor

from lrkit.metrics import Importance


@attrs.frozen
class Observed:
    """The outcome of one observation.

    Args:
        finite: False if a gradient was not finite; nothing was changed then.
        missing: how many of the tensors that train have no gradient: they count as zero.
        of: how many tensors train.
        silent: whether a metric reads layers, and no row has gone through any in this step.
        shown: names of the layers that rows have gone through.
    """

    finite: bool = True
    missing: int = 0
    of: int = 0
    silent: bool = False
    shown: frozenset[str] = frozenset()

    def warnings(self, step: int) -> Iterator[tuple[str, str]]:
        """Yield what is to be said of it once, each with a key."""
        if self.silent:
            yield (
                "silent",
                f"a metric reads layers, and nothing has come through any of them at step {step}: hooks do not run "
                "inside torch.compile (compile the model with the loss's backward outside, or not at all), nor before bind",
            )
        if self.missing:
            yield (
                "none",
                f"{self.missing} of {self.of} adapter tensors have no gradient at step {step}: they count as zero. Were "
                "they left out of the graph, or the gradients cleared before the step?",
            )
        if not self.finite:
            yield "finite", f"gradients are not finite at step {step}: the statistics skip this step"


@attrs.frozen(eq=False)
class Peers:
    """The processes that train one model together.

    Args:
        count: how many, this one included.
        tell: takes a tensor [*shape] that each of them has, and returns those of all [count, *shape], the same on each.
    """

    count: int
    tell: Callable[[Tensor], Tensor]


class Carried(Protocol):
    """Lets numbers of units [units] follow if units are cut or added."""

    def __call__(self, values: Tensor, new: float, /) -> Tensor:
        """Return the numbers of the units that there are now; `new` for a fresh one."""


def unchanged(values: Tensor, new: float, /) -> Tensor:
    """Return numbers of units as they are."""
    return values


class Place(Protocol):
    """Where a metric's units lie."""

    @property
    def device(self) -> torch.device:
        """Return their device."""

    @property
    def units(self) -> int:
        """Return how many there are."""


def none_of(metric: Importance, layout: Place) -> dict[str, Tensor]:
    """Return a metric's memory of units at first: zeros [units] by name."""
    return {name: torch.zeros(layout.units, dtype=torch.float32, device=layout.device) for name in metric.memory}


def carried_over(memory: Mapping[str, Tensor], carried: Carried) -> dict[str, Tensor]:
    """Return a metric's memory of units after units were cut or added: zero for those that are new."""
    return {name: carried(values, 0.0) for name, values in memory.items()}
