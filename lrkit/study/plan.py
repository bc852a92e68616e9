"""Lay out a study: `lay_out` makes a `Plan` of a `Study`, with every method built before a step is spent.

A *row* is one method; a *cell* is one row on one task with one seed. For example, a base with two values of one setting,
on two tasks and with six seeds, is three rows and 36 cells.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from lrkit.compose import from_plain, to_plain, with_setting
from lrkit.errors import LrkitError, nearest
from lrkit.method import Method
from lrkit.settings import defaults, is_at
from lrkit.study.asked import RowSpec, Study, study_from, study_named
from lrkit.study.claim import check_claims
from lrkit.study.composing import check_path, composed
from lrkit.study.controls import Control, check_control, check_kind, controlled
from lrkit.study.labels import differences, label_of, shown_value
from lrkit.study.published import check_published
from lrkit.study.reach import METHOD, Reached
from lrkit.study.run_settings import RunSettings, settings_from
from lrkit.study.task_spec import TaskSpec
from lrkit.study.tuning import check_rows, check_tune, inherited, paths_in

ROWS, CELLS = 2_000, 100_000
"""The most that a study may have."""

read_study = study_named
"""The public name of `study_named`. `lrkit.study.records.read_study` reads a study's folder."""


@attrs.frozen(kw_only=True)
class Row:
    """One method of a study.

    Args:
        label: its name in tables; unique in the study.
        method: the method.
        run: settings of its runs that differ from the study's.
        attach: arguments of `lrkit.attach` beside the method: ``targets`` and ``train_also``.
        own: paths of the method's settings that the row itself changes.
        control: the control of another row that it is; None for none.
        tuned: each setting that the study tunes, as it is asked for, to its path in this row.
    """

    label: str
    method: Method
    run: dict[str, Any]
    attach: dict[str, Any]
    own: frozenset[str] = frozenset()
    control: Control | None = None
    tuned: dict[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Plan:
    """A study laid out: all methods built, all tasks known.

    Args:
        study: as it was asked for.
        rows: the base first.
        seeds: which.
    """

    study: Study
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """Return the tasks."""
        return tuple(self.study.tasks) or (TaskSpec(task="movies"),)

    @property
    def cells(self) -> int:
        """Count the rows' own cells."""
        both = 2 if self.study.tune is not None and self.study.tune.defaults else 1
        return len(self.rows) * len(self.tasks) * len(self.seeds) * both

    @property
    def trials(self) -> int:
        """Count the cells that settings are tried in."""
        return 0 if self.study.tune is None else len(self.rows) * len(self.tasks) * self.study.tune.cells

    def settings(self, row: Row, task: TaskSpec, seed: int) -> RunSettings:
        """Return how a cell trains: the study's settings, then the task's, then the row's."""
        return settings_from({**self.study.run, **task.run, **row.run, "seed": seed})

    def method(self, row: Row, task: TaskSpec) -> Method:
        """Return a row's method on a task, with the task's own settings."""
        plain = to_plain(row.method)
        for path, value in task.set.items():
            # The row comes after the task; and a task's schedule means nothing to a row without one.
            if path not in row.own and (row is self.rows[0] or is_at(plain, path)):
                plain = with_setting(plain, path, value)
        return from_plain(plain)


def lay_out(study: Study) -> Plan:
    """Build all rows of a study.

    Raises:
        LrkitError: a method, component or setting that does not exist or does not fit, with the row's label.
    """
    reached = Reached(study.set, everywhere=METHOD in study.swap)
    name = study.label or (study.base if isinstance(study.base, str) else "base")
    beneath = reached.by(study.base, name)
    base = composed(study.base, beneath)
    for path in study.swap:
        if path != METHOD:
            check_path(study.base, base, path)
    _check_size(study)
    attach = {"targets": study.targets, "train_also": study.train_also}
    tuned = _tuned(study, name, study.base, lambda more: composed(study.base, {**beneath, **more}))
    rows = [Row(label=name, method=from_plain(base), run={}, attach=attach, tuned=tuned)]
    seen = {_identity(rows[0])}
    labels = {name}
    for spec in _specs(study):
        label = spec.label or label_of(spec)
        try:
            row = _row(label, spec, study, rows, reached)
        except LrkitError as error:
            raise LrkitError(f"row {label}: {error}") from None
        if spec.label is None and _identity(row) in seen:
            continue  # a value that the base has already
        if label in labels:
            raise LrkitError(f'two rows are called "{label}": give each a label of its own')
        seen.add(_identity(row))
        labels.add(label)
        rows.append(row)
    reached.tell()
    check_claims(study.claims, [row.label for row in rows])
    check_published(study.published, [row.label for row in rows])
    seeds = tuple(range(study.seeds)) if isinstance(study.seeds, int) else tuple(study.seeds)
    plan = Plan(study=study, rows=tuple(rows), seeds=seeds)
    if study.tune is not None:
        check_tune(study.tune, seeds)
        check_rows(study.tune, plan)
    _check_settings(plan)
    return plan


def _specs(study: Study) -> Iterator[RowSpec]:
    """List the rows beside the base: of each value by itself or of every combination, without a part, and written out."""
    if study.grid and study.swap:
        tried = [dict(zip(study.swap, values, strict=True)) for values in itertools.product(*study.swap.values())]
    else:
        tried = [{path: value} for path, values in study.swap.items() for value in values]
    for swap in tried:
        yield RowSpec(base=swap.pop(METHOD, None), swap=swap)
    yield from (RowSpec(leave_out=[name]) for name in study.leave_out)
    yield from study.rows


def _row(label: str, spec: RowSpec, study: Study, rows: Sequence[Row], reached: "Reached") -> Row:
    """Build a row, and note the paths that the row itself changes in its base."""
    settings_from(spec.run)
    given = {"targets": spec.targets, "train_also": spec.train_also}
    if spec.source is not None:
        return _derived(label, spec, given, study, rows)
    if spec.control is not None or spec.from_task is not None:
        raise LrkitError('a control is of another row: say of which, from = "LABEL"')
    source = study.base if spec.base is None else spec.base
    beneath = reached.by(source, label) if spec.base is None or reached.everywhere else {}

    def composed_with(more: Mapping[str, Any]) -> dict[str, Any]:
        return composed(source, {**spec.set, **more}, spec.swap, spec.leave_out, beneath=beneath)

    method = from_plain(composed_with({}))
    attach = {key: getattr(study, key) if value is None else value for key, value in given.items()}
    own = _own(composed(source, beneath), method, spec)
    tuned = _tuned(study, label, source, composed_with)
    return Row(label=label, method=method, run=dict(spec.run), attach=attach, own=own, tuned=tuned)


def _tuned(
    study: Study, label: str, base: Any, composed_with: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, str]:
    return {} if study.tune is None else paths_in(study.tune, base, composed_with, label)


def _derived(label: str, spec: RowSpec, given: Mapping[str, Any], study: Study, rows: Sequence[Row]) -> Row:
    """Build a row that begins with an earlier one, or is its control."""
    known = [row.label for row in rows]
    if spec.base is not None:
        raise LrkitError("it begins with a base or with another row (from), not with both")
    if spec.source not in known:
        raise LrkitError(f'from: there is no row "{spec.source}" before it{nearest(str(spec.source), known)}')
    index = known.index(spec.source)
    row = rows[index]
    if row.control is not None and spec.control is not None:
        raise LrkitError(f'row "{row.label}" is a control itself: a control is of a row that finds ranks')
    before = to_plain(row.method)
    plain = composed(before, spec.set, spec.swap, spec.leave_out)
    control = row.control
    if spec.control is not None:
        kind = check_kind(spec.control)
        plain = controlled(plain, kind)
        control = Control(kind=kind, row=index, task=spec.from_task)
    method = from_plain(plain)
    attach = {key: row.attach[key] if value is None else value for key, value in given.items()}
    own = row.own | _own(before, method, spec)
    # The ranks of a control are its row's, and not its own to tune.
    paths = {n: p for n, p in row.tuned.items() if control is None or p != "parameterization.rank"}
    tuned = {} if study.tune is None else inherited(study.tune, paths, plain, label)
    return Row(label=label, method=method, run=row.run | spec.run, attach=attach, own=own, control=control, tuned=tuned)


def _own(before: Mapping[str, Any], method: Method, spec: RowSpec) -> frozenset[str]:
    own = {change["path"] for change in differences(before, to_plain(method))}
    own |= {path for path in spec.set if "." in path}
    own |= {f"{path}.{key}" for path, value in spec.swap.items() if isinstance(value, Mapping) for key in value}
    return frozenset(own)


def _identity(row: Row) -> tuple[Any, ...]:
    """Return what tells two rows apart. As text: a target of 1 is a count, one of 1.0 a share, and Python has them equal."""
    run = tuple(sorted((key, repr(value)) for key, value in row.run.items()))
    return repr(to_plain(row.method)), run, repr(row.attach), row.control


def _check_size(study: Study) -> None:
    """Raise LrkitError for more rows or cells than anybody runs, before any is laid out."""
    tried = [len(values) for values in study.swap.values()]
    rows = 1 + (math.prod(tried) if study.grid and tried else sum(tried)) + len(study.leave_out) + len(study.rows)
    seeds = study.seeds if isinstance(study.seeds, int) else len(study.seeds)
    trials = 0 if study.tune is None else study.tune.cells
    cells = rows * (seeds + trials) * max(1, len(study.tasks))
    for what, number, most in (("rows", rows, ROWS), ("cells", cells, CELLS)):
        if number > most:
            raise LrkitError(f"the study has {number:,} {what}; at most {most:,}: try fewer values, or seeds")


def _check_settings(plan: Plan) -> None:
    """Raise LrkitError if tasks share a name, or a setting does not fit a cell."""
    names = [task.name for task in plan.study.tasks]
    if len(set(names)) < len(names):
        raise LrkitError(f'two tasks are called "{next(n for n in names if names.count(n) > 1)}"')
    for given in (plan.study.run, *(task.run for task in plan.tasks), *(row.run for row in plan.rows)):
        for name, instead in (("seed", "seeds"), ("threads", "--threads")):
            if name in given:
                raise LrkitError(f"run.{name} is not a cell's own: use {instead}")
    for row in plan.rows:
        if row.control is not None:
            try:
                tune = plan.study.tune
                seeds = {"seed": len(plan.seeds)} | (
                    {"tuning seed": len(tune.tuning_seeds)} if tune and row.tuned else {}
                )
                check_control(row.control, names, seeds)
            except LrkitError as error:
                raise LrkitError(f"row {row.label}: {error}") from None
        for task in plan.tasks:
            plan.settings(row, task, 0)
            plan.method(row, task)


def changes(plan: Plan, row: Row) -> list[dict[str, Any]]:
    """List what a row changed against the base: path, the base's value and the row's.

    A component that was swapped is one change; the settings of a component that stayed are one each.
    """
    base = plan.rows[0]
    found = list(differences(to_plain(base.method), to_plain(row.method)))
    if row.control is not None:
        found.insert(0, {"path": "control", "base": None, "value": row.control.kind})
    run = {**defaults(RunSettings), **plan.study.run, **base.run}
    found += [{"path": f"run.{key}", "base": _told(run[key]), "value": _told(value)} for key, value in row.run.items()]
    for key, value in row.attach.items():
        if value != base.attach[key]:
            found.append({"path": key, "base": shown_value(base.attach[key]), "value": shown_value(value)})
    return found


def _told(value: Any) -> Any:
    """Return a run's setting as a cell has it; a list of names in words."""
    return shown_value(list(value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


__all__ = ["Plan", "Row", "RowSpec", "Study", "TaskSpec", "changes", "lay_out", "read_study", "study_from"]
