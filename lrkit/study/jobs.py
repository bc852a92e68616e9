"""Cells of a plan, each with its place in the study; `lrkit.study.graph` lists all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from lrkit.compose import to_plain
from lrkit.study.cell import Cell, make_cell
from lrkit.study.needs import Need
from lrkit.study.plan import Plan, Row
from lrkit.study.study_file import CellEntry, TrialEntry
from lrkit.study.task_spec import TaskSpec
from lrkit.study.tuning import with_settings


@attrs.frozen(kw_only=True)
class Trial:
    """The place of a cell that tries settings of a row.

    Args:
        number: which settings it tries, counted from 0.
        rung: how many times these settings have been taken further.
    """

    number: int
    rung: int = 0

    def __str__(self) -> str:
        """Return it in words."""
        return f"trial {self.number}" + (f" (rung {self.rung})" if self.rung else "")


@attrs.frozen(kw_only=True)
class Job:
    """A cell and its place in the study.

    Args:
        cell: the cell.
        row: its row's index.
        label: its row's label.
        task: its task's name.
        seed: its seed.
        trial: which trial of its row it is; None for a cell of the row itself.
        tuned: its settings were chosen by trials.
        steps: optimizer steps, if known.
        kept: key and code of the cell of other code that stands for it; None for its own.
    """

    cell: Cell
    row: int
    label: str
    task: str
    seed: int
    trial: Trial | None = None
    tuned: bool = False
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

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the keys of the cells that it needs."""
        return tuple(dict.fromkeys(key for need in self.cell.needs for key in need.cells))

    def entry(self, row: int | None = None) -> CellEntry:
        """Return its entry in ``study.json``, in which its row may have another index."""
        common: dict[str, Any] = {
            "key": self.key,
            "row": self.row if row is None else row,
            "task": self.task,
            "seed": self.seed,
            "setup": self.cell.setup,
            "code": self.code,
            "old": self.kept is not None,
        }
        if self.trial is not None:
            return TrialEntry(**common, number=self.trial.number, rung=self.trial.rung)
        return CellEntry(**common, tuned=self.tuned)

    def moved(self, keys: Mapping[str, str]) -> "Job":
        """Return it with the keys of cells that it needs replaced, if others stand for these."""
        if not any(key in keys for key in self.sources):
            return self
        needs = [attrs.evolve(each, cells=[keys.get(key, key) for key in each.cells]) for each in self.cell.needs]
        return attrs.evolve(self, cell=attrs.evolve(self.cell, needs=needs))

    def __str__(self) -> str:
        """Return its place in words: row, task and seed."""
        return f"{self.label}, {self.task}, " + (f"{self.trial}, " if self.trial else "") + f"seed {self.seed}"


Told = Callable[[Job, Mapping[str, Any], int, int], None]
"""Called when a cell has ended: the job, what `run_cell` returned, cells ended and cells in all."""


def cell_of(
    plan: Plan,
    row: Row,
    spec: TaskSpec,
    seed: int,
    needs: Sequence[Need] = (),
    settings: Mapping[str, Any] | None = None,
) -> Cell:
    """Make the cell of a row on a task with a seed.

    Args:
        plan: the study.
        row: the row.
        spec: the task.
        seed: the seed.
        needs: what it takes from other cells.
        settings: path to value, of the method or of the run, that take the place of the row's.
    """
    method, run = with_settings(
        to_plain(plan.method(row, spec)), attrs.asdict(plan.settings(row, spec, seed)), settings or {}
    )
    made = make_cell(method, spec, plan.study.model, run=run, loading=plan.study.loading, **row.attach)
    return attrs.evolve(made, needs=tuple(needs)) if needs else made


def row_devices(plan: Plan) -> list[int]:
    """List the devices that the cells of each row and task take."""
    return [plan.settings(row, task, 0).devices for row in plan.rows for task in plan.tasks]
