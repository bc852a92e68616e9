"""Reading a study's folder: what was asked for, and what there is of it so far.

A study may still be running when it is read. Cells that have not begun, a last line that a killed process left torn,
steps that a resumed run repeated and costs not measured yet are all as they should be. What is no study at all is
refused in one line.

A cell's files are read when they are first asked for, and once: `read_study` itself opens ``study.json`` alone.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import attrs

from lrkit import reading
from lrkit.errors import LrkitError, cut, shown

if TYPE_CHECKING:
    import cattrs
    import pandas

FORMAT = 1
"""The newest format of a study's files that is understood here."""

Status = Literal["done", "failed", "running", "missing"]
"""``done``: has a result; ``failed``: the last attempt ended in an error; ``running``: begun, neither done nor failed
(it runs now, or it was interrupted: the files do not tell which); ``missing``: never begun."""

STATUSES: tuple[Status, ...] = ("done", "running", "failed", "missing")

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class ChangeRecord:
    """One setting in which a row differs from the base: the path, the base's value and the row's, as plain data."""

    path: str
    base: Any = None
    value: Any = None


@attrs.frozen(kw_only=True)
class RowRecord:
    """One row of the ablation table.

    Args:
        label: its name.
        changes: what it changes against the base; empty for the base itself.
        method: the method as plain data.
        rates: the learning rates in force on each task: task to ``{"lr", "head_lr"}``; empty in older studies.
    """

    label: str
    changes: tuple[ChangeRecord, ...] = ()
    method: dict[str, Any] = attrs.field(factory=dict, repr=False)
    rates: dict[str, dict[str, float]] = attrs.field(factory=dict, repr=False)

    @property
    def lr(self) -> str:
        """The adapters' learning rate, or those of the tasks; empty where it is not known."""
        found = sorted({rate["lr"] for rate in self.rates.values() if "lr" in rate})
        return " / ".join(f"{rate:g}" for rate in found)


@attrs.frozen(kw_only=True)
class TaskRecord:
    """One task: its name, its metric's name, and the primary score of the best constant guess, where known."""

    name: str
    metric: str = ""
    majority: float | None = None


@attrs.frozen(kw_only=True)
class ParametersRecord:
    """Trainable parameters of a run: the adapters' at first, now and averaged over `step` steps; the head's apart."""

    start: int
    now: int
    average: float
    head: int
    step: int


@attrs.frozen(kw_only=True)
class LayerRecord:
    """One adapted layer at the end of a run. Ranks are None for an adapter without components."""

    name: str
    rank: int | None = None
    initial_rank: int | None = None
    frozen: tuple[str, ...] = ()
    start: int = 0
    now: int = 0
    average: float = 0.0


@attrs.frozen(kw_only=True)
class FlopsRecord:
    """Counted floating-point operations: of the whole run, and of its first and last step."""

    run: float
    first_step: float
    last_step: float


@attrs.frozen(kw_only=True)
class ResultRecord:
    """What came of a cell.

    Args:
        scores: the primary score first. NaN: the run diverged.
        majority: the primary score of the best constant guess.
        steps: optimizer steps taken.
        parameters: trainable parameters.
        layers: the adapted layers in the model's order.
        flops: None where they were not counted.
    """

    scores: dict[str, float]
    majority: float | None = None
    steps: int
    parameters: ParametersRecord
    layers: tuple[LayerRecord, ...] = attrs.field(default=(), repr=False)
    flops: FlopsRecord | None = None


@attrs.frozen(kw_only=True)
class AttemptRecord:
    """One line of ``attempts.jsonl``: ``begin``, ``end`` or ``failed``, when, at which step, and the error if any."""

    event: str
    time: str = ""
    step: int | None = None
    error: str = ""


@attrs.frozen(kw_only=True)
class DecisionRecord:
    """What one policy decided after one step; the fields are those of `lrkit.loop.history.Decision`."""

    step: int
    policy: int
    budget: float
    kept: float
    units: float
    lost: tuple[str, ...] = attrs.field(default=(), repr=False)
    returned: tuple[str, ...] = attrs.field(default=(), repr=False)
    fresh: tuple[str, ...] = attrs.field(default=(), repr=False)

    @property
    def before(self) -> float:
        """Units that were in effect before it."""
        return self.kept + len(self.lost) - len(self.returned) - len(self.fresh)


