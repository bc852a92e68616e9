"""The learning rates in force in each row of a study, and what a row changes beside what it names."""

from typing import Any

from lrkit.compose import to_plain
from lrkit.settings import at
from lrkit.study.plan import Plan, Row
from lrkit.study.run_settings import rates
from lrkit.study.task_spec import TaskSpec


def rates_of(plan: Plan, row: Row, task: TaskSpec) -> dict[str, float]:
    """Return a row's rates on a task: ``{"lr", "head_lr"}``."""
    settings = plan.settings(row, task, 0)
    lr, head_lr = rates(plan.method(row, task).parameterization, settings.lr, settings.head_lr)
    return {"lr": lr, "head_lr": head_lr}


def given(plan: Plan, row: Row, task: TaskSpec) -> dict[str, Any]:
    """Map the path of each setting of a row that is tuned to its value on a task without tuning."""
    settings, method, own = plan.settings(row, task, 0), to_plain(plan.method(row, task)), rates_of(plan, row, task)
    return {
        path: at(method, path) if name == path else own.get(name, getattr(settings, name))
        for path in row.tuned.values()
        for name in [path.removeprefix("run.")]
    }


def implied(plan: Plan, row: Row) -> list[dict[str, Any]]:
    """List what a row changes against the base beside what it names: its parameterization's own rate."""
    found = []
    for key in ("lr", "head_lr"):
        if key in row.run:
            continue
        base, here = ({rates_of(plan, each, task)[key] for task in plan.tasks} for each in (plan.rows[0], row))
        if base != here:
            found.append({"path": f"run.{key} (by default)", "base": said(base), "value": said(here)})
    return found


def said(values: set[float]) -> Any:
    """Return one rate as a number, several (of several tasks) as a text."""
    return next(iter(values)) if len(values) == 1 else " / ".join(f"{value:g}" for value in sorted(values))
