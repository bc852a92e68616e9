"""See whether a model has diverged. This decides scores, so that it counts in the digest of the code."""

import math
from collections.abc import Iterable

from torch import Tensor


def unless_diverged(scores: dict[str, float], trained: Iterable[Tensor]) -> dict[str, float]:
    """Return scores, all NaN if the model has diverged.

    A task that scores numbers sees it by its predictions; one that scores texts does not: a model whose weights are NaN
    still writes something.

    Args:
        scores: by name.
        trained: the parameters that were trained.
    """
    return scores if all(bool(p.isfinite().all()) for p in trained) else dict.fromkeys(scores, math.nan)
