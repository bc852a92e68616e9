"""The table of all methods in docs/methods/index.md, from its packed cells: ``python -P tests/all_methods.py`` prints it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lrkit.study.files import CellResult
from lrkit.study.records import StudyRecord, read_study
from lrkit.study.taken import unpack

PACK = Path(__file__).parents[1] / "docs" / "replication" / "all-methods"
HEAD = "| method | accuracy | trainable at start | at the end | on average | FLOPs | state at the end |"


def table(record: StudyRecord) -> list[str]:
    """Return the table's lines: a row's mean accuracy and that of each seed, and means of what it trained and computed."""
    lines = [HEAD, "|---|---|---|---|---|---|---|"]
    for index, row in enumerate(record.rows):
        results = [each.result for each in sorted(record.cells_of(index), key=lambda cell: cell.seed)]
        found = [each for each in results if each is not None]
        scores = [100 * each.score for each in found]
        counts = [
            statistics.fmean(getattr(each.parameters, which) for each in found) for which in ("start", "now", "average")
        ]
        flops = statistics.fmean(each.flops.run for each in found if each.flops is not None)
        cells = [
            _named(row.label),
            f"{statistics.fmean(scores):.1f} % ({', '.join(f'{score:.1f}' for score in scores)})",
            *(f"{count:,.0f}" for count in counts),
            f"{flops / 1e12:.2f} T",
            _state(found),
        ]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return lines


def _named(label: str) -> str:
    name, comma, rest = label.partition(",")
    return f"`{name}`{comma}{rest}"


def _state(results: Sequence[CellResult]) -> str:
    """Say the ranks of all runs, and how many matrices are frozen in each."""
    ranks = [layer.rank for each in results for layer in each.layers if layer.rank is not None]
    frozen = sorted({sum(len(layer.frozen) for layer in each.layers) for each in results})
    said = []
    if ranks and min(ranks) == max(ranks):
        said.append(f"rank {ranks[0]}")
    elif ranks:
        said.append(f"ranks {min(ranks)} to {max(ranks)}, mean {statistics.fmean(ranks):.1f}")
    if any(frozen):
        said.append(f"{' or '.join(map(str, frozen))} matrices frozen")
    return ", ".join(said)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        unpack(PACK, Path(place) / "all-methods")
        print(*table(read_study(Path(place) / "all-methods")), sep="\n")
