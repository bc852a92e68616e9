"""Step 0 of a run: decisions that are taken before the first optimizer step, and the batches that are seen before them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from lrkit.fit import remembers
from lrkit.loop import rules
from lrkit.loop.controller import Controller
from lrkit.loop.policy import PolicyState
from lrkit.settings import MOST_STEPS


def waiting(loop: Controller, *, calibrated: bool) -> list[PolicyState]:
    """Return the policies whose decision at step 0 is still to come.

    Args:
        loop: the loop.
        calibrated: those that ask for batches before it; False for those that ask for none.
    """
    taken = {decision.policy for decision in loop.history if decision.step == 0}
    states = [state for state in loop.policies if state.at_start and not loop.step and state.index not in taken]
    return [state for state in states if (state.policy.scheduler.calibration > 0) == calibrated]


def batches(loop: Controller) -> int:
    """Return how many batches the policies ask for that are still to be calibrated; 0 for none."""
    return max((state.policy.scheduler.calibration for state in waiting(loop, calibrated=True)), default=0)


def taken(loop: Controller, loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the first batches of a trainer's loader, as many as the policies ask for; warn if it has fewer."""
    asked, seen = batches(loop), 0
    for batch in islice(loader, asked):
        seen += 1
        yield batch
    if seen < asked:
        loop.warn(
            "calibration", f"the method asks for {asked} batches to calibrate by, and the training data has {seen}"
        )


def refusal(loop: Controller) -> str | None:
    """Say why a run cannot begin; None if no batches are missing."""
    if not (asked := batches(loop)):
        return None
    return (
        f"the method decides by batches that it sees before the first step ({asked} by its calibration): call "
        "adapted.calibrate(batches) before bind"
    )


def forward_alone(states: Sequence[PolicyState]) -> bool:
    """Return whether the policies read nothing that a backward pass computes."""
    return all(state.policy.metric.reads == "inputs" for state in states)


def observe(loop: Controller, states: Sequence[PolicyState]) -> set[str]:
    """Let policies observe one batch. Returns the layers that finite rows have gone through for them."""
    loop.look()
    for state in states:
        state.follow_device()
    return {name for state in states if (seen := loop.take_in(state, 0, None)).finite for name in seen.shown}


def decide(loop: Controller, states: Sequence[PolicyState], optimizer: torch.optim.Optimizer | None) -> bool:
    """Take the decisions of step 0.

    Args:
        loop: the loop.
        states: the policies that take one.
        optimizer: the one that is bound; None at the end of a calibration.

    Returns:
        As `Controller.after_step`.
    """
    before = [state.times for state in states]
    for state in states:
        # Nothing at step 0 depends on the length of the run.
        state.times = rules.timetable(state, loop.total_steps or MOST_STEPS)
        metric, scheduler = state.policy.metric, type(state.policy.scheduler).__name__
        if not loop.total_steps and not state.times.last:  # `bind` will pass over a schedule that has ended
            rules.forewarn(state, state.times, loop.warn)
        lose = state.times.budget(0) < state.costs.whole
        if lose and remembers(metric) and not state.statistics.observations:
            loop.warn(
                f"unseen {state.index}",
                f"{scheduler} decides at step 0, when {metric!r} has seen nothing: all units count alike, and the first of "
                "them are kept. Let the scheduler calibrate, or begin with all units (start=1.0)",
            )
    try:
        return loop.act(states, optimizer)
    finally:
        for state, times in zip(states, before, strict=True):
            state.times = times
