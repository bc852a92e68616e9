"""A `Task`: texts with labels, and everything that a run needs to know about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from lrkit.errors import LrkitError
from lrkit.tasks.head import Head
from lrkit.tasks.hub import new_fingerprint
from lrkit.tasks.learnt import Learnt
from lrkit.tasks.scoring import METRICS, REGRESSION_METRICS, check_metric

if TYPE_CHECKING:
    import datasets
    from numpy.typing import ArrayLike

Kind = Literal["classification", "regression"]

_FEWEST, _MOST = 200, 2_000
"""Rows that are set aside for selection, if a tenth is less or more."""
_SELECTION = 0x5E1EC7
"""Tells the generator of this split from that of `Task.subset`, which has the same seeds."""


def _strings(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen(kw_only=True, eq=False)
class Task(Learnt):
    """Texts with labels, split in two, and the metric that scores predictions for them.

    Attributes:
        name: its name in reports: "movies", "glue/rte", a folder's name.
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

    name: str
    train: datasets.Dataset = attrs.field(repr=False)
    validation: datasets.Dataset = attrs.field(repr=False)
    fields: tuple[str, ...] = attrs.field(converter=_strings)
    kind: Literal["classification", "regression"] = "classification"
    labels: tuple[str, ...] = attrs.field(default=(), converter=_strings)
    metric: str = attrs.field(default="accuracy")
    second: tuple[str, int] | None = None

    def __attrs_post_init__(self) -> None:
        where = f'task "{self.name}"'
        self._check_answers(where)
        if len(self.fields) not in (1, 2):
            raise LrkitError(f"{where}: one or two text fields are needed, not {len(self.fields)}")
        for split, rows in (("train", self.train), ("validation", self.validation)):
            absent = [c for c in (*self.fields, "label") if c not in rows.column_names]
            if absent:
                raise LrkitError(f'{where}: {split} has no column "{absent[0]}", only {", ".join(rows.column_names)}')
            if not len(rows):
                raise LrkitError(f"{where}: {split} has no rows")
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
        """Count the outputs of the model's head, one per class, or 1 in regression."""
        return len(self.labels) if self.kind == "classification" else 1

    @property
    def problem_type(self) -> str:
        """Return transformers' name for `kind`: it picks the model's loss."""
        return "single_label_classification" if self.kind == "classification" else "regression"

    @property
    def head(self) -> Head:
        """Describe the head of the task's model, with an output per class, or one in regression."""
        own: dict[str, Any] = {"num_labels": self.num_labels, "problem_type": self.problem_type, "labels": self.labels}
        return attrs.evolve(super().head, **own)

    def perfect(self) -> Any:
        """Return predictions for the validation rows that score best: the labels themselves."""
        import numpy as np

        return np.asarray(self.validation["label"])

    @property
    def primary(self) -> str:
        """Return the name of the primary score."""
        return next(iter(self.score(self.perfect(), self.validation["label"])))

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
    def majority(self) -> float:
        """Compute the primary score of the best constant guess on validation, the floor of any method (see `best_guess`)."""
        return self.best_guess(self.validation["label"])

    def best_guess(self, labels: Sequence[Any]) -> float:
        """Compute the primary score of the best constant guess for some labels; of two validation sets, for the first's.

        The largest class's share for accuracy, 0 for a correlation.
        """
        import numpy as np

        if self.kind == "regression" or self.metric == "matthews":
            return 0.0
        counts = np.bincount(np.asarray(labels)[: self._first_rows(len(labels))])
        return float(counts.max() / counts.sum())

    def encode(self, batch: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> dict[str, Any]:
        """Encode some rows, by column, as model inputs with the column `labels`, as `tokenize` has them.

        Raises:
            LrkitError: the tokenizer cannot encode them.
        """
        from lrkit.tasks.tokens import encoding

        texts = [list(batch[field]) for field in self.fields]
        encoded = encoding(tokenizer, *texts, truncation=True, max_length=max_length, padding=False)
        return encoded | {"labels": list(batch["label"])}

    def tokenize(self, tokenizer: Any, max_length: int) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Encode both splits as model inputs, with the column `labels`, cut at `max_length` tokens and not padded.

        The collator pads, batch by batch. Of a pair the longer text is cut first.

        Args:
            tokenizer: a transformers tokenizer.
            max_length: in tokens, special tokens included.
        """
        import datasets

        from lrkit.tasks.hub import quiet_datasets

        label = datasets.Value("float32" if self.kind == "regression" else "int64")

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            return self.encode(batch, tokenizer, max_length)

        def split(rows: datasets.Dataset) -> datasets.Dataset:
            with quiet_datasets():
                done = rows.map(
                    encode,
                    batched=True,
                    remove_columns=rows.column_names,
                    keep_in_memory=True,  # nothing is written into the hub's cache
                    load_from_cache_file=False,
                    new_fingerprint=new_fingerprint(),  # the default pickles the tokenizer, to name a cache file
                )
                return done.cast_column("labels", label)

        return split(self.train), split(self.validation)

    def selection(self, seed: int = 0) -> Task:
        """Set a part of the training rows aside, and score on them instead of on the validation rows.

        For choosing settings: what is chosen must never have seen the validation rows. A tenth of the rows is set aside, but
        200 at least and 2,000 at most, and never more than half.

        Args:
            seed: of the split.

        Returns:
            The task with the other rows for training, and those set aside in place of the validation rows.

        Raises:
            LrkitError: there is a single row.
        """
        rows = len(self.train)
        aside = min(max(round(rows / 10), _FEWEST), _MOST, rows // 2)
        if not aside:
            raise LrkitError(f'task "{self.name}": of {rows} training row none can be set aside to select settings by')
        import numpy as np

        order = np.random.default_rng([_SELECTION, seed]).permutation(rows)
        parts = [
            self.train.select(sorted(which.tolist()), keep_in_memory=True, new_fingerprint=new_fingerprint())
            for which in (order[aside:], order[:aside])
        ]
        return attrs.evolve(self, train=parts[0], validation=parts[1], second=None)

    def subset(self, train: int | None = None, validation: int | None = None, seed: int = 0) -> Task:
        """Keep the first so many rows of each split after a shuffle with `seed`; None keeps all.

        Asking for more rows than there are gives all of them. A larger subset contains a smaller one of the
        same seed.

        Raises:
            LrkitError: for a size below 1.
        """

        def first(rows: datasets.Dataset, split: str, n: int | None) -> datasets.Dataset:
            if n is None:
                return rows
            if n < 1:
                raise LrkitError(f"a subset of {split} needs 1 row or more, not {n}")
            import numpy as np

            order = np.random.default_rng(seed).permutation(len(rows))[:n]
            # with a fingerprint for a table in memory, as in `tokenize`
            return rows.select(order.tolist(), keep_in_memory=True, new_fingerprint=new_fingerprint())

        rows, second = first(self.train, "train", train), self.second
        if second is None:
            return attrs.evolve(self, train=rows, validation=first(self.validation, "validation", validation))
        if validation is None or validation >= len(self.validation):
            return attrs.evolve(self, train=rows)
        import datasets

        (suffix, cut), share = second, self._first_rows(validation)
        parts = [
            first(self.validation.select(which, new_fingerprint=new_fingerprint()), "validation", size)
            for which, size in ((range(cut), share), (range(cut, len(self.validation)), validation - share))
            if size or which.start == 0
        ]
        return attrs.evolve(
            self,
            train=rows,
            validation=datasets.concatenate_datasets(parts),
            second=(suffix, share) if share < validation else None,
        )


__all__ = ["METRICS", "REGRESSION_METRICS", "Kind", "Task", "check_metric"]
