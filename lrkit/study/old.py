"""Cells that are there already: of other code, or with damaged files."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.compose import from_plain, to_plain
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.study.cell import Cell
from lrkit.study.cell_folder import damaged, has_result, is_done
from lrkit.study.store import canonical, read_json
from lrkit.study.study_file import read_study_file

if TYPE_CHECKING:
    from lrkit.study.jobs import Job


def with_old(jobs: "list[Job]", folder: Path, keep: bool) -> "list[Job]":
    """Return the jobs, with cells of other code that are done in place of those that have not been computed again, if kept.

    One warning tells of all cells of other code.
    """
    try:
        there = read_study_file(folder)
    except LrkitError:  # told when the plan is written
        return jobs
    labels = {row.label: index for index, row in enumerate(there.rows)} if there else {}
    entries = {(c.row, c.task, c.seed): c for c in there.cells} if there else {}
    found, old, kept = [], 0, 0
    for job in jobs:
        entry = entries.get((0 if job.row == 0 else labels.get(job.label, -1), job.task, job.seed))
        if entry is None or entry.key == job.cell.key or entry.code == job.cell.versions["code"]:
            found.append(job)
            continue
        if is_done(folder / "cells" / job.cell.key) or not is_done(folder / "cells" / entry.key):
            found.append(job)
            continue
        old += 1
        if keep and _differs_in_code_alone(job.cell, folder / "cells" / entry.key):
            kept += 1
            job = attrs.evolve(job, kept=(entry.key, entry.code))
        found.append(job)
    if old:
        rest = f"{old - kept} are computed again" if old > kept else ""
        what = f"{kept} are kept as they are" if kept else ""
        which = "the others" if kept else "they"
        other = f"; {which} have other settings now and cannot be kept" if keep and kept < old else ""
        hint = "" if keep else " (keep_old=True, --keep-old, keeps them)"
        warnings.warn(
            f"{_cells(old)} in {folder} {'is' if old == 1 else 'are'} of other code (the sources of lrkit or of a plug-in "
            f"have changed since): {' and '.join(filter(None, (what, rest)))}{other}{hint}",
            LrkitWarning,
            stacklevel=4,
        )
    return found


def _differs_in_code_alone(cell: Cell, place: Path) -> bool:
    """Tell if a cell that was computed is this one but for the code. A rate that was left open there may be any."""

    def plain(config: Mapping[str, Any]) -> tuple[Any, ...]:
        versions = {name: config["versions"].get(name) for name in ("torch", "transformers", "data", "model")}
        task = {**config["task"], "data": versions["data"]}
        model = versions["model"] or config["model"]
        attached = [config["targets"], config.get("train_also", "auto")]  # it always was, in cells of an earlier lrkit
        # Settings that there were not yet are at their defaults.
        method = to_plain(from_plain(config["method"]))
        return canonical([task, model, attached, method, versions]), dict(config["run"])

    try:
        (was, settings), (now, wanted) = plain(read_json(place / "config.json")), plain(cell.to_plain())
    except (LrkitError, KeyError, TypeError):
        return False
    open_ = {name: wanted.get(name) for name in ("lr", "head_lr") if settings.get(name) is None}
    return bool(was == now and {**settings, **open_} == wanted)


def _cells(number: int) -> str:
    return f"{number} cell" if number == 1 else f"{number} cells"


def tell_damaged(folder: Path, waiting: Sequence[str]) -> None:
    """Warn of cells that have a result and are made again because one of their files is damaged or gone.

    Args:
        folder: the study's.
        waiting: keys of the cells that will be run.
    """
    broken = {key: damaged(folder / "cells" / key) for key in waiting if has_result(folder / "cells" / key)}
    if broken:
        key, name = next(iter(broken.items()))
        path = folder / "cells" / key / str(name)
        warnings.warn(
            f"{_cells(len(broken))} had a result and damaged files, such as {path}: made again",
            LrkitWarning,
            stacklevel=4,
        )
