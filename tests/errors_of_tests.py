"""How often equivalence and a difference over several tasks are shown where there is none: a simulation.

    .venv/bin/python -P tests/errors_of_tests.py [--samples 10000]

docs/ablations.md has the tables that it prints; tests/faults/test_verdicts.py a quick part of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from lrkit.study.combined import combined_p
from lrkit.study.effects import effect_interval
from lrkit.study.equivalence import equivalence_p
from lrkit.study.paired import sign_flip_p

Rng = np.random.Generator
SHAPES: dict[str, Callable[[Rng, int], np.ndarray]] = {
    # differences with mean 0 and standard deviation 1
    "normal": lambda rng, n: rng.normal(0.0, 1.0, n),
    "heavy tails (t, 4)": lambda rng, n: rng.standard_t(4, n) / np.sqrt(2.0),
    "uniform": lambda rng, n: rng.uniform(-np.sqrt(3.0), np.sqrt(3.0), n),
}
TASKS: dict[str, Callable[[Rng], list[float]]] = {
    # the true mean difference on each of two tasks, in standard deviations of its differences
    "no task has a difference": lambda rng: [0.0, 0.0],
    "+1 and -1": lambda rng: [1.0, -1.0],
    "tasks drawn at random, deviation 1": lambda rng: rng.normal(0.0, 1.0, 2).tolist(),
    "+0.5 and +0.5": lambda rng: [0.5, 0.5],
    "+1 and 0": lambda rng: [1.0, 0.0],
}


def equivalent(shape: str, n: int, mean: float, margin: float, samples: int, seed: int = 0) -> float:
    """The share of samples of n differences that are shown to be within ±margin, in standard deviations."""
    rng = np.random.default_rng([seed, n])
    return float(
        np.mean([equivalence_p((SHAPES[shape](rng, n) + mean).tolist(), margin) < 0.05 for _ in range(samples)])
    )


def together(
    truth: str, n: int, samples: int, *, pooled: bool = False, spreads: tuple[float, ...] = (1.0, 20.0)
) -> float:
    """The share of samples in which the combined test shows a difference, of tasks whose spreads differ.

    Args:
        truth: of `TASKS`.
        n: pairs of each task.
        samples: how many.
        pooled: take all pairs for pairs of one task instead.
        spreads: standard deviation of each task's differences.
    """
    rng = np.random.default_rng([1, n])
    test = (lambda tasks: sign_flip_p([d for task in tasks for d in task])) if pooled else combined_p
    found = 0
    for _ in range(samples):
        means = TASKS[truth](rng)
        tasks = [(s * (rng.normal(0.0, 1.0, n) + m)).tolist() for m, s in zip(means, spreads, strict=True)]
        found += test(tasks) < 0.05
    return found / samples


def effect_coverage(effect: float, n: int, samples: int) -> float:
    """The share of samples of n normal differences whose interval holds the effect size."""
    rng = np.random.default_rng([2, n])
    ends = [effect_interval((rng.normal(effect, 1.0, n)).tolist()) for _ in range(samples)]
    return float(np.mean([found is not None and found[0] <= effect <= found[1] for found in ends]))


def lines(samples: int) -> Iterator[str]:
    """The tables as Markdown."""
    pairs = (5, 6, 7, 8, 10, 12)
    yield f"| differences | true mean | {' | '.join(f'n = {n}' for n in pairs)} |"
    yield f"|---|---|{'---:|' * len(pairs)}"
    for shape in SHAPES:
        for mean, words in ((1.0, "at the margin"), (0.5, "half of it"), (0.0, "none")):
            row = [equivalent(shape, n, mean, 1.0, samples) for n in pairs]
            yield f"| {shape} | {words} | {' | '.join(f'{100 * share:.1f}' for share in row)} |"
    yield ""
    pairs = (5, 6, 7, 8)
    yield f"| two tasks, spreads 1 and 20 | test | {' | '.join(f'n = {n}' for n in pairs)} |"
    yield f"|---|---|{'---:|' * len(pairs)}"
    for truth in TASKS:
        for pooled in (False, True):
            row = [together(truth, n, samples, pooled=pooled) for n in pairs]
            name = "all pairs as one sample" if pooled else "stratified, standardized"
            yield f"| {truth} | {name} | {' | '.join(f'{100 * share:.1f}' for share in row)} |"
    yield ""
    pairs = (3, 5, 6, 8, 12)
    yield f"| effect size | {' | '.join(f'n = {n}' for n in pairs)} |"
    yield f"|---|{'---:|' * len(pairs)}"
    for effect in (0.0, 0.5, 1.0, 2.0):
        row = [effect_coverage(effect, n, samples) for n in pairs]
        yield f"| {effect:g} | {' | '.join(f'{100 * share:.1f}' for share in row)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=10_000)
    for line in lines(parser.parse_args().samples):
        print(line, flush=True)
