"""Join two plans of one study into one: rows, tasks, seeds and cells of both.

For example, a study that is run again with a further row and two more seeds keeps all its rows, tasks, seeds and cells,
and gains the new ones. Two that cannot be compared in one table are refused.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs

from lrkit.compose import from_plain, to_plain
from lrkit.errors import LrkitError
from lrkit.study.cell import code_of
from lrkit.study.retuned import with_tuning
from lrkit.study.store import canonical
from lrkit.study.study_file import CellEntry, RowRecord, StudyFile, differing, with_base_called


def joined(there: StudyFile, mine: StudyFile, where: Path, *, yields: bool, packed: Container[str] = ()) -> StudyFile:
    """Join the plan that is there with this one: the same base, and rows and cells of both.

    Args:
        there: the one that is there.
        mine: this one, which has its way where both have a cell.
        where: what holds the one that is there.
        yields: a row that is there and all of other code gives way to its namesake here, if that is another method.
        packed: keys of cells from other machines, which may be of other versions.

    Raises:
        LrkitError: they cannot be compared in one table.
    """
    if found := differing(there, mine, ("model", "loading", "targets", "train_also", "run")):
        key, was, now = found
        raise _refusal(where, f"{key} is {was} there and {now} here")
    were = {task.name: task for task in there.tasks}
    for task in mine.tasks:
        for what in ("options", "run", "set"):
            was, now = (getattr(each, what) for each in (were.get(task.name, task), task))
            if None not in (was, now) and canonical(was) != canonical(now):
                raise _refusal(where, f"{what} of {task.name} are {canonical(was)} there and {canonical(now)} here")
    mine = called_alike(mine, there, where)
    stated = {what: _stated(there, mine, what, where) for what in ("margin", "claims")}
    there = with_tuning(there, mine, where)
    rows, place, stays = _joined_rows(there, mine, where, yields)
    cells = _joined_cells([c for c in there.cells if stays(c.row)], mine.cells, place, rows)
    trials = _joined_cells([c for c in there.trials if stays(c.row)], mine.trials, place, rows)
    setups = {c.task: c.setup for c in mine.cells}
    stale = [c for c in cells if c.key not in packed and c.setup != setups.get(c.task, c.setup)]
    if stale:
        raise _refusal(
            where,
            f'{len(stale)} of its cells, such as row "{rows[stale[0].row].label}" on {stale[0].task}, are of other data, '
            "another model or other versions of lrkit, torch or transformers, and cannot be compared with these",
        )
    # Costs are ratios to the base's: where it gave way, all of them go.
    costs = tuple(c for c in there.costs if stays(c.row) and stays(there.base))
    return attrs.evolve(
        mine,
        title=mine.title or there.title,
        note=mine.note or there.note,
        rows=tuple(rows),
        tasks=tuple({task.name: task for task in [*there.tasks, *mine.tasks]}.values()),
        seeds=tuple(sorted({*there.seeds, *mine.seeds})),
        cells=cells,
        trials=trials,
        tune=mine.tune or there.tune,
        costs=costs,
        published=mine.published or there.published,
        **stated,
    )


def called_alike(mine: StudyFile, there: StudyFile, where: Path) -> StudyFile:
    """Call my base as it is called there: the base is the base. Raise LrkitError if it is another one."""
    label, own = there.rows[0].label, mine.rows[0].label
    if label == own:
        return mine
    if _normal(there.rows[0].method) != _normal(mine.rows[0].method):
        raise _refusal(where, f'its base is "{label}", and not "{own}"')
    if label in [row.label for row in mine.rows[1:]]:
        raise _refusal(where, f'its base is called "{label}", which is another row here')
    return with_base_called(mine, label)


def _stated(there: StudyFile, mine: StudyFile, what: str, folder: Path) -> Any:
    """Return the margin or the claims of both plans; those that are there if none are asked for now.

    Raises:
        LrkitError: they are others, or the first ones after a test cell was begun. (Trials may come before.)
    """
    was, now = getattr(there, what), getattr(mine, what)
    if not now or now == was:
        return was
    if was:
        told = (
            f"the margin {was:g}, stated before its first test cell, and not {now:g}"
            if what == "margin"
            else ("other claims, stated before its first test cell")
        )
        raise LrkitError(f"{folder} has {told}: leave the {what} out, or choose another --out")
    if any((folder / "cells" / cell.key).exists() for cell in there.cells):
        told = f"a margin of {now:g}" if what == "margin" else "claims"
        raise LrkitError(
            f"{folder} has test cells already and no {what}: {told} must be stated before the first test cell; leave the "
            f"{what} out, or choose another --out"
        )
    return now


Entry = TypeVar("Entry", bound=CellEntry)


def _joined_cells(
    there: Sequence[Entry], mine: Sequence[Entry], place: Mapping[int, int], rows: Sequence[RowRecord]
) -> tuple[Entry, ...]:
    """Join the cells that are there and stay with mine, whose rows have other indices; note which are of other code."""
    moved = {entry.place: entry for entry in (attrs.evolve(c, row=place[c.row]) for c in mine)}
    joined = {c.place: c for c in there} | moved
    return tuple(
        c if at in moved else attrs.evolve(c, old=c.code != code_of(rows[c.row].method, _task_of(c)))
        for at, c in joined.items()
    )


def _joined_rows(
    there: StudyFile, mine: StudyFile, where: Path, yields: bool
) -> tuple[list[RowRecord], dict[int, int], Callable[[int], bool]]:
    """Join the rows.

    Returns:
        All rows; for each of mine its index among them; and a function that tells if the cells of a row that is there stay.
    """
    gone: set[int] = set()
    codes = {c.row: c.code for c in mine.cells}
    theirs: dict[int, set[str]] = {}
    for cell in there.cells:
        theirs.setdefault(cell.row, set()).add(cell.code)

    def gives_way(index: int, now: int) -> bool:
        """Tell if a row that is there is all of other code than its namesake here: then a default may have changed."""
        return yields and (index in gone or codes.get(now) not in theirs.get(index, ()))

    if _normal(there.rows[0].method) != _normal(mine.rows[0].method) and not gives_way(0, 0):
        raise _refusal(where, f'its base is "{there.rows[0].label}" with other settings')
    rows = list(there.rows)
    named = {row.label: index for index, row in reversed(list(enumerate(rows)))}
    place = {}
    for index, row in enumerate(mine.rows):
        at = named.setdefault(row.label, len(rows)) if index else 0
        place[index] = at
        if at == len(rows):
            rows.append(row)
            continue
        was = rows[at]
        if canonical(_trained(was, there)) != canonical(_trained(row, mine)):
            if not gives_way(at, index):
                raise _refusal(where, f'row "{row.label}" is another method there')
            gone.add(at)
        rows[at] = attrs.evolve(
            row, tuned=row.tuned or was.tuned, rates=was.rates | row.rates, given=was.given | row.given
        )
    return rows, place, lambda row: row not in gone


def _refusal(where: Path, reason: str) -> LrkitError:
    what = "nothing is taken in" if where.is_file() else "choose another --out"
    return LrkitError(f"{where} holds another study: {reason}; {what}")


def _normal(method: Mapping[str, Any]) -> str:
    """Write a method so that settings that there were not yet are at their defaults."""
    try:
        return canonical(to_plain(from_plain(method)))
    except LrkitError:  # of a plug-in that is not installed here, or not a method any more
        return canonical(method)


def _trained(row: RowRecord, study: StudyFile) -> list[Any]:
    """Return all that decides what a row trains."""
    targets = study.targets if row.targets is None else row.targets
    train_also = study.train_also if row.train_also is None else row.train_also
    control = [row.control, row.source] if row.control else []
    return [_normal(row.method), row.run, targets, train_also, *control]


def _task_of(cell: CellEntry) -> dict[str, Any]:
    """Return a task as `code_of` wants it. A folder's name may be a registered task's, but then its plug-in is not used."""
    from lrkit.registry import current

    known = cell.task.partition("/")[0] in current().names("task")
    return {"task": cell.task if known else None}
