"""The further scores of each row, and a few validation rows with the base's answer and each row's."""

import math
import statistics

import attrs

from lrkit.study.report.view import View
from lrkit.study.scores import scale_of

_SHORT = 400
"""Characters of a text that are shown at once; of a longer one the whole is folded."""


@attrs.frozen
class Further:
    """The scores beside the primary one: their names with units, and each row's means over seeds."""

    names: list[str]
    rows: list[tuple[int, list[str]]]


def further(view: View, task: str) -> Further | None:
    """Collect the further scores of a task; None if it has one score alone."""
    results = {row: [cell.result for cell in view.cells(row, task) if cell.result] for row in view.rows}
    names = list(dict.fromkeys(name for each in results.values() for result in each for name in [*result.scores][1:]))
    if not names:
        return None
    means: dict[str, dict[int, float]] = {}
    for name in names:
        for row, each in results.items():
            found = [result.scores[name] for result in each if math.isfinite(result.scores.get(name, math.nan))]
            if found:
                means.setdefault(name, {})[row] = statistics.fmean(found)
    scales = {name: scale_of([name], means.get(name, {}).values()) for name in names}

    def text(name: str, row: int) -> str:
        value = means.get(name, {}).get(row)
        return "–" if value is None else scales[name].number(value)

    return Further(
        names=[scales[name].heading(name) for name in names],
        rows=[(row, [text(name, row) for name in names]) for row, each in results.items() if each],
    )


@attrs.frozen
class Text:
    """A text to be read: all of it, or its beginning and, folded, all of it."""

    begin: str
    whole: str = ""

    @classmethod
    def of(cls, text: str) -> "Text":
        """Fold a long text."""
        return cls(text) if len(text) <= _SHORT else cls(f"{text[:_SHORT].rstrip()} …", text)


@attrs.frozen
class Answers:
    """One validation row: what is asked, the right answer, the base's (None: it has none), and the study's rows' answers."""

    input: Text
    reference: Text
    base: Text | None
    rows: list[tuple[int, Text]]


def samples(view: View, task: str) -> list[Answers]:
    """List a few validation rows and what is said to them; of each row of the study those of its first seed that has any."""
    found: dict[tuple[str, str], Answers] = {}
    for row in view.order:
        for each in next((cell.samples for cell in view.cells(row, task) if cell.samples), ()):
            base = None if each.base is None else Text.of(each.base)
            answers = found.setdefault(
                (each.input, each.reference), Answers(Text.of(each.input), Text.of(each.reference), base, [])
            )
            answers.rows.append((row, Text.of(each.output)))
    return list(found.values())
