"""A study's results so far, read from its folder. Cells are read when they are first asked for, and once. No torch here.

A study may still be running when it is read. Cells that have not begun, a last line that a killed process left torn,
steps that a resumed run repeated and costs that are not measured yet are no errors.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import attrs

from lrkit.loop.history import Decision
from lrkit.study.answers import Sampled, samples_in
from lrkit.study.cell_folder import PACKED
from lrkit.study.claim import Claim
from lrkit.study.files import Attempt, CellResult, Cost, attempt_in, decision_in, read_cost, read_result
from lrkit.study.published import Published
from lrkit.study.store import number, read_lines, read_object, read_text
from lrkit.study.study_file import CostEntry, RowRecord, TaskRecord

Status = Literal["done", "failed", "running", "missing"]
"""``done``: has a result; ``failed``: the last attempt ended in an error; ``running``: begun, neither done nor failed
(it runs now or was interrupted: the files do not tell which); ``missing``: never begun."""

STATUSES: tuple[Status, ...] = ("done", "running", "failed", "missing")


@attrs.frozen(kw_only=True)
class CellRecord:
    """One run of a study: a row, a task and a seed. Its files are read when they are first asked for.

    Args:
        key: the name of its folder.
        row: index into `StudyRecord.rows`.
        task: name of the task.
        seed: the seed.
        folder: the folder of its files, which may not be there yet.
        old: it is of other code than the study was last run with.
        code: the digest of the code that its result is of; empty if it is not known.
        number: of a trial: which settings it tries, counted from 0 in each row and task; None for a row's own cell.
        rung: of a trial: how many times these settings have been taken further.
    """

    key: str
    row: int
    task: str
    seed: int
    folder: Path = attrs.field(repr=False)
    old: bool = False
    code: str = ""
    number: int | None = None
    rung: int = 0

    @cached_property
    def status(self) -> Status:
        """Tell how far it is. A failed cell that is being tried again is running."""
        if self.result is not None:
            return "done"
        if self.attempts:
            return "failed" if self.attempts[-1].event == "failed" else "running"
        if self.error:
            return "failed"
        return "running" if self._metrics else "missing"

    @cached_property
    def result(self) -> CellResult | None:
        """Read its result; None until it is done.

        Raises:
            LrkitError: ``result.json`` is there and is not a result. (It is written in one move, so a run that was killed
                cannot leave it so.)
        """
        return read_result(self.folder / "result.json")

    @property
    def score(self) -> float | None:
        """Return the primary score; None until the cell is done, NaN if the run diverged."""
        return None if self.result is None else self.result.score

    @cached_property
    def error(self) -> str:
        """Read the traceback of the last attempt if that failed; empty otherwise."""
        text = read_text(self.folder / "error.txt").strip()
        if text or not self.attempts:
            return text
        return self.attempts[-1].error

    @property
    def error_line(self) -> str:
        """Return the last line of the traceback: the error itself."""
        lines = [line.strip() for line in self.error.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    @cached_property
    def attempts(self) -> tuple[Attempt, ...]:
        """Read every begin, end and failure, oldest first."""
        found = (attempt_in(line) for line in read_lines(self.folder / "attempts.jsonl"))
        return tuple(attempt for attempt in found if attempt is not None)

    @property
    def tokens_per_second(self) -> float | None:
        """Return the training tokens per second of the attempt that came to the end; None if that is not known."""
        found = [attempt.tokens_per_second for attempt in self.attempts if attempt.event == "end"]
        return found[-1] if found else None

    @cached_property
    def samples(self) -> tuple[Sampled, ...]:
        """Read a few validation rows with the base's answer and the trained model's; empty if there are none."""
        return samples_in(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Read ``config.json``: everything that defines the cell, and versions; empty if it is not there yet."""
        return read_object(self.folder / "config.json", "a cell's configuration") or {}

    @cached_property
    def env(self) -> dict[str, Any]:
        """Read ``env.json``: the machine; empty if it is not there yet."""
        return read_object(self.folder / "env.json", "a description of a machine") or {}

    @cached_property
    def packed(self) -> str:
        """Read the pack that it was taken in from; empty if it was computed here."""
        return str((read_object(self.folder / PACKED, "a mark") or {}).get("pack", ""))

    @property
    def steps(self) -> int:
        """Count the optimizer steps that are on record: all of them if the cell is done."""
        if self.result is not None:
            return self.result.steps
        return max((step for step, _ in self.losses), default=0)

    @cached_property
    def losses(self) -> tuple[tuple[int, float], ...]:
        """List (step, training loss) by step; NaN if the loss was not a number."""
        return tuple((step, number(line["loss"])) for (step, kind), line in self._metrics.items() if kind == "loss")

    @cached_property
    def penalties(self) -> tuple[tuple[int, float], ...]:
        """List (step, penalty that was added to the loss) by step; empty for a method without one, and in older studies."""
        return tuple(
            (step, number(line["penalty"]))
            for (step, kind), line in self._metrics.items()
            if kind == "loss" and line.get("penalty") is not None
        )

    @cached_property
    def evaluations(self) -> tuple[tuple[int, dict[str, float]], ...]:
        """List (step, scores on the validation rows) by step, if the run was evaluated on the way."""
        return tuple(
            (step, {str(name): number(value) for name, value in line["scores"].items()})
            for (step, kind), line in self._metrics.items()
            if kind == "scores"
        )

    @cached_property
    def _metrics(self) -> dict[tuple[int, str], dict[str, Any]]:
        """Map (step, "loss" or "scores") to the last line that says so, by step."""
        found: dict[tuple[int, str], dict[str, Any]] = {}
        for line in read_lines(self.folder / "metrics.jsonl"):
            if type(line.get("step")) is int:
                if "loss" in line:
                    found[line["step"], "loss"] = line
                if isinstance(line.get("scores"), dict):
                    found[line["step"], "scores"] = line
        return dict(sorted(found.items()))

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """Read every decision, by step and then policy. If a resumed run repeated a step, its last line counts."""
        found: dict[tuple[int, int], Decision] = {}
        for line in read_lines(self.folder / "history.jsonl"):
            decision = decision_in(line)
            if decision is not None:
                found[decision.step, decision.policy] = decision
        return tuple(found[place] for place in sorted(found))