@attrs.frozen(kw_only=True)
class CostRecord:
    """What a row's step costs beside the base row's, timed interleaved in one process.

    Args:
        row: index of the row.
        task: name of the task.
        step_ratio: time of a whole step at the start of training, over the base row's; 1 for the base.
        step_ratio_end: the same with the state at the end of training.
        step_ms: milliseconds of a step.
        base_step_ms: the base row's.
        peak_memory: bytes.
        base_peak_memory: the base row's.
        device: where it was measured.
        threads: CPU threads.
        error: why there are no numbers, in one line; empty where there are.
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


@attrs.frozen(kw_only=True)
class CellRecord:
    """One run of a study: a row, a task and a seed. Its files are read when first asked for.

    Args:
        key: the name of its folder.
        row: index into `StudyRecord.rows`.
        task: name of the task.
        seed: the seed.
        folder: where its files are, or will be.
        old: it is of other code than the study was last run with.
    """

    key: str
    row: int
    task: str
    seed: int
    folder: Path = attrs.field(repr=False)
    old: bool = False

    @cached_property
    def status(self) -> Status:
        """How far it is. A failed cell that is being tried again is running."""
        if self.result is not None:
            return "done"
        if self.attempts:
            return "failed" if self.attempts[-1].event == "failed" else "running"
        if self.error:
            return "failed"
        return "running" if self._metrics else "missing"

    @cached_property
    def result(self) -> ResultRecord | None:
        """What came of it; None until it is done.

        Raises:
            LrkitError: ``result.json`` is there and is no result. (It is written in one move, so a run that was killed
                cannot leave it so.)
        """
        path = self.folder / "result.json"
        data = _json(path, "a result")
        if data is None:
            return None
        _check_format(data, path)
        result = _structured(data, ResultRecord, path, "a result")
        if not result.scores:
            raise LrkitError(f"{path} is not a result of a cell: it holds no score")
        return result

    @property
    def score(self) -> float | None:
        """The primary score; None until the cell is done, NaN where the run diverged."""
        return None if self.result is None else next(iter(self.result.scores.values()))

    @cached_property
    def error(self) -> str:
        """The traceback of the last attempt, if that failed; empty otherwise."""
        text = _text(self.folder / "error.txt").strip()
        if text or not self.attempts:
            return text
        return self.attempts[-1].error

    @property
    def error_line(self) -> str:
        """The last line of the traceback: the error itself."""
        lines = [line.strip() for line in self.error.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    @cached_property
    def attempts(self) -> tuple[AttemptRecord, ...]:
        """Every begin, end and failure, oldest first."""
        found = []
        for line in _lines(self.folder / "attempts.jsonl"):
            step = line.get("step", line.get("from_step"))
            if isinstance(line.get("event"), str):
                found.append(
                    AttemptRecord(
                        event=line["event"],
                        time=str(line.get("time") or ""),
                        step=step if _is_int(step) else None,
                        error=str(line.get("error") or ""),
                    )
                )
        return tuple(found)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``: everything that defines the cell, and versions; empty where it is not there yet."""
        return _json(self.folder / "config.json", "a cell's configuration") or {}

    @cached_property
    def env(self) -> dict[str, Any]:
        """``env.json``: the machine; empty where it is not there yet."""
        return _json(self.folder / "env.json", "a description of a machine") or {}

    @property
    def steps(self) -> int:
        """Optimizer steps that are on record: all of them where the cell is done."""
        if self.result is not None:
            return self.result.steps
        return max((step for step, _ in self.losses), default=0)

    @cached_property
    def losses(self) -> tuple[tuple[int, float], ...]:
        """(step, training loss) by step; NaN where the loss was none."""
        return tuple((step, _number(line["loss"])) for (step, kind), line in self._metrics.items() if kind == "loss")

    @cached_property
    def evaluations(self) -> tuple[tuple[int, dict[str, float]], ...]:
        """(step, scores on the validation rows) by step, where the run was evaluated on the way."""
        return tuple(
            (step, {str(name): _number(value) for name, value in line["scores"].items()})
            for (step, kind), line in self._metrics.items()
            if kind == "scores"
        )

    @cached_property
    def _metrics(self) -> dict[tuple[int, str], dict[str, Any]]:
        """(step, what) to the last line that says so, by step."""
        found: dict[tuple[int, str], dict[str, Any]] = {}
        for line in _lines(self.folder / "metrics.jsonl"):
            if _is_int(line.get("step")):
                if "loss" in line:
                    found[line["step"], "loss"] = line
                if isinstance(line.get("scores"), dict):
                    found[line["step"], "scores"] = line
        return dict(sorted(found.items()))

    @cached_property
    def decisions(self) -> tuple[DecisionRecord, ...]:
        """Every decision by step, then policy."""
        found: dict[tuple[int, int], DecisionRecord] = {}
        for line in _lines(self.folder / "history.jsonl"):
            step, policy = line.get("step"), line.get("policy", 0)
            budget, kept, units = (_number(line.get(name)) for name in ("budget", "kept", "units"))
            names = [line.get(name) or [] for name in ("lost", "returned", "fresh")]
            if not isinstance(step, int) or not isinstance(policy, int) or math.isnan(budget + kept + units):
                continue
            if all(isinstance(listed, list) for listed in names):
                lost, returned, fresh = (tuple(str(unit) for unit in listed) for listed in names)
                found[step, policy] = DecisionRecord(
                    step=step,
                    policy=policy,
                    budget=budget,
                    kept=kept,
                    units=units,
                    lost=lost,
                    returned=returned,
                    fresh=fresh,
                )
        return tuple(found[place] for place in sorted(found))


