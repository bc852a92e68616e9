"""The report of a study: one HTML page that works offline, and its tables as CSV, Markdown and LaTeX.

The page holds everything it shows: style, charts (inline SVG, see `lrkit.study.charts`) and ten lines of script that
sort the table. It asks for nothing from anywhere, and says so to the browser in its content security policy. Whatever
comes from the study is escaped. A study that is still running gives a page that says what is not there yet; written
again later, it is replaced in one move.
"""

import base64
import hashlib
import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs

from lrkit.errors import cut
from lrkit.study import charts
from lrkit.study.charts import Style, minus
from lrkit.study.pictures import grid_of
from lrkit.study.records import CellRecord, Status, StudyRecord, frame, read_study
from lrkit.study.sheet import safe_csv
from lrkit.study.statistics import Table, TableRow, compare
from lrkit.study.table import COSTS, SCORES, columns_of, columns_of_tasks, decimals
from lrkit.study.texts import compact, memory

_HUES = 7
_FEW = 6  # up to so many rows share one chart, named at their lines
_POINTS = 160  # of a curve, at most
_TRACEBACK = 20_000  # characters of a traceback that are shown, at most


def write_report(folder: str | Path) -> list[Path]:
    """Write a study's report into its folder.

    Args:
        folder: a study's, finished or still running.

    Returns:
        ``report.html``, ``table.csv``, ``table.md``, ``table.tex`` and ``cells.csv`` (one line for each cell), each
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
    return [_replace(folder / name, text) for name, text in files.items()]


def page(record: StudyRecord, table: Table) -> str:
    """The report as HTML.

    Args:
        record: the study.
        table: `lrkit.study.statistics.compare` of it.
    """
    study = _Study(record=record, table=table, styles=_styles(record))
    sections = [
        ("results", "Results", _results(study)),
        ("changes", "What each row changes", _changes(study)),
        ("pareto", "Score against trainable parameters", _by_task(study, _pareto)),
        ("budget", "Budget", _by_task(study, _budget)),
        ("ranks", "Ranks at the end", _by_task(study, _ranks)),
        ("freezing", "When matrices froze", _by_task(study, _freezing)),
        ("curves", "Learning curves", _by_task(study, _curves)),
        ("cost", "Cost", _by_task(study, _cost)),
        ("failures", "Failures", _failures(study)),
        ("cells", "Cells", _cells(study)),
    ]
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{html}</section>' for key, name, html in sections if html)
    script = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(record.title)}</title><style>{_STYLE}</style></head>\n<body><main>"
        f"{_head(study)}{body}</main><script>{_SCRIPT}</script></body></html>\n"
    )


@attrs.frozen(kw_only=True)
class _Study:
    """What every section needs."""

    record: StudyRecord
    table: Table
    styles: tuple[Style, ...]

    def label(self, row: int) -> str:
        return self.record.rows[row].label

    def name(self, row: int) -> str:
        """A row's label with its mark, as HTML."""
        # a long label may break after an equals sign or a dot, a number may not
        label = re.sub(r"(=|[.,/](?!\d))", r"\1<wbr>", escape(self.label(row)))
        return f'<span class="row">{charts.chip(self.styles[row])}<span>{label}</span></span>'

    def cells(self, row: int, task: str) -> tuple[CellRecord, ...]:
        return self.record.cells_of(row, task)

    @property
    def order(self) -> list[int]:
        """The rows with the base first."""
        base = self.record.base
        return [base, *(i for i in range(len(self.record.rows)) if i != base)]


def _styles(record: StudyRecord) -> tuple[Style, ...]:
    """A colour for each row, the same everywhere; dash and marker tell apart those that share one."""
    styles, others = [], 0
    for index in range(len(record.rows)):
        if index == record.base:
            styles.append(Style("base", "", 3))
        else:
            again = others // _HUES
            styles.append(Style(f"h{others % _HUES}", ("", "6 3", "2 3")[again % 3], again % 3))
            others += 1
    return tuple(styles)


def _by_task(study: _Study, section: Callable[[_Study, str], str]) -> str:
    """A section for each task, under the task's name where there are several."""
    parts = [(task.name, section(study, task.name)) for task in study.record.tasks]
    if len(parts) == 1:
        return parts[0][1]
    return "".join(f"<h3>{escape(name)}</h3>{html}" for name, html in parts if html)


# ---- head -----------------------------------------------------------------------------------------------------------


def _head(study: _Study) -> str:
    record = study.record
    note = f'<p class="note">{escape(record.note)}</p>' if record.note.strip() else ""
    facts = [(name, text) for name, text in _facts(record) if text]
    terms = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)
    return f"<header><h1>{escape(record.title)}</h1>{note}<dl>{terms}</dl>{_progress(study)}</header>"


def _facts(record: StudyRecord) -> Iterator[tuple[str, str]]:
    yield "Model", record.model
    targets = record.targets
    yield "Adapted layers", targets if isinstance(targets, str) else _value(targets) if targets else ""
    tasks = []
    for task in record.tasks:
        # That of the rows that were scored, once there are such.
        found = [c.result.majority for c in record.cells if c.task == task.name and c.result]
        scored = [value for value in found if value is not None]
        majority = statistics.fmean(scored) if scored else task.majority
        guess = "" if majority is None else f"best constant guess {majority:.3g}"
        inside = ", ".join(filter(None, (task.metric, guess)))
        tasks.append(f"{task.name} ({inside})" if inside else task.name)
    yield ("Tasks" if len(tasks) > 1 else "Task"), "; ".join(tasks)
    yield "Seeds", f"{', '.join(map(str, record.seeds))} ({len(record.seeds)})"
    steps = sorted({cell.result.steps for cell in record.cells if cell.result})
    planned = record.run.get("steps")
    yield "Steps", ", ".join(f"{n:,}" for n in steps) or (f"{planned:,}" if isinstance(planned, int) else "")
    others = [f"{key} {_value(value)}" for key, value in record.run.items() if value is not None and key != "steps"]
    yield "Settings", ", ".join(others)
    yield "Versions", ", ".join(_tally((c.config.get("versions") or {}) for c in record.cells))
    keys = ("device", "threads", "host", "python")
    yield "Machine", ", ".join(_tally({k: c.env[k] for k in keys if c.env.get(k) is not None} for c in record.cells))
    times = [attempt.time for cell in record.cells for attempt in cell.attempts if attempt.time]
    yield "Last activity", max(times, default="")[:19].replace("T", " ")


