"""Take in a pack: restore the cells of a study that were finished elsewhere into its folder. No torch here.

A cell that is taken in has a mark, ``packed.json``, with the pack's name and the digest of the code that its result is of.
The folder's ``study.json`` comes first and each cell's ``result.json`` last, so that a process that is killed meanwhile is
taken up where it was: cells that are there and done are left alone.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from lrkit.errors import LrkitError, LrkitWarning
from lrkit.study.cell import Cell
from lrkit.study.cell_folder import PACKED, is_done
from lrkit.study.graph import jobs_of
from lrkit.study.jobs import Job
from lrkit.study.joining import joined
from lrkit.study.ledger import check_same
from lrkit.study.packed import PACK, Pack, PackedCell, Place, places, read_pack
from lrkit.study.place import holds, try_folder
from lrkit.study.plan import Plan
from lrkit.study.store import FORMAT, LIST, Lines, check_sum, lock, write_json
from lrkit.study.study_file import CellEntry, StudyFile, TaskRecord, TrialEntry, read_study_file, write_study_file

REPLICATION = Path("docs") / "replication"
"""Where a repository keeps the packs of the studies that ship, seen from its root."""


@attrs.frozen(kw_only=True)
class Source:
    """A pack to take in.

    Args:
        path: the file, or its folder.
        asked: it was asked for; otherwise it was found, and one of other settings is passed over.
    """

    path: Path
    asked: bool = True


def source_of(packed: object, name: object, out: Path) -> Source | None:
    """Find the pack that a study goes on from.

    Args:
        packed: the one that was asked for; None if none was.
        name: of a study that ships, or a study file; anything else if it is neither.
        out: the study's folder.

    Returns:
        The one that was asked for; else the one in the study's folder; else that of a study that ships below the current
        folder, ``docs/replication/NAME/cells.jsonl.gz``, or of a file beside it: ``NAME/cells.jsonl.gz`` for ``NAME.toml``.
        None if there is none.
    """
    from lrkit.study.catalogue import names

    if packed is not None:
        return Source(path=Path(str(packed)))
    if (out / PACK).is_file():
        return Source(path=out / PACK)
    if not isinstance(name, str):
        return None
    ships = name in names()
    beside = (REPLICATION / name if ships else Path(name.removesuffix(".toml"))) / PACK
    found = (ships or name.endswith(".toml")) and beside.is_file()
    return Source(path=beside, asked=False) if found else None


def take_in(source: Source, plan: Plan, jobs: Sequence[Job], tasks: Mapping[str, TaskRecord], folder: Path) -> int:
    """Restore the cells of a pack that the study's folder does not have, and say so in one line.

    Args:
        source: the pack.
        plan: the study that is going to run.
        jobs: its cells.
        tasks: its tasks by name.
        folder: its folder, which need not exist.

    Returns:
        How many were taken in.

    Raises:
        LrkitError: the pack cannot be read or is of another study, or the folder holds something else. Nothing is written
            then.
    """
    pack = _fitting(source, plan, jobs, tasks)
    if pack is None:
        return 0
    there = [path.name for path in holds(folder)] if folder.is_dir() else []
    own = read_study_file(folder) if folder.is_dir() else None
    allowed = (PACK, "cells.csv", ".study.json.", "study.lock")  # the last two: of a process that was killed
    if own is None and not all(name.startswith(allowed) for name in there):
        raise LrkitError(f"{folder} exists and holds no study: nothing is overwritten, choose another --out")
    taken = _take(pack, own, {job.task: job.cell for job in jobs}, folder)
    if taken:
        code = ", ".join(sorted({entry.code or "unknown" for entry in taken}))
        many = "1 finished cell is" if len(taken) == 1 else f"{len(taken)} finished cells are"
        again = "" if source.asked else " (recompute=True, --recompute, computes them here)"
        warnings.warn(f"{many} taken in from {pack.path}, of code {code}{again}", LrkitWarning, stacklevel=5)
    return len(taken)


def offered(source: Source, plan: Plan, tasks: Mapping[str, TaskRecord], folder: Path | None) -> int:
    """Count the cells of a pack that `take_in` would restore in a folder, None for a new one; nothing is written.

    Raises:
        LrkitError: the pack cannot be read, or is of another study.
    """
    pack = _fitting(source, plan, jobs_of(plan), tasks)
    if pack is None:
        return 0
    own = read_study_file(folder) if folder is not None and folder.is_dir() else None
    return len(pack.cells if own is None or folder is None else _waiting(pack, own, folder))


def _fitting(source: Source, plan: Plan, jobs: Sequence[Job], tasks: Mapping[str, TaskRecord]) -> Pack | None:
    """Read a pack and see that it is of this study; None, and a warning, if one that was not asked for is of another."""
    pack = read_pack(source.path)
    model = jobs[0].cell.versions.get("model")
    if model is not None and any(cell.versions.get("model") == model for cell in pack.cells.values()):
        pack = attrs.evolve(pack, study=attrs.evolve(pack.study, model=plan.study.model))  # the same, in another folder
    try:
        check_same(plan, jobs, tasks, pack.study, pack.path)
        _check_inputs(pack, jobs)
    except LrkitError as error:
        if source.asked:
            raise
        warnings.warn(f"not taken in: {error}", LrkitWarning, stacklevel=6)
        return None
    return pack


def unpack(path: str | Path, folder: str | Path) -> int:
    """Make a study's folder of a pack, as it was packed, to report on: neither data nor models are needed.

    Args:
        path: the pack, or its folder.
        folder: the study's, which is not there yet or is empty. `lrkit.study.report.write_report` writes its report.

    Returns:
        How many finished cells it holds.

    Raises:
        LrkitError: the pack cannot be read or is not what it says, or the folder is not empty. Nothing is written then.
    """
    pack, folder = read_pack(path), Path(folder)
    _check_keys(pack)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LrkitError(f"{folder} exists and is not an empty folder: nothing is overwritten, choose another")
    return len(_take(pack, None, {}, folder))


def _take(pack: Pack, own: StudyFile | None, here: Mapping[str, Cell], folder: Path) -> list[CellEntry]:
    """Restore the cells of a pack that a folder does not have.

    Args:
        pack: the pack.
        own: the study in the folder; None if there is none.
        here: task to a cell of it on this machine, for the folders of its data and model.
        folder: the study's folder.

    Returns:
        Those that were restored.
    """
    if not _waiting(pack, own, folder):
        return []
    try_folder(folder / "cells")
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "study.lock", wait=True):
        own = read_study_file(folder)
        waiting = _waiting(pack, own, folder)
        write_study_file(folder, _merged(pack, own, waiting, folder))
        for key, content in pack.costs.items():
            if not (path := folder / "costs" / f"{key}.json").exists():
                path.parent.mkdir(exist_ok=True)
                write_json(path, content)
    for entry in waiting.values():
        cell = _placed(pack.cells[entry.key], here.get(entry.task))
        _restore(cell, entry, pack.path, folder / "cells" / entry.key)
    return list(waiting.values())


def _check_keys(pack: Pack) -> None:
    """Raise LrkitError if packed cells are not what their keys say."""
    for key, packed in pack.cells.items():
        if _key_of(packed.config) != key:
            raise LrkitError(f"{pack.path}: the cell {key} is not of the configuration that it holds")


def _check_inputs(pack: Pack, jobs: Sequence[Job]) -> None:
    """Raise LrkitError if packed cells are not what their keys say, or of other data, metrics or models than these."""
    _check_keys(pack)
    here = {job.task: job.cell for job in jobs}
    for entry in places(pack.study).values():
        cell, job = pack.cells.get(entry.key), here.get(entry.task)
        if cell is None or job is None:
            continue
        task = cell.config.get("task")
        same = all(cell.versions.get(name) == job.versions.get(name) for name in ("data", "model"))
        if not same or not isinstance(task, dict) or task.get("metric") != job.task["metric"]:
            raise LrkitError(f"{pack.path} is of other data, another metric or another model on {entry.task}")


def _key_of(config: Mapping[str, Any]) -> str:
    """Compute a cell's key from its configuration; empty if it is none of a cell."""
    try:
        return Cell.from_config(config, planned=True).key
    except (LrkitError, TypeError, ValueError, KeyError, AttributeError):
        return ""


