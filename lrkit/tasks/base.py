"""What a run needs to know about its data: a `Task`, and the metrics that score it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from lrkit.errors import LrkitError, nearest

if TYPE_CHECKING:
    import datasets
    from numpy.typing import ArrayLike, NDArray

Kind = Literal["classification", "regression"]


# Metrics. Each takes the predicted and the true values, both [n] (class numbers, or real numbers in
# regression), and returns its scores by name, the primary score first. Larger is better, in all of them.


def accuracy(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """The share of rows predicted right, in [0, 1]."""
    return {"accuracy": float((predicted == true).mean())}


def accuracy_f1(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """Accuracy, and F1 of class 1: 2 TP / (2 TP + FP + FN), 0 where nothing is or is called class 1."""
    hits = int(((predicted == 1) & (true == 1)).sum())
    called = int((predicted == 1).sum()) + int((true == 1).sum())  # = 2 TP + FP + FN
    return accuracy(predicted, true) | {"f1": 2 * hits / called if called else 0.0}


def matthews(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """Matthews correlation, in [-1, 1], in float64; 0 where a marginal is empty.

    For two classes this is (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)); it is written in Gorodkin's
    form (R_K, 2004), which is the same number and holds for more classes.
    """
    import numpy as np

    size = int(max(predicted.max(), true.max())) + 1
    pairs = np.bincount(true * size + predicted, minlength=size * size)
    confusion = pairs.reshape(size, size).astype(np.float64)  # [true, predicted]
    n, of_true, of_predicted = confusion.sum(), confusion.sum(axis=1), confusion.sum(axis=0)
    covariance = n * np.trace(confusion) - of_true @ of_predicted
    # two roots, not one of the product: up to 9e7 rows each variance is then an exact integer in float64
    spread = math.sqrt(n * n - of_true @ of_true) * math.sqrt(n * n - of_predicted @ of_predicted)
    return {"matthews": float(covariance / spread) if spread > 0 else 0.0}


def pearson(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, in [-1, 1]; 0 where one side is constant."""
    import numpy as np
    from scipy import stats

    if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(predicted, true).statistic),
        "spearman": float(stats.spearmanr(predicted, true).statistic),
    }


METRICS: Mapping[str, Callable[[NDArray[Any], NDArray[Any]], dict[str, float]]] = {
    "accuracy": accuracy,
    "accuracy_f1": accuracy_f1,
    "matthews": matthews,
    "pearson": pearson,
}
REGRESSION_METRICS = frozenset({"pearson"})


def check_metric(metric: str) -> None:
    """Raise LrkitError unless `metric` is a name in `METRICS`."""
    if metric not in METRICS:
        raise LrkitError(f'unknown metric "{metric}"{nearest(metric, METRICS)}; there are: {", ".join(METRICS)}')


