"""The protocol of a scheduler: how many units may be kept at a step, and when that is decided."""

import abc
from typing import Literal

import attrs

from lrkit.errors import LrkitError
from lrkit.settings import Amount, Time, count_or_share, in_steps, in_units, one_of


@attrs.frozen(kw_only=True)
class Scheduler(abc.ABC):
    """A budget over time: all of `start` until t_i, down to `target` at T - t_f, and `target` from then on.

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
    """

    target: Amount = attrs.field(default=0.5, validator=count_or_share())
    start: Amount = attrs.field(default=1.0, validator=count_or_share())
    warmup: Time = attrs.field(default=0, validator=count_or_share())
    final: Time = attrs.field(default=0, validator=count_or_share())
    interval: Time = attrs.field(default=1, validator=count_or_share(1))
    first_step: Literal[0, 1] = attrs.field(default=1, validator=one_of((0, 1)))

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
            units: all units of the policy.
            layers: adapted matrices, for amounts given as an average.

        Returns:
            An integer from 0 to `units`.
        """
        begin, end = self.bounds(total_steps)
        first = min(in_units(self.start, total=units, layers=layers), units)
        last = min(in_units(self.target, total=units, layers=layers), units)
        if step >= end:
            return last
        if step <= begin:
            return first
        return int(last + (first - last) * self.decay((step - begin) / (end - begin)))

    def due(self, step: int, *, total_steps: int) -> bool:
        """Whether a decision is taken after `step`: every `interval` steps after t_i, and always at T - t_f."""
        begin, end = self.bounds(total_steps)
        if step == end:
            return True
        return begin < step < end and step % max(1, in_steps(self.interval, total_steps)) == 0

    def end(self, total_steps: int) -> int:
        """T - t_f: the number of the step after which the last decision is taken; nothing changes sides after it."""
        return self.bounds(total_steps)[1]