@attrs.frozen(kw_only=True)
class StudyRecord:
    """A study as its folder has it.

    Args:
        folder: the folder.
        name: its short name.
        title: its title; where none was given, the base and what the rows change.
        note: free text.
        base: index of the row that all others are compared with.
        rows: the rows of the table.
        tasks: the tasks.
        model: what was asked for as the model.
        targets: which layers are adapted, as `lrkit.attach` takes it.
        seeds: the seeds.
        run: the run's settings.
        cells: every cell that was asked for, by row, task and seed as the study lists them.
    """

    folder: Path
    name: str
    title: str
    note: str
    base: int
    rows: tuple[RowRecord, ...]
    tasks: tuple[TaskRecord, ...]
    model: str
    targets: Any
    seeds: tuple[int, ...]
    run: dict[str, Any] = attrs.field(repr=False)
    cells: tuple[CellRecord, ...] = attrs.field(repr=False)
    _costs: tuple[tuple[str, int, str], ...] = attrs.field(repr=False)

    @cached_property
    def costs(self) -> dict[tuple[int, str], CostRecord]:
        """(row, task) to what its step costs, for those measured so far, or tried in vain."""
        found = {}
        for key, row, task in self._costs:
            cost = _cost(self.folder / "costs" / f"{key}.json", row, task)
            if cost is not None:
                found[row, task] = cost
        return found

    def cells_of(self, row: int, task: str | None = None) -> tuple[CellRecord, ...]:
        """The cells of one row, of one task if it is given."""
        return tuple(cell for cell in self.cells if cell.row == row and task in (None, cell.task))

    @property
    def counts(self) -> dict[Status, int]:
        """How many cells are in each status."""
        statuses = [cell.status for cell in self.cells]
        return {status: statuses.count(status) for status in STATUSES}


@attrs.frozen(kw_only=True)
class _Cell:
    key: str
    row: int
    task: str
    seed: int
    code: str = ""
    old: bool = False

    @property
    def of_other_code(self) -> bool:
        # A study from before code was written down is of other code.
        return self.old or not self.code


@attrs.frozen(kw_only=True)
class _Cost:
    key: str
    row: int
    task: str


@attrs.frozen(kw_only=True)
class _Study:
    """``study.json`` as it is written."""

    name: str
    title: str = ""
    note: str = ""
    base: int = 0
    rows: tuple[RowRecord, ...]
    tasks: tuple[TaskRecord, ...]
    model: str = ""
    targets: Any = None
    seeds: tuple[int, ...]
    run: dict[str, Any] = attrs.field(factory=dict)
    cells: tuple[_Cell, ...]
    costs: tuple[_Cost, ...] = ()


