"""Decisions of policies, one record each. Nothing here needs torch: the records are read back without it."""

from collections.abc import Sequence

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


def switches(history: Sequence[Decision]) -> set[int]:
    """Return the policies of which units of whole matrices came back: they stopped training, and trained again."""
    return {d.policy for d in history if any("[" not in name for name in d.returned)}


def comebacks(history: Sequence[Decision]) -> tuple[int, int, int]:
    """Count the units that were lost, those of them that came back, and those of these that were kept at the end.

    A unit counts once, however often it was lost. For example, a is lost, comes back and is lost again, and b is lost and
    comes back: (2, 2, 1).

    Args:
        history: a run's decisions, in order.
    """
    lost: set[tuple[int, str]] = set()
    back: set[tuple[int, str]] = set()
    away: set[tuple[int, str]] = set()
    for d in history:
        going, coming = {(d.policy, name) for name in d.lost}, {(d.policy, name) for name in d.returned}
        lost, back, away = lost | going, back | coming, (away | going) - coming
    return len(lost), len(back), len(back - away)


def training(history: Sequence[Decision], steps: int, layers: Sequence[str]) -> dict[str, float]:
    """Return the share of a run's steps in which each layer trained, if units of whole matrices came back in it.

    A layer of which several matrices stopped has their mean; a unit may also be a block with several layers. Nothing is
    returned for a run in which no such unit came back: its units stopped at one step each.

    Args:
        history: the run's decisions, in order.
        steps: its length.
        layers: names of its layers.
    """
    switching = switches(history)
    away: dict[str, int] = {}
    since: dict[str, int] = {}
    for d in history:
        if d.policy in switching:
            since |= dict.fromkeys(d.lost, d.step)
            for name in d.returned:
                away[name] = away.get(name, 0) + d.step - since.pop(name)
    for name, step in since.items():
        away[name] = away.get(name, 0) + steps - step
    found = {}
    for layer in layers if switching else ():
        mine = [n for name, n in away.items() if f"{layer}.".startswith(f"{name}.") or name.startswith(f"{layer}.")]
        found[layer] = 1 - sum(mine) / max(1, len(mine)) / max(1, steps)
    return found
