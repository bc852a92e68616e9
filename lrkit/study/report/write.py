"""Write a study's report into its folder."""

from pathlib import Path

from lrkit.moves import replacing
from lrkit.study.claims import judge, to_markdown
from lrkit.study.records import frame, read_study
from lrkit.study.report.page import page
from lrkit.study.sheet import safe_csv
from lrkit.study.statistics import compare
from lrkit.study.tuned import trial_frame


def write_report(folder: str | Path) -> list[Path]:
    """Write a study's report into its folder.

    Args:
        folder: of a study, finished or still running.

    Returns:
        ``report.html``, ``table.csv``, ``table.md``, ``table.tex`` and ``cells.csv`` (one line per cell); of a tuned
        study also ``trials.csv`` (one line per trial and seed), and ``claims.md`` if the study states claims. Each is
        replaced in one move.

    Raises:
        LrkitError: the folder holds no study, or something in it cannot be read.
    """
    folder = Path(folder)
    record = read_study(folder)
    table = compare(record)
    files = {
        "report.html": page(record, table),
        "table.csv": table.to_csv(),
        "table.md": table.to_markdown(),
        "table.tex": table.to_latex(),
        "cells.csv": safe_csv(frame(record).to_csv(index=False, lineterminator="\n")),
    }
    if record.claims:
        files["claims.md"] = to_markdown(record, judge(record))
    if record.trials:
        files["trials.csv"] = safe_csv(trial_frame(record).to_csv(index=False, lineterminator="\n"))
    return [_replace(folder / name, text) for name, text in files.items()]


def _replace(path: Path, text: str) -> Path:
    with replacing(path) as draft:
        # a lone surrogate can come out of JSON, and has no bytes
        draft.write_bytes(text.encode("utf-8", "replace"))
    return path
