"""Decisions of policies, one record each. Nothing here needs torch: the records are read back without it."""

import attrs


@attrs.frozen
class Decision:
    """A decision of one policy, after one optimizer step or before the first.

    Args:
        step: how many optimizer steps had been taken: 1, 2, ...; 0 for a decision before the first.
        policy: index into ``method.policies``.
        budget: units that may be kept, or what they may cost (`amount`); all of them if the action goes by no number
            (`lrkit.actions.Verdict.budget`).
        kept: units that are kept.
        units: all units of the policy; if its action adds units, those that the schedule has room for.
        threshold: the lowest score among the kept units; None if none is kept.
        lost: names of the units that were kept before and are not now.
        returned: names of the units that were not kept before and are now.
        fresh: names of the units that were added. No number is given twice.
        amount: in what `budget`, `spent` and `whole` are counted: ``"units"``, ``"parameters"`` or ``"flops"``
            (multiply-adds per token), as the scheduler has it (`lrkit.Scheduler`).
        spent: what the kept units cost. For units as many as are kept.
        whole: what all units of the policy cost. For units their number.
    """

    step: int
    policy: int
    budget: int
    kept: int
    units: int
    threshold: float | None
    lost: tuple[str, ...]
    returned: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    amount: str = "units"
    spent: int = attrs.field(default=attrs.Factory(lambda self: self.kept, takes_self=True))
    whole: int = attrs.field(default=attrs.Factory(lambda self: self.units, takes_self=True))

    @property
    def before(self) -> int:
        """Units that were in effect before it."""
        return self.kept + len(self.lost) - len(self.returned) - len(self.fresh)

    @property
    def began(self) -> int:
        """What was in effect before it as the budget is counted, if it is the first of its policy."""
        return self.before if self.amount == "units" else self.whole
