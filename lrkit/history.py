"""Decisions as they are remembered, written to ``history.jsonl`` and read back: one class for all three. No torch here."""

import attrs


@attrs.frozen
class Decision:
    """One policy's decision after one optimizer step.

    For example, a policy of 10 units that kept 6 and takes 2 of them away gives ``kept=4`` and two names in `lost`.

    Args:
        step: optimizer steps taken before it: 1, 2, ...
        policy: index into ``method.policies``.
        budget: units that may be kept; all of them if the action asks for no number (`Action.budgeted`).
        kept: units that are kept.
        units: all units of the policy; if its action adds units, those that the schedule has room for.
        threshold: the lowest score among the kept units; None if none is kept.
        lost: names of the units that were kept before and are not now.
        returned: names of the units that were not kept before and are now.
        fresh: names of the units that were added. An action that adds units cuts those that it does not keep, and no
            number is given twice.
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

    @property
    def before(self) -> int:
        """Count the units that were in effect before it."""
        return self.kept + len(self.lost) - len(self.returned) - len(self.fresh)
