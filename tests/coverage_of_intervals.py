"""How often a 95 % interval of the mean holds the mean, and how often it contradicts p: a simulation.

    .venv/bin/python -P tests/coverage_of_intervals.py [--samples 20000]

Three intervals are compared: lrkit's, which inverts the sign-flip test; Student's t; and the BCa bootstrap (Efron, 1987),
here with 2,000 resamples. docs/ablations.md has the table that it prints; tests/faults/test_intervals.py a quick part of it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from lrkit.study.paired import interval, sign_flip_p

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
Ends = tuple[np.ndarray, np.ndarray]

KINDS: dict[str, tuple[Draw, float, float]] = {
    # what differences are like: how they are drawn, their mean, their standard deviation
    "normal": (lambda rng, shape: rng.normal(0.0, 1.0, shape), 0.0, 1.0),
    "heavy tails (t, 4)": (lambda rng, shape: rng.standard_t(4, shape), 0.0, math.sqrt(2.0)),
    "skewed (exponential)": (lambda rng, shape: rng.exponential(1.0, shape), 1.0, 1.0),
    # of 100 validation rows the row gets some right that the base gets wrong, and the other way round
    "discrete (of 100 rows)": (
        lambda rng, shape: (rng.binomial(100, 0.03, shape) - rng.binomial(100, 0.01, shape)).astype(float),
        2.0,
        math.sqrt(100 * (0.03 * 0.97 + 0.01 * 0.99)),
    ),
}


def inverted(data: np.ndarray) -> Ends:
    """lrkit's interval of each row of data [samples, n]."""
    found = [interval(row) or (-math.inf, math.inf) for row in data.tolist()]
    low, high = zip(*found, strict=True)
    return np.array(low), np.array(high)


def student(data: np.ndarray) -> Ends:
    """mean ± t s / √n."""
    n = data.shape[1]
    half = stats.t.ppf(0.975, n - 1) * data.std(axis=1, ddof=1) / math.sqrt(n)
    return data.mean(axis=1) - half, data.mean(axis=1) + half


def bca(data: np.ndarray, resamples: int = 2_000) -> Ends:
    """Efron's BCa interval (Efron and Tibshirani, 1993, Eq. 14.9 to 14.15), with the same resamples for every sample."""
    n = data.shape[1]
    weights = np.random.default_rng(1).multinomial(n, [1 / n] * n, resamples) / n
    left_out = (data.sum(axis=1, keepdims=True) - data) / (n - 1)
    gap = left_out.mean(axis=1, keepdims=True) - left_out
    spread = (gap**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        acceleration = np.where(spread > 0, (gap**3).sum(axis=1) / (6 * spread**1.5), 0.0)
    low, high = np.empty(len(data)), np.empty(len(data))
    for begin in range(0, len(data), 1_000):
        part = slice(begin, begin + 1_000)
        means = np.sort(data[part] @ weights.T, axis=1)
        middle = data[part].mean(axis=1, keepdims=True)
        share = (means < middle - 1e-12).mean(axis=1) + 0.5 * (np.abs(means - middle) <= 1e-12).mean(axis=1)
        bias = stats.norm.ppf(np.clip(share, 1e-9, 1 - 1e-9))
        for z, ends in ((-1.959964, low), (1.959964, high)):
            at = stats.norm.cdf(bias + (bias + z) / (1 - acceleration[part] * (bias + z)))
            index = np.clip((at * (resamples - 1)).round().astype(int), 0, resamples - 1)
            ends[part] = np.take_along_axis(means, index[:, None], axis=1)[:, 0]
    return low, high


INTERVALS: dict[str, Callable[[np.ndarray], Ends]] = {"inverted": inverted, "t": student, "BCa": bca}


def coverage(kind: str, n: int, samples: int, which: str, seed: int = 0) -> float:
    """The share of the samples of n differences whose interval holds their mean."""
    draw, mean, _ = KINDS[kind]
    low, high = INTERVALS[which](draw(np.random.default_rng([seed, n]), (samples, n)))
    slack = 1e-9  # an end that is the mean itself holds it
    return float(((low <= mean + slack) & (high >= mean - slack)).mean())


def contradictions(kind: str, n: int, samples: int, which: str, seed: int = 0) -> float:
    """The share of the samples where the interval leaves out 0 and p >= 0.05, or the other way round.

    The mean is from 0 to 2 standard deviations, where either is often near its limit.
    """
    draw, mean, deviation = KINDS[kind]
    rng = np.random.default_rng([seed, n])
    data = draw(rng, (samples, n))
    move = rng.uniform(0.0, 2.0, (samples, 1)) * deviation - mean
    data = data + (np.round(move) if kind.startswith("discrete") else move)
    low, high = INTERVALS[which](data)
    significant = np.array([sign_flip_p(row) < 0.05 for row in data.tolist()])
    return float((((low > 0) | (high < 0)) != significant).mean())


def lines(samples: int) -> Iterator[str]:
    """The tables as Markdown."""
    pairs = range(3, 13)
    yield f"| differences | interval | {' | '.join(f'n = {n}' for n in pairs)} |"
    yield f"|---|---|{'---:|' * len(pairs)}"
    for kind in KINDS:
        for which in INTERVALS:
            row = [coverage(kind, n, samples, which) for n in pairs]
            words = [
                "unbounded" if which == "inverted" and n < 6 else f"{100 * c:.1f}"
                for n, c in zip(pairs, row, strict=True)
            ]
            yield f"| {kind} | {which} | {' | '.join(words)} |"
    yield ""
    yield f"| contradicts p, % | {' | '.join(f'n = {n}' for n in pairs)} |"
    yield f"|---|{'---:|' * len(pairs)}"
    for which in INTERVALS:
        row = [max(contradictions(kind, n, samples // 10, which) for kind in KINDS) for n in pairs]
        yield f"| {which}, at worst | {' | '.join(f'{100 * c:.1f}' for c in row)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=20_000)
    for line in lines(parser.parse_args().samples):
        print(line, flush=True)
