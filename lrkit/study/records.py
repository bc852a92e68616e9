"""Read a study's folder, finished or still running: `read_study`, and the same as a table: `frame`. No torch here.

Anything that is not a study is refused in one line. `read_study` itself opens ``study.json`` alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lrkit.errors import LrkitError, cut
from lrkit.study.results import CellRecord, Status, StudyRecord
from lrkit.study.study_file import (
    CellEntry,
    ChangeRecord,
    RowRecord,
    StudyFile,
    TaskRecord,
    TrialEntry,
    read_study_file,
)

if TYPE_CHECKING:
    import pandas


def read_study(folder: str | Path) -> StudyRecord:
    """Read a study, finished or still running.

    Args:
        folder: the folder that holds its ``study.json``.

    Returns:
        The record. Cells are read when they are first asked for.

    Raises:
        LrkitError: there is no ``study.json``, or it is something else, of a newer format, or at odds with itself.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LrkitError(f"{folder} is no folder: a study's folder is what `lrkit ablate` writes")
    study = read_study_file(folder)
    if study is None:
        if (folder / "cells.jsonl.gz").is_file():
            raise LrkitError(f"{folder} is a packed study: `lrkit unpack {folder} FOLDER` makes a study's folder of it")
        raise LrkitError(f"{folder} holds no study.json: a study's folder is what `lrkit ablate` writes")
    tuned = study.tune is not None
    return StudyRecord(
        folder=folder,
        name=study.name,
        title=study.title or _title(study),
        note=study.note,
        base=study.base,
        rows=study.rows,
        tasks=study.tasks,
        model=study.model,
        loading=study.loading,
        targets=study.targets,
        seeds=study.seeds,
        run=study.run,
        cells=tuple(_cell(folder, cell) for cell in study.cells if cell.tuned == tuned),
        measured=study.costs,
        margin=study.margin,
        claims=study.claims,
        published=study.published,
        tune=study.tune,
        trials=tuple(_cell(folder, trial) for trial in study.trials),
        untuned=tuple(_cell(folder, cell) for cell in study.cells if cell.tuned != tuned),
    )


def _cell(folder: Path, entry: CellEntry) -> CellRecord:
    return CellRecord(
        key=entry.key,
        row=entry.row,
        task=entry.task,
        seed=entry.seed,
        folder=folder / "cells" / entry.key,
        old=entry.old or not entry.code,  # a study from before code was written down is of other code
        code=entry.code,
        number=entry.number if isinstance(entry, TrialEntry) else None,
        rung=entry.rung if isinstance(entry, TrialEntry) else 0,
    )


def _title(study: StudyFile) -> str:
    """Make a title, ``adalora: metric, scheduler``: the base and what the rows change; the folder's name if too much."""
    paths = dict.fromkeys(change.path.split(".")[0] for row in study.rows for change in row.changes)
    return f"{study.rows[study.base].label}: {', '.join(paths)}" if 0 < len(paths) <= 4 else study.name


_PARAMETERS = ("start", "now", "average", "head")


def frame(record: StudyRecord) -> "pandas.DataFrame":
    """Return a study as a tidy table, one line per cell, in the study's order.

    Returns:
        Columns ``row`` (the label), ``task``, ``seed``, ``status``, ``score`` (the primary one; NaN if the run diverged or
        is not done: ``status`` tells which), ``scores.NAME`` for every score that there is, ``parameters.start``,
        ``parameters.now``, ``parameters.average`` (adapters alone), ``parameters.head``, ``flops`` (of the whole run),
        ``steps``, ``tokens`` and ``tokens_per_second`` (of the training batches; not in older studies), ``error`` (of a
        failed cell), ``other_code`` (if it is of other code than the study was last run with) and ``key``.
    """
    import pandas

    names = list(dict.fromkeys(name for cell in record.cells if cell.result for name in cell.result.scores))
    table = []
    for cell in record.cells:
        result = cell.result
        table.append(
            {
                "row": record.rows[cell.row].label,
                "task": cell.task,
                "seed": cell.seed,
                "status": cell.status,
                "score": cell.score,
                **{f"scores.{name}": result.scores.get(name) if result else None for name in names},
                **{f"parameters.{name}": result and getattr(result.parameters, name) for name in _PARAMETERS},
                "flops": result.flops.run if result and result.flops else None,
                "steps": cell.steps,
                "tokens": result and result.tokens,
                "tokens_per_second": cell.tokens_per_second,
                "error": cut(cell.error_line) if cell.status == "failed" else "",
                "other_code": cell.old,
                "key": cell.key,
            }
        )
    scores, parameters = (
        [f"{kind}.{name}" for name in of] for kind, of in (("scores", names), ("parameters", _PARAMETERS))
    )
    speed = ["tokens", "tokens_per_second"] if any(line["tokens"] is not None for line in table) else []
    whole = dict.fromkeys((name for name in [*parameters, *speed[:1]] if name != "parameters.average"), "Int64")
    real = dict.fromkeys(("score", *scores, "parameters.average", "flops", *speed[1:]), "float64")
    columns = ["row", "task", "seed", "status", "score", *scores, *parameters]
    columns += ["flops", "steps", *speed, "error", "other_code", "key"]
    return pandas.DataFrame(table, columns=columns).astype(whole | real)


__all__ = ["CellRecord", "ChangeRecord", "RowRecord", "Status", "StudyRecord", "TaskRecord", "frame", "read_study"]
