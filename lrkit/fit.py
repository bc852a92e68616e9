"""Rules for what fits what: one for each way in which four parts cannot work together.

A rule takes the parts that it compares, and gives the reason why they do not fit, with both sides named, or None. For
example, `no_units` refuses `Freeze` on a parameterization that has no matrix which trains.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import get_args

import torch
from torch import Tensor

from lrkit.actions import Action, Ballot, Fate, unsound
from lrkit.metrics import Importance
from lrkit.parameterizations import Parameterization
from lrkit.ranks import most_of
from lrkit.schedulers import Scheduler
from lrkit.settings import MOST_STEPS
from lrkit.units import UnitKind

_ANY = 2**31 - 1
"""More units than any layer or model has."""

_READS: Mapping[str, tuple[str, tuple[str, ...] | None]] = {
    "all": ("", None),
    "core": ("the core value of a component", ("component",)),
    "component": ("whole components", ("component",)),
    "nothing": ("", None),
    "inputs": ("layers one by one", ("component", "matrix", "layer")),
    "gradient": ("layers one by one", ("component", "matrix", "layer")),
}
"""Every signal that a metric may read: what that is, and the kinds of units that have it; None for any."""


def refusal(parameterization: Parameterization, metric: Importance, scheduler: Scheduler, action: Action) -> str | None:
    """Return why these four cannot work together, by the first rule that refuses; None if they can."""
    return (
        unknown_fate(action)
        or refused_by_action(action, parameterization)
        or no_start_for_growth(action, parameterization)
        or no_units(action, parameterization)
        or unknown_signal(metric)
        or other_units_read(metric, action)
        or no_core_read(metric, parameterization)
        or no_entries(metric, action)
        or budget_that_rises(scheduler, action)
        or budget_above_units(scheduler, action, parameterization)
        or budget_in_costs(scheduler, action)
        or no_optimizer_yet(scheduler, action)
        or nothing_seen_yet(metric, scheduler)
    )


def unknown_fate(action: Action) -> str | None:
    """Refuse an action that does not say what becomes of a unit that loses."""
    fate, words = getattr(action, "fate", None), get_args(Fate)
    return None if fate in words else f"action {action!r}: fate must be one of {', '.join(words)}, not {fate!r}"


def refused_by_action(action: Action, parameterization: Parameterization) -> str | None:
    """Ask the action itself."""
    reason = action.refusal(parameterization)
    return None if reason is None else f"{_apart(action, parameterization)}: {reason}"


def no_start_for_growth(action: Action, parameterization: Parameterization) -> str | None:
    """Refuse to add components if nothing says how they begin, or if layers would have to grow together."""
    begins = action.unit == "component" and type(parameterization).fresh is not Parameterization.fresh
    shares = any(part.shared for part in parameterization.parts)
    if not action.grows or (begins and not shares):
        return None
    return (
        f"{_apart(action, parameterization)}: the action adds rank components, and this parameterization does not say how "
        f"a new one begins{': its layers share tensors, so that none can grow alone' if shares else ''}"
    )


def no_units(action: Action, parameterization: Parameterization) -> str | None:
    """Refuse an action whose units do not exist, or never train."""
    if most_units(parameterization, action.unit):
        return None
    return (
        f"{_apart(action, parameterization)}: it acts on units of kind {action.unit!r}, and there are none that train"
    )


def unknown_signal(metric: Importance) -> str | None:
    """Refuse a metric that reads nothing that the loop knows."""
    if metric.reads in _READS:
        return None
    return f"metric {metric!r}: reads must be one of {', '.join(_READS)}, not {metric.reads!r}"


def other_units_read(metric: Importance, action: Action) -> str | None:
    """Refuse to score units by a signal that they do not have, such as matrices by core values."""
    what, kinds = _READS[metric.reads]
    if kinds is None or action.unit in kinds:
        return None
    return (
        f"metric {metric!r} does not fit action {action!r}: the metric reads {what}, and the action's units are of kind "
        f"{action.unit!r}"
    )


def no_core_read(metric: Importance, parameterization: Parameterization) -> str | None:
    """Refuse to read core values if none train."""
    if metric.reads != "core" or any(part.core and part.trains for part in parameterization.parts):
        return None
    return (
        f"metric {metric!r} does not fit parameterization {parameterization!r}: the metric reads core values, and there "
        "are none"
    )


def budget_that_rises(scheduler: Scheduler, action: Action) -> str | None:
    """Refuse a target above the start, unless the action adds units."""
    start, target = scheduler.start, scheduler.target
    if action.grows or type(target) is not type(start) or target <= start:
        return None
    return (
        f"{type(scheduler).__name__}.target = {target!r} is above start = {start!r}, and {action!r} adds no units: such a "
        "budget never grows"
    )


def budget_above_units(scheduler: Scheduler, action: Action, parameterization: Parameterization) -> str | None:
    """Refuse to keep more units per layer than a layer has, unless the action adds some."""
    most = most_units(parameterization, action.unit)
    for name in ("start", "target"):
        amount = getattr(scheduler, name)
        if isinstance(amount, int) and amount > most and not action.grows:
            what = "initial rank" if action.unit == "component" else f"number of units ({action.unit})"
            each = "" if action.unit == "component" else " in each layer"
            return (
                f"{type(scheduler).__name__}.{name} = {amount} is above the {what} {most}{each} of {parameterization!r}: it "
                f"must be at most {most}, or a share of all such as 0.5"
            )
    return None


def budget_in_costs(scheduler: Scheduler, action: Action) -> str | None:
    """Refuse a budget in costs if the action cannot keep to one; and a ranking by cost if every unit costs the same."""
    if scheduler.amount == "units":
        if getattr(action, "by", None) != "score-per-cost":
            return None
        return (
            f'{action!r} ranks by = "score-per-cost", and {type(scheduler).__name__}.amount is "units", of which each '
            'costs 1: amount must be "parameters" or "flops", or by "score"'
        )
    if action.grows:
        why = "the action adds units, and goes by their number"
    elif action.turnover(1, 1, 1) is None:
        why = "the action goes by no budget"
    elif not _keeps_to_costs(action):
        why = "the action goes by the number of units, whatever they cost (`lrkit.actions.best` would not)"
    else:
        return None
    return f'{type(scheduler).__name__}.amount = "{scheduler.amount}" does not fit action {action!r}: {why}'


def no_optimizer_yet(scheduler: Scheduler, action: Action) -> str | None:
    """Refuse a proximal step, which reads an optimizer's rates, in a decision that is taken before there is an optimizer."""
    if not scheduler.calibration or type(action).proximal is Action.proximal:
        return None
    return (
        f"scheduler {scheduler!r} does not fit action {action!r}: it decides by batches before any optimizer is bound, and "
        "the action's proximal step is called with one"
    )


