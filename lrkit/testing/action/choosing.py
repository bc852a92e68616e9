"""Ask how an action chooses: what it says of itself, whom it keeps, and whether losing is for good."""

from typing import Any, get_args

import attrs
import torch
from torch import Tensor

from lrkit.actions import Action, Ballot, Fate, unsound
from lrkit.fit import budget_in_costs
from lrkit.schedulers import Cubic
from lrkit.testing.action.clauses import ActionClauses
from lrkit.testing.action.stage import ballot_of
from lrkit.testing.base import clause
from lrkit.testing.comparisons import same
from lrkit.testing.findings import calling, expect
from lrkit.units import UnitKind


def _drew(ballot: Ballot) -> bool:
    """Say whether a decision has taken random numbers from the ballot."""
    return not torch.equal(ballot.generator.get_state(), torch.Generator().manual_seed(ballot.seed).get_state())


class Choosing(ActionClauses):
    """The clauses about `decide`, on ballots with made-up scores."""

    @clause
    def test_says_what_it_acts_on(self, component: Any) -> None:
        """`unit` and `fate` are words that lrkit knows; `final` and `grows` are True or False."""
        kinds = get_args(UnitKind)
        expect(component.unit in kinds, f"unit must be one of {', '.join(kinds)}, not {component.unit!r}")
        fates = get_args(Fate)
        says = getattr(component, "fate", None)
        expect(says in fates, f"fate must be one of {', '.join(fates)}, not {says!r}")
        for name in ("final", "grows"):
            says = getattr(component, name, None)
            expect(isinstance(says, bool), f"{name} must be True or False, not {says!r}")

    @clause
    def test_decide_keeps_the_best_of_the_budget(self, component: Any) -> None:
        """`decide` keeps exactly the budget, ties and all, and nobody with a lower score than a loser, unless it draws."""
        for units, budget in ((20, 8), (20, 0), (20, 20), (1, 1), (1, 0)):
            # If losing is final, some are out already; the budget has never been above those that are left.
            for out, ties in ((0, False), (0, True), (min(units - budget, 5) if component.final else 0, False)):
                ballot = ballot_of(units, budget, ties=ties and self._is_exact(component), out=out)
                before = attrs.asdict(ballot, recurse=False)
                copies = {key: v.clone() if isinstance(v, Tensor) else v for key, v in before.items()}
                with torch.no_grad(), calling("decide"):
                    kept = self._kept(component, ballot)
                name = f"{budget} of {units - out}"
                expect(same(copies, before), "decide writes to the ballot it was given")
                lost = ballot.scores[~kept & ballot.candidates]
                expect(
                    _drew(ballot) or not kept.any() or not len(lost) or bool(ballot.scores[kept].min() >= lost.max()),
                    f"{name}: it keeps a unit whose score is below that of one that loses",
                )
                if self._is_exact(component):
                    expect(int(kept.sum()) == budget, f"{name}: it keeps {int(kept.sum())}, the budget is {budget}")
                again = ballot_of(units, budget, ties=ties and self._is_exact(component), out=out)
                with torch.no_grad():
                    expect(torch.equal(kept, component.decide(again).kept), f"{name}: asked again, it keeps others")
        self._keeps_to_costs(component)

    def _keeps_to_costs(self, component: Action) -> None:
        """Expect that it is refused with a budget in costs, or keeps to one and leaves nothing out that would still fit."""
        if budget_in_costs(Cubic(amount="parameters"), component):
            return
        for budget in (0, 7, 20, 41, 1000):
            ballot = ballot_of(20, budget, costs=True)
            with torch.no_grad(), calling("decide"):
                kept = self._kept(component, ballot)
            costs = ballot.costs
            assert costs is not None
            room = budget - int(costs[kept].sum())
            fits = int((costs[~kept] <= room).sum())
            expect(
                not fits or not self._is_exact(component),
                f"a budget of {budget} has room for {room} more, and {fits} units are left out that cost no more",
            )

    @clause
    def test_losers_stay_lost_where_that_is_final(self, component: Any) -> None:
        """If it is `final`, `decide` never keeps a unit that is not a candidate any more."""
        for budget in (3, 10) if component.final else ():
            ballot = ballot_of(20, budget, ties=budget == 3, out=8)
            with torch.no_grad(), calling("decide"):
                kept = self._kept(component, ballot)
            back = int((kept & ~ballot.candidates).sum())
            expect(not back, f"final is True, and decide keeps {back} units that had lost for good")

    def _kept(self, component: Action, ballot: Ballot) -> Tensor:
        """Return bool [units] of who is kept, or break the clause if the verdict has another form."""
        verdict = component.decide(ballot)
        reason = unsound(component, verdict, ballot, len(ballot.scores))
        expect(reason is None, str(reason))
        return verdict.kept
