"""The findings of a study: its tables, its claims, and how much of the rank went to the right layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.cli import screen, study_screen
from lrkit.cli.tables import Column

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lrkit.study.claims import Judged
    from lrkit.study.recall import Recall
    from lrkit.study.results import StudyRecord
    from lrkit.study.statistics import Table


@attrs.frozen
class Findings:
    """The findings of a study.

    Args:
        written: the report's files.
        table: of its comparisons.
        recalls: of its rows, if a task knows the right layers.
        claims: those of its file, judged.
        tuned: what the trials of each row on each task chose: row, task, trials, settings, and how to widen the range.
    """

    written: list[Path]
    table: "Table"
    recalls: "list[Recall]"
    claims: "tuple[Judged, ...]"
    tuned: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> "Findings":
        """Write a study's report, and collect its findings."""
        from lrkit.study.claims import judge
        from lrkit.study.recall import recalls_of
        from lrkit.study.records import read_study
        from lrkit.study.report import write_report
        from lrkit.study.statistics import compare

        written, record = list(write_report(folder)), read_study(folder)
        recalls = [each for task in record.tasks for each in recalls_of(record, task.name)]
        return cls(written, compare(record), recalls, judge(record), _tuned(record))

    def to_plain(self) -> dict[str, Any]:
        """Return them as plain data; recalls and claims only if there are any."""
        plain: dict[str, Any] = {
            "files": [str(path) for path in self.written],
            "rows": [attrs.asdict(row) for row in self.table.rows],
            "combined": [attrs.asdict(each) for each in self.table.combined],
        }
        plain |= {"recall": [attrs.asdict(each) for each in self.recalls]} if self.recalls else {}
        plain |= {"tuned": self.tuned} if self.tuned else {}
        return plain | ({"claims": [attrs.asdict(each) for each in self.claims]} if self.claims else {})

    def show(self) -> None:
        """Print them."""
        study_screen.show_table(self.table)
        study_screen.show_recalls(self.recalls)
        if self.tuned:
            heads = [Column("row"), Column("task"), Column("trials", number=True), Column("chosen")]
            lines = [
                [each["row"], each["task"], str(each["trials"]), _settings(each["settings"])] for each in self.tuned
            ]
            screen.say("")
            screen.table(heads, lines, "tuned")
            ends: dict[str, list[str]] = {}
            for each in self.tuned:
                if each["widen"]:
                    ends.setdefault(each["widen"], []).append(f"{each['row']} ({each['task']})")
            for wider, places in ends.items():
                screen.say(f"chosen at the edge of the range by {', '.join(places)}: {screen.whole(wider)} widens it")
        if self.claims:
            heads = [Column("claim"), Column("verdict"), Column("difference"), Column("p (margin)"), Column("because")]
            rows = [
                [each.claim.name, each.verdict, _by_task(each.difference), each.against_margin, each.why]
                for each in self.claims
            ]
            screen.say("")
            screen.table(heads, rows, "claims")


def _tuned(record: "StudyRecord") -> list[dict[str, Any]]:
    from lrkit.study.tuned import chosen_of, trials_of

    found = []
    for index, row in enumerate(record.rows) if record.tune is not None else ():
        for task in record.tasks:
            choice = chosen_of(record, index, task.name)
            if choice is not None:
                trials = len(trials_of(record, index, task.name))
                told = {"row": row.label, "task": task.name, "trials": trials, "settings": choice.settings}
                found.append(told | {"widen": choice.widen})
    return found


def _by_task(difference: str) -> str:
    """Return a claim's differences so that lines break between two tasks alone."""
    return "; ".join(map(screen.whole, difference.split("; ")))


def _settings(settings: "Mapping[str, Any]") -> str:
    return ", ".join(
        f"{path}={value:g}" if isinstance(value, float) else f"{path}={value}" for path, value in settings.items()
    )
