"""Faulty loaders of tasks, each found by the clause that is meant."""

from __future__ import annotations

import numpy as np
import pytest
from faulty import rows

import lrkit
from lrkit.testing import check


@pytest.mark.parametrize(
    ("table", "clause"),
    [
        ([{"text": "a", "label": 0}, {"text": None, "label": 1}], "rows have texts and labels"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 2}], "rows have texts and labels"),
        ([{"text": "a", "label": 0.0}, {"text": "b", "label": 1.0}], "rows have texts and labels"),
    ],
    ids=["no text", "label out of range", "label a float"],
)
def test_odd_rows(table, clause):
    """A row without text, or with a label that does not exist, is found."""

    def loader(rest: str | None) -> lrkit.tasks.Task:
        """Odd rows. Source: this test."""
        return rows(table)

    assert clause in {finding.clause for finding in check(loader, kind="task")}


def test_random_rows():
    """A loader that draws and raises breaks three clauses."""

    def loader(rest: str | None) -> lrkit.tasks.Task:
        """Rows in a random order. Source: this test."""
        if rest:
            {}[rest]
        order = np.random.permutation(25)
        return rows([{"text": f"{i}", "label": int(i) % 2} for i in order])

    wanted = {"is the same each time", "leaves global state alone", "unknown part is refused"}
    assert {finding.clause for finding in check(loader, kind="task")} == wanted