def _tally(tables: Iterable[Any]) -> Iterator[str]:
    """`name value`, for values that differ between cells with how many have which."""
    found: dict[str, Counter[str]] = {}
    for table in tables:
        for name, value in table.items() if isinstance(table, dict) else ():
            found.setdefault(str(name), Counter())[str(value)] += 1
    for name, counts in found.items():
        if len(counts) == 1:
            yield f"{name} {next(iter(counts))}"
        else:
            each = ", ".join(f"{value} ({n} cells)" for value, n in counts.most_common(4))
            yield f"{name} {each}" + (f" and {len(counts) - 4} more" if len(counts) > 4 else "")


_WORDS: dict[Status, str] = {
    "done": "done",
    "running": "running or interrupted",
    "failed": "failed",
    "missing": "not begun",
}


def _progress(study: _Study) -> str:
    record = study.record
    counts = record.counts
    total = len(record.cells)
    told = [f"{counts['done']} of {total} cells done"]
    told += [f"{n} {_WORDS[status]}" for status, n in counts.items() if n and status != "done"]
    bar = charts.stacked([(f"s-{status}", f"{n} {_WORDS[status]}", n) for status, n in counts.items() if n])
    html = f'<div class="progress">{bar}<p>{", ".join(told)}.</p></div>'
    html += _other_code(study)
    if counts["done"] == total:
        return html
    lines = []
    for row in range(len(record.rows)):
        for task in record.tasks:
            open_cells = [cell for cell in study.cells(row, task.name) if cell.status != "done"]
            if open_cells:
                where = f" on {escape(task.name)}" if len(record.tasks) > 1 else ""
                seeds = "; ".join(_open(open_cells))
                lines.append(f"<li>{study.name(row)}{where}: {escape(seeds)}</li>")
    unfinished = counts["running"] + counts["missing"]
    head = "What is missing" if unfinished else "What failed"
    return f'{html}<details class="missing" open><summary>{head}</summary><ul>{"".join(lines)}</ul></details>'


def _other_code(study: _Study) -> str:
    """Cells whose results are of other code than the rest."""
    old = [cell for cell in study.record.cells if cell.old and cell.status == "done"]
    if not old:
        return ""
    lines = []
    for row in range(len(study.record.rows)):
        mine = [cell for cell in old if cell.row == row]
        if mine:
            which = ", ".join(
                f"{cell.task} {cell.seed}" if len(study.record.tasks) > 1 else str(cell.seed) for cell in mine
            )
            lines.append(f"<li>{study.name(row)}: {'seed' if len(mine) == 1 else 'seeds'} {escape(which)}</li>")
    count = f"{len(old)} cell is" if len(old) == 1 else f"{len(old)} cells are"
    told = (
        f"{count} of other code: the sources of lrkit or of a plug-in have changed since. The same command computes them "
        "again."
    )
    return f'<p class="warn">{told}</p><details class="missing"><summary>Which</summary><ul>{"".join(lines)}</ul></details>'


def _open(cells: Sequence[CellRecord]) -> Iterator[str]:
    """Seeds of cells that are not done, by status."""
    for status in ("running", "failed", "missing"):
        chosen = [cell for cell in cells if cell.status == status]
        if chosen:
            seeds = ", ".join(f"{c.seed} (at step {c.steps})" if status == "running" else str(c.seed) for c in chosen)
            yield f"{'seed' if len(chosen) == 1 else 'seeds'} {seeds} {_WORDS[status]}"


# ---- the table ------------------------------------------------------------------------------------------------------

_TIPS = {
    "lr": "learning rate of the adapters",
    "n": "finite scores, of the cells asked for",
    "score": "mean ± standard deviation over seeds",
    "difference": "mean of row minus base over pairs of the same task and seed",
    "interval": "95 % interval of the mean difference: what the permutation test does not reject",
    "p": "two-sided sign-flip permutation test",
    "p_holm": "corrected over the rows of this table (Holm)",
    "parameters_average": "trainable adapter parameters, averaged over the run",
    "parameters_final": "trainable adapter parameters at the end of the run",
    "flops": "floating-point operations counted over the whole run",
    "step_ratio": "time of a step over the base's, at the start of training",
    "step_ratio_end": "the same at the end of training",
    "peak_memory": "peak memory of a step",
}
_HEADERS = {
    "difference": "Δ",
    "interval": "95 % interval",
    "p": "<i>p</i>",
    "n": "<i>n</i>",
    "p_holm": "<i>p</i> Holm",
    "parameters_average": "params<br>average",
    "parameters_final": "params<br>end",
    "step_ratio": "step time<br>start",
    "step_ratio_end": "step time<br>end",
    "peak_memory": "peak<br>memory",
}


