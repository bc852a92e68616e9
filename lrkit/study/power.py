"""Say before the first step how many seeds would see a difference of a stated size: `seeds_needed`. No torch here.

Assumed are normal differences of a stated standard deviation, and the tests of `lrkit.study.paired` and
`lrkit.study.equivalence` at 0.05 over the number of rows: the least p of all rows must come below that in Holm's correction.
Up to 12 pairs each simulated sample is tested as a study's would be, over all sign patterns, so that few seeds have the
power that they have and no more: five show no difference, whatever its size. Beyond, where p moves in steps too small to
matter, Student's t stands for the sign flips. Random numbers have a fixed seed: the same question has the same answer.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from lrkit.errors import LrkitError
from lrkit.study.paired import LEVEL, smallest_p

if TYPE_CHECKING:
    import numpy.typing

MOST = 1_000
"""More seeds than this are not looked for."""

_EXACT = 12  # up to so many pairs each sample is tested over all sign patterns
_SAMPLES, _OF_T = 4_000, 40_000
_BATCH = 500
_TIE = 1e-9


def seeds_needed(
    *, spread: float, size: float = 0.0, margin: float | None = None, rows: int = 1, power: float = 0.8
) -> int | None:
    """Return the fewest seeds with which a study is likely to see what there is.

    >>> seeds_needed(spread=0.01, size=0.02)                 # to show a difference that is twice its spread
    >>> seeds_needed(spread=0.01, margin=0.01)               # to show equivalence, if there is no difference at all

    Args:
        spread: standard deviation of the paired differences from seed to seed, in the score's units.
        size: the true mean difference. To show a difference it must not be 0; to show equivalence it must be inside the
            margin.
        margin: to show equivalence within ±margin; None: to show a difference.
        rows: how many are compared with the base: each takes a share of the 5 %.
        power: the wanted probability of showing it.

    Returns:
        The number of seeds of each row on one task; None if more than 1,000 are needed.

    Raises:
        LrkitError: a number is out of its range.
    """
    _check(spread, size, margin, rows, power)
    least = _least(rows, one_sided=margin is not None)

    def enough(seeds: int) -> bool:
        return power_of(seeds, spread=spread, size=size, margin=margin, rows=rows) >= power

    for seeds in range(least, _EXACT + 1):
        if enough(seeds):
            return seeds
    return fewest(enough, max(least, _EXACT + 1))


def fewest(enough: Callable[[int], bool], least: int) -> int | None:
    """Return the fewest seeds, from `least` to 1,000, that are enough, if more of them are as well; None if none are."""
    low, high = least - 1, MOST
    if not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def power_of(seeds: int, *, spread: float, size: float, margin: float | None = None, rows: int = 1) -> float:
    """Return the probability that so many seeds show a difference, or equivalence if there is a margin.

    Args:
        seeds: pairs of a row and the base on one task.
        spread: as of `seeds_needed`, likewise the rest.
        size: the true mean difference.
        margin: None for a difference.
        rows: how many are compared with the base.
    """
    if seeds < _least(rows, one_sided=margin is not None):
        return 0.0
    import numpy as np

    level = LEVEL / rows
    rng = np.random.default_rng([seeds, rows])
    if seeds <= _EXACT:
        data = rng.normal(0.0, spread, (_SAMPLES, seeds)) + size
        shown = _p(data) < level if margin is None else _below(data - margin, level) & _below(-data - margin, level)
        return float(shown.mean())
    from scipy.special import stdtrit

    root = math.sqrt(seeds)
    means = rng.normal(0.0, spread / root, _OF_T) + size
    errors = spread * np.sqrt(rng.chisquare(seeds - 1, _OF_T) / (seeds - 1)) / root
    if margin is None:
        return float((np.abs(means) > stdtrit(seeds - 1, 1 - level / 2) * errors).mean())
    return float((np.abs(means) + stdtrit(seeds - 1, 1 - level) * errors < margin).mean())


def _below(data: "numpy.typing.NDArray[Any]", level: float) -> "numpy.typing.NDArray[Any]":
    """Tell for each sample if the one-sided test shows that its mean is below zero."""
    below: numpy.typing.NDArray[Any] = (data.sum(axis=1) < 0) & (_p(data) < 2 * level)
    return below


def _p(data: "numpy.typing.NDArray[Any]") -> "numpy.typing.NDArray[Any]":
    """Compute the two-sided sign-flip p of each sample, as `sign_flip_p` does: data [samples, n], p [samples]."""
    import numpy as np

    signs = _signs(data.shape[1])
    counts = []
    for begin in range(0, len(data), _BATCH):
        part = data[begin : begin + _BATCH]
        seen = np.abs(part.sum(axis=1)) - _TIE * np.abs(part).sum(axis=1)
        counts.append((np.abs(part @ signs) >= seen[:, None]).mean(axis=1))
    return np.concatenate(counts)


@cache
def _signs(n: int) -> "numpy.typing.NDArray[Any]":
    """Return half of the sign patterns, [n, 2^(n-1)]; the others are their opposites."""
    import numpy as np

    return 1.0 - 2.0 * ((np.arange(2 ** (n - 1))[None, :] >> np.arange(n)[:, None]) & 1)


def _least(rows: int, *, one_sided: bool) -> int:
    """Return the fewest pairs whose smallest p, of one side or of two, times the rows is below 0.05."""
    n = 1
    while rows * smallest_p(n) / (2 if one_sided else 1) >= LEVEL:
        n += 1
    return n


def _check(spread: float, size: float, margin: float | None, rows: int, power: float) -> None:
    if not 0 < spread < math.inf:
        raise LrkitError(f"the spread of the differences must be a number above 0, not {spread}")
    if margin is None and not 0 < abs(size) < math.inf:
        raise LrkitError(f"the size of a difference to be shown must be a number other than 0, not {size}")
    if margin is not None and not abs(size) < margin < math.inf:
        raise LrkitError(
            f"equivalence within ±{margin} can be shown of a true difference inside it alone, not of {size}"
        )
    if not 1 <= rows <= 2_000:
        raise LrkitError(f"rows must be a number from 1 to 2,000, not {rows}")
    if not 0 < power < 1:
        raise LrkitError(f"power must be a probability between 0 and 1, such as 0.8, not {power}")


__all__ = ["MOST", "fewest", "power_of", "seeds_needed"]
