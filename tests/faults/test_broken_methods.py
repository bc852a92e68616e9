"""Faulty methods, each found by the clause that is meant."""

from __future__ import annotations

import attrs
import pytest
from faulty import COMMON, NEVER_DUE, Peak, Shrink, Specimens, frozen, timed

import lrkit

fault = Specimens("method")


@fault("arguments are keywords with defaults")
def method_with_positions():
    def made(rank: int = 4) -> lrkit.Method:
        """LoRA of rank `rank`. Source: arXiv 2106.09685."""
        return lrkit.methods.lora(rank=rank)

    return made


@fault("docstring names settings and source")
def method_without_source():
    def made(*, rank: int = 4) -> lrkit.Method:
        """LoRA of rank `rank`."""
        return lrkit.methods.lora(rank=rank)

    return made


@fault("survives plain data", "saved and taken out", "resumes exactly")
def method_with_a_metric_that_is_not_registered():
    def made() -> lrkit.Method:
        """AdaLoRA by the largest gradient. Source: this test."""
        return attrs.evolve(lrkit.methods.adalora(), metric=Peak())

    return made


@fault("loss goes down", "survives plain data", "saved and taken out", "resumes exactly")
def method_that_never_ends():
    scheduler = timed(**NEVER_DUE)

    def made() -> lrkit.Method:
        """AdaLoRA without a last decision. Source: this test."""
        return attrs.evolve(lrkit.methods.adalora(), scheduler=scheduler)

    return made


@fault("parts can be swapped", "survives plain data", "saved and taken out", "resumes exactly")
def method_with_a_part_that_cannot_refuse():
    @frozen
    class Picky(Shrink):
        """factor. Source: this test."""

        def refusal(self, parameterization):
            return {lrkit.parameterizations.SVD: None}[type(parameterization)]

    def made() -> lrkit.Method:
        """AdaLoRA that shrinks. Source: this test."""
        return attrs.evolve(lrkit.methods.adalora(), action=Picky())

    return made


@fault("arguments are keywords with defaults")
def method_that_is_another_each_time():
    ranks = iter(range(1, 10_000))

    def made() -> lrkit.Method:
        """LoRA of some rank. Source: arXiv 2106.09685."""
        return lrkit.methods.lora(rank=next(ranks))

    return made


@pytest.mark.parametrize("name", fault.made)
def test_found_by_its_clause(name):
    """Each fault is found by the clauses that are meant, and by no other."""
    fault.check(name)


def test_every_clause_finds():
    """Each clause of a method finds a fault, or is one that every kind has."""
    assert fault.missing() <= COMMON
