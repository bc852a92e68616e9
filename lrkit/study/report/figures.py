"""The figures that are curves, marks and bars: Pareto front, budget, learning curves and cost."""

import math
from collections.abc import Callable, Sequence

import attrs
from markupsafe import Markup

from lrkit.study.charts import Bar, Curve, Point, Style, bars, lines, scatter
from lrkit.study.comparison import scale_on
from lrkit.study.report.series import Series, curve_of, diverging, over_seeds, smooth
from lrkit.study.report.view import View
from lrkit.study.texts import compact, memory

_FEW = 6  # up to so many rows share one chart, named at their lines


@attrs.frozen(kw_only=True)
class Chart:
    """One chart in two widths, of which the page shows the one that fits.

    Args:
        wide: as an ``svg`` element.
        narrow: the same for a telephone.
        rows: the rows in it, for the key.
        caption: below it.
        named: the wide one names its rows itself.
    """

    wide: Markup
    narrow: Markup
    rows: Sequence[int]
    caption: str
    named: bool = False
    kind: str = "chart"


@attrs.frozen(kw_only=True)
class Panel:
    """One of several small charts: its row or title, and a text at the right above it."""

    svg: Markup
    row: int | None = None
    title: str = ""
    aside: str = ""


@attrs.frozen(kw_only=True)
class Panels:
    """Small charts side by side, their caption, and texts about rows that have none."""

    panels: Sequence[Panel]
    caption: str
    notes: Sequence[tuple[int, str]] = ()
    width: int = 320
    kind: str = "panels"


Figures = list["Chart | Panels"]


def pareto(view: View, task: str) -> Figures:
    """Draw score against parameters."""
    table = view.table.of(task)
    scale = table.scale
    rows = [(r, r.parameters_average, r.mean) for r in table.rows]
    known = [(row, x, y) for row, x, y in rows if x is not None and y is not None]
    if not known:
        return []
    up = -1 if scale.lower else 1
    front = {
        row.index: (x, scale.of(y))
        for row, x, y in known
        if not any(a <= x and up * b >= up * y and (a < x or up * b > up * y) for _, a, b in known)
    }
    points = [
        Point(
            label=row.label,
            style=view.styles[row.index],
            x=x,
            y=scale.of(y),
            error=None if row.sd is None else scale.of(row.sd),
            front=row.index in front,
            title=f"{row.label}: {scale.number(y)} ± {scale.text(row.sd or 0.0)} with {x:,.0f} parameters, n = {row.n}",
        )
        for row, x, y in known
    ]
    xs = [x for _, x, _ in known]
    log = min(xs) > 0 and max(xs) / min(xs) > 8
    wide = "trainable adapter parameters, averaged over the run" + (", logarithmic" if log else "")
    narrow = "average trainable parameters" + (", log" if log else "")

    def draw(width: int, height: int, label: str) -> Markup:
        svg = scatter(
            points,
            width=width,
            height=height,
            x_label=label,
            y_label=scale.heading(table.scores[0]),
            x_show=lambda value: compact(value, 2),
            x_log=log,
            front=sorted(front.values()),
        )
        return Markup(svg)

    caption = (
        "Mean over seeds; bars: ± one standard deviation. Full marks lie on the Pareto front, drawn as stairs: no other "
        "row has at most as many parameters and at least as good a score."
    )
    every = [row.index for row, _, _ in known]
    return [Chart(wide=draw(780, 400, wide), narrow=draw(320, 320, narrow), rows=every, caption=caption)]


def budget(view: View, task: str) -> Figures:
    """Draw what is kept over the steps, beside what was planned: units, or their costs where the schedule counts those."""
    panels = []
    for row in view.rows:
        cells = view.cells(row, task)
        for policy in sorted({d.policy for cell in cells for d in cell.decisions}):
            runs = [[d for d in cell.decisions if d.policy == policy] for cell in cells]
            runs = [run for run in runs if run]
            units, counted = max(d.whole for run in runs for d in run), runs[0][0].amount
            end = max([cell.steps for cell in cells] + [run[-1].step for run in runs])
            own = attrs.evolve(view.styles[row], dash=())
            curves = []
            for label, amount, style, width in (
                ("planned", "budget", Style("planned"), 5.0),
                ("kept", "spent", own, 1.75),
            ):
                # A decision at step 0 is the beginning: no step trains in the state before it.
                x, mean, low, high = over_seeds(
                    [[(0, run[0].began)][: run[0].step] + [(d.step, getattr(d, amount)) for d in run] for run in runs]
                )
                if x[-1] < end:
                    x, mean, low, high = [*x, end], [*mean, mean[-1]], [*low, low[-1]], [*high, high[-1]]
                curves.append(Curve(label=label, style=style, x=x, y=mean, low=low, high=high, width=width, step=True))
            x_range, y_range = (0, end), (0, units * 1.06)
            svg = lines(
                curves, x_label="step", y_label=counted, x_range=x_range, y_range=y_range, show="{:,.1f}".format
            )
            there = curves[1].y[-1]
            left = f"{f'{there:,.0f}' if there >= 1000 else f'{there:.4g}'} of {units:,.0f} {counted} left"
            which = "" if policy == 0 else f", policy {policy}"
            panels.append(Panel(svg=Markup(svg), row=row, title=which, aside=left))
    caption = (
        "What is kept after each decision, mean over seeds (shaded: lowest to highest). Thick and grey: what the "
        "scheduler planned."
    )
    return [Panels(panels=panels, caption=caption)] if panels else []


