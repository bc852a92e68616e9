"""The look at a model before the first step that trains it: which modules have no gradient."""

import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lrkit.adapt.heads import head_parameters
from lrkit.adapt.tied import passed_by
from lrkit.adapt.weights import Weights
from lrkit.errors import LrkitError, LrkitWarning, listing
from lrkit.loop import liveness
from lrkit.loop.controller import Controller


def look(model: nn.Module, head: Sequence[str], weights: Weights, loop: Controller, ddp: Any) -> bool:
    """Name the modules that train and have no gradient, before the first step that has any.

    Args:
        model: the adapted model.
        head: names of its modules that train in full.
        weights: what trains.
        loop: the loop.
        ddp: the ``DistributedDataParallel`` that it runs in; None for none.

    Returns:
        Whether there were gradients to look at.

    Raises:
        LrkitError: DDP waits for a gradient that does not come.
    """
    loop.look()
    dead = loop.liveness.dead
    if dead is None and loop.run.modules:
        return False
    if cast := weights.cast():
        loop.warn("cast", cast)
    silent = liveness.unreached({name: list(head_parameters(model, [name])) for name in head})
    if silent:
        loop.warn(
            "head",
            f"no gradient reaches {listing(silent)}, which trains in full: the loss does not depend on it. Leave it out "
            "with train_also",
        )
    if passed := passed_by(model):
        loop.warn(
            "passed by",
            f"{listing(passed)} is tied to an adapted embedding and has not been called: a loss that reads its weight, "
            "as TRL's do, misses the ΔW that the model's own outputs have. Leave the embedding out of targets",
        )
    if ddp is not None and (dead or silent) and not (ddp.find_unused_parameters or ddp.static_graph):
        raise LrkitError(
            f"no gradient reaches {listing([*(dead or []), *silent])}, and DDP waits for it, so that others are not "
            "averaged: leave it out (targets, train_also), or use DistributedDataParallel(..., "
            "find_unused_parameters=True)"
        )
    return True


def stay(adapters: Mapping[str, nn.Module], binding: Any) -> None:
    """Leave a `Left` with the first adapter, if the method has anything to do while it is bound."""
    adaptive = binding.controller.policies or binding.penalty.exists
    for adapter in list(adapters.values())[:1] if adaptive else ():
        trained = {id(p) for each in adapters.values() for p in each.parameters() if p.requires_grad}
        vars(adapter)["left"] = Left(binding, trained)


class Left:
    """Stays with an adapter, and warns if an optimizer trains the adapters after the handle has ended.

    It holds neither the handle nor the model, so that both end when they would without it. A copy of the adapter has one
    that does nothing.

    Args:
        binding: what ends with the handle; None for nothing to watch.
        trained: ``id`` of each of the adapters' tensors.
    """

    def __init__(self, binding: object | None = None, trained: Collection[int] = ()) -> None:
        self._trained = set(trained)
        if binding is not None:
            self._binding = weakref.ref(binding)
            liveness.watch(self, Left.look)

    def __reduce__(self) -> tuple[Any, ...]:
        return Left, ()

    def look(self, optimizer: torch.optim.Optimizer, held: frozenset[int]) -> None:
        """Look at any optimizer before its step."""
        if self._binding() is None and not held.isdisjoint(self._trained):
            liveness.leave(self)
            warnings.warn(
                "an optimizer steps adapters whose handle is gone: nothing is adaptive. Keep what attach returns, "
                "adapted = lrkit.attach(...), and call adapted.bind(optimizer, total_steps=...) before training",
                LrkitWarning,
                stacklevel=2,
            )
