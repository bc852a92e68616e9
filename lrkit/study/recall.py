"""Hold a study's allocations against the truth, on a task that knows where the rank belongs. No torch here.

A task such as `teacher` says in each result which layers are the right ones (`lrkit.study.files.CellResult.truth`).
`recalls_of` makes one `Recall` of each row: how much of the rank its runs gave to them, over all draws.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import attrs

from lrkit.study.files import CellResult
from lrkit.study.results import StudyRecord
from lrkit.tasks.lesson import could_give, recall_of


@attrs.frozen(kw_only=True)
class Layer:
    """A right layer of one draw: its name, its rank at the end and at first. None: it has no adapter of a rank."""

    name: str
    rank: int | None
    initial_rank: int | None

    @property
    def found(self) -> bool:
        """True if it has kept half of its first rank or more."""
        return self.rank is not None and 2 * self.rank >= (self.initial_rank or 1)


@attrs.frozen(kw_only=True)
class Draw:
    """One run: its seed, its right layers, its recall (None without a choice of ranks) and its primary score."""

    seed: int
    layers: tuple[Layer, ...]
    recall: float | None
    score: float

    @property
    def missed(self) -> bool:
        """True if it chose its ranks, and a right layer has kept less than half of its own."""
        return self.recall is not None and not all(layer.found for layer in self.layers)

    def __str__(self) -> str:
        """Return seed, ranks of the right layers and score in one line."""
        ranks = ", ".join(
            f"{layer.name} {layer.rank} of {layer.initial_rank}" if layer.rank is not None else f"{layer.name} none"
            for layer in self.layers
        )
        return f"seed {self.seed}: {ranks}; score {self.score:.3f}"


@attrs.frozen(kw_only=True)
class Recall:
    """One row on one task.

    Args:
        row: index into the study's rows.
        label: the row's name.
        task: the task's name.
        chosen: its runs chose their ranks; if not, each layer ended with the rank that it had at first.
        draws: runs that are done and know their right layers.
        recall: mean over the draws. A row that chose its ranks is held against what it could have given (see
            `lrkit.tasks.lesson.recall_of`), a row of fixed ranks against the most that a row of the study which chose
            could have given at the same seed; None if there is none.
        low: lower end of the 95 % interval of the mean over draws (`mean_interval`); None for fewer than two draws.
        high: upper end.
        found: right layers, of all draws, that kept at least half of their first rank.
        right: right layers of all draws.
        score: mean primary score.
        misses: the draws in which a right layer kept less than half of its first rank, the worst first.
    """

    row: int
    label: str
    task: str
    chosen: bool
    draws: int
    recall: float | None
    low: float | None
    high: float | None
    found: int
    right: int
    score: float
    misses: tuple[Draw, ...]

    def texts(self) -> tuple[str, str, str, str, str]:
        """Write recall, interval, layers found, draws and score for a table."""
        recall = "-" if self.recall is None else f"{self.recall:.3f}"
        ends = "-" if self.low is None or self.high is None else f"{self.low:.3f} to {self.high:.3f}"
        found = f"{self.found} of {self.right}" if self.chosen else "-"
        return recall, ends, found, str(self.draws), "-" if math.isnan(self.score) else f"{self.score:.3f}"


def recalls_of(record: StudyRecord, task: str) -> tuple[Recall, ...]:
    """Compute the recall of each row of a study on one task; empty if the task does not know its right layers.

    Raises:
        LrkitError: a cell's result cannot be read.
    """
    results = {
        index: {cell.seed: cell.result for cell in record.cells_of(index, task) if cell.result and cell.result.truth}
        for index in range(len(record.rows))
    }
    most: dict[int, int] = {}
    for found in results.values():
        for seed, result in found.items():
            if _own(result) is not None:
                most[seed] = max(most.get(seed, 0), could_give(_ranks(result), result.truth))
    return tuple(
        _recall(index, record.rows[index].label, task, found, most) for index, found in results.items() if found
    )


def _recall(index: int, label: str, task: str, results: Mapping[int, CellResult], most: Mapping[int, int]) -> Recall:
    draws = [_draw(seed, result) for seed, result in results.items()]
    chosen = any(draw.recall is not None for draw in draws)
    recalls = [
        own if own is not None else _against(result, most.get(seed))
        for (seed, result), own in zip(results.items(), (draw.recall for draw in draws), strict=True)
    ]
    known = [recall for recall in recalls if recall is not None]
    low, high = mean_interval(known)
    scores = [draw.score for draw in draws if math.isfinite(draw.score)]
    return Recall(
        row=index,
        label=label,
        task=task,
        chosen=chosen,
        draws=len(draws),
        recall=statistics.fmean(known) if known else None,
        low=low,
        high=high,
        found=sum(layer.found for draw in draws for layer in draw.layers),
        right=sum(len(draw.layers) for draw in draws),
        score=statistics.fmean(scores) if scores else math.nan,
        misses=tuple(sorted((draw for draw in draws if draw.missed), key=lambda draw: draw.recall or 0.0)),
    )


def _ranks(result: CellResult) -> list[tuple[str, int | None, int | None]]:
    return [(layer.name, layer.rank, layer.initial_rank) for layer in result.layers]


def _own(result: CellResult) -> float | None:
    return recall_of(_ranks(result), result.truth)


def _draw(seed: int, result: CellResult) -> Draw:
    by_name = {layer.name: layer for layer in result.layers}
    layers = []
    for name in result.truth:
        layer = by_name.get(name)
        rank, first = (None, None) if layer is None else (layer.rank, layer.initial_rank)
        layers.append(Layer(name=name, rank=rank, initial_rank=first))
    return Draw(seed=seed, layers=tuple(layers), recall=_own(result), score=result.score)


def _against(result: CellResult, most: int | None) -> float | None:
    """Hold fixed ranks against the most that another row could have given; None if one is not known."""
    kept = [rank for name, rank, _ in _ranks(result) if name in result.truth and rank is not None]
    has_ranks = any(rank is not None for _, rank, _ in _ranks(result))
    return min(1.0, sum(kept) / most) if most and has_ranks else None


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a mean by Student's t, cut at 0 and 1, the bounds of a recall.

    It takes the draws as a sample of all sets of layers. If all values are equal it has no width, which says how coarse
    they are. For example, recalls of 1, 1, 0.5 and 0.5 have the mean 0.75 and the interval 0.29 to 1.

    Args:
        values: one per draw, each from 0 to 1.

    Returns:
        Its ends; None and None for fewer than two values.
    """
    if len(values) < 2:
        return None, None
    from scipy import stats

    mean = statistics.fmean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return max(0.0, mean - half), min(1.0, mean + half)
