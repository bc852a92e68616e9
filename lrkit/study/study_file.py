"""``study.json``: one class for what is written and for what is read back. No torch here.

Keys that a class does not have are passed over, and a key that an earlier lrkit did not write has a default.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from lrkit.errors import LrkitError, shown
from lrkit.study.claim import Claim, check_claims
from lrkit.study.published import Published
from lrkit.study.space import tune_from
from lrkit.study.store import FORMAT, canonical, read_object, whole_in, write_json


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
        changes: the settings in which it differs from the base; empty for the base itself.
        method: the method as plain data.
        run: settings of its runs that differ from the study's.
        rates: the learning rates in force on each task: task to ``{"lr", "head_lr"}``; empty in older studies.
        targets: as `lrkit.attach` takes it; None for the study's.
        train_also: likewise.
        control: the control of another row that it is; empty for none.
        source: label of the row that it controls; empty for none.
        tuned: what each setting that is tuned is called in its method or run, by the name that it was asked for by.
        given: what these settings are without tuning: task to path to value; empty in older studies.
    """

    label: str
    changes: tuple[ChangeRecord, ...] = ()
    method: dict[str, Any] = attrs.field(factory=dict, repr=False)
    run: dict[str, Any] = attrs.field(factory=dict, repr=False)
    rates: dict[str, dict[str, float]] = attrs.field(factory=dict, repr=False)
    targets: Any = attrs.field(default=None, repr=False)
    train_also: Any = attrs.field(default=None, repr=False)
    control: str = ""
    source: str = ""
    tuned: dict[str, str] = attrs.field(factory=dict, repr=False)
    given: dict[str, dict[str, Any]] = attrs.field(factory=dict, repr=False)


@attrs.frozen(kw_only=True)
class TaskRecord:
    """One task: its name, its metric's name, the best trivial answers' score if known, and the direction.

    For example, a lower perplexity is a better one: its `higher_is_better` is False. Options, and settings of runs and
    methods on this task alone (`run`, `set`), are those that the study gives it; of an older study the latter are not known.
    """

    name: str
    metric: str = ""
    majority: float | None = None
    higher_is_better: bool = True
    options: dict[str, Any] = attrs.field(factory=dict)
    run: dict[str, Any] | None = None
    set: dict[str, Any] | None = None


@attrs.frozen(kw_only=True)
class CellEntry:
    """One cell in ``study.json``.

    Args:
        key: the name of its folder.
        row: index of its row.
        task: name of its task.
        seed: its seed.
        setup: a hash of what all cells of the task share (`Cell.setup`).
        code: the digest of the code that its result is of; empty in a study from before there was one.
        old: it is of other code than the study was last run with.
        tuned: its settings were chosen by trials.
    """

    key: str
    row: int
    task: str
    seed: int
    setup: str = ""
    code: str = ""
    old: bool = False
    tuned: bool = False

    @property
    def place(self) -> tuple[Any, ...]:
        """Return row, task, seed and whether it is tuned: two cells of a study never share all of them."""
        return self.row, self.task, self.seed, self.tuned


@attrs.frozen(kw_only=True)
class TrialEntry(CellEntry):
    """A cell that tries settings of a row, in ``study.json``.

    Args:
        number: which settings it tries, counted from 0 in each row and task.
        rung: how many times these settings have been taken further.
    """

    number: int
    rung: int = 0

    @property
    def place(self) -> tuple[Any, ...]:
        """Return row, task, seed, number and rung."""
        return self.row, self.task, self.seed, self.number, self.rung


@attrs.frozen(kw_only=True)
class CostEntry:
    """One measured row in ``study.json``: the name of its file in ``costs``, its row's index and its task."""

    key: str
    row: int
    task: str