def _results(study: _Study) -> str:
    table = study.table
    html = "".join(f'<p class="warn">{escape(note)}</p>' for note in table.limits)
    html += _by_task(study, lambda study, task: _main_table(study, table.of(task)))
    columns = columns_of_tasks(table)
    if len(columns) > 1:
        head = "".join(f"<th>{escape(column.header)}</th>" for column in columns[1:])
        lines = "".join(
            f'<tr><th scope="row">{study.name(row.index)}</th>'
            + "".join(f"<td>{escape(minus(column.text(row)) or '–')}</td>" for column in columns[1:])
            + "</tr>"
            for row in table.of(table.tasks[0]).rows
        )
        means = f"<table><thead><tr><th>row</th>{head}</tr></thead><tbody>{lines}</tbody></table>"
        html += f"<h3>Means by task</h3>{_scroll(means)}"
    html += f'<p class="caption">{" ".join(_what_columns_mean(table))}</p>'
    rest = [note for note in table.all_notes() if note not in table.limits]
    if rest:
        html += f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in rest)}</ul>'
    return html


def _what_columns_mean(table: Table) -> Iterator[str]:
    """Sentences about the columns that there are."""
    shown = {column.key for column in columns_of(table, SCORES + COSTS)}
    scores = " or ".join(dict.fromkeys(table.scores))
    yield f"Score on the validation rows: {escape(scores)}, ± standard deviation over seeds."
    if "difference" in shown:
        yield (
            f"Δ: mean difference to {escape(table.base)} over pairs of the same seed. <i>p</i>: two-sided sign-flip "
            "permutation test on those pairs; its 95 % interval is all that this test does not reject; Holm: <i>p</i> "
            "corrected over the rows of one table."
        )
    heads = [row.head for row in table.rows if row.head]
    if "parameters_average" in shown:
        head = f" (the task head's {max(heads):,.0f} are left out)" if heads else ""
        flops = "; FLOPs: counted over a whole run" if "flops" in shown else ""
        yield f"Params: trainable parameters of the adapters{head}{flops}."
    if "step_ratio" in shown:
        yield "Step time: over the base's, timed interleaved in one process."


