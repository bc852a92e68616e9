"""The metrics that score a task.

Each takes the predicted and the true values, both [n] (class numbers, or real numbers in regression), and returns its
scores by name, the primary score first. Larger is better, in all of them. For example, `accuracy` of three rows of which
two are right is ``{"accuracy": 0.667}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lrkit.errors import LrkitError, nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray


def accuracy(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """Compute the share of rows predicted right, in [0, 1]."""
    return {"accuracy": float((predicted == true).mean())}


def accuracy_f1(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """Compute accuracy, and F1 of class 1: 2 TP / (2 TP + FP + FN), 0 if no row is or is called class 1."""
    hits = int(((predicted == 1) & (true == 1)).sum())
    called = int((predicted == 1).sum()) + int((true == 1).sum())  # = 2 TP + FP + FN
    return accuracy(predicted, true) | {"f1": 2 * hits / called if called else 0.0}


def matthews(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """Compute Matthews correlation, in [-1, 1], in float64; 0 if a marginal is empty.

    For two classes this is (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)); it is written in Gorodkin's
    form (R_K, 2004), which is the same number and holds for more classes.
    """
    import numpy as np

    size = int(max(predicted.max(), true.max())) + 1
    pairs = np.bincount(true * size + predicted, minlength=size * size)
    confusion = pairs.reshape(size, size).astype(np.float64)  # [true, predicted]
    n, of_true, of_predicted = confusion.sum(), confusion.sum(axis=1), confusion.sum(axis=0)
    covariance = n * np.trace(confusion) - of_true @ of_predicted
    # Two roots, not one of the product: up to 9e7 rows each variance is then a whole number in float64.
    spread = math.sqrt(n * n - of_true @ of_true) * math.sqrt(n * n - of_predicted @ of_predicted)
    return {"matthews": float(covariance / spread) if spread > 0 else 0.0}


def pearson(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """Compute Pearson's and Spearman's correlation, in [-1, 1]; 0 if one side is constant."""
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
