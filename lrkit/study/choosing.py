"""Choose a row's settings by its trials: rules "chosen", "proposed" and "promoted" of `lrkit.study.settling`. No torch here.

Every trial is scored on rows that were set aside from the training data. The settings with the best mean of the primary
score over the tuning seeds are chosen; a run that diverged makes its settings the worst, and of equal ones the first are
taken. In this module more is always better: of a score whose lower values are better, such as a perplexity, a mean is
minus the scores' own (`lrkit.study.files.CellResult.merit`).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError
from lrkit.study.needs import Source
from lrkit.study.proposing import proposals
from lrkit.study.space import grid

if TYPE_CHECKING:
    from lrkit.study.cell import Cell


def mean_score(scores: Sequence[float]) -> float:
    """Return the mean score of some settings over the tuning seeds; minus infinity if a run diverged."""
    return statistics.fmean(scores) if all(map(math.isfinite, scores)) else -math.inf


def best_of(means: Sequence[float]) -> int:
    """Return the index of the settings that are chosen, given the mean score of each; the first of equal ones.

    Raises:
        LrkitError: all diverged.
    """
    if all(mean == -math.inf for mean in means):
        raise LrkitError("none of its trials can be chosen: every one diverged; try lower learning rates")
    return means.index(max(means))


def chosen(cell: "Cell", sources: Sequence[Source], settings: Mapping[str, Any]) -> "Cell":
    """Fill in the settings that the trials chose: the rule "chosen".

    Args:
        cell: the cell, with the settings of its row.
        sources: its row's trials: all seeds of the first one, then of the second one, and so on.
        settings: ``space``, path to values; ``seeds``, how many each trial has; ``batch`` and ``seed`` of a sampler;
            ``rungs`` of successive halving: how many trials each has.
    """
    from lrkit.study.tuning import with_settings

    _, best = winner_of(sources, settings)
    method, run = with_settings(cell.method, cell.run, best)
    return attrs.evolve(cell, method=method, run=run)


def proposed(cell: "Cell", sources: Sequence[Source], settings: Mapping[str, Any]) -> "Cell":
    """Fill in the settings that a trial tries: the rule "proposed".

    Args:
        cell: the trial's cell.
        sources: the trials of all batches before: all seeds of the first one, then of the second one, and so on.
        settings: ``space``, path to values; ``seeds``, how many each trial has; ``batch``; ``seed`` of the sampler;
            ``index`` in the batch.
    """
    from lrkit.study.tuning import with_settings

    means = means_of(sources, settings["seeds"])
    tried = candidates(settings, means, len(means) + settings["index"] + 1)[-1]
    method, run = with_settings(cell.method, cell.run, tried)
    return attrs.evolve(cell, method=method, run=run)


def means_of(sources: Sequence[Source], seeds: int) -> list[float]:
    """Return the mean score of each trial: so many of the sources in turn are its seeds."""
    return [
        mean_score([source.result.merit for source in sources[at : at + seeds]]) for at in range(0, len(sources), seeds)
    ]


def survivors(means: Sequence[float], sizes: Sequence[int]) -> list[list[int]]:
    """List the trials that each rung of successive halving has: of the one before, those with the best means.

    For example, of three trials with means 0.1, 0.9 and 0.5 two go on: ``survivors([0.1, 0.9, 0.5], [3, 2])`` is
    ``[[0, 1, 2], [1, 2]]``. Of equal ones the first go on.

    Args:
        means: of the first rung's trials, then of the second one's, and so on, up to the rung before the last.
        sizes: how many trials each rung has.
    """
    rungs, at = [list(range(sizes[0]))], 0
    for size in sizes[1:]:
        here = means[at : at + len(rungs[-1])]
        at += len(here)
        best = sorted(range(len(here)), key=lambda each: -here[each])[:size]
        rungs.append([rungs[-1][each] for each in sorted(best)])
    return rungs


def promoted(cell: "Cell", sources: Sequence[Source], settings: Mapping[str, Any]) -> "Cell":
    """Fill in the settings of a trial that goes on to more steps: the rule "promoted".

    Args:
        cell: the trial's cell.
        sources: the trials of all rungs before, each with all its seeds.
        settings: as in `chosen`; ``rungs``, how many trials each rung has, this one the last; ``slot``, which of this one.
    """
    from lrkit.study.tuning import with_settings

    means = means_of(sources, settings["seeds"])
    number = survivors(means, settings["rungs"])[-1][settings["slot"]]
    method, run = with_settings(cell.method, cell.run, candidates(settings, means, number + 1)[number])
    return attrs.evolve(cell, method=method, run=run)


def candidates(settings: Mapping[str, Any], means: Sequence[float], count: int) -> list[dict[str, Any]]:
    """List the settings of a row's trials: path to value each.

    Args:
        settings: ``space``; and, if a sampler proposes them, ``batch`` and ``seed``.
        means: of the trials that are done.
        count: how many.
    """
    if "batch" not in settings:
        return grid(settings["space"])[:count]
    return proposals(settings["space"], means, count, batch=settings["batch"], seed=settings["seed"])


def winner_of(sources: Sequence[Source], settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return which trial is chosen, counted over all rungs, and its settings."""
    means = means_of(sources, settings["seeds"])
    sizes = settings.get("rungs", [len(means)])
    winner = best_of(means[-sizes[-1] :])
    number = survivors(means, sizes)[-1][winner]
    return len(means) - sizes[-1] + winner, candidates(settings, means, sizes[0])[number]