def read_study(folder: str | Path) -> StudyRecord:
    """Read a study, finished or still running.

    Args:
        folder: where its ``study.json`` is.

    Returns:
        The record. Cells are read when first asked for.

    Raises:
        LrkitError: there is no ``study.json``, it is something else, of a newer format, or at odds with itself.
    """
    folder = Path(folder)
    path = folder / "study.json"
    if not folder.is_dir():
        raise LrkitError(f"{folder} is no folder: a study's folder is what `lrkit ablate` writes")
    data = _json(path, "a study")
    if data is None:
        raise LrkitError(f"{folder} holds no study.json: a study's folder is what `lrkit ablate` writes")
    _check_format(data, path)
    study = _structured(data, _Study, path, "a study")
    _check_study(study, path)
    return StudyRecord(
        folder=folder,
        name=study.name,
        title=study.title or _title(study),
        note=study.note,
        base=study.base,
        rows=study.rows,
        tasks=study.tasks,
        model=study.model,
        targets=study.targets,
        seeds=study.seeds,
        run=study.run,
        cells=tuple(
            CellRecord(
                key=cell.key,
                row=cell.row,
                task=cell.task,
                seed=cell.seed,
                folder=folder / "cells" / cell.key,
                old=cell.of_other_code,
            )
            for cell in study.cells
        ),
        costs=tuple((cost.key, cost.row, cost.task) for cost in study.costs),
    )


def _title(study: _Study) -> str:
    """``adalora: metric, scheduler``: the base and what the rows change; the folder's name where that is too much."""
    paths = dict.fromkeys(change.path.split(".")[0] for row in study.rows for change in row.changes)
    return f"{study.rows[study.base].label}: {', '.join(paths)}" if 0 < len(paths) <= 4 else study.name


def frame(record: StudyRecord) -> "pandas.DataFrame":
    """A study as a tidy table, one line for each cell, in the study's order.

    Returns:
        Columns ``row`` (the label), ``task``, ``seed``, ``status``, ``score`` (the primary one; NaN where the run
        diverged or is not done: ``status`` tells which), ``scores.NAME`` for every score there is,
        ``parameters.start``, ``parameters.now``, ``parameters.average`` (adapters alone), ``parameters.head``,
        ``flops`` (of the whole run), ``steps``, ``error`` (of a failed cell), ``other_code`` (whether it is of other code
        than the study was last run with) and ``key``.
    """
    import pandas

    names = list(dict.fromkeys(name for cell in record.cells if cell.result for name in cell.result.scores))
    table = []
    for cell in record.cells:
        result = cell.result
        parameters = result.parameters if result else None
        table.append(
            {
                "row": record.rows[cell.row].label,
                "task": cell.task,
                "seed": cell.seed,
                "status": cell.status,
                "score": cell.score,
                **{f"scores.{name}": result.scores.get(name) if result else None for name in names},
                "parameters.start": parameters and parameters.start,
                "parameters.now": parameters and parameters.now,
                "parameters.average": parameters and parameters.average,
                "parameters.head": parameters and parameters.head,
                "flops": result.flops.run if result and result.flops else None,
                "steps": cell.steps,
                "error": cut(cell.error_line) if cell.status == "failed" else "",
                "other_code": cell.old,
                "key": cell.key,
            }
        )
    scores = [f"scores.{name}" for name in names]
    whole = dict.fromkeys(("parameters.start", "parameters.now", "parameters.head"), "Int64")
    real = dict.fromkeys(("score", *scores, "parameters.average", "flops"), "float64")
    parameter_columns = ["parameters.start", "parameters.now", "parameters.average", "parameters.head"]
    columns = [
        "row",
        "task",
        "seed",
        "status",
        "score",
        *scores,
        *parameter_columns,
        "flops",
        "steps",
        "error",
        "other_code",
        "key",
    ]
    return pandas.DataFrame(table, columns=columns).astype(whole | real)


