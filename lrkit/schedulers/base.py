"""The protocol of a scheduler: how many units may be kept at a step, and when that is decided."""

import abc
from typing import Literal

import attrs

from lrkit.schedulers import timetable
from lrkit.settings import Amount, Time, count_or_share, one_of


@attrs.frozen(kw_only=True)
class Amounts:
    """How much may be kept: at first, in the end, and in what that is counted. `Scheduler` says what each setting means."""

    target: Amount = attrs.field(default=0.5, validator=count_or_share())
    start: Amount = attrs.field(default=1.0, validator=count_or_share())
    amount: Literal["units", "parameters", "flops"] = attrs.field(
        default="units", validator=one_of(("units", "parameters", "flops"))
    )


@attrs.frozen(kw_only=True)
class Scheduler(Amounts, abc.ABC):
    """A budget over time: all of `start` until t_i, from there to `target` at T - t_f, and `target` from then on.

    It falls, or stays. If the action adds units (`lrkit.Action.grows`) it may rise as well.

    A subclass (``@attrs.frozen(kw_only=True)``) writes `decay` alone. ``scheduler.over(total_steps, units=, layers=)`` binds
    it to a run: a `Timetable`, whose steps are 1, 2, .... Times are steps (``int``) or a share of the total
    steps (``float``); amounts are units for each adapted matrix on average (``int``) or a share of all units
    (``float``), or what these cost (`amount`).

    Args:
        target: b_T, what is kept in the end. ``8`` is an average rank of 8; ``0.0`` is nothing.
        start: b_0, what is kept in the beginning: all units.
        amount: in what the budget is counted. ``"units"``: each unit is one, as the papers have it. ``"parameters"``: a unit
            costs its trainable entries. ``"flops"``: it costs the multiply-adds per token that are spent on it: for a
            component one for each entry of its slices in all of the adapter's tensors, whether they train or not; for a
            matrix one for each entry, the part of the weight gradient that freezing saves. A target of n is then what n
            units in every layer cost, and a share one of the whole cost; the best units are taken in turn, each if it
            still fits (`lrkit.actions.best`).
        warmup: t_i, steps before the first decision.
        final: t_f, steps at the end during which the budget and what is kept are fixed.
        interval: ΔT, steps between decisions. Between them, what lost may change and win the next time.
        first_step: number of the first optimizer step: 1 in the papers' algorithms, 0 in their released code and PEFT.
        rounding: what becomes of a budget between two whole numbers. ``"down"``: it is cut to the lower one, as AdaLoRA's
            released code and PEFT have it. ``"up"``: the higher one. It decides when the last unit goes: of N matrices that
            AFLoRA freezes, ``"down"`` keeps ⌊N (1 - r)⌋, so that the last one freezes where N (1 - r) falls below 1;
            ``"up"`` freezes ⌊N r⌋, and the last one goes at T - t_f.
        ending: what happens at T - t_f, in five versions. ``"fixed"``: scores are measured up to and at T - t_f, the last
            decision is taken there whatever the interval, and what is kept is fixed (the paper's "fix the resulting
            budget distribution"). ``"peft"``: the same, but scores are last measured one step before. ``"released"``: as
            PEFT measures, but at T - t_f it decides only where the interval divides it, and last at T - t_f + 1
            (AdaLoRA's and AFLoRA's released code). ``"open"``: scores and decisions go on, at the target, to the end.
            ``"every-step"``: the same, but at T - t_f it decides only where the interval divides it, and from then on after
            each step (PLATON's and LoSparse's released code).
    """

    warmup: Time = attrs.field(default=0, validator=count_or_share())
    final: Time = attrs.field(default=0, validator=count_or_share())
    interval: Time = attrs.field(default=1, validator=count_or_share(1))
    first_step: Literal[0, 1] = attrs.field(default=1, validator=one_of((0, 1)))
    rounding: Literal["down", "up"] = attrs.field(default="down", validator=one_of(("down", "up")))
    ending: Literal["fixed", "peft", "released", "open", "every-step"] = attrs.field(
        default="fixed", validator=one_of(("fixed", "peft", "released", "open", "every-step"))
    )

    calibration = 0
    """How many batches the metric sees before the decision at step 0 (`lrkit.Adapted.calibrate`); 0 for none. A
    scheduler that asks for some has it as a setting, as `lrkit.schedulers.Once` does."""
    at_start = False
    """Whether a decision is taken at step 0 as well, before the first optimizer step. Asking for calibration implies it."""

    @abc.abstractmethod
    def decay(self, progress: float) -> float:
        """Return how far from `target` to `start` the budget is, in [0, 1], after progress 0 and before 1. Never increasing.

        For example a straight line is ``1 - progress``.
        """

    over = timetable.over
    budget = timetable.budget