def no_entries(metric: Importance, action: Action) -> str | None:
    """Refuse an action that goes by entry-wise scores beside a metric that scores units as they are."""
    if metric.reads not in ("nothing", "inputs", "gradient"):
        return None
    asked = []

    def entries() -> Tensor:
        asked.append(True)
        return torch.tensor([3.0, 2.0, 1.0])

    with suppress(Exception):  # whatever a plug-in's own choice may raise on units that are made up
        action.decide(_three_units(None, entries))
    if not asked:
        return None
    return (
        f"metric {metric!r} does not fit action {action!r}: the action asks for scores of entries, and it scores units"
    )


def _three_units(costs: Tensor | None, entries: Callable[[], Tensor] | Tensor) -> Ballot:
    """Return a ballot of three made-up units of one layer and a budget of 2, of which the best has three entries."""
    scores, sizes, places = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3, 1, 1]), torch.zeros(3, dtype=torch.long)
    everyone = torch.ones(3, dtype=torch.bool)
    return Ballot(scores, everyone, 2, 0.4, entries, places + 1, places, sizes, layers=1, costs=costs)


def nothing_seen_yet(metric: Importance, scheduler: Scheduler) -> str | None:
    """Refuse to decide at step 0 alone by a metric that goes by what it has seen, if it is shown no batches before."""
    if not scheduler.at_start or scheduler.calibration or not remembers(metric):
        return None
    if scheduler.over(MOST_STEPS, units=1, layers=1).last > 0:  # later decisions go by what it has seen
        return None
    return (
        f"metric {metric!r} does not fit scheduler {scheduler!r}: it decides once, before the metric has seen "
        "anything: calibration must be 1 batch or more"
    )


def remembers(metric: Importance) -> bool:
    """Say whether a metric goes by what it has seen, and not by the weights or by chance alone."""
    return metric.reads in ("inputs", "gradient") or bool(getattr(metric, "buffers", False))


def _keeps_to_costs(action: Action) -> bool:
    """Try an action's choice on three units, of which the best alone costs more than the budget."""
    ballot = _three_units(torch.tensor([3, 1, 1]), torch.tensor([3.0, 2.0, 1.0]))
    try:
        return unsound(action, action.decide(ballot), ballot, 3) is None
    except Exception:  # whatever a plug-in's own choice may raise on units that are made up
        return False


def most_units(parameterization: Parameterization, kind: UnitKind) -> int:
    """Return the largest number of units of a kind that one layer, or for blocks a model, may have; 0 if none train."""
    live = [part for part in parameterization.parts if part.trains]
    matrices = sum(part.matrix for part in live)
    if kind == "component":
        rank = _ANY if parameterization.components is None else most_of(parameterization.components)
        return rank if any(part.axis is not None for part in live) else 0
    if kind == "block":  # as many as the model has
        own = type(parameterization).own_parameters is not Parameterization.own_parameters
        return _ANY if live or own else 0
    return matrices if kind == "matrix" else min(matrices, 1)


def _apart(action: Action, parameterization: Parameterization) -> str:
    return f"action {action!r} does not fit parameterization {parameterization!r}"