# ---- files ----------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return reading.read_bytes(path).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _json(path: Path, what: str) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file."""
    try:
        text = reading.read_bytes(path)
    except FileNotFoundError:
        return None
    data = reading.parse_json(text, f"{path} is not {what}: it")
    if not isinstance(data, dict):
        raise LrkitError(f"{path} is not {what}: it holds a JSON {type(data).__name__}, not an object")
    return data


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; a torn line, or one that is something else, is passed over."""
    with suppress(FileNotFoundError):
        for line in reading.lines(path):
            with suppress(LrkitError):
                data = reading.parse_json(line.decode("utf-8", errors="replace"), path)
                if isinstance(data, dict):
                    yield data


def _cost(path: Path, row: int, task: str) -> CostRecord | None:
    try:
        data = _json(path, "a cost")
    except LrkitError as error:
        return CostRecord(row=row, task=task, error=str(error))
    if data is None:
        return None
    if data.get("error"):
        return CostRecord(row=row, task=task, error=" ".join(str(data["error"]).split()))

    def number(name: str) -> float | None:
        value = _number(data.get(name))
        return value if math.isfinite(value) else None

    threads = data.get("threads")
    return CostRecord(
        row=row,
        task=task,
        step_ratio=number("row_step_ratio"),
        step_ratio_end=number("row_step_ratio_end"),
        step_ms=number("step_ms"),
        base_step_ms=number("base_step_ms"),
        peak_memory=number("peak_memory"),
        base_peak_memory=number("base_peak_memory"),
        device=str(data.get("device") or ""),
        threads=threads if _is_int(threads) else None,
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """A number from JSON; NaN for null, which is how a NaN is written, and for what is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _check_format(data: Mapping[str, Any], path: Path) -> None:
    version = data.get("format")
    if not _is_int(version):
        raise LrkitError(f'{path} is no file of a study: it has no "format" number')
    assert isinstance(version, int)
    if version > FORMAT:
        raise LrkitError(f"{path} is of format {version}, and this lrkit reads up to {FORMAT}: a newer lrkit wrote it")


def _check_study(study: _Study, path: Path) -> None:
    rows, tasks = len(study.rows), {task.name for task in study.tasks}
    if not rows:
        raise LrkitError(f"{path} has no rows")
    if not 0 <= study.base < rows:
        raise LrkitError(f"{path}: base {study.base} is not one of its {rows} rows (0 to {rows - 1})")
    seen: set[tuple[int, str, int]] = set()
    entries: list[_Cell | _Cost] = [*study.cells, *study.costs]
    for entry in entries:
        # a key becomes a path below the folder, and a link in the report
        if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_.-]*", entry.key):
            raise LrkitError(f"{path}: {shown(entry.key)} is no key of a cell: letters, digits, -, _ and . make one")
        if not 0 <= entry.row < rows:
            raise LrkitError(f"{path}: cell {entry.key} is of row {entry.row}, and there are {rows} (0 to {rows - 1})")
        if entry.task not in tasks:
            raise LrkitError(f"{path}: cell {entry.key} is of task {shown(entry.task)}, which is none of its tasks")
    for cell in study.cells:
        place = cell.row, cell.task, cell.seed
        if place in seen:
            raise LrkitError(f"{path}: row {cell.row}, task {shown(cell.task)}, seed {cell.seed} is there twice")
        seen.add(place)


def _structured(data: Mapping[str, Any], cls: type[T], path: Path, what: str) -> T:
    from cattrs import transform_error
    from cattrs.errors import ClassValidationError

    try:
        return _converter().structure(data, cls)
    except ClassValidationError as error:
        first = transform_error(error, path=what.split()[-1])[0]
        raise LrkitError(f"{path} is not {what} of lrkit: {' '.join(first.split())}") from None


@cache
def _converter() -> "cattrs.Converter":
    """Strict where cattrs is lenient: no number is made of text, no text of a number."""
    from cattrs import Converter

    converter = Converter()
    for cls in (int, str):
        converter.register_structure_hook(cls, _exactly)
    converter.register_structure_hook(float, _real)
    converter.register_structure_hook(bool, _flag)
    return converter


def _exactly(value: Any, cls: type[T]) -> T:
    if not isinstance(value, cls) or isinstance(value, bool):
        raise TypeError
    return value


def _flag(value: Any, _: type[bool]) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _real(value: Any, _: type[float]) -> float:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise TypeError
    return _number(value)
