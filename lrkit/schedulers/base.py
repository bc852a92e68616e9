"""The protocol of a scheduler: how many units may be kept at a step, and when that is decided."""

import abc
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
        ending: what happens at T - t_f, in four versions. ``"fixed"``: scores are measured up to and at T - t_f, the last
            decision is taken there whatever the interval, and what is kept is fixed (the paper's "fix the resulting
            budget distribution"). ``"peft"``: the same, but scores are last measured one step before. ``"released"``: as
            PEFT measures, but at T - t_f it decides only where the interval divides it, and last at T - t_f + 1
            (AdaLoRA's and AFLoRA's released code). ``"open"``: scores and decisions go on, at the target, to the end.
    """

    target: Amount = attrs.field(default=0.5, validator=count_or_share())
    start: Amount = attrs.field(default=1.0, validator=count_or_share())
    warmup: Time = attrs.field(default=0, validator=count_or_share())
    final: Time = attrs.field(default=0, validator=count_or_share())
    interval: Time = attrs.field(default=1, validator=count_or_share(1))
    first_step: Literal[0, 1] = attrs.field(default=1, validator=one_of((0, 1)))
    ending: Literal["fixed", "peft", "released", "open"] = attrs.field(
        default="fixed", validator=one_of(("fixed", "peft", "released", "open"))
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

        b(t) = int(b_T + (b_0 - b_T) · decay((t - t_i) / (T - t_i - t_f))) between t_i and T - t_f, exact at both ends.
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
        low, high, share = self._between(step, total_steps, units, layers)
        return int(low + (high - low) * share)

    def share(self, step: int, *, total_steps: int, units: int, layers: int) -> float:
        """The budget as a share of all units in [0, 1], before it is cut to an integer. Arguments as in `budget`."""
        low, high, share = self._between(step, total_steps, units, layers)
        return (low + (high - low) * share) / units

    def _between(self, step: int, total_steps: int, units: int, layers: int) -> tuple[int, int, float]:
        """b_T, b_0, and where between them the budget is."""
        begin, end = self.bounds(total_steps)
        high = min(in_units(self.start, total=units, layers=layers), units)
        low = min(in_units(self.target, total=units, layers=layers), units)
        if step >= end:
            return low, high, 0.0
        return low, high, 1.0 if step <= begin else self.decay((step - begin) / (end - begin))

    def due(self, step: int, *, total_steps: int) -> bool:
        """Whether a decision is taken after `step`: every `interval` steps after t_i until the last one."""
        begin, end = self.bounds(total_steps)
        if step == self.end(total_steps) or (step == end and self.ending != "released"):
            return True
        return begin < step <= self.end(total_steps) and step % max(1, in_steps(self.interval, total_steps)) == 0

    def decisions(self, total_steps: int) -> Sequence[range]:
        """The steps of a run after which `due` is true, in order: a long run is counted without walking through it."""
        begin, end = self.bounds(total_steps)
        first, last = self.first_step, self.first_step + total_steps - 1
        every = max(1, in_steps(self.interval, total_steps))
        final = self.end(total_steps)
        alone = sorted({final} | ({end} if self.ending != "released" else set()))
        found, at = [], begin // every * every + every
        for stop in alone:
            found += [range(at, stop, every), range(stop, stop + 1)]
            at = max(at, stop // every * every + every)
        cut = (range(max(r.start, first + (r.start - first) % r.step), min(r.stop, last + 1), r.step) for r in found)
        return [each for each in cut if each]

    def observes(self, step: int, *, total_steps: int) -> bool:
        """Whether scores are measured at `step`."""
        end = self.bounds(total_steps)[1]
        return self.ending == "open" or step < end or (step == end and self.ending == "fixed")

    def end(self, total_steps: int) -> int:
        """The number of the step after which the last decision is taken; nothing changes sides after it."""
        end = self.bounds(total_steps)[1]
        return {"fixed": end, "peft": end, "released": end + 1, "open": self.first_step - 1 + total_steps}[self.ending]
