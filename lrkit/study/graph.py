"""All cells of a plan as one graph, in an order in which each comes after the cells that it needs: `jobs_of`.

A tuned row's own cells need all of its trials. A control needs a cell of the row that it controls: its own cells one of
that row's own, and its trials the trial that is chosen there, with the same tuning seed.
"""

from collections.abc import Sequence
from typing import Any

import attrs

from lrkit.errors import LrkitError
from lrkit.study.jobs import Job, Trial, cell_of
from lrkit.study.needs import Need
from lrkit.study.plan import Plan, Row
from lrkit.study.run_settings import steps_of
from lrkit.study.space import TuneSpec, grid, optuna_version, space_of
from lrkit.study.task_spec import TaskSpec, load_task_of


def jobs_of(plan: Plan) -> list[Job]:
    """List all cells, seed by seed, so that a study that is stopped early has every row; those that others need first."""
    graph = _Graph(plan)
    tune = plan.study.tune
    if tune is not None:
        for seed in tune.tuning_seeds:
            for spec in plan.tasks:
                for rung, size in enumerate(tune.rungs):
                    for number in range(size):
                        for index in range(len(plan.rows)):
                            graph.trial(tune, index, spec, seed, Trial(number=number, rung=rung))
    for seed in plan.seeds:
        for spec in plan.tasks:
            for index in range(len(plan.rows)):
                if tune is None or tune.defaults:
                    graph.test(None, index, spec, seed)
                if tune is not None:
                    graph.test(tune, index, spec, seed)
    return graph.jobs


class _Graph:
    """The cells so far, by place. A cell is added after those that it needs."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._found: dict[tuple[Any, ...], Job] = {}
        self._rows: dict[str, int] = {}
        self._choices: dict[tuple[Any, ...], Need] = {}
        self._grids: dict[int, list[dict[str, Any]]] = {}

    @property
    def jobs(self) -> list[Job]:
        """List the cells."""
        return list(self._found.values())

    def test(self, tune: TuneSpec | None, index: int, spec: TaskSpec, seed: int) -> Job:
        """Add a row's cell on a task with a seed, with settings that are tuned or as they are given; return it."""
        place = (index, spec.name, seed, tune is not None)
        if place not in self._found:
            needs = [] if tune is None else [self._all(tune, index, spec, tune.rungs)]
            if (control := self._plan.rows[index].control) is not None:
                at = control.reads(self._plan.tasks, self._plan.seeds, spec, seed)
                needs += control.needs(None if at is None else self.test(tune, control.row, *at).key)
            self._add(place, index, spec, seed, needs, tuned=tune is not None)
        return self._found[place]

    def trial(self, tune: TuneSpec, index: int, spec: TaskSpec, seed: int, trial: Trial) -> Job:
        """Add a trial of a row on a task with a tuning seed; return it."""
        place = (index, spec.name, seed, trial)
        if place not in self._found:
            row = self._plan.rows[index]
            needs: list[Need] = []
            settings: dict[str, Any] = {}
            if trial.rung:
                before = self._all(tune, index, spec, tune.rungs[: trial.rung])
                at = {**before.settings, "rungs": list(tune.rungs[: trial.rung + 1]), "slot": trial.number}
                needs.append(attrs.evolve(before, rule="promoted", settings=at))
            elif tune.sampler == "grid":
                settings = self._grid(tune, index)[trial.number]
            else:
                before = self._all(tune, index, spec, [trial.number - trial.number % tune.batch])
                at = {**before.settings, "index": trial.number % tune.batch}
                needs.append(attrs.evolve(before, rule="proposed", settings=at))
            if row.control is not None and (
                source := row.control.reads(self._plan.tasks, tune.tuning_seeds, spec, seed)
            ):
                among = self._all(tune, row.control.row, source[0], tune.rungs)
                which = tune.tuning_seeds.index(source[1])
                needs += [
                    Need(
                        rule="of-chosen",
                        cells=among.cells,
                        settings={**among.settings, "which": which, "rule": each.rule, "of_rule": each.settings},
                    )
                    for each in row.control.needs("")
                ]
            self._add(place, index, spec, seed, needs, settings=settings, trial=trial)
        return self._found[place]

    def _grid(self, tune: TuneSpec, index: int) -> list[dict[str, Any]]:
        """Return the settings of a row's trials."""
        if index not in self._grids:
            self._grids[index] = grid(space_of(tune, self._plan.rows[index].tuned))
        return self._grids[index]

    def _all(self, tune: TuneSpec, index: int, spec: TaskSpec, sizes: Sequence[int]) -> Need:
        """Return the need of the first rungs of a row's trials on a task, of so many trials each: one for all."""
        place = (index, spec.name, *sizes)
        if place in self._choices:
            return self._choices[place]
        trials = [
            self.trial(tune, index, spec, seed, Trial(number=number, rung=rung))
            for rung, size in enumerate(sizes)
            for number in range(size)
            for seed in tune.tuning_seeds
        ]
        settings: dict[str, Any] = {
            "space": space_of(tune, self._plan.rows[index].tuned),
            "seeds": len(tune.tuning_seeds),
        }
        if tune.halving is not None:
            settings["rungs"] = list(sizes)
        if tune.sampler == "tpe":
            settings |= {"batch": tune.batch, "seed": tune.seed, "optuna": optuna_version()}
        self._choices[place] = Need(rule="chosen", cells=[job.key for job in trials], settings=settings)
        return self._choices[place]

    def _add(
        self,
        place: tuple[Any, ...],
        index: int,
        spec: TaskSpec,
        seed: int,
        needs: Sequence[Need],
        *,
        settings: dict[str, Any] | None = None,
        trial: Trial | None = None,
        tuned: bool = False,
    ) -> None:
        row, tune = self._plan.rows[index], self._plan.study.tune
        cell = cell_of(self._plan, row, spec, seed, needs, settings)
        if trial is not None and tune is not None:
            # It is scored on all rows that are set aside.
            stop = self._stop(tune, row, spec, trial.rung)
            cell = attrs.evolve(cell, selection=tune.seed, run={**cell.run, "validation_rows": None}, stop=stop)
        self._found[place] = Job(
            cell=cell, row=index, label=row.label, task=spec.name, seed=seed, trial=trial, tuned=tuned
        )

    def _stop(self, tune: TuneSpec, row: Row, spec: TaskSpec, rung: int) -> int | None:
        """Return the step after which a rung's trials of a row end; None for the last one."""
        above = len(tune.rungs) - 1 - rung
        if tune.halving is None or not above:
            return None
        settings = self._plan.settings(row, spec, 0)
        if settings.steps is None and spec.name not in self._rows:
            task = load_task_of(spec)
            if not task.by_row:
                raise LrkitError(
                    f"tune.halving on {spec.name}: its rows become as many examples as the tokenizer says, so that the "
                    "steps of an epoch are not known yet: give run.steps"
                )
            self._rows[spec.name] = len(task.train)
        return max(1, steps_of(settings, self._rows.get(spec.name, 1)) // int(tune.halving**above))