def curves(view: View, task: str) -> Figures:
    """Draw the task's loss, the penalty and the scores over the steps."""
    steps = max((cell.steps for row in view.order for cell in view.cells(row, task)), default=0)
    window = max(1, steps // 25) | 1
    losses: dict[int, Curve] = {}
    penalties: dict[int, Curve] = {}
    scores: dict[int, Curve] = {}
    metric = next((t.metric for t in view.record.tasks if t.name == task), "") or "score"
    seen = [
        next(iter(s.values()), math.nan) for cell in view.record.cells if cell.task == task for _, s in cell.evaluations
    ]
    scale = scale_on(view.record, task, filter(math.isfinite, seen))
    for row in view.order:
        cells = view.cells(row, task)
        runs: list[Series] = []
        crosses = []
        for cell in cells:
            smoothed = smooth([loss for _, loss in cell.losses], window)
            runs.append([(step, value) for (step, _), value in zip(cell.losses, smoothed, strict=True)])
            crosses += list(diverging(cell, smoothed))
        if any(runs):
            losses[row] = curve_of(view, row, runs, crosses)
        penalized = [list(cell.penalties) for cell in cells]
        if any(penalized):
            penalties[row] = curve_of(view, row, penalized)
        evaluated = [
            [(step, scale.of(next(iter(s.values()), math.nan))) for step, s in cell.evaluations] for cell in cells
        ]
        if len({step for run in evaluated for step, _ in run}) > 1:
            scores[row] = curve_of(view, row, evaluated, marks=True)
    over = f"running mean over {window} steps, " if window > 1 else ""
    return [
        *_of_rows(
            view,
            losses,
            "task loss",
            f"Training loss of the task, without any penalty, {over}mean over seeds; shaded: lowest to highest seed. "
            "A cross marks where a run diverged.",
        ),
        *_of_rows(
            view,
            penalties,
            "penalty",
            "The penalty that is added to the task loss, with its weight, of the rows whose method has one; mean over "
            "seeds.",
        ),
        *_of_rows(
            view,
            scores,
            scale.heading(metric),
            f"Validation {metric} on the way, mean over seeds; shaded: lowest to highest seed.",
        ),
    ]


def _of_rows(view: View, drawn: dict[int, Curve], label: str, caption: str) -> Figures:
    """Draw all rows in one chart if they are few; if not, one panel for each, with the base behind it."""
    ends = [v for c in drawn.values() for v in (*c.y, *c.low, *c.high) if math.isfinite(v)]
    if not ends:
        return []
    if len(drawn) <= _FEW:
        ordered = list(reversed(drawn.values()))  # the base on top
        wide = lines(ordered, width=780, height=340, x_label="step", y_label=label, names=True)
        narrow = lines(ordered, width=320, height=280, x_label="step", y_label=label)
        return [Chart(wide=Markup(wide), narrow=Markup(narrow), rows=list(drawn), caption=caption, named=True)]
    air = (max(ends) - min(ends)) * 0.05 or 0.05
    span = (min(ends) - air, max(ends) + air)
    steps = [x for curve in drawn.values() for x in curve.x]
    x_range = (min(steps), max(steps)) if max(steps) > min(steps) else None
    base = drawn.get(view.record.base)
    panels = []
    for row, curve in drawn.items():
        behind = [attrs.evolve(base, marks=False, width=1.25)] if base is not None and curve is not base else []
        svg = lines([*behind, curve], x_label="step", y_label=label, y_range=span, x_range=x_range)
        panels.append(Panel(svg=Markup(svg), row=row))
    return [Panels(panels=panels, caption=f"{caption} The base, thinner, is in each panel.")]


def cost(view: View, task: str) -> Figures:
    """Draw the time of a step, the FLOPs of a run and the memory as bars."""
    rows = view.table.of(task).rows

    def drawn(key: str, show: Callable[[float], str], second: str = "", reference: float | None = None) -> Markup:
        items = []
        for row in rows:
            value, other = getattr(row, key), getattr(row, second) if second else None
            text = "not measured" if value is None else show(value)
            told = "" if other is None else f" at the start, {show(other)} at the end"
            items.append(
                Bar(
                    label=row.label,
                    style=view.styles[row.index],
                    value=math.nan if value is None else value,
                    text=text,
                    second=other,
                    second_text="" if other is None else show(other),
                    title=f"{row.label}: {text}{told}",
                )
            )
        return Markup(bars(items, reference=reference))

    panels = [
        Panel(
            title="Step time, over the base's",
            svg=drawn("step_ratio", "{:.2f}".format, "step_ratio_end", 1.0),
            aside="thin: at the end",
        ),
        Panel(title="FLOPs of a run", svg=drawn("flops", compact)),
        Panel(title="Peak memory of a step", svg=drawn("peak_memory", memory)),
    ]
    costs = [each for (_, name), each in view.record.costs.items() if name == task]
    measured = {f"{each.device or 'unknown device'}" for each in costs if not each.error}
    threads = {each.threads for each in costs if each.threads}
    place = ", ".join([*sorted(measured), *(f"{n} threads" if n > 1 else "1 thread" for n in sorted(threads))])
    caption = f"Times and memory were measured on {place}; FLOPs are counted." if place else ""
    panels = [panel for panel in panels if panel.svg]
    return [Panels(panels=panels, caption=caption)] if panels else []
