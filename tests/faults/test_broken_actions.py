"""Faulty actions, each found by the clause that is meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from faulty import COMMON, Shrink, Specimens, frozen, variant
from torch import nn

import lrkit
from lrkit.actions import Ballot, Verdict

fault = Specimens("action")


SELECT = "decide keeps the best of the budget"
LOST = "losers stay lost where that is final"
ALONE = "acts on what loses alone"
STAY = "parameters stay what they are"
RESTORE = "a load makes again what tensors do not hold"
REFUSAL = "refusal names both sides"
TAKES = "trains with all it takes"
RESUME = "resumes exactly"


def applies(more: Callable[..., None]) -> Any:
    @torch.no_grad()
    def apply(self, blocks, kept, optimizer):
        Shrink.apply(self, blocks, kept, optimizer)
        more(blocks, kept, optimizer)

    return apply


@fault("says what it acts on", ALONE, STAY, RESTORE, TAKES, RESUME)
def action_on_what_there_is_not():
    return variant(Shrink, unit=property(lambda self: "components"))


@fault("says what it acts on")
def action_that_does_not_say_whether_it_is_final():
    return variant(Shrink, final=1)


@fault(SELECT, TAKES)
def action_that_keeps_one_too_many():
    def decide(self, ballot: Ballot):
        return Shrink.decide(self, attrs.evolve(ballot, budget=ballot.budget + 1))

    return variant(Shrink, decide=decide)


@fault(SELECT)
def action_that_keeps_the_worst():
    def decide(self, ballot: Ballot):
        return Shrink.decide(self, attrs.evolve(ballot, scores=-ballot.scores))

    return variant(Shrink, decide=decide)


@fault(SELECT)
def action_that_stops_at_what_is_too_dear():
    def decide(self, ballot: Ballot):
        if ballot.costs is None:
            return Shrink.decide(self, ballot)
        order = ballot.scores.argsort(descending=True)
        kept = torch.zeros_like(ballot.candidates)
        kept[order[ballot.costs[order].cumsum(0) <= ballot.budget]] = True
        return Verdict(kept)

    return variant(Shrink, decide=decide)


@fault(SELECT)
def action_that_counts_ties_twice():
    def decide(self, ballot: Ballot):
        if ballot.budget == 0:
            return Verdict(torch.zeros_like(ballot.candidates))
        return Verdict(ballot.scores >= ballot.scores.sort(descending=True).values[ballot.budget - 1])

    return variant(Shrink, decide=decide)


@fault(SELECT)
def action_that_writes_to_the_ballot():
    def decide(self, ballot: Ballot):
        verdict = Shrink.decide(self, ballot)
        ballot.scores[~verdict.kept] = -torch.inf
        return verdict

    return variant(Shrink, decide=decide)


@fault(SELECT, TAKES, RESUME)
def action_that_gives_indices():
    def decide(self, ballot: Ballot):
        return Verdict(Shrink.decide(self, ballot).kept.nonzero().flatten())

    return variant(Shrink, decide=decide)


@fault(LOST, SELECT, TAKES)
def action_that_is_final_and_takes_back():
    def decide(self, ballot: Ballot):
        everybody = attrs.evolve(ballot, candidates=torch.ones_like(ballot.candidates))
        return Verdict(Shrink.decide(self, everybody).kept.roll(1))

    return variant(Shrink, final=True, decide=decide)


@fault(ALONE)
def action_that_scales_what_is_kept():
    def more(blocks, kept, optimizer):
        for block in blocks:
            block.core.mul_(1.01)

    return variant(Shrink, apply=applies(more))


@fault(ALONE)
def action_that_holds_what_is_kept():
    def more(blocks, kept, optimizer):
        for block in blocks if optimizer is None else ():
            block.tensors[-1].clamp_(-1e-3, 1e-3)

    return variant(Shrink, apply=applies(more))


@fault(ALONE, RESTORE)
def action_that_freezes_the_base_again():
    def more(blocks, kept, optimizer):
        for block in blocks:
            block.module.base.weight.requires_grad_(True)

    @frozen
    class Broken(Shrink):
        """λ of a loser times factor, on SVD alone. Source: this test."""

        def refusal(self, parameterization):
            return None if isinstance(parameterization, lrkit.parameterizations.SVD) else "it is no SVD"

        apply = applies(more)

    return Broken()


@fault(ALONE)
def action_that_clears_all_optimizer_state():
    def more(blocks, kept, optimizer):
        if optimizer is not None:
            optimizer.state.clear()

    return variant(Shrink, apply=applies(more))


@fault(STAY, RESUME)
def action_that_edits_groups():
    def more(blocks, kept, optimizer):
        if optimizer is not None:
            optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]

    return variant(Shrink, apply=applies(more))


@fault(STAY)
def action_that_edits_the_learning_rate():
    def more(blocks, kept, optimizer):
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] *= 0.5

    return variant(Shrink, apply=applies(more))


@fault(STAY, ALONE)
def action_that_needs_an_optimizer():
    return variant(Shrink, apply=applies(lambda blocks, kept, optimizer: optimizer.state.keys()))


@fault(STAY, TAKES, RESUME)
def action_that_makes_new_parameters():
    def more(blocks, kept, optimizer):
        for block in blocks:
            block.module.core = nn.Parameter(block.core.clone())

    return variant(Shrink, apply=applies(more))


@fault("proximal moves its units alone")
def action_whose_proximal_step_moves_everything():
    @torch.no_grad()
    def proximal(self, blocks, share, optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.mul_(0.99)

    return variant(Shrink, proximal=proximal)


@fault("what has lost is out")
def action_that_does_not_hold():
    def apply(self, blocks, kept, optimizer):
        if optimizer is not None:
            lrkit.actions.Prune.apply(self, blocks, kept, optimizer)

    return variant(lrkit.actions.Prune, doc="cut, ties. Source: this test.", apply=apply)


@fault("what has lost is out")
def action_that_counts_what_it_halves_as_gone():
    return variant(Shrink, fate="masked")


@fault(RESTORE, "what returns trains again", "what is frozen stays")
def action_that_masks_and_says_it_freezes():
    return variant(Shrink, fate="frozen")


@fault(RESTORE, RESUME)
def action_that_does_not_freeze_again_on_load():
    return variant(lrkit.actions.Freeze, doc="together, rule. Source: this test.", fate="dimmed")


@fault(REFUSAL)
def action_that_refuses_without_a_reason():
    def refusal(self, parameterization):
        return None if any(part.core for part in parameterization.parts) else ""

    return variant(Shrink, refusal=refusal)


@fault(ALONE, STAY, RESTORE, TAKES, RESUME)
def action_that_takes_what_it_cannot_do():
    # LoRA has components without a core.
    return variant(Shrink, refusal=lambda self, parameterization: None)


@fault(TAKES, RESUME)
def action_that_cannot_do_all_that_it_takes():
    def apply(self, blocks, kept, optimizer):
        if hasattr(blocks[0].module, "out_scale") and len(blocks) > 5 and blocks[0].module.out_scale is not None:
            raise RuntimeError("not on vectors")
        Shrink.apply(self, blocks, kept, optimizer)

    return variant(Shrink, apply=apply)


@fault("leaves global state alone")
def action_that_draws():
    def decide(self, ballot: Ballot):
        torch.rand(1)
        return Shrink.decide(self, ballot)

    return variant(Shrink, decide=decide)


@fault("leaves global state alone", RESUME, ALONE)
def action_that_adds_noise():
    def more(blocks, kept, optimizer):
        for block in blocks:
            block.core.add_(torch.randn_like(block.core))

    return variant(Shrink, apply=applies(more))


@fault(STAY, ALONE, RESTORE, TAKES, RESUME)
def action_that_forgets_no_grad():
    def apply(self, blocks, kept, optimizer):
        for block, keep in zip(blocks, kept.split([b.count for b in blocks]), strict=True):
            block.core.mul_(keep)

    return variant(Shrink, apply=apply)


@pytest.mark.parametrize("name", fault.made)
def test_found_by_its_clause(name):
    """Each fault is found by the clauses that are meant, and by no other."""
    fault.check(name)


def test_every_clause_finds():
    """Each clause of an action finds a fault, or is one that every kind has."""
    assert fault.missing() <= COMMON