def _main_table(study: _Study, table: Table) -> str:
    columns = columns_of(table, SCORES + COSTS)[1:]
    ends = [v for row in table.rows for v in (row.low, row.high, row.difference) if v is not None]
    bounds = (min([*ends, 0.0]), max([*ends, 0.0])) if ends else None
    heads = ['<th data-sort="text">row</th>']
    for column in columns:
        name = _HEADERS.get(column.key, escape(column.header))
        tip = escape(_TIPS[column.key])
        heads.append(f'<th data-sort="number" title="{tip}">{name}</th>')
        if column.key == "interval" and bounds:
            heads.append("<th></th>")
    lines = []
    for row in table.rows:
        cells = [f'<th scope="row" data-v="{row.index}">{study.name(row.index)}</th>']
        for column in columns:
            text = minus(column.text(row))
            value = _sort_value(row, column.key)
            empty = "base" if row.is_base and column.key == "difference" else "–"
            strong = column.key == "p_holm" and row.p_holm is not None and row.p_holm < 0.05
            shown = f"<b>{escape(text)}</b>" if strong else escape(text) or empty
            cells.append(f'<td data-v="{value}"{"" if text else " class=none"}>{shown}</td>')
            if column.key == "interval" and bounds:
                cells.append(f'<td class="forest">{_forest(row, bounds, study.styles[row.index])}</td>')
        lines.append(f"<tr{' class=is-base' if row.is_base else ''}>{''.join(cells)}</tr>")
    return _scroll(
        f'<table class="main"><thead><tr>{"".join(heads)}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )


def _forest(row: TableRow, bounds: tuple[float, float], style: Style) -> str:
    if row.difference is None:
        return ""
    return charts.interval(row.low, row.difference, row.high, bounds=bounds, style=style)


def _sort_value(row: TableRow, key: str) -> str:
    if key == "lr":
        return row.lr.partition(" ")[0]
    value = getattr(row, {"score": "mean", "interval": "low"}.get(key, key))
    return "" if value is None else f"{value:.12g}"


def _changes(study: _Study) -> str:
    record = study.record
    lines = []
    for index, row in enumerate(record.rows):
        if index == record.base:
            continue
        changes = [
            f"<tr><td><code>{escape(c.path)}</code></td><td><code>{escape(_value(c.base))}</code></td>"
            f"<td>→</td><td><code>{escape(_value(c.value))}</code></td></tr>"
            for c in row.changes
        ]
        said = f"<table>{''.join(changes)}</table>" if changes else "<p>nothing: the same method as the base</p>"
        lines.append(f"<dt>{study.name(index)}</dt><dd>{_scroll(said)}</dd>")
    name = study.name(record.base)
    parts = "".join(
        f"<tr><td>{escape(kind)}</td><td><code>{escape(_value(part))}</code></td></tr>"
        for kind, part in record.rows[record.base].method.items()
        if part not in (None, [])
    )
    table = _scroll(f"<table>{parts}</table>")
    whole = f'<details class="whole"><summary>The base, {name}, in full</summary>{table}</details>'
    base = f'<p class="caption">Against the base, {name}.</p>'
    return f'{base}<dl class="changes">{"".join(lines)}</dl>{whole if parts else ""}' if lines else ""


def _value(value: Any) -> str:
    """A setting in a few characters: a component by its name with its settings."""
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    if isinstance(value, dict):
        name = value.get("name", "")
        settings = ", ".join(f"{key}={_value(v)}" for key, v in value.items() if key != "name")
        return f"{name}({settings})" if settings else str(name)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


# ---- charts ---------------------------------------------------------------------------------------------------------


def _pareto(study: _Study, task: str) -> str:
    table = study.table.of(task)
    rows = [(r, r.parameters_average, r.mean) for r in table.rows]
    known = [(row, x, y) for row, x, y in rows if x is not None and y is not None]
    if not known:
        return ""
    front = {
        row.index: (x, y) for row, x, y in known if not any(a <= x and b >= y and (a < x or b > y) for _, a, b in known)
    }
    places = decimals(table)
    points = [
        charts.Point(
            label=row.label,
            style=study.styles[row.index],
            x=x,
            y=y,
            error=row.sd,
            front=row.index in front,
            title=f"{row.label}: {y:.{places}f} ± {row.sd or 0.0:.{places}f} with {x:,.0f} parameters, n = {row.n}",
        )
        for row, x, y in known
    ]
    xs = [x for _, x, _ in known]
    log = min(xs) > 0 and max(xs) / min(xs) > 8
    label = "trainable adapter parameters, averaged over the run" + (", logarithmic" if log else "")

    def draw(width: int, height: int, label: str) -> str:
        return charts.scatter(
            points,
            width=width,
            height=height,
            x_label=label,
            y_label=table.scores[0],
            x_show=lambda value: compact(value, 2),
            x_log=log,
            front=sorted(front.values()),
        )

    narrow = "average trainable parameters" + (", log" if log else "")
    return _figure(
        draw(780, 400, label),
        draw(350, 320, narrow),
        [study.name(row.index) for row, _, _ in known],
        "Mean over seeds; bars: ± one standard deviation. Full marks lie on the Pareto front, drawn as stairs: no other "
        "row has at most as many parameters and at least as good a score.",
    )


def _budget(study: _Study, task: str) -> str:
    panels = []
    for row in range(len(study.record.rows)):
        cells = study.cells(row, task)
        for policy in sorted({d.policy for cell in cells for d in cell.decisions}):
            runs = [[d for d in cell.decisions if d.policy == policy] for cell in cells]
            runs = [run for run in runs if run]
            units = max(d.units for run in runs for d in run)
            end = max([cell.steps for cell in cells] + [run[-1].step for run in runs])
            curves = []
            for label, amount, style, width in (
                ("planned", "budget", Style("planned"), 5.0),
                ("kept", "kept", attrs.evolve(study.styles[row], dash=""), 1.75),
            ):
                x, mean, low, high = _over_seeds(
                    [[(0, run[0].before), *((d.step, getattr(d, amount)) for d in run)] for run in runs]
                )
                if x[-1] < end:
                    x, mean, low, high = [*x, end], [*mean, mean[-1]], [*low, low[-1]], [*high, high[-1]]
                curves.append(
                    charts.Curve(label=label, style=style, x=x, y=mean, low=low, high=high, width=width, step=True)
                )
            svg = charts.lines(
                curves, x_label="step", x_range=(0, end), y_range=(0, units * 1.06), show="{:,.1f}".format
            )
            which = "" if policy == 0 else f", policy {policy}"
            left = f"{curves[1].y[-1]:,.4g} of {units:,.0f} units left"
            panels.append(_panel(study.name(row) + which, svg, left))
    caption = (
        "Units kept after each decision, mean over seeds (shaded: lowest to highest). Thick and grey: what the "
        "scheduler planned."
    )
    return _panels(panels, caption)


def _over_seeds(
    runs: Sequence[Sequence[tuple[int, float]]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Step, mean, lowest and highest over the runs that have a finite value at the step; thinned."""
    at: dict[int, list[float]] = {}
    for run in runs:
        for step, value in run:
            at.setdefault(step, [])
            if math.isfinite(value):
                at[step].append(value)
    steps = sorted(at)
    steps = [steps[i] for i in charts.thin(len(steps), _POINTS)]
    of = [at[step] for step in steps]
    return (
        [float(step) for step in steps],
        [statistics.fmean(values) if values else math.nan for values in of],
        [min(values, default=math.nan) for values in of],
        [max(values, default=math.nan) for values in of],
    )


def _ranks(study: _Study, task: str) -> str:
    tables: dict[int, dict[str, list[int]]] = {}
    initial: dict[int, int] = {}
    same: list[str] = []
    for row in range(len(study.record.rows)):
        layers = [layer for cell in study.cells(row, task) if cell.result for layer in cell.result.layers]
        ranked = [layer for layer in layers if layer.rank is not None]
        if not ranked:
            continue
        if all(layer.rank == layer.initial_rank for layer in ranked):
            ranks = sorted({layer.rank for layer in ranked if layer.rank is not None})
            shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            same.append(f"{study.name(row)} keeps rank {shown} in every layer.")
            continue
        initial[row] = max(max(layer.initial_rank or 0, layer.rank or 0) for layer in ranked)
        for layer in ranked:
            tables.setdefault(row, {}).setdefault(layer.name, []).append(layer.rank or 0)
    top = max(initial.values(), default=0)
    panels = []
    for row, table in tables.items():
        cells = {}
        for name, ranks in table.items():
            mean = statistics.fmean(ranks)
            each = ", ".join(map(str, ranks))
            cells[name] = (mean, _short_number(mean), f"{name}: {mean:.2f} on average ({each})")
        mean = statistics.fmean(value for value, _, _ in cells.values())
        panels.append(_panel(study.name(row), _grid(cells, top=top), f"mean {mean:.2f} of {initial[row]}"))
    fixed = f'<p class="caption">{" ".join(same)}</p>' if same else ""
    return _panels(panels, "Components kept at the end, mean over seeds, by transformer block and module.") + fixed


def _freezing(study: _Study, task: str) -> str:
    panels = []
    last = max((cell.steps for cell in study.record.cells), default=0)
    for row in range(len(study.record.rows)):
        done = [cell for cell in study.cells(row, task) if cell.result]
        steps: dict[str, dict[str, list[int]]] = {}  # matrix -> layer -> steps
        for cell in done:
            assert cell.result is not None
            when: dict[str, int] = {}
            for decision in cell.decisions:
                for name in decision.lost:
                    when.setdefault(name, decision.step)
            for layer in cell.result.layers:
                for matrix in layer.frozen:
                    # matrices that freeze together stand in the history by their layer's name
                    step = when.get(f"{layer.name}.{matrix}", when.get(layer.name))
                    if step is not None:
                        steps.setdefault(matrix, {}).setdefault(layer.name, []).append(step)
        adapted = [layer.name for cell in done[:1] if cell.result for layer in cell.result.layers]
        for matrix in sorted(steps):
            cells = {}
            touched = {grid_of([name])[name][0] for name in steps[matrix]}
            for name in adapted:
                if grid_of([name])[name][0] not in touched:
                    continue  # a module of which this matrix never freezes does not train it
                froze = steps[matrix].get(name, [])
                mean = statistics.fmean(froze) if froze else math.nan
                text = f"{mean:.0f}" if froze else "–"
                told = f"froze at step {mean:.1f} on average" if froze else "never froze"
                cells[name] = (mean, text, f"{name}.{matrix}: {told} ({len(froze)} of {len(done)} seeds)")
            svg = _grid(cells, top=last, css="heat warm")
            panels.append(_panel(f"{study.name(row)}, <b>{escape(matrix)}</b>", svg, ""))
    return _panels(panels, f"Step of {last:,} after which each matrix was frozen, mean over the seeds in which it was.")


def _grid(cells: dict[str, tuple[float, str, str]], *, top: float, css: str = "heat") -> str:
    places = grid_of(list(cells))
    modules = list(dict.fromkeys(module for module, _ in places.values()))
    blocks = sorted({block for _, block in places.values()})
    values = {(places[name][0], str(places[name][1])): value for name, value in cells.items()}
    return charts.heat_map(
        values,
        list(zip(modules, _short_names(modules), strict=True)),
        [str(block) for block in blocks],
        top=top,
        css=css,
        x_label="transformer block" if len(blocks) > 1 else "",
    )


def _short_names(modules: Sequence[str]) -> list[str]:
    """Each module's last part, or all but the last, or all: the first of these that tells them apart."""
    ways: list[Callable[[str], str]] = [
        lambda m: m.rpartition(".")[2],
        lambda m: m.rpartition(".")[0] or m,
        lambda m: m,
    ]
    names = [[way(module) for way in ways] for module in modules]
    every = Counter(name for options in names for name in set(options))
    return [next((option for option in options if every[option] == 1), options[-1]) for options in names]


def _short_number(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 or abs(value - round(value)) < 0.05 else f"{value:.1f}"


def _curves(study: _Study, task: str) -> str:
    record = study.record
    steps = max((cell.steps for row in study.order for cell in study.cells(row, task)), default=0)
    window = max(1, steps // 25) | 1
    losses: dict[int, charts.Curve] = {}
    scores: dict[int, charts.Curve] = {}
    for row in study.order:
        cells = study.cells(row, task)
        runs, crosses = [], []
        for cell in cells:
            smoothed = charts.smooth([loss for _, loss in cell.losses], window)
            runs.append([(step, value) for (step, _), value in zip(cell.losses, smoothed, strict=True)])
            crosses += list(_diverging(cell, smoothed))
        if any(runs):
            losses[row] = _curve(study, row, runs, crosses)
        evaluated = [[(step, next(iter(s.values()), math.nan)) for step, s in cell.evaluations] for cell in cells]
        if len({step for run in evaluated for step, _ in run}) > 1:
            scores[row] = _curve(study, row, evaluated, [], marks=True)
    metric = next((t.metric for t in record.tasks if t.name == task), "") or "score"
    over = f"running mean over {window} steps, " if window > 1 else ""
    html = _curve_figure(
        study,
        losses,
        "training loss",
        f"Training loss of the task, without any penalty, {over}mean over seeds; shaded: lowest to highest seed. "
        "A cross marks where a run diverged.",
    )
    return html + _curve_figure(
        study, scores, metric, f"Validation {metric} on the way, mean over seeds; shaded: lowest to highest seed."
    )


def _curve(
    study: _Study,
    row: int,
    runs: Sequence[Sequence[tuple[int, float]]],
    crosses: Sequence[tuple[float, float, str]],
    marks: bool = False,
) -> charts.Curve:
    x, mean, low, high = _over_seeds(runs)
    several = sum(1 for run in runs if run) > 1
    return charts.Curve(
        label=study.label(row),
        style=study.styles[row],
        x=x,
        y=mean,
        low=low if several else (),
        high=high if several else (),
        crosses=crosses,
        marks=marks,
    )


def _diverging(cell: CellRecord, smoothed: Sequence[float]) -> Iterator[tuple[float, float, str]]:
    """Where a run's loss stopped being a number."""
    steps = [step for step, _ in cell.losses]
    for i in range(1, len(steps)):
        if math.isfinite(smoothed[i - 1]) and not math.isfinite(smoothed[i]):
            yield float(steps[i - 1]), smoothed[i - 1], f"seed {cell.seed} diverged at step {steps[i]}"
            return


def _curve_figure(study: _Study, curves: dict[int, charts.Curve], label: str, caption: str) -> str:
    """All rows in one chart where they are few; else one panel for each, with the base behind it."""
    if not curves:
        return ""
    if len(curves) <= _FEW:
        ordered = list(reversed(curves.values()))  # the base on top
        wide = charts.lines(ordered, width=780, height=340, x_label="step", y_label=label, names=True)
        narrow = charts.lines(ordered, width=350, height=280, x_label="step", y_label=label)
        return _figure(wide, narrow, [study.name(row) for row in curves], caption, named=True)
    ends = [v for c in curves.values() for v in (*c.y, *c.low, *c.high) if math.isfinite(v)]
    if not ends:
        return ""
    air = (max(ends) - min(ends)) * 0.05 or 0.05
    span = (min(ends) - air, max(ends) + air)
    steps = [x for curve in curves.values() for x in curve.x]
    base = curves.get(study.record.base)
    panels = []
    for row, curve in curves.items():
        behind = [attrs.evolve(base, marks=False, width=1.25)] if base is not None and curve is not base else []
        x_range = (min(steps), max(steps)) if max(steps) > min(steps) else None
        svg = charts.lines([*behind, curve], x_label="step", y_label=label, y_range=span, x_range=x_range)
        panels.append(_panel(study.name(row), svg, ""))
    return _panels(panels, f"{caption} The base, thinner, is in each panel.")


def _cost(study: _Study, task: str) -> str:
    rows = study.table.of(task).rows

    def bars(key: str, show: Callable[[float], str], second: str = "", reference: float | None = None) -> str:
        items = []
        for row in rows:
            value, other = getattr(row, key), getattr(row, second) if second else None
            items.append(
                charts.Bar(
                    label=row.label,
                    style=study.styles[row.index],
                    value=math.nan if value is None else value,
                    text="not measured" if value is None else show(value),
                    second=other,
                    second_text="" if other is None else show(other),
                    title=f"{row.label}: {'not measured' if value is None else show(value)}"
                    + ("" if other is None else f" at the start, {show(other)} at the end"),
                )
            )
        return charts.bars(items, reference=reference)

    panels = [
        _panel(
            "Step time, over the base's", bars("step_ratio", "{:.2f}".format, "step_ratio_end", 1.0), "thin: at the end"
        ),
        _panel("FLOPs of a run", bars("flops", compact), ""),
        _panel("Peak memory of a step", bars("peak_memory", memory), ""),
    ]
    costs = [cost for (_, name), cost in study.record.costs.items() if name == task]
    measured = {f"{cost.device or 'unknown device'}" for cost in costs if not cost.error}
    threads = {cost.threads for cost in costs if cost.threads}
    where = ", ".join([*sorted(measured), *(f"{n} threads" if n > 1 else "1 thread" for n in sorted(threads))])
    return _panels(panels, f"Times and memory were measured on {escape(where)}; FLOPs are counted." if where else "")


# ---- cells ----------------------------------------------------------------------------------------------------------


def _failures(study: _Study) -> str:
    parts = []
    for cell in study.record.cells:
        if cell.status != "failed":
            continue
        text = cell.error or "no traceback was kept"
        lead = f"… the last {_TRACEBACK:,} of {len(text):,} characters\n" if len(text) > _TRACEBACK else ""
        parts.append(
            f"<details><summary>{study.name(cell.row)}, {escape(cell.task)}, seed {cell.seed}: "
            f"<code>{escape(cut(cell.error_line or text))}</code></summary>"
            f"<pre>{escape(lead + text[-_TRACEBACK:])}</pre>{_link(cell, 'its folder')}</details>"
        )
    return "".join(parts)


def _cells(study: _Study) -> str:
    record = study.record
    seeds = list(dict.fromkeys(cell.seed for cell in record.cells))
    several = len(record.tasks) > 1
    places = decimals(study.table)
    lines = []
    for row in range(len(record.rows)):
        for task in record.tasks:
            cells = {cell.seed: cell for cell in study.cells(row, task.name)}
            entries = []
            for seed in seeds:
                cell = cells.get(seed)
                if cell is None:
                    entries.append('<td class="none"></td>')
                    continue
                score = cell.score
                text = f"at step {cell.steps}" if cell.status == "running" else _WORDS[cell.status]
                if score is not None:
                    text = minus(f"{score:.{places}f}") if math.isfinite(score) else "diverged"
                shown = escape(text) if cell.status == "missing" else _link(cell, text)
                entries.append(f'<td class="s-{cell.status}">{shown}</td>')
            name = f"<td>{escape(task.name)}</td>" if several else ""
            lines.append(f'<tr><th scope="row">{study.name(row)}</th>{name}{"".join(entries)}</tr>')
    heads = "".join(f"<th>seed {seed}</th>" for seed in seeds)
    first = "<th>row</th><th class=task>task</th>" if several else "<th>row</th>"
    table = f'<table class="cells"><thead><tr>{first}{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    files = ", ".join(f'<a href="{name}">{name}</a>' for name in ("table.csv", "table.md", "table.tex", "cells.csv"))
    return (
        f'{_scroll(table)}<p class="caption">The score of each cell, with a link to its folder. '
        f"The tables as files: {files}.</p>"
    )


def _link(cell: CellRecord, text: str) -> str:
    return f'<a href="cells/{quote(cell.key)}/">{escape(text)}</a>'


# ---- parts ----------------------------------------------------------------------------------------------------------


def _scroll(html: str) -> str:
    return f'<div class="scroll" tabindex="0">{html}</div>'


def _figure(wide: str, narrow: str, key: Sequence[str], caption: str, *, named: bool = False) -> str:
    """A chart in two widths, its caption beside it where there is room; its key, too, unless the wide one names all."""
    items = "".join(f"<li>{name}</li>" for name in key)
    return (
        f'<figure class="side"><div><div class="scroll wide">{wide}</div><div class="scroll narrow">{narrow}</div></div>'
        f'<div><ul class="key{" narrow" if named else ""}">{items}</ul><figcaption>{caption}</figcaption></div></figure>'
    )


def _panel(title: str, svg: str, aside: str) -> str:
    if not svg:
        return ""
    aside = f'<span class="aside">{escape(aside)}</span>' if aside else ""
    return f'<div class="panel"><h4><span>{title}</span>{aside}</h4><div class="scroll">{svg}</div></div>'


def _panels(panels: Sequence[str], caption: str) -> str:
    """Small charts side by side, as many as fit without being cut."""
    widths = [int(width) for panel in panels for width in re.findall(r'<svg width="(\d+)" height="\d+" viewBox', panel)]
    if not any(panels):
        return ""
    grid = f'<div class="panels" style="--w:{max(widths, default=340)}px">{"".join(panels)}</div>'
    return f"<figure>{grid}<figcaption>{caption}</figcaption></figure>"


def _replace(path: Path, text: str) -> Path:
    """Write a file so that whoever reads it finds the old one or the new one, whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # a lone surrogate can come out of JSON, and has no bytes
        draft.write_bytes(text.encode("utf-8", "replace"))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


_SCRIPT = """
for (const head of document.querySelectorAll("table.main th[data-sort]")) {
  head.tabIndex = 0;
  head.setAttribute("role", "button");
  const sort = () => {
    const body = head.closest("table").tBodies[0], at = head.cellIndex;
    const up = head.getAttribute("aria-sort") === "descending";
    const value = (row) => row.cells[at].dataset.v === "" ? NaN : Number(row.cells[at].dataset.v);
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
      return up ? x - y : y - x;
    });
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
  });
}
"""

# Hues are told apart with normal sight and with the three kinds of colour blindness, on either paper: two of them
# are at least 20 apart (CIE76), and 3:1 or more against the paper.
_STYLE = """
:root{--paper:#fff;--ink:#1f1e1b;--soft:#5e5c56;--rule:#dddad2;--grid:#edebe5;--faint:#f6f5f1;--link:#1a5fa3;
--base:#57564f;--h0:#034777;--h1:#b8623d;--h2:#24a87e;--h3:#e84fb8;--h4:#7a22e6;--h5:#9f9004;--h6:#811e0e;
--heat:#0f5a96;--warm:#a84708;--in:#fff;--bad:#a3261a;--planned:#d2cfc5}
@media screen and (prefers-color-scheme:dark){:root{--paper:#16171a;--ink:#e6e4dd;--soft:#a5a39b;--rule:#3a3b3f;
--grid:#292a2e;--faint:#1e1f23;--link:#8ab8f0;--base:#e0ddd3;--h0:#86adfa;--h1:#e2571a;--h2:#20c98d;--h3:#ec3fb8;
--h4:#9650f0;--h5:#e6c540;--h6:#c76657;--heat:#5b93cf;--warm:#cf8443;--in:#101114;--bad:#ff9385;--planned:#4c4d52}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Liberation Sans",Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:40px 16px 64px}
h1,h2,h3,h4,p,dd,li,summary,figcaption{overflow-wrap:anywhere}
h1{font-size:28px;line-height:1.2;font-weight:650;letter-spacing:-.01em;margin:0 0 8px;text-wrap:balance}
h2{font-size:19px;line-height:1.3;font-weight:650;margin:0 0 12px}
h3{font-size:16px;font-weight:600;margin:24px 0 8px}
h4{font-size:14px;font-weight:500;margin:0 0 4px;display:flex;gap:4px 12px;justify-content:space-between;flex-wrap:wrap}
section{margin-top:40px;padding-top:20px;border-top:1px solid var(--rule)}
p{margin:0 0 10px;max-width:74ch}
a{color:var(--link);text-decoration-thickness:1px;text-underline-offset:2px}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:13px}
pre{margin:8px 0;padding:10px 12px;background:var(--faint);overflow-x:auto;line-height:1.45}
.note{white-space:pre-line;color:var(--soft)}
.caption,figcaption,.notes{font-size:14px;line-height:1.5;color:var(--soft);max-width:92ch}
figcaption{margin-top:8px}
.scroll+.caption{margin-top:10px}
.missing .row,.caption .row,summary .row{display:inline}
.missing .chip,.caption .chip,summary .chip{display:inline-block;margin-right:6px}
.side figcaption{margin:0}
.warn{font-size:14px;padding-left:12px;border-left:3px solid var(--bad)}
.notes{margin:8px 0 0;padding-left:18px}
.aside{color:var(--soft);font-weight:400;font-variant-numeric:tabular-nums}
header dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(250px,100%),1fr));gap:10px 28px;margin:20px 0;
font-size:14px;line-height:1.45}
dt{color:var(--soft)}
dd{margin:0}
.progress{display:flex;flex-wrap:wrap;align-items:center;gap:4px 14px;font-size:14px}
.progress p{margin:0}
.progress svg{border-radius:4px}
details{margin:8px 0;font-size:14px}
summary{cursor:pointer}
.missing ul{margin:6px 0;padding-left:18px}
.scroll{overflow-x:auto;max-width:100%;
background:linear-gradient(90deg,var(--paper) 50%,transparent) 0/36px 100% no-repeat local,
linear-gradient(270deg,var(--paper) 50%,transparent) 100%/36px 100% no-repeat local,
linear-gradient(90deg,var(--rule),transparent) 0/14px 100% no-repeat scroll,
linear-gradient(270deg,var(--rule),transparent) 100%/14px 100% no-repeat scroll}
figure{margin:16px 0 0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(var(--w),100%),1fr));gap:24px 24px}
.panel{min-width:0}
.row{white-space:normal;display:inline-flex;gap:7px;align-items:baseline}
.chip{flex:none;position:relative;top:1px}
.side{display:grid;grid-template-columns:minmax(0,780px) minmax(0,1fr);gap:12px 36px;align-items:start}
.side .key{flex-direction:column;margin:20px 0 16px}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;margin:8px 0 0;padding:0;font-size:13px}
table{border-collapse:collapse;font-size:13px;line-height:1.35;font-variant-numeric:tabular-nums lining-nums}
th,td{padding:5px 6px;text-align:right;white-space:nowrap;font-weight:400;vertical-align:middle}
thead th{color:var(--soft);font-size:12px;vertical-align:bottom;border-bottom:1px solid var(--ink)}
th:first-child,.changes td,.whole td,.cells td:nth-child(2):not([class]),.cells .task{text-align:left}
tbody th:first-child{min-width:150px;max-width:260px;white-space:normal;padding-left:0}
thead th:first-child{padding-left:0}
tbody tr+tr>*{border-top:1px solid var(--grid)}
table.main,table.cells{border-bottom:1px solid var(--ink)}
table.main{width:100%}
.is-base>*{background:var(--faint)}
.none,.s-missing{color:var(--soft)}
.forest{padding:0 4px}
th[aria-sort=descending]::after{content:" ↓"}
th[aria-sort=ascending]::after{content:" ↑"}
th[role=button]{cursor:pointer}
th[role=button]:hover{color:var(--ink)}
.changes{display:grid;grid-template-columns:fit-content(320px) minmax(0,1fr);gap:8px 24px;margin:0;font-size:14px;
align-items:baseline}
.changes dt{color:var(--ink)}
.changes td,.whole td{padding:1px 14px 1px 0;border:0}
.changes td:nth-child(2){color:var(--soft)}
svg{display:block;font-family:inherit}
.chip{display:inline-block}
svg text{font-size:12px;fill:var(--ink);font-variant-numeric:tabular-nums}
svg .tick{font-size:11px;fill:var(--soft)}
svg .over{paint-order:stroke;stroke:var(--paper);stroke-width:3px}
svg .soft{fill:var(--soft)}
svg .mid{text-anchor:middle}
svg .end{text-anchor:end}
svg .name{fill:currentColor;paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
.base{color:var(--base)}.h0{color:var(--h0)}.h1{color:var(--h1)}.h2{color:var(--h2)}.h3{color:var(--h3)}
.h4{color:var(--h4)}.h5{color:var(--h5)}.h6{color:var(--h6)}.planned{color:var(--planned)}
.grid{stroke:var(--grid)}
.axis{stroke:var(--soft)}
.reference{stroke:var(--soft);stroke-dasharray:2 2}
.line{fill:none;stroke:currentColor;stroke-linejoin:round}
.chip .line{stroke-width:1.75}
.band{fill:currentColor;fill-opacity:.13}
.hover{fill:transparent}
.hover:hover{fill:currentColor;fill-opacity:.5}
.dot,.full{fill:currentColor;stroke:currentColor;stroke-width:1.5}
.hollow{fill:var(--paper);stroke:currentColor;stroke-width:1.75}
.error{fill:none;stroke:currentColor;stroke-width:1.25}
.cross{fill:none;stroke:currentColor;stroke-width:2}
.front{fill:none;stroke:var(--soft);stroke-dasharray:5 4}
.bar{fill:currentColor;fill-opacity:.85}
.second{fill-opacity:.45}
.heat{color:var(--heat)}.heat.warm{color:var(--warm)}
.cell{fill:currentColor;stroke:var(--rule)}
.cell.none{stroke-dasharray:2 2}
svg .on{fill:var(--ink)}
svg .in{fill:var(--in)}
rect.s-done{fill:var(--heat)}rect.s-running{fill:var(--warm)}rect.s-failed{fill:var(--bad)}rect.s-missing{fill:var(--rule)}
td.s-failed a{color:var(--bad)}
.narrow{display:none}
@media screen and (max-width:1140px){.side{display:block}.side .key{flex-direction:row;margin:8px 0}}
@media screen and (max-width:840px){.wide{display:none}div.narrow{display:block}ul.narrow{display:flex}
main{padding:24px 12px 48px}h1{font-size:24px}
header dl{grid-template-columns:repeat(auto-fill,minmax(min(160px,100%),1fr))}
.changes{grid-template-columns:minmax(0,1fr);gap:2px}.changes dd{margin-bottom:10px}
table.main tbody th:first-child,table.main thead th:first-child{position:sticky;left:0;background:var(--paper);z-index:1;
min-width:120px;max-width:150px}.is-base th:first-child{background:var(--faint)!important}}
@media print{@page{size:A4 landscape;margin:12mm}main{max-width:none;padding:0}section{margin-top:20px;padding-top:12px}
.side{display:block}.side .key{flex-direction:row;margin:8px 0}figure{break-inside:avoid}
.scroll{overflow:visible}.panel,figure>.scroll,tr{break-inside:avoid}h2,h3,h4{break-after:avoid}table{font-size:11px}
th,td{padding:3px 5px}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
details::details-content{content-visibility:visible;block-size:auto}}
"""
_STYLE = re.sub(r"\n\s*", "\n", _STYLE)