def _waiting(pack: Pack, own: StudyFile | None, folder: Path) -> dict[Place, CellEntry]:
    """List the packed cells that are to be restored: those whose place in the folder has none that is done."""
    there = {} if own is None else places(own)
    return {
        place: entry
        for place, entry in places(pack.study).items()
        if entry.key in pack.cells and not (place in there and is_done(folder / "cells" / there[place].key))
    }


def _merged(pack: Pack, own: StudyFile | None, waiting: Mapping[Place, CellEntry], folder: Path) -> StudyFile:
    """Join the pack's study with the one in the folder, in which the cells that are taken in give way."""
    if own is None:
        return attrs.evolve(pack.study, name=folder.resolve().name)
    stay = [entry for place, entry in places(own).items() if place not in waiting]
    own = attrs.evolve(
        own,
        cells=tuple(entry for entry in stay if not isinstance(entry, TrialEntry)),
        trials=tuple(entry for entry in stay if isinstance(entry, TrialEntry)),
    )
    study = joined(pack.study, own, pack.path, yields=False, packed=pack.cells)
    # The pack's rows come first; a cost that was measured here goes with its row, wherever that stands now.
    labels = [row.label for row in study.rows]
    here = [attrs.evolve(c, row=c.row and labels.index(own.rows[c.row].label)) for c in own.costs]
    costs = {(cost.row, cost.task): cost for cost in (*pack.study.costs, *here)}
    return attrs.evolve(study, costs=tuple(costs.values()))


def _placed(packed: PackedCell, here: Cell | None) -> PackedCell:
    """Give a cell's configuration the folders of its data and model on this machine, if the study has them."""
    if here is None:
        return packed
    config = {**packed.config, "model": here.model}
    if here.task["data"] is not None:
        config["task"] = {**config["task"], "data": here.task["data"]}
    return attrs.evolve(packed, config=config)


def _restore(cell: PackedCell, entry: CellEntry, path: Path, folder: Path) -> None:
    """Write the files of a cell, ``result.json`` last, unless another process runs it or did so meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "lock") as mine:
        if not mine or is_done(folder):
            return
        for name in ("history", "metrics", "attempts"):
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
            lines = Lines(folder / f"{name}.jsonl")
            for line in getattr(cell, name):
                lines.write(line)
            lines.close()
        write_json(folder / "config.json", cell.config)
        write_json(folder / "env.json", cell.env)
        write_json(folder / PACKED, {"format": FORMAT, "pack": str(path), "code": entry.code})
        draft = folder / ".result.json.sum"
        write_json(draft, cell.result)
        write_json(folder / LIST, {"config.json": check_sum(folder / "config.json"), "result.json": check_sum(draft)})
        draft.replace(folder / "result.json")
