"""Each row's hyperparameters and parameter counts, and how it differs from the base."""

from collections.abc import Mapping
from typing import Any

import attrs

from lrkit.study.report.view import View, alpha_over_rank
from lrkit.study.setting_texts import in_words
from lrkit.study.texts import compact
from lrkit.study.tuned import chosen_of


@attrs.frozen
class Setup:
    """One row: its parts as plain data by kind, its learning rates, and trainable parameters by task."""

    row: int
    parts: list[tuple[str, Any]]
    rates: list[str]
    parameters: list[tuple[str, str]]


@attrs.frozen
class Hyperparameters:
    """The parts of each row."""

    rows: list[Setup]
    tasks: list[str]

    @classmethod
    def of(cls, view: View) -> "Hyperparameters":
        """Collect it."""
        rows = []
        for row in view.order:
            record = view.record.rows[row]
            parts = [(kind, part) for kind, part in record.method.items() if part not in (None, [])]
            rates = [
                (f"{task}: " if view.several else "") + ", ".join(f"{name} {rate:g}" for name, rate in of.items())
                for task, of in record.rates.items()
            ]
            if view.record.tune is not None:
                rates = [*_chosen(view, row), *(f"given: {told}" for told in rates)]
            scale = alpha_over_rank(record.method)
            rates += [f"α/r {scale}"] if rates and scale else []
            counts = [
                (task.name if view.several else "", _parameters(view, row, task.name)) for task in view.record.tasks
            ]
            rows.append(Setup(row, parts, list(dict.fromkeys(rates)), [(task, told) for task, told in counts if told]))
        return cls(rows, [task.name for task in view.record.tasks])


def _chosen(view: View, row: int) -> list[str]:
    """Write what the trials of a row chose, by task."""
    choices = {task.name: chosen_of(view.record, row, task.name) for task in view.record.tasks}
    return [
        f"chosen{f' on {task}' if view.several else ''}: {in_words(choice.settings)}"
        for task, choice in choices.items()
        if choice is not None
    ]


def _tuned(path: str, tune: Mapping[str, Any] | None) -> bool:
    """Tell if a change is a rate by default that no test cell has, since it is tuned."""
    return tune is not None and path.endswith(" (by default)") and path.removesuffix(" (by default)") in tune["space"]


def _parameters(view: View, row: int, task: str) -> str:
    """Write how many parameters a row trains, as a mean over its seeds; empty if no cell is done."""
    results = [cell.result for cell in view.cells(row, task) if cell.result is not None]
    if not results:
        return ""
    counts = [result.parameters for result in results]
    start, average, end = (
        sum(values) / len(counts)
        for values in ([c.start for c in counts], [c.average for c in counts], [c.now for c in counts])
    )
    if start == average == end:
        return f"{compact(end)} throughout"
    return f"{compact(start)} at first, {compact(average)} on average, {compact(end)} at the end"


@attrs.frozen
class Changes:
    """The differences to the base: row and changes of each, and the base's parts."""

    base: int
    rows: list[tuple[int, list[tuple[str, Any, Any]]]]
    whole: list[tuple[str, Any]]

    def __bool__(self) -> bool:
        return bool(self.rows)

    @classmethod
    def of(cls, view: View) -> "Changes":
        """Collect it."""
        record = view.record
        rows = [
            (row, [(c.path, c.base, c.value) for c in record.rows[row].changes if not _tuned(c.path, record.tune)])
            for row in view.rows
            if row != record.base
        ]
        whole = [(kind, part) for kind, part in record.rows[record.base].method.items() if part not in (None, [])]
        return cls(record.base, rows, whole)
