"""Say with how many seeds a claim would be decided, by what its differences vary: an open one has too few. No torch here.

Assumed are normal differences of a known standard deviation on each task. Of the two ways in which a claim is decided, one
needs an advantage of the margin on every task, which the stratified test is to see; the other none at all, so that an
advantage of the margin can be excluded on every task. Sign flips are stood for by a normal and by Student's t, since beyond
a dozen pairs their p moves in steps too small to matter.
"""

import math
import statistics
from collections.abc import Sequence
from functools import cache

from lrkit.study.paired import ENOUGH_PAIRS, LEVEL, enough_pairs
from lrkit.study.power import MOST, fewest

_SAMPLES = 20_000
_FAR = 30.0  # standard deviations, beyond which a tail is 0


def seeds_to_show(spreads: Sequence[float], margin: float, *, claims: int = 1, power: float = 0.8) -> int | None:
    """Return the fewest seeds with which a claim is likely to be replicated, if its advantage is the margin everywhere.

    >>> seeds_to_show([0.01, 0.02], 0.01)                    # two tasks, whose differences vary by 0.01 and 0.02
    10

    Args:
        spreads: standard deviation of the differences on each task, above 0.
        margin: the advantage, above 0.
        claims: how many claims the study has: Holm's correction takes the least p times so many.
        power: the wanted probability.

    Returns:
        Seeds of each row on each task; None if more than 1,000 are needed.
    """
    # Of several tasks six seeds each give the test patterns enough, however many claims there are.
    least = enough_pairs(claims) if len(spreads) == 1 else ENOUGH_PAIRS
    return fewest(lambda seeds: _shown(tuple(spreads), margin, claims, seeds) >= power, least)


def seeds_to_exclude(
    spreads: Sequence[float], margin: float, *, means: Sequence[float] | None = None, power: float = 0.8
) -> int | None:
    """Return the fewest seeds that are likely to exclude an advantage of the margin on every task.

    Args:
        spreads: as of `seeds_to_show`.
        margin: the advantage, above 0.
        means: the true advantage on each task, below the margin; None for none at all.
        power: the wanted probability.

    Returns:
        As `seeds_to_show`.
    """
    left = [margin - mean for mean in means or [0.0] * len(spreads)]
    return fewest(lambda seeds: _excluded(spreads, left, seeds) >= power, ENOUGH_PAIRS)


def seeds_to_decide(differences: Sequence[Sequence[float]], margin: float, claims: int, words: str) -> str:
    """Say how many seeds would decide an open claim, by how its differences vary; empty if these are too few.

    Args:
        differences: of each task.
        margin: the advantage, above 0.
        claims: how many the study has.
        words: the margin as it is told.
    """
    spreads = [statistics.stdev(each) for each in differences if len(each) > 2]
    if len(spreads) < len(differences):
        return ""
    show, exclude = seeds_to_show(spreads, margin, claims=claims), seeds_to_exclude(spreads, margin)
    return (
        f"; {in_words(show)} seeds would probably (0.8) show an advantage of {words}, {in_words(exclude)} exclude it if "
        "there is none"
    )


def in_words(seeds: int | None) -> str:
    """Say a number of seeds in words: ``about 14``."""
    return f"over {MOST:,}" if seeds is None else f"about {seeds:,}"


@cache  # a report judges its claims for the terminal, the page and a file
def _shown(spreads: tuple[float, ...], margin: float, claims: int, seeds: int) -> float:
    """Return the probability that the stratified test rejects, with the first row ahead."""
    import numpy as np
    from scipy.special import ndtri

    rng = np.random.default_rng(seeds)
    total = np.zeros(_SAMPLES)
    for spread in spreads:
        mean = rng.normal(margin, spread / math.sqrt(seeds), _SAMPLES)
        total += mean / np.sqrt(mean**2 + spread**2 * rng.chisquare(seeds - 1, _SAMPLES) / seeds)
    # With each task's differences in units of their root mean square, sign flips have a variance of 1 / seeds on each.
    return float((total * math.sqrt(seeds / len(spreads)) > ndtri(1 - LEVEL / claims / 2)).mean())


def _excluded(spreads: Sequence[float], left: Sequence[float], seeds: int) -> float:
    """Return the probability that one-sided tests exclude the margin on every task, which lies `left` above the truth."""
    from scipy.special import nctdtr, stdtrit

    critical = float(stdtrit(seeds - 1, 1 - LEVEL))
    far = [gap * math.sqrt(seeds) / each for each, gap in zip(spreads, left, strict=True)]
    # scipy gives NaN for a tail of less than the smallest float, which is none at all.
    return math.prod(1 - float(nctdtr(seeds - 1, each, critical)) for each in far if each < critical + _FAR)


__all__ = ["in_words", "seeds_to_decide", "seeds_to_exclude", "seeds_to_show"]