@attrs.frozen(kw_only=True)
class StudyRecord:
    """A study as its folder has it.

    Args:
        folder: the folder.
        name: its short name.
        title: its title; if none was given, the base and the settings that the rows change.
        note: free text.
        base: index of the row that all others are compared with.
        rows: the rows of the table.
        tasks: the tasks.
        model: the model that was asked for.
        loading: how it is loaded, as plain data of what is not at its default.
        targets: the layers that are adapted, as `lrkit.attach` takes it.
        seeds: the seeds.
        run: the run's settings.
        cells: every cell that was asked for, by row, task and seed as the study lists them: tuned ones if it is tuned.
        measured: the rows whose cost was measured, or tried in vain.
        tune: how settings are chosen, as it was asked for; None if they are given.
        trials: the cells that settings were tried in.
        untuned: of a tuned study, the cells that ran with the settings that were given.
        margin: differences of the primary score that are smaller do not matter; None if none was stated.
        claims: what was claimed of the rows before the first test cell.
        published: values that others published.
    """

    folder: Path
    name: str
    title: str
    note: str
    base: int
    rows: tuple[RowRecord, ...]
    tasks: tuple[TaskRecord, ...]
    model: str
    targets: Any
    seeds: tuple[int, ...]
    run: dict[str, Any] = attrs.field(repr=False)
    cells: tuple[CellRecord, ...] = attrs.field(repr=False)
    measured: tuple[CostEntry, ...] = attrs.field(repr=False)
    tune: dict[str, Any] | None = None
    trials: tuple[CellRecord, ...] = attrs.field(default=(), repr=False)
    untuned: tuple[CellRecord, ...] = attrs.field(default=(), repr=False)
    margin: float | None = None
    claims: tuple[Claim, ...] = ()
    published: Published | None = None
    loading: dict[str, Any] = attrs.field(factory=dict)

    @cached_property
    def costs(self) -> dict[tuple[int, str], Cost]:
        """Map (row, task) to the cost of its step, for the rows that were measured or tried in vain."""
        found = {}
        for entry in self.measured:
            cost = read_cost(self.folder / "costs" / f"{entry.key}.json", entry.row, entry.task)
            if cost is not None:
                found[entry.row, entry.task] = cost
        return found

    def higher_is_better(self, task: str) -> bool:
        """Say if a larger primary score is a better one on a task."""
        return all(each.higher_is_better for each in self.tasks if each.name == task)

    def cells_of(self, row: int, task: str | None = None) -> tuple[CellRecord, ...]:
        """List the cells of one row, of one task if it is given."""
        return tuple(cell for cell in self._cells.get(row, ()) if task in (None, cell.task))

    def trials_in(self, row: int, task: str) -> tuple[CellRecord, ...]:
        """List the cells that settings of one row were tried in, on one task."""
        return tuple(self._trials.get((row, task), ()))

    @cached_property
    def _cells(self) -> dict[int, list[CellRecord]]:
        found: dict[int, list[CellRecord]] = {}
        for cell in self.cells:
            found.setdefault(cell.row, []).append(cell)
        return found

    @cached_property
    def _trials(self) -> dict[tuple[int, str], list[CellRecord]]:
        found: dict[tuple[int, str], list[CellRecord]] = {}
        for cell in self.trials:
            found.setdefault((cell.row, cell.task), []).append(cell)
        return found

    @property
    def counts(self) -> dict[Status, int]:
        """Count the cells in each status."""
        statuses = [cell.status for cell in self.cells]
        return {status: statuses.count(status) for status in STATUSES}
