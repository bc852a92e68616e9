"""Print studies: those that ship, one that is laid out, and the tables of one that has run."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lrkit.cli import screen
from lrkit.cli.tables import Column

if TYPE_CHECKING:
    from pathlib import Path

    from lrkit.study.plan import Plan
    from lrkit.study.recall import Recall
    from lrkit.study.statistics import Table
    from lrkit.study.tune import Tuned


def list_studies(found: Sequence[Any], as_json: bool) -> None:
    """Print the studies that ship."""
    import attrs

    if as_json:
        screen.say_json({study.name: attrs.asdict(study) for study in found})
        return
    rows = [[study.name, study.title, ", ".join(study.profiles), study.distribution] for study in found]
    screen.table([Column("study"), Column("title"), Column("--profile"), Column("from", extra=True)], rows)
    screen.say("The first profile is the default: minilm is the embedded model and data, which pip fetches once.")


def limits(plan: "Plan") -> list[str]:
    """Say what a study cannot show, before anything is run."""
    from lrkit.study.paired import too_few_seeds

    few = too_few_seeds(len(plan.rows) - 1, len(plan.seeds))
    alone = (
        f"nothing is swapped, so {plan.rows[0].label} is compared with nothing: it alone is trained, with "
        f"{_count(len(plan.seeds), 'seed')} (--swap PATH=A,B,... adds rows)"
    )
    return [*([alone] if len(plan.rows) == 1 else []), *([few] if few else [])]


def show_plan(
    plan: "Plan",
    tasks: Iterable[str],
    as_json: bool,
    done: tuple[int, int] | None = None,
    taken: "tuple[int, Path] | None" = None,
) -> None:
    """Print a study that is laid out: each row with its changes and rates, and how many cells there are.

    Args:
        plan: the study.
        tasks: names of the tasks.
        as_json: print plain data instead.
        done: cells that are done in its folder, and all of them; None if no folder was named.
        taken: cells that would be taken in first, and the pack; None if there is none.
    """
    from lrkit.study.paired import too_few_seeds
    from lrkit.study.plan import changes
    from lrkit.study.rates import implied, rates_of, said

    rows = {row.label: [*changes(plan, row), *implied(plan, row)] for row in plan.rows}
    rates = {row.label: {task.name: rates_of(plan, row, task) for task in plan.tasks} for row in plan.rows}
    cells, trials = plan.cells, plan.trials
    if as_json:
        told = {"rows": rows, "rates": rates, "tasks": list(tasks), "seeds": plan.seeds, "cells": cells}
        told |= {"options": {task.name: task.options for task in plan.tasks if task.options}}
        told |= {"margin": plan.study.margin, "claims": [claim.name for claim in plan.study.claims]}
        told |= {"trials": trials} if plan.study.tune is not None else {}
        told |= {} if done is None else {"done": done[0]}
        told |= {} if taken is None else {"taken_in": taken[0]}
        screen.say_json(told | {"too_few_seeds": too_few_seeds(len(plan.rows) - 1, len(plan.seeds))})
        return
    shown = [
        [
            label,
            "; ".join(f"{c['path']}: {_said(c['base'])} -> {_said(c['value'])}" for c in row) or "-",
            *(str(said({each[key] for each in rates[label].values()})) for key in ("lr", "head_lr")),
        ]
        for label, row in rows.items()
    ]
    columns = [Column("row"), Column("changed against the base"), Column("learning rate"), Column("the head's")]
    screen.table(columns, shown)
    counted = (_count(len(plan.rows), "row"), _count(len(plan.seeds), "seed"), _count(cells, "cell"))
    before = f"{_count(trials, 'trial cell')} ({plan.study.tune.told()}), then " if plan.study.tune is not None else ""
    screen.say(f"{before}{counted[2]}: {counted[0]} on {', '.join(tasks)} with {counted[1]}. Every one can run.")
    if done is not None:
        screen.say(f"{done[0]} of {_count(done[1], 'cell')} {'is' if done[0] == 1 else 'are'} done in this folder.")
    if taken is not None:
        screen.say(f"{_count(taken[0], 'finished cell')} would be taken in first, from {taken[1]}.")
    for task in plan.tasks:
        if task.options:
            screen.say(
                f"Task {task.name}: {', '.join(f'{key}={_said(value)}' for key, value in task.options.items())}."
            )
    if plan.study.margin is not None:
        screen.say(f"Margin: ±{plan.study.margin:g} of the primary score, written down before the first test cell.")
    if plan.study.claims:
        screen.say(f"Claims, judged when every cell is done: {', '.join(claim.name for claim in plan.study.claims)}.")
    bare = [c.name for c in plan.study.claims if c.margin is None and plan.study.margin is None]
    if bare:
        screen.say(
            f"Without a margin, which none can be given once a cell has begun: {', '.join(bare)}. That an advantage is too "
            "small to matter cannot be found then."
        )
    for line in limits(plan):
        screen.say(line)


def show_table(table: "Table") -> None:
    """Print a study's tables: per task its scores, effects and costs, then the tasks side by side; and the notes."""
    from lrkit.study.table import COSTS, EFFECTS, SCORES, columns_of, columns_of_tasks

    first = table.of(table.tasks[0])
    shown = [(task, columns_of(table.of(task), keys)) for task in table.tasks for keys in (SCORES, EFFECTS, COSTS)]
    shown.append(("means by task", columns_of_tasks(table)))
    screen.say(f"{table.title}\n")
    said = ""
    for name, columns in shown:
        if len(columns) > 1:
            rows = (first if name == "means by task" else table.of(name)).rows
            # A number and its unit, or an interval, stay on one line.
            texts = [[columns[0].text(row), *(screen.whole(c.text(row) or "-") for c in columns[1:])] for row in rows]
            heads = [Column(column.header, number=column is not columns[0]) for column in columns]
            screen.table(heads, texts, name if name != said and len(table.tasks) > 1 else None)
            said = name
    for note in table.all_notes():
        screen.say(note)


