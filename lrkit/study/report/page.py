"""The report as one HTML page, of the templates, the CSS and the script that stand beside this file."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import attrs
from markupsafe import Markup

from lrkit.study.charts import DARK, LIGHT, chip, drawing, styles
from lrkit.study.charts.palette import in_css
from lrkit.study.report import answers, cells, claims, effects, figures, head, layers, results, rows, truth, tuning
from lrkit.study.report.view import View, breakable
from lrkit.study.results import StudyRecord
from lrkit.study.setting_texts import setting
from lrkit.study.table import Table

if TYPE_CHECKING:
    from jinja2 import Template


@attrs.frozen
class Section:
    """One section of the page: its anchor, its title, its template, and its data by task (the task's name, or none)."""

    key: str
    title: str
    template: str
    parts: Sequence[tuple[str, Any]]


def page(record: StudyRecord, table: Table) -> str:
    """Return the report as HTML.

    Args:
        record: the study.
        table: of its comparisons, as `lrkit.study.statistics.compare` gives it.
    """
    with drawing():
        chosen = styles(len(record.rows), record.base)
        view = View(record=record, table=table, styles=chosen, chips=tuple(chip(style) for style in chosen))
        sections = [section for section in _sections(view) if section.parts]
        css, script = _file("style.css"), _file("script.js")
        return _template().render(
            title=record.title,
            policy=_policy(script),
            style=Markup(_colours() + css),
            script=Markup(script),
            head=head.Head.of(view),
            sections=sections,
            name=view.name,
        )


def _sections(view: View) -> list[Section]:
    def once(data: Any) -> list[tuple[str, Any]]:
        return [("", data)] if data else []

    pictures = [
        ("pareto", "Score against trainable parameters", figures.pareto),
        ("budget", "Budget", figures.budget),
        ("ranks", "Ranks at the end", layers.ranks),
        ("freezing", "When matrices froze", layers.freezing),
        ("switching", "How long each layer trained", layers.switching),
        ("curves", "Learning curves", figures.curves),
        ("cost", "Cost", figures.cost),
    ]
    return [
        Section("results", "Results", "results.html", once(results.Results.of(view))),
        Section(
            "effects",
            "Effect sizes" + (" and equivalence" if view.table.margin else ""),
            "effects.html",
            once(effects.Effects.of(view)),
        ),
        Section("further", "Further scores", "further.html", view.by_task(answers.further)),
        Section("claims", "Claims", "claims.html", once(claims.claims(view))),
        Section("truth", "Rank in the right layers", "truth.html", view.by_task(truth.truth)),
        Section("tuning", "Tuning", "tuning.html", view.by_task(tuning.tuning)),
        Section("untuned", "At the settings given", "untuned.html", once(tuning.untuned(view))),
        Section("best", "Best step and last", "best.html", view.by_task(tuning.best)),
        Section("rows", "Hyperparameters and parameters", "rows.html", once(rows.Hyperparameters.of(view))),
        Section("changes", "What each row changes", "changes.html", once(rows.Changes.of(view))),
        *(Section(key, title, "figures.html", view.by_task(draw)) for key, title, draw in pictures),
        Section("samples", "Answers to read", "samples.html", view.by_task(answers.samples)),
        Section("failures", "Failures", "failures.html", once(cells.failures(view))),
        Section("cells", "Cells", "cells.html", once(cells.Grid.of(view))),
    ]


def _policy(script: str) -> str:
    """Return the content security policy: no request at all, and no script but this one."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"


def _colours() -> str:
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{in_css(DARK)}}}}}"
    return f":root{{{in_css(LIGHT)}}}\n{dark}\n"


@cache
def _file(name: str) -> str:
    return (resources.files("lrkit.study.report") / name).read_text(encoding="utf-8")


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lrkit.study.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": breakable, "setting": setting}
    return environment.get_template("page.html")
