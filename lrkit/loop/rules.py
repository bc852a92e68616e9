"""Questions to a policy before a run: does its schedule fit, what will it miss, what would another length change."""

from collections.abc import Callable, Iterator, Sequence

from lrkit.errors import LrkitError, shown
from lrkit.loop.course import course, is_known
from lrkit.loop.policy import PolicyState
from lrkit.schedulers import Timetable
from lrkit.settings import MOST_STEPS


def timetable(state: PolicyState, total_steps: int) -> Timetable:
    """Bind a policy's schedule to a run.

    Raises:
        LrkitError: more steps than any run has, phases that do not fit, or a budget that would grow.
    """
    if total_steps > MOST_STEPS:
        raise LrkitError(f"total_steps must be at most {MOST_STEPS:,}, not {shown(total_steps)}")
    scheduler, times = state.policy.scheduler, state.over(total_steps)
    whole, layer = state.costs.whole, state.costs.layer
    if isinstance(scheduler.target, int) and scheduler.target * layer > whole:
        many = (
            f" is {scheduler.target * layer:,} {scheduler.amount} in {state.layers} layers" if state.layers > 1 else ""
        )
        raise LrkitError(
            f"{type(scheduler).__name__}.target = {scheduler.target}{many}, and there are {whole:,} {scheduler.amount} at "
            f"first: it must be at most {'their mean' if many else f'{whole:,}'}, or a share such as 0.5"
        )
    first, last = times.budget(-1), times.budget(total_steps + 1)
    if last > first and not state.policy.action.grows:
        raise LrkitError(
            f"{type(scheduler).__name__}: target {scheduler.target!r} is {last} of {times.units} {scheduler.amount}, "
            f"above start {scheduler.start!r}, which is {first}: a budget never grows"
        )
    return times


def objection(policies: Sequence[PolicyState], step: int, before: int | None, total_steps: int) -> str | None:
    """Say why a run that has begun cannot go on as one of so many steps; None if it can.

    Once every schedule has ended, nothing depends on the total any more, and the run may be longer.

    Args:
        policies: its policies.
        step: steps that have been taken.
        before: its total steps until now; None if it was not bound.
        total_steps: its total steps from now on.
    """
    if before is None or not step or before == total_steps:
        return None
    if total_steps < step:
        return f"total_steps={total_steps}, but {step} steps have been taken: it counts the whole run"
    changes = []
    for state in policies:
        if not state.ended:
            changes.append(_change(step, state.over(before), state.over(total_steps)))
    if not changes:
        return None
    return (
        f"total_steps={total_steps}, but this run was begun with {before}, and its schedule has not ended: the schedule "
        f"would be another one ({'; '.join(changes)}). Go on with {before}, or attach anew"
    )


def earlier(step: int, total_steps: int | None, there: int, steps: int, *, skipping: bool) -> int:
    """Return the steps that a run took before the training that a trainer goes on with.

    In a second training a trainer counts from 0 again, and the method goes on: it is ahead by the steps before. A scaler of
    float16 skips steps, which a trainer counts and a method does not.

    Args:
        step: steps that the method has taken.
        total_steps: its total steps until now; None if it was not bound.
        there: the trainer's count of the steps of this training.
        steps: the steps of this training.
        skipping: whether a scaler may have skipped some.

    Raises:
        LrkitError: the method's state is not of the trainer's step.
    """
    ahead, before = step - there, (total_steps or 0) - steps
    if not ahead or total_steps == ahead + steps:
        return ahead
    if skipping and before >= 0 and 0 <= step - before <= there:
        return before
    raise LrkitError(f"the Trainer resumes at step {there}, the lrkit state beside it is of step {step}")


def unfinished(policies: Sequence[PolicyState], step: int, total_steps: int | None) -> str | None:
    """Say what training that ends now leaves undone; None if every last decision has been taken."""
    # Of a decision that no step of the run is due for `forewarnings` has spoken.
    ends = [s.times.number(s.times.last) for s in policies if not s.ended and s.times and s.times.last > step]
    if not ends:
        return None
    return (
        f"training ends at step {step} of {total_steps}, before the last decision at step {max(ends)}: the budget was not "
        "reached"
    )


def over(state: PolicyState, step: int, total_steps: int) -> str | None:
    """Say that a policy's schedule has ended and the run goes on, if units would have come back; None if not."""
    scheduler, action = state.policy.scheduler, state.policy.action
    turns = scheduler.ending in ("open", "every-step") or (action.fate == "frozen" and not action.final)
    if not (state.ended and turns and step and total_steps > step):
        return None
    return (
        f"{action!r}: its schedule ended with step {step} of the run, and the next {total_steps - step} steps are trained "
        f"with what the last decision left, {int(state.kept.sum())} of {len(state.kept)} units. For further decisions "
        "train all steps in one run, or attach anew"
    )


def forewarn(state: PolicyState, times: Timetable, warn: Callable[[str, str], None]) -> None:
    """Warn once of each thing that a run will not reach by a policy's schedule, bound to the run."""
    for key, message in forewarnings(state, times):
        warn(f"{key} {state.index}", message)


def forewarnings(state: PolicyState, times: Timetable) -> Iterator[tuple[str, str]]:
    """Yield a key and a message for each thing that a run will not reach by its schedule.

    Args:
        state: the policy.
        times: its schedule, bound to the run.
    """
    scheduler, action = state.policy.scheduler, state.policy.action
    name, end = type(scheduler).__name__, times.number(times.last)
    if not (1 <= times.last <= times.total_steps or (times.last == 0 and times.at_start)):
        first = times.number(1)
        yield (
            "end",
            f"{name}: the last decision is due at step {end}, and the run's steps are numbered {first} to "
            f"{times.number(times.total_steps)}: the budget will not be reached",
        )
        return
    if (
        action.unit == "component"
        and action.fate in ("masked", "removed")
        and any(p.started for p in state.blocks[0].parts)
    ):
        yield (
            "started",
            f"{action!r} takes components out whose increment is counted from what they began with: each one that goes "
            "takes that piece of the base's weight with it",
        )
    budget = times.budget(times.last)
    if not budget and action.fate == "frozen" and not action.final:
        yield (
            "none",
            f"{name}.target = {scheduler.target!r} is none of {state.costs.whole:,} {scheduler.amount}: after the decision "
            f"at step {0 if times.at_start and not times.budget(0) else end} nothing trains that {action!r} acts on, if it "
            "keeps to its budget",
        )
    if not state.fate.counts and is_known(action) and budget < state.costs.least:
        yield (
            "nothing",
            f"{name}.target = {scheduler.target!r}: after the last decision, at step {end}, no component is left, and the "
            "model is the one before fine-tuning but for its head",
        )
    there = course(times, action, state.units)[-1][1] if action.grows else budget
    if there != budget:
        yield (
            "short",
            f"{action!r}: after the last decision, at step {end}, there will be {there} components of a budget of {budget}: "
            "give it more decisions, or more at each",
        )


def _change(step: int, before: Timetable, after: Timetable) -> str:
    """Say what another number of total steps would change after `step` steps."""
    ends = [times.number(times.last) for times in (after, before)]
    budgets = [times.budget(step) for times in (after, before)]
    return (
        f"last decision at step {ends[0]} instead of {ends[1]}, budget at step {before.number(step)} {budgets[0]} instead "
        f"of {budgets[1]} of {before.units} {before.scheduler.amount}"
    )
