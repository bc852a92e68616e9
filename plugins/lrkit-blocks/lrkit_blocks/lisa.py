"""The parts of LISA that lrkit has not: a decision before the first step and one every K (Pan et al., 2403.17919)."""

from typing import ClassVar, Literal

import attrs
import torch

import lrkit
from lrkit.actions import Ballot, Switch, Verdict
from lrkit.actions.base import By
from lrkit.settings import OWN, Amount, Time, count_or_share, one_of


@attrs.frozen(kw_only=True)
class Periodic(lrkit.schedulers.Constant):
    """`target` from before the first step on, with a decision at step 0 and every `interval` steps. Source: 2403.17919.

    Args:
        target: how much is kept, always. For blocks an int is their number in the whole model.
        start: the same, always.
        interval: K, steps between decisions.
        ending: ``"open"``: decisions go on to the end of the run.
    """

    at_start = True

    target: Amount = attrs.field(default=2, validator=count_or_share())
    start: Amount = attrs.field(default=attrs.Factory(lambda self: self.target, takes_self=True), metadata=OWN)
    interval: Time = attrs.field(default=20, validator=count_or_share(1))
    ending: Literal["fixed", "peft", "released", "open", "every-step"] = attrs.field(
        default="open", validator=one_of(("open",)), metadata=OWN
    )

    @start.validator
    def _as_the_target(self, attribute: object, value: object) -> None:
        if value != self.target:
            raise lrkit.LrkitError(f"Periodic.start is the target, {self.target!r}, and not {value!r}: leave it out")


@attrs.frozen(kw_only=True)
class Coins(Switch):
    """Each unit trains with probability γ/N, whatever the others do. Source: arXiv 2403.17919v1, Algorithm 1.

    How many train is γ on average, and another number at each decision. Scores and costs count for nothing, so that `by`
    has one value.
    """

    by: By = attrs.field(default="score", validator=one_of(("score",)), metadata=OWN)

    exact: ClassVar[bool] = False

    def decide(self, ballot: Ballot) -> Verdict:
        """Throw a coin for each candidate."""
        chance = torch.rand(len(ballot.scores), generator=ballot.generator).to(ballot.scores.device)
        return Verdict(ballot.candidates & (chance < ballot.share))

    def turnover(self, units: int, budget: int, layers: int) -> None:
        """Return None: how many train is known only after a run."""
        return