def show_recalls(recalls: Sequence["Recall"]) -> None:
    """Print how much of the rank each row gave to the right layers, and its misses; nothing if no task knows them."""
    if not recalls:
        return
    several = len({each.task for each in recalls}) > 1
    heads = [Column("row"), *([Column("task")] if several else []), Column("recall", number=True)]
    heads += [Column(name, number=True) for name in ("95 % interval", "layers found", "draws", "score")]
    rows = [
        [each.label, *([each.task] if several else []), *(screen.whole(text) for text in each.texts())]
        for each in recalls
    ]
    screen.table(heads, rows, "rank in the right layers")
    for each in recalls:
        for draw in each.misses:
            screen.say(f"missed by {each.label}{', ' + each.task if several else ''}: {draw}")


def show_trials(found: "Tuned") -> None:
    """Print the trials of a method, best last, the one that was chosen marked; and how to go on if it is at an edge."""
    paths = list(found.settings)
    heads = [Column("trial", number=True), *(Column(path, number=True) for path in paths)]
    heads += [Column("mean", number=True), Column("by seed", number=True), Column("")]
    rows = [
        [
            str(trial.number),
            *(str(trial.settings.get(path, "-")) for path in paths),
            "-" if trial.mean is None else f"{trial.mean:.4f}",
            screen.whole(" ".join(f"{score:.4f}" for score in trial.scores.values())),
            "chosen" if trial.number == found.choice.trial else f"to step {trial.stopped}" if trial.stopped else "",
        ]
        for trial in found.trials
    ]
    screen.table(heads, rows)
    for path in found.choice.edges:
        screen.say(f"{path} = {found.choice.settings[path]} is at the edge of what was tried")
    if found.choice.widen:
        screen.say(f"to try further values, the same command with: {found.choice.widen}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
