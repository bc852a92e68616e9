"""Write ``study.json``: the plan, joined with the plan that is in the folder already. Another study's folder is refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from lrkit.compose import to_plain
from lrkit.errors import LrkitError
from lrkit.study.cell_folder import is_packed
from lrkit.study.jobs import Job
from lrkit.study.joining import called_alike, joined
from lrkit.study.place import holds, try_folder
from lrkit.study.plan import Plan, changes
from lrkit.study.rates import given, implied, rates_of
from lrkit.study.store import lock
from lrkit.study.study_file import (
    ChangeRecord,
    RowRecord,
    StudyFile,
    TaskRecord,
    TrialEntry,
    read_study_file,
    write_study_file,
)


def write_plan(plan: Plan, jobs: Sequence[Job], tasks: Mapping[str, TaskRecord], folder: Path) -> None:
    """Write ``study.json``, keeping rows, tasks, seeds and cells that are there already.

    Args:
        plan: the study.
        jobs: its cells.
        tasks: its tasks by name.
        folder: its folder, which need not exist.

    Raises:
        LrkitError: the folder holds another study, or something else.
    """
    _check_free(folder)
    try_folder(folder / "cells")
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "study.lock", wait=True):
        for draft in folder.glob(".study.json.*"):
            draft.unlink(missing_ok=True)
        write_study_file(folder, _with_there(plan, jobs, tasks, folder))


def check_folder(plan: Plan, jobs: Sequence[Job], tasks: Mapping[str, TaskRecord], folder: Path) -> None:
    """Refuse a folder that `write_plan` would refuse, and write nothing. The arguments are those of `write_plan`."""
    _check_free(folder)
    _with_there(plan, jobs, tasks, folder)


def _check_free(folder: Path) -> None:
    """Raise LrkitError if a folder holds something that is no study."""
    if folder.exists() and not folder.is_dir():
        raise LrkitError(f"{folder} is a file: choose another --out")
    # A process that was killed while it wrote the first study.json left a draft, and nothing else.
    drafts = (".study.json.", "study.lock")
    others = [p for p in holds(folder) if not p.name.startswith(drafts)] if folder.exists() else []
    if others and not (folder / "study.json").exists():
        raise LrkitError(f"{folder} exists and holds no study: nothing is overwritten, choose another --out")


def _with_there(plan: Plan, jobs: Sequence[Job], tasks: Mapping[str, TaskRecord], folder: Path) -> StudyFile:
    """Return a plan as ``study.json`` has it, joined with the one that is there. Raises as `joined`."""
    mine, there = _planned(plan, jobs, tasks, folder.resolve().name), read_study_file(folder)
    if there is None:
        return mine
    packed = {c.key for c in there.cells if is_packed(folder / "cells" / c.key)}
    return joined(there, mine, folder, yields=True, packed=packed)


def check_same(plan: Plan, jobs: Sequence[Job], tasks: Mapping[str, TaskRecord], there: StudyFile, where: Path) -> None:
    """Raise LrkitError if a study that was written elsewhere is not this one: the same base, and rows that can be joined.

    Args:
        plan: this one.
        jobs: its cells.
        tasks: its tasks by name.
        there: the other one.
        where: the file that it is from, for errors.
    """
    mine = called_alike(_planned(plan, jobs, tasks, there.name), there, where)
    for what in ("margin", "claims"):
        was, now = getattr(there, what), getattr(mine, what)
        if now and now != was:
            begun = f"with {'another' if what == 'margin' else 'other'} {what}" if was else f"without {what}"
            raise LrkitError(f"{where} was begun {begun}, which a study states before its first test cell")
    if not {task.name for task in there.tasks} & set(tasks):
        theirs = ", ".join(task.name for task in there.tasks)
        raise LrkitError(f"{where} is of other tasks ({theirs}) than this study ({', '.join(tasks)})")
    joined(attrs.evolve(there, cells=(), trials=()), mine, where, yields=False)


def _planned(plan: Plan, jobs: Sequence[Job], tasks: Mapping[str, TaskRecord], name: str) -> StudyFile:
    """Return a plan as ``study.json`` has it, in a folder where there is none yet."""
    study = plan.study
    return StudyFile(
        name=name,
        title=study.title,
        note=study.note,
        base=0,
        rows=tuple(
            RowRecord(
                label=row.label,
                changes=tuple(ChangeRecord(**c) for c in [*changes(plan, row), *implied(plan, row)]),
                method=to_plain(row.method),
                run=row.run,
                rates={spec.name: rates_of(plan, row, spec) for spec in plan.tasks},
                control="" if row.control is None else row.control.kind,
                source="" if row.control is None else plan.rows[row.control.row].label,
                tuned=row.tuned,
                given={spec.name: given(plan, row, spec) for spec in plan.tasks} if row.tuned else {},
                **row.attach,
            )
            for row in plan.rows
        ),
        tasks=tuple(tasks[spec.name] for spec in plan.tasks),
        model=study.model,
        loading=study.loading,
        targets=study.targets,
        train_also=study.train_also,
        seeds=plan.seeds,
        run=dict(study.run),
        margin=study.margin,
        claims=tuple(study.claims),
        tune=None if study.tune is None else study.tune.to_plain(),
        published=study.published,
        cells=tuple(job.entry() for job in jobs if job.trial is None),
        trials=tuple(entry for job in jobs if isinstance(entry := job.entry(), TrialEntry)),
    )