def _strings(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen(kw_only=True, eq=False)
class Task:
    """Texts with labels, split in two, and how predictions for them are scored.

    Attributes:
        name: what reports call it: "movies", "glue/rte", a folder's name.
        train, validation: the rows, each with the columns `fields` (str) and `label` (an int from 0 to
            `num_labels - 1`, or a float in regression).
        fields: the one or two text columns, in the order in which the tokenizer gets them.
        kind: "classification" or "regression".
        labels: the classes' names by number; empty in regression.
        metric: a name in `METRICS`.
        second: where validation is two sets one after the other: a suffix for the second's scores, and how many rows are the
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
        check_metric(self.metric)
        if self.kind not in ("classification", "regression"):
            raise LrkitError(f'{where}: kind is "classification" or "regression", not "{self.kind}"')
        if len(self.fields) not in (1, 2):
            raise LrkitError(f"{where}: one or two text fields are needed, not {len(self.fields)}")
        regression = self.kind == "regression"
        if regression != (self.metric in REGRESSION_METRICS):
            raise LrkitError(f'{where}: metric "{self.metric}" is not for {self.kind}')
        if regression and self.labels:
            raise LrkitError(f"{where}: a regression task has no label names")
        if not regression and len(self.labels) < 2:
            raise LrkitError(f"{where}: classification needs two labels or more, not {len(self.labels)}")
        if self.metric == "accuracy_f1" and len(self.labels) != 2:
            raise LrkitError(f'{where}: metric "accuracy_f1" is for two labels, not {len(self.labels)}')
        for split, rows in (("train", self.train), ("validation", self.validation)):
            absent = [c for c in (*self.fields, "label") if c not in rows.column_names]
            if absent:
                raise LrkitError(f'{where}: {split} has no column "{absent[0]}", only {", ".join(rows.column_names)}')
            if not len(rows):
                raise LrkitError(f"{where}: {split} has no rows")
        if self.second is not None and not 0 < self.second[1] < len(self.validation):
            raise LrkitError(f"{where}: of its two validation sets one has no rows")

    def _first_rows(self, rows: int) -> int:
        """How many of so many validation rows are of the first set: its share of all, so that a part has both."""
        if self.second is None or rows < 2:
            return rows
        return min(max(round(rows * self.second[1] / len(self.validation)), 1), rows - 1)

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head, one a class, or 1 in regression."""
        return len(self.labels) if self.kind == "classification" else 1

    @property
    def problem_type(self) -> str:
        """What transformers calls `kind`: it picks the model's loss."""
        return "single_label_classification" if self.kind == "classification" else "regression"

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
        """The primary score of the best constant guess on validation, the floor any method must beat (see `best_guess`)."""
        return self.best_guess(self.validation["label"])

    def best_guess(self, labels: Sequence[Any]) -> float:
        """The primary score of the best constant guess for some labels; of two validation sets, for the first's.

        The largest class's share for accuracy, 0 for a correlation.
        """
        import numpy as np

        if self.kind == "regression" or self.metric == "matthews":
            return 0.0
        counts = np.bincount(np.asarray(labels)[: self._first_rows(len(labels))])
        return float(counts.max() / counts.sum())

    def encode(self, batch: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> dict[str, Any]:
        """Some rows, by column, as model inputs with the column `labels`, as `tokenize` has them.

        Raises:
            LrkitError: the tokenizer cannot encode them.
        """
        from lrkit.tasks.tokens import encoding

        texts = [list(batch[field]) for field in self.fields]
        encoded = encoding(tokenizer, *texts, truncation=True, max_length=max_length, padding=False)
        return encoded | {"labels": list(batch["label"])}

    def tokenize(self, tokenizer: Any, max_length: int) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Both splits as model inputs, with the column `labels`, cut at `max_length` tokens and not padded.

        Padding is the collator's, batch by batch. Of a pair the longer text is cut first.

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
                    new_fingerprint=_fingerprint(),  # the default pickles the tokenizer, to name a cache file
                )
                return done.cast_column("labels", label)

        return split(self.train), split(self.validation)

    def subset(self, train: int | None = None, validation: int | None = None, seed: int = 0) -> Task:
        """The first so many rows of each split after a shuffle with `seed`; None keeps all.

        Asking for more rows than there are gives all of them. A larger subset contains a smaller one of one
        seed.

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
            return rows.select(order.tolist(), keep_in_memory=True, new_fingerprint=_fingerprint())

        rows, second = first(self.train, "train", train), self.second
        if second is None:
            return attrs.evolve(self, train=rows, validation=first(self.validation, "validation", validation))
        if validation is None or validation >= len(self.validation):
            return attrs.evolve(self, train=rows)
        import datasets

        (suffix, cut), share = second, self._first_rows(validation)
        parts = [
            first(self.validation.select(which, new_fingerprint=_fingerprint()), "validation", size)
            for which, size in ((range(cut), share), (range(cut, len(self.validation)), validation - share))
            if size or which.start == 0
        ]
        return attrs.evolve(
            self,
            train=rows,
            validation=datasets.concatenate_datasets(parts),
            second=(suffix, share) if share < validation else None,
        )


def _fingerprint() -> str:
    import uuid

    return uuid.uuid4().hex[:16]


__all__ = ["METRICS", "REGRESSION_METRICS", "Kind", "Task", "check_metric"]
