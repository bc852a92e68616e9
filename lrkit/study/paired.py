"""Compare a row with the base in pairs: the sign-flip test, the interval that inverts it, and Holm's correction.

A pair is the same task and the same seed, and d_i = score of the row - score of the base in pair i.

- p is that of a two-sided sign-flip permutation test (Fisher, 1935): if row and base were the same, each d_i could as
  well have had the other sign. p is the share of all 2^n sign patterns whose mean is at least as far from zero as the
  one seen, so it can never be below 2/2^n.
- The 95 % interval holds every θ that the same test, made on d_i - θ, does not reject at 0.05. So it leaves out 0
  exactly if p < 0.05. Its ends are means of subsets of the d_i (Hartigan, 1969, "Using Subsample Values as Typical
  Values"): flipping the signs of a subset S brings the mean as far out as the one seen if the mean of S, or that of the
  rest, lies on the other side of θ. With fewer than six pairs the test rejects nothing, and the interval is unbounded.
- Holm's correction (Holm, 1979) of p over the rows of one table.

Random sign patterns, beyond 16 pairs, have a fixed seed: the same study gives the same table. numpy is imported when it
is used, since it is slow to import.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing

LEVEL = 0.05
ENOUGH_PAIRS = 6
"""With six pairs the smallest p is 2/2^6 = 0.031; with five it is 0.0625."""

_ALL_PATTERNS = 16  # up to so many pairs all sign patterns are tried
_RANDOM = 99_999  # and so many random ones beyond
_BATCH = 10_000
# Differences of rounded scores that are equal in exact arithmetic differ in the last bits. Relative to the sum of
# abs(d), ties must count as ties.
_TIE = 1e-9


def sign_flip_p(differences: Sequence[float]) -> float:
    """Compute the two-sided p of the sign-flip permutation test on the mean.

    Args:
        differences: paired differences [n], finite, n >= 1.

    Returns:
        The share of the 2^n sign patterns whose mean is at least as far from zero as the one seen, exact up to n = 16.
        Beyond that (1 + such patterns) / (1 + 99,999) over random ones. Always in [2/2^n, 1].
    """
    lower, higher, _ = _splits(differences)
    # Of one sign of the mean no split has both parts on the other side: that share is 1.
    as_far = min(int((lower <= 0.0).sum()), int((higher >= 0.0).sum()))
    if len(differences) <= _ALL_PATTERNS:
        return as_far / len(lower)
    return max((as_far + 1) / (_RANDOM + 1), smallest_p(len(differences)))


def all_equal(differences: Sequence[float]) -> bool:
    """Say whether all differences [n] are equal, but for rounding; False for fewer than two."""
    if len(differences) < 2:
        return False
    return max(differences) - min(differences) <= _TIE * math.fsum(abs(each) for each in differences)


def interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Compute an interval of the mean: every value that the sign-flip test does not reject, at 0.05 for 95 %.

    Args:
        differences: paired differences [n], finite.
        level: share of intervals that hold the mean: 0.95, or 0.9, which rejects at 0.1.

    Returns:
        (low, high), both inside the interval. If all differences are equal, both ends are that value, which says nothing
        about how they would vary. None for fewer than six pairs (five at 0.9): the test rejects nothing, and the interval
        is unbounded.
    """
    over = round(1.0 / (1.0 - level))  # 20 for 0.95: whole numbers, so that no rounding moves an end
    if over * smallest_p(len(differences)) >= 1.0:
        return None
    import numpy as np

    lower, higher, scale = _splits(differences)
    # Rejected are the θ with p < 1/over; so many splits must be as far out for p to be at least that.
    every = len(differences) <= _ALL_PATTERNS
    needed = -(-len(lower) // over) if every else (_RANDOM + 1) // over - 1
    low = float(np.partition(lower, needed - 1)[needed - 1])
    high = -float(np.partition(-higher, needed - 1)[needed - 1])
    if high - low <= _TIE:
        low = high = math.fsum(d / scale for d in differences) / len(differences) if scale else 0.0
    return low * scale, high * scale


def _splits(differences: Sequence[float]) -> "tuple[numpy.typing.NDArray[Any], numpy.typing.NDArray[Any], float]":
    """Split the pairs in two in each way: the lower and the higher of the two parts' means, over the largest abs(d).

    A split stands for two sign patterns, which flip one part or the other. If one part is empty, the split is as far out
    as the mean that was seen at any θ: its means are -∞ and ∞.

    Returns:
        lower [splits], higher [splits], and the largest abs(d). All 2^(n-1) splits up to n = 16, else random ones.
    """
    import numpy as np

    n = len(differences)
    data = np.asarray(differences, dtype=np.float64)
    scale = float(np.abs(data).max())
    if scale:
        data = data / scale
    if n <= _ALL_PATTERNS:
        # the last pair is in the second part
        batches = iter([(np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1])
    else:
        rng = np.random.default_rng(0)
        sizes = [min(_BATCH, _RANDOM - begin) for begin in range(0, _RANDOM, _BATCH)]
        batches = (rng.integers(0, 2, (size, n)) for size in sizes)
    slack = 0.5 * _TIE * float(np.abs(data).sum())
    total = float(data.sum())
    lower, higher = [], []
    for first in batches:
        size = first.sum(axis=1)
        sums = first @ data
        with np.errstate(divide="ignore", invalid="ignore"):
            # A mean that is zero in exact arithmetic is zero here, so that p and interval agree to the last bit.
            means = [
                np.where(np.abs(part) <= slack, 0.0, part) / many
                for part, many in ((sums, size), (total - sums, n - size))
            ]
        one_empty = (size == 0) | (size == n)
        lower.append(np.where(one_empty, -np.inf, np.minimum(*means)))
        higher.append(np.where(one_empty, np.inf, np.maximum(*means)))
    return np.concatenate(lower), np.concatenate(higher), scale


def smallest_p(pairs: int) -> float:
    """Return the smallest p that so many pairs can give: all differences of one sign, 2 of the 2^n patterns."""
    return 1.0 if pairs < 1 else math.ldexp(2.0, -pairs)


def enough_pairs(rows: int) -> int:
    """Return the fewest pairs with which p can fall below 0.05 after Holm's correction: 2 rows / 2^n < 0.05.

    Args:
        rows: how many are compared with the base, at least 1.
    """
    return next(n for n in itertools.count(ENOUGH_PAIRS) if rows * smallest_p(n) < LEVEL)


def too_few_seeds(rows: int, seeds: int) -> str | None:
    """Say, before a study is run, that no p in a table of it can fall below 0.05; None if one can.

    Args:
        rows: how many are compared with the base.
        seeds: of each row and task.
    """
    if rows < 1 or seeds >= enough_pairs(rows):
        return None
    told = "1 seed is" if seeds == 1 else f"{seeds} seeds are"
    over = f"over {rows} rows after Holm's correction" if rows > 1 else "for one row"
    least = min(1.0, rows * smallest_p(seeds))
    return (
        f"{told} too few to show a difference: {over} no p can be below {least:.2g}, whatever the scores; "
        f"{enough_pairs(rows)} seeds could bring it below {LEVEL}"
    )


def holm(p: Sequence[float]) -> list[float]:
    """Correct p by Holm's step-down method, in the order given.

    The k-th smallest of m (from 0) is multiplied by m - k; none is then below a smaller one's, or above 1.
    """
    adjusted = [0.0] * len(p)
    least = 0.0
    for k, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - k) * p[i]))
        adjusted[i] = least
    return adjusted
