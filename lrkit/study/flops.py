"""The FLOPs of a run: of a row in a step, of a row in a calibration, and of all steps together."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lrkit.accounting import flops, passes
from lrkit.adapt.adapted import Adapted
from lrkit.adapt.taps import Taps
from lrkit.loop import beginning
from lrkit.study.files import RunFlops
from lrkit.study.run_settings import RunSettings


def of_step(adapted: Adapted, batch: Mapping[str, Tensor]) -> int:
    """Count a forward and a backward pass of a batch."""
    return flops(adapted.model, batch).total


def of_calibration(adapted: Adapted, batch: Mapping[str, Tensor]) -> int:
    """Count a batch of the calibration that is to come, with the products that metrics of layers make of it.

    It has a backward pass if a metric reads gradients. What torch does not count, such as a singular value decomposition, is
    not in it. Nothing is remembered of the batch.
    """
    states = beginning.waiting(adapted.controller, calibrated=True)
    forward = beginning.forward_alone(states)
    try:
        with Taps(adapted.model).hung(states, forward=forward), torch.set_grad_enabled(not forward):
            return passes(adapted.model, batch).total
    finally:
        for state in states:
            state.begin()


def run_flops(log: Sequence[dict[str, Any]], settings: RunSettings) -> RunFlops:
    """Sum up the FLOPs of a whole run from those that were counted at some of its steps.

    Between two of these, half the steps cost as much as each. A calibration before the first step is in the sum.

    Args:
        log: the Trainer's.
        settings: how the run trained.
    """
    points = [(line["step"], line["flops_of_a_row"]) for line in log if "flops_of_a_row" in line]
    last = points[-1][0]
    total = sum((b - a) * (at_a + at_b) / 2 for (a, at_a), (b, at_b) in pairwise(points))
    mean = total / (last - points[0][0]) if last > points[0][0] else points[0][1]
    size = settings.batch_size
    before = sum(line.get("flops_of_calibration", 0.0) for line in log)
    return RunFlops(
        run=(mean * (last + 1) + before) * size, first_step=points[0][1] * size, last_step=points[-1][1] * size
    )
