"""Rows of texts with labels, classes or numbers: how they are counted, divided and scored, whatever a model is asked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import attrs

from lrkit.errors import LrkitError
from lrkit.tasks.base import Task, first_rows
from lrkit.tasks.hub import new_fingerprint
from lrkit.tasks.scoring import METRICS, REGRESSION_METRICS, check_metric

if TYPE_CHECKING:
    import datasets
    from numpy.typing import ArrayLike

Kind = Literal["classification", "regression"]


def _strings(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen(kw_only=True, eq=False)
class Labelled(Task):
    """Texts with labels, split in two, and the metric that scores predictions for them.

    What a model is given of them is for its kinds to say: `lrkit.tasks.Classification`, `lrkit.tasks.Verbalized`.

    Attributes:
        train, validation: the rows, each with the columns `fields` (str) and `label` (an int from 0 to
            `num_labels - 1`, or a float in regression).
        fields: the one or two text columns, in the order in which the tokenizer gets them.
        kind: "classification" or "regression".
        labels: the classes' names by number; empty in regression.
        metric: a name in `METRICS`.
        second: if validation is two sets one after the other: a suffix for the second's scores, and how many rows are the
            first's. Each is scored by itself; the first's scores are the primary ones.

    Raises:
        LrkitError: fields, kind, labels, metric or columns that do not fit together.
    """

    fields: tuple[str, ...] = attrs.field(converter=_strings)
    kind: Literal["classification", "regression"] = "classification"
    labels: tuple[str, ...] = attrs.field(default=(), converter=_strings)
    metric: str = attrs.field(default="accuracy")
    second: tuple[str, int] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the columns that both splits must have."""
        return (*self.fields, "label")

    def check(self, where: str) -> None:
        """Check that kind, labels, metric, fields and the two validation sets fit together."""
        self._check_answers(where)
        if len(self.fields) not in (1, 2):
            raise LrkitError(f"{where}: one or two text fields are needed, not {len(self.fields)}")
        if self.second is not None and not 0 < self.second[1] < len(self.validation):
            raise LrkitError(f"{where}: of its two validation sets one has no rows")

    def _check_answers(self, where: str) -> None:
        """Check that kind, labels and metric fit together."""
        check_metric(self.metric)
        if self.kind not in ("classification", "regression"):
            raise LrkitError(f'{where}: kind is "classification" or "regression", not "{self.kind}"')
        regression = self.kind == "regression"
        if regression != (self.metric in REGRESSION_METRICS):
            raise LrkitError(f'{where}: metric "{self.metric}" is not for {self.kind}')
        if regression and self.labels:
            raise LrkitError(f"{where}: a regression task has no label names")
        if not regression and len(self.labels) < 2:
            raise LrkitError(f"{where}: classification needs two labels or more, not {len(self.labels)}")
        if self.metric == "accuracy_f1" and len(self.labels) != 2:
            raise LrkitError(f'{where}: metric "accuracy_f1" is for two labels, not {len(self.labels)}')

    def _first_rows(self, rows: int) -> int:
        """Count how many of so many validation rows are of the first set: its share of all, so that a part has both."""
        if self.second is None or rows < 2:
            return rows
        return min(max(round(rows * self.second[1] / len(self.validation)), 1), rows - 1)

    @property
    def num_labels(self) -> int:
        """Count the outputs for a row, one per class, or 1 in regression."""
        return len(self.labels) if self.kind == "classification" else 1

    def references(self) -> Any:
        """Return the validation rows' labels [n]."""
        import numpy as np

        return np.asarray(self.validation["label"])

    def score(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Score predictions; the first key is the primary score, and larger is better.

        Args:
            predictions: [n] class numbers or values, or the model's raw outputs [n, num_labels].
            labels: [n].

        Returns:
            Scores by name, nan if an output is not finite, since a run that diverged has no score.

        Raises:
            LrkitError: if the shapes do not fit, or are empty.
        """
        import numpy as np

        outputs, true = np.asarray(predictions), np.asarray(labels)
        if outputs.ndim == 2 and outputs.shape[1] == self.num_labels:
            predicted = outputs[:, 0] if self.kind == "regression" else outputs.argmax(axis=1)
        else:
            predicted = outputs
        if predicted.ndim != 1 or predicted.shape != true.shape or not len(true):
            raise LrkitError(
                f'task "{self.name}": predictions of shape {outputs.shape} do not fit '
                f"labels of shape {true.shape} with {self.num_labels} output(s)"
            )
        dtype = np.float64 if self.kind == "regression" else np.int64
        first, score = self._first_rows(len(true)), METRICS[self.metric]
        scores: dict[str, float] = {}
        for suffix, rows in (
            ("", slice(first)),
            *([] if self.second is None else [(self.second[0], slice(first, None))]),
        ):
            if not len(true[rows]):
                continue
            zeros = np.zeros(len(true[rows]), dtype)
            found = score(zeros, zeros)
            if np.isfinite(outputs).all():
                found = score(predicted[rows].astype(dtype), true[rows].astype(dtype))
            else:
                found = dict.fromkeys(found, math.nan)
            scores |= {f"{name}{suffix}": value for name, value in found.items()}
        return scores

    @property
    def majority(self) -> float | None:
        """Compute the primary score of the best constant guess for the validation rows; of two sets, for the first's.

        The largest class's share for accuracy, 0 for a correlation.
        """
        import numpy as np

        if self.kind == "regression" or self.metric == "matthews":
            return 0.0
        labels = self.references()
        counts = np.bincount(labels[: self._first_rows(len(labels))])
        return float(counts.max() / counts.sum())

    def texts(self, rows: datasets.Dataset) -> list[str]:
        """List the texts of some rows, field by field."""
        return [text for field in self.fields for text in rows[field]]

    def selection(self, seed: int = 0) -> Task:
        """Set a part of the training rows aside in place of the validation rows, which are then one set."""
        return super().selection(seed) if self.second is None else attrs.evolve(self, second=None).selection(seed)

    def subset(self, train: int | None = None, validation: int | None = None, seed: int = 0) -> Task:
        """Keep the first so many rows of each split after a shuffle; of two validation sets each its share."""
        if self.second is None or validation is None or validation >= len(self.validation):
            return super().subset(train, None if self.second is not None else validation, seed)
        import datasets

        (suffix, cut), share = self.second, self._first_rows(validation)
        parts = [
            first_rows(self.validation.select(which, new_fingerprint=new_fingerprint()), "validation", size, seed)
            for which, size in ((range(cut), share), (range(cut, len(self.validation)), validation - share))
            if size or which.start == 0
        ]
        return attrs.evolve(
            self,
            train=first_rows(self.train, "train", train, seed),
            validation=datasets.concatenate_datasets(parts),
            second=(suffix, share) if share < validation else None,
        )
