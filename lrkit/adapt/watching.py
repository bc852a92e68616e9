"""The look at a model before the first step that trains it: which modules have no gradient."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lrkit.adapt.heads import head_parameters
from lrkit.adapt.tied import passed_by
from lrkit.adapt.weights import Weights
from lrkit.errors import LrkitError, listing
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
