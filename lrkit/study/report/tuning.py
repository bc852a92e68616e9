"""How settings were chosen: scores over what was tried, the choice, its trials, and the rows at the settings given."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from markupsafe import Markup

from lrkit.study.charts import Curve, Style
from lrkit.study.charts.rates import rates
from lrkit.study.columns import SCORES
from lrkit.study.comparison import scale_on, score_name
from lrkit.study.report.figures import Figures, Panel, Panels
from lrkit.study.report.results import Heading, Line, tabled
from lrkit.study.report.view import View, alpha_over_rank
from lrkit.study.scores import Scale
from lrkit.study.setting_texts import in_words, ordered, ordinal, short_name, value_text
from lrkit.study.statistics import compare
from lrkit.study.tuned import Choice, TrialRecord, chosen_of, trials_of

_DASHES: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 3), (8, 3, 2, 3))
_LOOKS = ("solid", "dashed", "dotted", "dash-dotted")
_CAPTION = (
    "Scores on training rows set aside, mean over the tuning seeds; bars: lowest to highest seed; a ring: chosen; the "
    "dashed upright: the value without tuning; a red cross: a run diverged."
)


@attrs.frozen
class Chosen:
    """One row: what was chosen and what it has without tuning, α/r, trials, and a flag for a choice at the edge."""

    row: int
    chosen: str
    scale: str
    default: str
    score: str
    trials: str
    flag: str
    widen: str


@attrs.frozen
class Tuning:
    """The charts and the table of one task, the score's name, and the rows that one command widens."""

    figures: Figures
    rows: list[Chosen]
    scored: str

    @property
    def widened(self) -> dict[str, list[int]]:
        """Map what the command is given to try further values to the rows that were chosen at an edge."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        for each in self.rows:
            if each.widen:
                found[each.widen].append(each.row)
        return found


def tuning(view: View, task: str) -> Tuning | None:
    """Collect what the trials of a task came to; None if none was planned."""
    if not any(cell.task == task for cell in view.record.trials):
        return None
    tried = {row: trials_of(view.record, row, task) for row in view.order}
    tried = {row: trials for row, trials in tried.items() if trials}
    if not tried:
        return None
    seen = [score for trials in tried.values() for trial in trials for score in trial.scores.values()]
    scale = scale_on(view.record, task, filter(math.isfinite, seen))
    choices = {row: chosen_of(view.record, row, task) for row in tried}
    rows = [_chosen(view, task, row, trials, choices[row], scale) for row, trials in tried.items()]
    heading = scale.heading(score_name(view.record, task))
    return Tuning(figures=_charts(tried, choices, scale, heading), rows=rows, scored=heading)


def _chosen(
    view: View, task: str, row: int, trials: Sequence[TrialRecord], choice: Choice | None, scale: Scale
) -> Chosen:
    cells = view.record.trials_in(row, task)
    stopped = sum(trial.stopped is not None for trial in trials)
    done = sum(cell.status == "done" for cell in cells)
    told = f"{len(trials)} ({done} of {len(cells)} cells{f', {stopped} stopped early' if stopped else ''})"
    if choice is None:
        return Chosen(row, "not all trials are done", "", "", "", told, "", "")
    best = next(trial for trial in trials if trial.number == choice.trial)
    method: dict[str, Any] = next(
        (cell.config["method"] for cell in view.cells(row, task) if cell.config.get("method")), {}
    )
    edges = [f"{short_name(path)} {value_text(choice.settings[path])}" for path in ordered(choice.edges)]
    return Chosen(
        row=row,
        chosen=in_words(choice.settings),
        scale=alpha_over_rank(method),
        default=in_words(choice.default),
        score="" if best.mean is None else scale.number(best.mean),
        trials=told,
        flag=f"at the edge of what was tried: {', '.join(edges)}" if edges else "",
        widen=choice.widen,
    )


# ---- the charts ------------------------------------------------------------------------------------------------------


def _charts(
    tried: Mapping[int, Sequence[TrialRecord]], choices: Mapping[int, Choice | None], scale: Scale, heading: str
) -> Figures:
    """Draw the score over each setting that has a range, the rows side by side: a line per value of the other settings."""
    paths = ordered({path for trials in tried.values() for trial in trials for path in trial.settings})
    ends = [scale.of(score) for trials in tried.values() for trial in trials for score in trial.scores.values()]
    ends = [end for end in ends if math.isfinite(end)]
    if not ends:
        return []
    air = (max(ends) - min(ends)) * 0.06 or abs(max(ends)) * 0.05 or 1.0
    found: Figures = []
    for path in paths:
        values = {row: _numbers(trials, path) for row, trials in tried.items()}
        every = [value for numbers in values.values() for value in numbers]
        if len(set(every)) < 2:
            continue
        given = [ordinal(choice.default.get(path)) for choice in choices.values() if choice is not None]
        every += [value for value in given if value is not None]
        panels = []
        for row, trials in tried.items():
            if not values[row]:
                continue
            choice = choices[row]
            picked = None if choice is None else next(t for t in trials if t.number == choice.trial)
            curves = _curves(trials, path, scale)
            svg = rates(
                curves,
                x_label=short_name(path),
                y_label=heading,
                x_range=(min(every), max(every)),
                y_range=(min(ends) - air, max(ends) + air),
                chosen=_point(picked, path, scale),
                default=None if choice is None else ordinal(choice.default.get(path)),
            )
            if svg:
                aside = "" if choice is None else f"chosen: {value_text(choice.settings.get(path))}"
                panels.append(Panel(svg=Markup(svg), row=row, aside=aside))
        found += [Panels(panels=panels, caption=_CAPTION + _key(tried, path, scale))] if panels else []
    return found


def _key(tried: Mapping[int, Sequence[TrialRecord]], path: str, scale: Scale) -> str:
    """Say which dashes stand for which values of the other settings, if these are few and the same in all rows."""
    labels = {tuple(curve.label for curve in _curves(trials, path, scale)) for trials in tried.values()}
    names = next(iter(labels)) if len(labels) == 1 else ()
    if not 1 < len(names) <= len(_DASHES):
        return ""
    return " Lines: " + "; ".join(f"{look}: {name}" for look, name in zip(_LOOKS, names, strict=False)) + "."


def _curves(trials: Sequence[TrialRecord], path: str, scale: Scale) -> list[Curve]:
    """Make a line for each combination of the other settings; points alone if no two trials share these."""
    groups: defaultdict[str, list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        if ordinal(trial.settings.get(path)) is not None and trial.scores:
            rest = {name: value for name, value in trial.settings.items() if name != path}
            groups[in_words(rest)].append(trial)
    curves = []
    for number, (label, group) in enumerate(groups.items()):
        points = sorted(((trial.settings[path], trial) for trial in group), key=lambda pair: pair[0])
        scores = [[scale.of(score) for score in trial.scores.values()] for _, trial in points]
        curves.append(
            Curve(
                label=label,
                style=Style("heat", _DASHES[number % len(_DASHES)] if len(groups) < 6 else ()),
                x=[float(value) for value, _ in points],
                y=[statistics.fmean(each) for each in scores],
                low=[min(each) for each in scores],
                high=[max(each) for each in scores],
                marks=True,
            )
        )
    return curves


def _point(trial: TrialRecord | None, path: str, scale: Scale) -> tuple[float, float] | None:
    value = None if trial is None else ordinal(trial.settings.get(path))
    if trial is None or value is None or trial.mean is None:
        return None
    return value, scale.of(trial.mean)


def _numbers(trials: Sequence[TrialRecord], path: str) -> list[float]:
    return [value for trial in trials if (value := ordinal(trial.settings.get(path))) is not None]


# ---- as given, best and last -----------------------------------------------------------------------------------------


@attrs.frozen
class Tables:
    """A table by task, and the sentence below."""

    tables: list[tuple[str, list[Heading], list[Line]]]
    caption: list[str]

    def __bool__(self) -> bool:
        return bool(self.tables)


def untuned(view: View) -> Tables:
    """Compare the rows at the settings given, if the study ran them so beside the tuned ones."""
    if not view.record.untuned:
        return Tables([], [])
    record = attrs.evolve(view.record, cells=view.record.untuned, untuned=view.record.cells)
    given = attrs.evolve(view, record=record, table=compare(record))
    tables = [(name, *found) for name, found in given.by_task(lambda v, task: tabled(v, task, SCORES, "interval"))]
    return Tables(tables, ["The same rows, tasks and seeds with the settings that were given, none of them tuned."])


@attrs.frozen
class Best:
    """One row: its score after the last step, the best on the way, the difference, and the step of the best."""

    row: int
    last: str
    best: str
    gain: str
    step: str


@attrs.frozen
class Bests:
    """The rows of one task, and the score's name."""

    rows: list[Best]
    scored: str


