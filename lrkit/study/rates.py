"""The learning rates in force in each row of a study, and what a row changes beside what it names."""

from typing import Any

from lrkit.study.plan import Plan, Row, TaskSpec
from lrkit.study.run import rates


def rates_of(plan: Plan, row: Row, task: TaskSpec) -> dict[str, float]:
    """A row's rates on a task: ``{"lr", "head_lr"}``."""
    settings = plan.settings(row, task, 0)
    lr, head_lr = rates(row.method.parameterization, settings.lr, settings.head_lr)
    return {"lr": lr, "head_lr": head_lr}


def implied(plan: Plan, row: Row) -> list[dict[str, Any]]:
    """What a row changes against the base beside what it names: the rate that its parameterization has by default."""
    found = []
    for key in ("lr", "head_lr"):
        if key in row.run:
            continue
        base, here = ({rates_of(plan, each, task)[key] for task in plan.tasks} for each in (plan.rows[0], row))
        if base != here:
            found.append({"path": f"run.{key} (by default)", "base": said(base), "value": said(here)})
    return found


def said(values: set[float]) -> Any:
    """One rate as a number, several (of several tasks) as a text."""
    return next(iter(values)) if len(values) == 1 else " / ".join(f"{value:g}" for value in sorted(values))
