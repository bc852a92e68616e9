"""The protocol of a scheduler: how many units may be kept at a step, and when that is decided."""

import abc
import math
from collections.abc import Sequence
from typing import Literal

import attrs

from lrkit.errors import LrkitError
from lrkit.settings import Amount, Time, count_or_share, in_steps, in_units, one_of


@attrs.frozen(kw_only=True)
class Scheduler(abc.ABC):
    """A budget over time: all of `start` until t_i, from there to `target` at T - t_f, and `target` from then on.

    It falls, or stays. Where the action adds units (`lrkit.Action.grows`) it may rise as well.

    A subclass (``@attrs.frozen(kw_only=True)``) writes `decay` alone. Times are steps (``int``) or a share of the total
    steps (``float``); amounts are units for each adapted matrix on average (``int``) or a share of all units
    (``float``).

    Args:
        target: b_T, what is kept in the end. ``8`` is an average rank of 8; ``0.0`` is nothing.
        start: b_0, what is kept in the beginning: all units.
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

    target: Amount = attrs.field(default=0.5, validator=count_or_share())
    start: Amount = attrs.field(default=1.0, validator=count_or_share())
    warmup: Time = attrs.field(default=0, validator=count_or_share())
    final: Time = attrs.field(default=0, validator=count_or_share())
    interval: Time = attrs.field(default=1, validator=count_or_share(1))
    first_step: Literal[0, 1] = attrs.field(default=1, validator=one_of((0, 1)))
    rounding: Literal["down", "up"] = attrs.field(default="down", validator=one_of(("down", "up")))
    ending: Literal["fixed", "peft", "released", "open", "every-step"] = attrs.field(
        default="fixed", validator=one_of(("fixed", "peft", "released", "open", "every-step"))
    )

    @abc.abstractmethod
    def decay(self, progress: float) -> float:
        """How far from `target` to `start` the budget is: 1 at progress 0, 0 at progress 1, never increasing."""

    def bounds(self, total_steps: int) -> tuple[int, int]:
        """(t_i, T - t_f) in steps. Raises LrkitError where warm-up and final phase do not fit into the run."""
        warmup, final = in_steps(self.warmup, total_steps), in_steps(self.final, total_steps)
        if warmup + final > total_steps:
            raise LrkitError(
                f"{type(self).__name__}: warmup {warmup} + final {final} steps are more than total_steps {total_steps}"
            )
        return warmup, total_steps - final

    def budget(self, step: int, *, total_steps: int, units: int, layers: int) -> int:
        """Units that may be kept after `step`.

        b(t) = b_T + (b_0 - b_T) · decay((t - t_i) / (T - t_i - t_f)) between t_i and T - t_f, made a whole number as
        `rounding` says, and exact at both ends.
        With ``decay = (1 - u)³`` it is AdaLoRA's budget (arXiv 2303.10512, Eq. 14, whose printed numerator t - t_i - t_f
        is a misprint: it gives neither end) and one minus AFLoRA's freezing fraction (arXiv 2403.13269, section 4).

        Args:
            step: t, the number of the optimizer step just taken.
            total_steps: T.
            units: all units of the policy, those that the action may still add included.
            layers: adapted matrices, for amounts given as an average.

        Returns:
            An integer from 0 to `units`.
        """
        share, ends = self._between(step, total_steps), []
        for amount in (self.target, self.start):
            ends.append(min(in_units(amount, total=units, layers=layers), units))
        low, high = ends
        if share in (0.0, 1.0):
            return low if share == 0.0 else high
        budget = self._amount(share, units, layers)
        whole = math.ceil(budget) if self.rounding == "up" else int(budget)
        # An end that is a share has been rounded to whole units, which a budget beside it must not pass.
        return min(max(whole, min(ends)), max(ends)) if 0.0 < share < 1.0 else whole

    def share(self, step: int, *, total_steps: int, units: int, layers: int) -> float:
        """The budget as a share of all units in [0, 1], before anything is made a whole number. Arguments as in `budget`."""
        share = self._between(step, total_steps)
        if isinstance(self.target, float) and isinstance(self.start, float):
            return self.target + (self.start - self.target) * share
        return self._amount(share, units, layers) / units

    def _amount(self, share: float, units: int, layers: int) -> float:
        """The budget in units, before it is made a whole number, so far between b_T (0) and b_0 (1)."""
        low, high = (
            min(amount * layers, units) if isinstance(amount, int) else amount * units
            for amount in (self.target, self.start)
        )
        return low + (high - low) * share

    def _between(self, step: int, total_steps: int) -> float:
        """Where the budget is between b_T (0) and b_0 (1)."""
        begin, end = self.bounds(total_steps)
        if step >= end:
            return 0.0
        return 1.0 if step <= begin else self.decay((step - begin) / (end - begin))

    def due(self, step: int, *, total_steps: int) -> bool:
        """Whether a decision is taken after `step`: every `interval` steps after t_i until the last one."""
        begin, end = self.bounds(total_steps)
        last = self.end(total_steps)
        if step == last or (step == end and self.ending not in ("released", "every-step")):
            return True
        if self.ending == "every-step" and end < step <= last:
            return True
        return begin < step <= last and step % max(1, in_steps(self.interval, total_steps)) == 0

    def decisions(self, total_steps: int) -> Sequence[range]:
        """The steps of a run after which `due` is true, in order: a long run is counted without walking through it."""
        begin, end = self.bounds(total_steps)
        first, last = self.first_step, self.first_step + total_steps - 1
        every = max(1, in_steps(self.interval, total_steps))
        final = self.end(total_steps)
        alone = sorted({final} | ({end} if self.ending not in ("released", "every-step") else set()))
        found, at = [], begin // every * every + every
        if self.ending == "every-step":
            found, at, alone = [range(at, min(end + 1, final), every), range(end + 1, final)], final + 1, [final]
        for stop in alone:
            found += [range(at, stop, every), range(stop, stop + 1)]
            at = max(at, stop // every * every + every)
        cut = (range(max(r.start, first + (r.start - first) % r.step), min(r.stop, last + 1), r.step) for r in found)
        return [each for each in cut if each]

    def observes(self, step: int, *, total_steps: int) -> bool:
        """Whether scores are measured at `step`."""
        end = self.bounds(total_steps)[1]
        return self.ending in ("open", "every-step") or step < end or (step == end and self.ending == "fixed")

    def end(self, total_steps: int) -> int:
        """The number of the step after which the last decision is taken; nothing changes sides after it."""
        end, last = self.bounds(total_steps)[1], self.first_step - 1 + total_steps
        ends = {"fixed": end, "peft": end, "released": end + 1, "open": last, "every-step": last}
        return ends[self.ending]