def best(view: View, task: str) -> Bests | None:
    """Compare the best score on the way with the last one; None if no run was scored on the way."""
    name, up = score_name(view.record, task), view.record.higher_is_better(task)
    runs: dict[int, list[tuple[float, float, int]]] = {}
    for row in view.order:
        for cell in view.cells(row, task):
            if cell.result is None or not cell.evaluations or not math.isfinite(cell.result.score):
                continue
            on_the_way = [(next(iter(s.values()), math.nan), step) for step, s in cell.evaluations]
            scored = [(v, step) for v, step in on_the_way if math.isfinite(v)] + [
                (cell.result.score, cell.result.steps)
            ]
            top, step = max(scored, key=lambda pair: (pair[0] if up else -pair[0], -pair[1]))
            runs.setdefault(row, []).append((cell.result.score, top, step))
    if not runs:
        return None
    scale = scale_on(
        view.record, task, [value for each in runs.values() for last, top, _ in each for value in (last, top)]
    )
    rows = []
    for row, each in runs.items():
        last, top = (statistics.fmean(run[i] for run in each) for i in (0, 1))
        steps = sorted(run[2] for run in each)
        at = (
            f"{steps[0]:,}"
            if steps[0] == steps[-1]
            else f"{statistics.median(steps):,.0f} ({steps[0]:,} to {steps[-1]:,})"
        )
        rows.append(Best(row, scale.number(last), scale.number(top), scale.number(top - last, "+"), at))
    return Bests(rows, scale.heading(name))
