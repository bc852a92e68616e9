"""A verdict that is wrong more often than it says, or that one of several tasks makes alone."""

from __future__ import annotations

import math

import errors_of_tests as simulation
import pytest

SAMPLES = 1_500


def within(share: float) -> float:
    """The share and three standard errors of it."""
    return share + 3 * math.sqrt(share * (1 - share) / SAMPLES)


@pytest.mark.parametrize("n", [5, 7])
@pytest.mark.parametrize("shape", simulation.SHAPES)
def test_equivalence_errs_rarely(shape: str, n: int) -> None:
    """At the margin's edge 5 % of the samples at most are called equivalent, with the size that n allows."""
    found = simulation.equivalent(shape, n, 1.0, 1.0, SAMPLES)
    assert found <= within(0.05)
    assert found >= (0.015 if n == 5 else 0.03)


def test_equivalence_is_found() -> None:
    """With no difference at all and a margin of 1.5 deviations, eight pairs show equivalence in most samples."""
    assert simulation.equivalent("normal", 8, 0.0, 1.5, SAMPLES) > 0.9
    assert simulation.equivalent("normal", 8, 1.0, 1.5, SAMPLES) < 0.5
    assert simulation.equivalent("normal", 4, 0.0, 9.0, 100) == 0.0  # four pairs show nothing


def test_tasks_together_err_rarely() -> None:
    """With no difference on either of two tasks, of spreads 1 and 20, p is below 0.05 in 5 % of the samples."""
    found = simulation.together("no task has a difference", 6, SAMPLES)
    assert 0.03 <= found <= within(0.05)


def test_opposite_tasks_cancel() -> None:
    """Where one task goes up and one down, the combined test stays silent; a test of all pairs as one sample does not."""
    assert simulation.together("+1 and -1", 7, SAMPLES) <= 0.02
    assert simulation.together("+1 and -1", 7, 300, pooled=True) > 0.2


def test_no_task_drowns_another() -> None:
    """A difference on the narrow task alone is seen beside a task of twenty times its spread."""
    assert simulation.together("+1 and 0", 7, SAMPLES) > 0.15
    assert simulation.together("+1 and 0", 7, SAMPLES, pooled=True) <= within(0.07)


@pytest.mark.parametrize(("effect", "n"), [(0.0, 6), (1.0, 3), (1.0, 6), (2.0, 12)])
def test_effects_are_covered(effect: float, n: int) -> None:
    """95 % of the intervals hold the effect size, to within three standard errors."""
    found = simulation.effect_coverage(effect, n, SAMPLES)
    assert 1 - within(0.05) <= found <= within(0.95)
