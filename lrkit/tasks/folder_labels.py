"""Texts with labels, from a folder: which fields are texts, and which classes there are."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal

from lrkit.errors import LrkitError
from lrkit.tasks.classification import Classification
from lrkit.tasks.found import Found, Table
from lrkit.tasks.glue import GLUE
from lrkit.tasks.scoring import REGRESSION_METRICS, check_metric

# Pairs before single texts: a row with `question` and `sentence` is a pair.
FIELDS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("sentence",),
    ("text",),
)


def text_fields(row: Container[str]) -> tuple[str, ...] | None:
    """Return the first of `FIELDS` that a row has."""
    return next((fields for fields in FIELDS if all(name in row for name in fields)), None)


def classification(found: Found) -> Classification:
    """Make the task of texts with labels.

    Whole-number labels make it a classification, whose classes are 0, 1, ... as they occur in training; any label with a
    decimal point in training makes it a regression, in which whole numbers are fine too. A folder that is named as a GLUE
    task has that task's metric and label names, unless another metric is asked for.

    Raises:
        LrkitError: the labels are not as they should be, with file and line.
    """
    found = found.alike("label")
    train, glue = found.train, GLUE.get(found.name)
    fields, given = tuple(name for name in train.columns if name != "label"), train.columns["label"]
    if glue is not None and fields != glue.fields:
        glue = None
    metric = glue.metric if found.metric is None and glue is not None else found.metric
    if metric is not None:
        check_metric(metric)
    kind: Literal["classification", "regression"] = "classification"
    if metric in REGRESSION_METRICS or any(isinstance(label, float) for label in given):
        kind = "regression"
    if metric is None:
        metric = "accuracy" if kind == "classification" else "pearson"
    if kind == "regression" and metric not in REGRESSION_METRICS:
        decimal = next(row for row, label in enumerate(given) if isinstance(label, float))
        raise LrkitError(
            f"{train.where(decimal)}: label {given[decimal]} makes this a regression, "
            f'for which metric "{metric}" is not; there is: {", ".join(sorted(REGRESSION_METRICS))}'
        )
    labels = _classes(train, found.validation) if kind == "classification" else ()
    if glue is not None and len(labels) == len(glue.labels):
        labels = glue.labels
    elif len(named := train.names("label")) == len(labels):
        labels = named
    number = float if kind == "regression" else int

    def numbered(split: Table) -> dict[str, list[Any]]:
        return split.columns | {"label": [number(label) for label in split.columns["label"]]}

    task = found.with_columns(numbered).task()
    return Classification(**task, fields=fields, kind=kind, labels=labels, metric=metric)


def _classes(train: Table, validation: Table) -> tuple[str, ...]:
    """Return the classes' names: "0", "1", ... up to the largest label in training."""
    first: dict[int, str] = {}  # label -> where it is first seen
    for row, label in enumerate(train.columns["label"]):
        if isinstance(label, float):
            raise LrkitError(f"{train.where(row)}: label {label} is no class number")
        if label < 0:
            raise LrkitError(f"{train.where(row)}: label is {label}: GLUE's mark for a row without one")
        first.setdefault(label, train.where(row))
    classes = len(first)
    for label, where in first.items():
        if label >= classes:
            absent = next(n for n in range(label) if n not in first)
            raise LrkitError(f"{where}: label is {label}, but no row has label {absent}: number them from 0")
    if classes < 2:
        raise LrkitError(f"{train.file}: every row has label 0: there is nothing to tell apart")
    for row, label in enumerate(validation.columns["label"]):
        if label == -1:
            raise LrkitError(f"{validation.where(row)}: label is -1: GLUE's mark for a row without one")
        if isinstance(label, float) or label not in first:
            raise LrkitError(
                f"{validation.where(row)}: label {label} does not occur in {train.file.name}, which has "
                f"0 to {classes - 1}"
            )
    return tuple(str(n) for n in range(classes))
