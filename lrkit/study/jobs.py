"""The cells of a plan, in the order in which they run."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from lrkit.compose import to_plain
from lrkit.study.asked import TaskSpec
from lrkit.study.cell import Cell, make_cell
from lrkit.study.plan import Plan, Row


@attrs.frozen(kw_only=True)
class Job:
    """A cell and its place in the study.

    Args:
        cell: the cell.
        row: its row's index.
        label: its row's label.
        task: its task's name.
        seed: its seed.
        steps: optimizer steps, if known.
        kept: key and code of the cell of other code that stands for it; None for its own.
    """

    cell: Cell
    row: int
    label: str
    task: str
    seed: int
    steps: int | None = None
    kept: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """Return the name of its folder."""
        return self.cell.key if self.kept is None else self.kept[0]

    @property
    def code(self) -> str:
        """Return the digest of the code that its result is of."""
        return self.cell.versions["code"] if self.kept is None else self.kept[1]

    def __str__(self) -> str:
        """Return its place in words: row, task and seed."""
        return f"{self.label}, {self.task}, seed {self.seed}"


Told = Callable[[Job, Mapping[str, Any], int, int], None]
"""Called when a cell has ended: the job, what `run_cell` returned, cells ended and cells in all."""


def jobs_of(plan: Plan) -> list[Job]:
    """List all cells, seed by seed, so that a study that is stopped early has every row."""
    return [
        Job(cell=cell_of(plan, row, spec, seed), row=index, label=row.label, task=spec.name, seed=seed)
        for seed in plan.seeds
        for spec in plan.tasks
        for index, row in enumerate(plan.rows)
    ]


def cell_of(plan: Plan, row: Row, spec: TaskSpec, seed: int) -> Cell:
    """Make the cell of a row on a task with a seed."""
    run = attrs.asdict(plan.settings(row, spec, seed))
    return make_cell(to_plain(plan.method(row, spec)), spec, plan.study.model, run=run, **row.attach)


def row_devices(plan: Plan) -> list[int]:
    """List the devices that the cells of each row and task take."""
    return [plan.settings(row, task, 0).devices for row in plan.rows for task in plan.tasks]
