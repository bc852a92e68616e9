"""The files of a cell and of a measured row: one class for what is written and for what is read back. No torch here.

- ``cells/KEY/result.json``: `CellResult`.
- ``cells/KEY/history.jsonl``: one `lrkit.Decision` per line.
- ``cells/KEY/attempts.jsonl``: one `Attempt` per line.
- ``costs/KEY.json``: `Cost`.

``study.json`` is in `lrkit.study.study_file`. All are structured strictly, and an error names the path:
``result.layers[2].rank must be a whole number, not '8'``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from lrkit.adapt.summary import LayerSummary
from lrkit.errors import LrkitError
from lrkit.loop.history import Decision
from lrkit.study.store import FORMAT, read_object, read_whole, structured_as, structured_line

# ---- result.json -----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Parameters:
    """Trainable parameters of a run, as `lrkit.adapt.summary.Summary` counts them.

    Args:
        start: the adapters' at first.
        now: the adapters' at the end.
        average: the adapters' averaged over the steps.
        beside: parameters of the method that are in none of its layers.
        head: the head's.
        step: optimizer steps that the average is over.
        coverage: how much of the blocks' weights is adapted, as plain data; None if it is not known.
    """

    start: int
    now: int
    average: float
    beside: int = 0
    head: int
    step: int
    coverage: dict[str, Any] | None = None


@attrs.frozen(kw_only=True)
class RunFlops:
    """Floating-point operations of a run's forward and backward passes; a multiply-add is two.

    torch counts them on the training example of median length (of 1,000, in a run shorter than an epoch), at eight steps
    spread over the run, so that frozen matrices and cut ranks are seen. Everything that a step computes is in it: attention
    over the whole sequence, the head over the vocabulary, and in an encoder-decoder the decoder over the target, whose
    length counts beside the source's. Padding, the penalty, the optimizer, the decisions and evaluation are not in it.

    Args:
        run: of all steps, and of calibration before the first.
        first_step: of the first step, a whole batch.
        last_step: of the last one.
    """

    run: float
    first_step: float
    last_step: float


@attrs.frozen(kw_only=True)
class CellResult:
    """The numbers that a run comes to: the part of `lrkit.study.run.Result` that ``result.json`` keeps.

    Args:
        scores: on the validation rows, the primary score first. NaN: the run diverged.
        majority: the primary score of the best trivial answers to the rows that were scored; None if there are none.
        steps: optimizer steps taken.
        parameters: trainable parameters.
        layers: the adapted layers in the model's order.
        flops: work of the model in training; None if it was not counted.
        truth: names of the layers that the best allocation is known to lie in (`lrkit.tasks.Task.truth`); empty if it is
            not known.
        higher_is_better: a larger primary score is a better one.
        tokens: tokens of the training batches of all steps, padding left out, and in an encoder-decoder the decoder's too;
            None in older results.
    """

    scores: dict[str, float]
    majority: float | None = None
    steps: int
    parameters: Parameters = attrs.field(repr=False)
    layers: tuple[LayerSummary, ...] = attrs.field(default=(), repr=False)
    flops: RunFlops | None = None
    truth: tuple[str, ...] = ()
    higher_is_better: bool = True
    tokens: int | None = None

    @property
    def score(self) -> float:
        """Return the primary score."""
        return next(iter(self.scores.values()))

    @property
    def merit(self) -> float:
        """Return the primary score, or minus it if a lower one is better: of two runs the better one has more merit."""
        return self.score if self.higher_is_better else -self.score

    def to_file(self, key: str) -> dict[str, Any]:
        """Return the content of ``result.json`` for the cell of a key."""
        kept = {field.name: getattr(self, field.name) for field in attrs.fields(CellResult)}
        kept |= {"parameters": attrs.asdict(self.parameters), "layers": [each.to_plain() for each in self.layers]}
        for name, usual in (("truth", ()), ("higher_is_better", True)):
            if kept[name] == usual:
                del kept[name]  # of most tasks; a file is as it was before there was anything else
        return {"format": FORMAT, "key": key, **kept, "flops": self.flops and attrs.asdict(self.flops)}


def read_result(path: Path) -> CellResult | None:
    """Read a ``result.json``; None if there is none.

    Raises:
        LrkitError: it is something else, of a newer format, or without a score.
    """
    result = read_whole(path, CellResult, "a result")
    if result is not None and not result.scores:
        raise LrkitError(f"{path} is not a result of a cell: it holds no score")
    return result


# ---- lines and costs -------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Attempt:
    """One line of ``attempts.jsonl``: ``begin``, ``end`` or ``failed``, when, at which step, and the error if any.

    An attempt that came to its end has its speed: tokens of training batches per second of its steps.
    """

    event: str
    time: str = ""
    step: int | None = None
    error: str = ""
    tokens_per_second: float | None = None


def attempt_in(line: Mapping[str, Any]) -> Attempt | None:
    """Read one line of ``attempts.jsonl``; None if it is something else."""
    return structured_line(_said({"step": line.get("from_step"), **line}), Attempt)


_NOT_YET = {"policy": 0, "threshold": None, "lost": (), "returned": (), "fresh": ()}
"""What a decision has if its line does not say it."""


def decision_in(line: Mapping[str, Any]) -> Decision | None:
    """Read one line of ``history.jsonl``; None if it is something else."""
    return structured_line({**_NOT_YET, **_said(line)}, Decision)


def _said(line: Mapping[str, Any]) -> dict[str, Any]:
    """Drop nulls, which stand for the default."""
    return {key: value for key, value in line.items() if value is not None}


@attrs.frozen(kw_only=True)
class Cost:
    """The cost of a row's step beside the base row's, timed interleaved in one process.

    Args:
        row: index of the row.
        task: name of the task.
        step_ratio: time of a whole step at the start of training, over the base row's; 1 for the base.
        step_ratio_end: the same with the state at the end of training.
        step_ms: milliseconds of a step.
        base_step_ms: the base row's.
        peak_memory: bytes.
        base_peak_memory: the base row's.
        device: the device that it was measured on.
        threads: CPU threads.
        error: why there are no numbers, in one line; empty if there are some.
    """

    row: int
    task: str
    step_ratio: float | None = None
    step_ratio_end: float | None = None
    step_ms: float | None = None
    base_step_ms: float | None = None
    peak_memory: float | None = None
    base_peak_memory: float | None = None
    device: str = ""
    threads: int | None = None
    error: str = ""


_SHORT = {"row_step_ratio": "step_ratio", "row_step_ratio_end": "step_ratio_end"}
"""Names in the file that the class has without the row."""


def read_cost(path: Path, row: int, task: str) -> Cost | None:
    """Read a measured row's file; None if there is none. A file that cannot be read is a cost with an error.

    Args:
        path: the file.
        row: index of the row.
        task: name of the task.
    """
    try:
        data = read_object(path, "a cost")
        if data is None:
            return None
        values = {_SHORT.get(key, key): value for key, value in _said(data).items()}
        cost = structured_as({**values, "row": row, "task": task}, Cost, "a cost", path)
    except LrkitError as error:
        return Cost(row=row, task=task, error=str(error))
    return attrs.evolve(cost, error=" ".join(cost.error.split()))