@attrs.frozen(kw_only=True)
class StudyFile:
    """``study.json``. Arguments as `lrkit.study.results.StudyRecord` has them."""

    name: str
    title: str = ""
    note: str = ""
    base: int = 0
    rows: tuple[RowRecord, ...]
    tasks: tuple[TaskRecord, ...]
    model: str = ""
    loading: dict[str, Any] = attrs.field(factory=dict)
    targets: Any = None
    train_also: Any = "auto"  # it always was, in a study of an earlier lrkit
    seeds: tuple[int, ...]
    run: dict[str, Any] = attrs.field(factory=dict)
    cells: tuple[CellEntry, ...]
    costs: tuple[CostEntry, ...] = ()
    tune: dict[str, Any] | None = None
    trials: tuple[TrialEntry, ...] = ()
    margin: float | None = None
    claims: tuple[Claim, ...] = ()
    published: Published | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain data, with its format."""
        return {"format": FORMAT, **attrs.asdict(self)}


def read_study_file(folder: Path) -> StudyFile | None:
    """Read ``study.json``; None if there is none.

    Raises:
        LrkitError: it is something else, of a newer format, or at odds with itself.
    """
    path = folder / "study.json"
    data = read_object(path, "a study")
    return None if data is None else study_in(data, path)


def study_in(data: Any, path: Path) -> StudyFile:
    """Make a study of the content of a ``study.json``.

    Args:
        data: the content.
        path: the file that it is from, for errors.

    Raises:
        LrkitError: it is something else, of a newer format, or at odds with itself.
    """
    if not isinstance(data, dict):
        raise LrkitError(f"{path} is not a study: it holds {shown(data)}, not an object")
    study = whole_in(data, StudyFile, "a study", path)
    _check(study, path)
    return study


def write_study_file(folder: Path, study: StudyFile) -> None:
    """Replace ``study.json`` in one move."""
    write_json(folder / "study.json", study.to_plain())


def differing(there: StudyFile, mine: StudyFile, keys: Sequence[str]) -> tuple[str, str, str] | None:
    """Return the first of some attributes that two studies do not share, and both values; None if they share all."""
    pairs = ((key, canonical(getattr(there, key)), canonical(getattr(mine, key))) for key in keys)
    return next((each for each in pairs if each[1] != each[2]), None)


def with_base_called(study: StudyFile, label: str) -> StudyFile:
    """Give the base another label, in whatever names it: rows made from it, claims and published values."""
    own = study.rows[0].label

    def now(name: str) -> str:
        return label if name == own else name

    published = study.published
    if published is not None:
        published = attrs.evolve(published, values={now(row): each for row, each in published.values.items()})
    return attrs.evolve(
        study,
        rows=tuple(attrs.evolve(row, label=now(row.label), source=now(row.source)) for row in study.rows),
        claims=tuple(attrs.evolve(each, higher=now(each.higher), lower=now(each.lower)) for each in study.claims),
        published=published,
    )


def _check(study: StudyFile, path: Path) -> None:
    """Raise LrkitError if what a study lists does not fit together."""
    rows, tasks = len(study.rows), {task.name for task in study.tasks}
    if not rows:
        raise LrkitError(f"{path} has no rows")
    if not 0 <= study.base < rows:
        raise LrkitError(f"{path}: base {study.base} is not one of its {rows} rows (0 to {rows - 1})")
    if study.margin is not None and not 0 < study.margin < math.inf:
        raise LrkitError(f"{path}: margin must be a number above 0, not {study.margin}")
    try:
        check_claims(study.claims, [row.label for row in study.rows])
    except LrkitError as error:
        raise LrkitError(f"{path}: {error}") from None
    if study.tune is not None:
        tune_from(study.tune, f"{path}: tune")
    entries: list[CellEntry | CostEntry] = [*study.cells, *study.trials, *study.costs]
    for entry in entries:
        # A key becomes a path below the folder, and a link in the report.
        if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_.-]*", entry.key):
            raise LrkitError(f"{path}: {shown(entry.key)} is no key of a cell: letters, digits, -, _ and . make one")
        if not 0 <= entry.row < rows:
            raise LrkitError(f"{path}: cell {entry.key} is of row {entry.row}, and there are {rows} (0 to {rows - 1})")
        if entry.task not in tasks:
            raise LrkitError(f"{path}: cell {entry.key} is of task {shown(entry.task)}, which is none of its tasks")
    seen: set[tuple[Any, ...]] = set()
    for cell in (*study.cells, *study.trials):
        if cell.place in seen:
            raise LrkitError(f"{path}: row {cell.row}, task {shown(cell.task)}, seed {cell.seed} is there twice")
        seen.add(cell.place)
