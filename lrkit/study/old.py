"""Cells that are there already: of other code, or with damaged files."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.compose import from_plain, to_plain
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.study.cell import Cell
from lrkit.study.cell_folder import damaged, follows, has_result, is_done, is_packed
from lrkit.study.run_settings import RunSettings
from lrkit.study.store import canonical, read_json
from lrkit.study.study_file import read_study_file

if TYPE_CHECKING:
    from lrkit.study.jobs import Job


def check_old(keep: bool, recompute: bool) -> None:
    """Raise LrkitError if cells of other code are to be kept and to be computed again."""
    if keep and recompute:
        raise LrkitError("keep_old keeps cells of other code, and recompute computes them again: give one of them")


def with_old(jobs: "list[Job]", folder: Path, keep: bool, recompute: bool = False) -> "list[Job]":
    """Return the jobs, with cells of other code that are done in place of those that have not been computed again, if kept.

    A cell that needs one that is kept needs it under its old name. One warning tells of all cells of other code, but for
    those that were taken in from a pack and are kept.

    Args:
        jobs: the study's.
        folder: the study's.
        keep: keep all of them.
        recompute: keep none, not even those that were taken in from a pack.
    """
    try:
        there = read_study_file(folder)
    except LrkitError:  # told when the plan is written
        return jobs
    if there is None:
        return jobs
    labels = {row.label: index for index, row in enumerate(there.rows)}
    entries = {c.place: c for c in (*there.cells, *there.trials)}
    cells = folder / "cells"
    found: list[Job] = []
    moved: dict[str, str] = {}
    old, kept = 0, 0
    for job in jobs:
        named = job.key
        job = job.moved(moved)
        entry = entries.get(job.entry(0 if job.row == 0 else labels.get(job.label, -1)).place)
        packed = entry is not None and is_packed(cells / entry.key)
        if not (
            entry is None
            or entry.key == job.key
            or (entry.code == job.cell.versions["code"] and not packed)
            or is_done(cells / job.key)
            or not is_done(cells / entry.key)
        ):
            stays = (keep or packed) and not recompute
            stays = stays and _differs_in_code_alone(job.cell, entry.key, cells)
            told = entry.code != job.cell.versions["code"] and not (packed and stays)
            old += told
            kept += told and stays
            if stays:
                job = attrs.evolve(job, kept=(entry.key, entry.code))
        if job.key != named:
            moved[named] = job.key
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


def _differs_in_code_alone(cell: Cell, key: str, cells: Path) -> bool:
    """Tell if a cell that was computed is this one but for the code, and so are the cells that it needed.

    One that was taken in from a pack may be of other versions, too.

    Args:
        cell: this one.
        key: of the one that was computed.
        cells: the folder that holds the cells' folders.
    """
    names = ("data", "model") if is_packed(cells / key) else ("torch", "transformers", "data", "model")
    defaults = {name: value for name, value in attrs.asdict(RunSettings()).items() if name != "threads"}

    def plain(config: Mapping[str, Any]) -> tuple[Any, ...]:
        versions = {name: config["versions"].get(name) for name in names}
        task = {**config["task"], "data": versions["data"]}
        model = versions["model"] or config["model"]
        attached = [config["targets"], config.get("train_also", "auto"), config.get("selection"), config.get("stop")]
        attached.append(config.get("loading", {}))
        # Settings that there were not yet are at their defaults.
        method = to_plain(from_plain(config["method"]))
        return canonical([task, model, attached, method, versions]), {**defaults, **config["run"]}

    try:
        computed = Cell.from_config(read_json(cells / key / "config.json"), planned=True)
        (was, settings), (now, wanted) = plain(computed.to_plain()), plain(cell.to_plain())
    except (LrkitError, KeyError, TypeError):
        return False
    # A rate that was left open there may be any.
    open_ = {name: wanted.get(name) for name in ("lr", "head_lr") if settings.get(name) is None}
    # The cells that it needs must be the very same: under their old keys, if they are kept.
    needs, needed = (canonical([attrs.asdict(need) for need in each.needs]) for each in (cell, computed))
    return bool(was == now and {**settings, **open_} == wanted and needs == needed and follows(cells / key))


def _cells(number: int) -> str:
    return f"{number} cell" if number == 1 else f"{number} cells"


def tell_damaged(folder: Path, waiting: Sequence[str]) -> None:
    """Warn of cells that have a result and are made again because one of their files is damaged or gone.

    Args:
        folder: the study's.
        waiting: keys of the cells that will be run.
    """
    looked = {key: damaged(folder / "cells" / key) for key in waiting if has_result(folder / "cells" / key)}
    broken = {key: name for key, name in looked.items() if name is not None}
    if broken:
        key, name = next(iter(broken.items()))
        path = folder / "cells" / key / str(name)
        warnings.warn(
            f"{_cells(len(broken))} had a result and damaged files, such as {path}: made again",
            LrkitWarning,
            stacklevel=4,
        )
