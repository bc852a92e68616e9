"""Tune one method from Python: `tune` tries settings on rows set aside from the training data, and chooses."""

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit import toml
from lrkit.compose import to_plain
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.method import Method
from lrkit.moves import replacing
from lrkit.study.asked import Study, study_from
from lrkit.study.execute import execute
from lrkit.study.labels import shown_value
from lrkit.study.plan import Plan, lay_out
from lrkit.study.records import read_study
from lrkit.study.task_spec import TaskSpec
from lrkit.study.tuned import Choice, TrialRecord, chosen_of, trials_of

if TYPE_CHECKING:
    from lrkit.study.execute import Outcome


@attrs.frozen(kw_only=True)
class Tuned:
    """What tuning a method came to.

    Args:
        method: its name, or plain data.
        choice: what was chosen.
        trials: all that was tried.
        folder: the study's; ``chosen.toml`` is in it.
    """

    method: Any
    choice: Choice
    trials: tuple[TrialRecord, ...]
    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        """Return the chosen settings by path, as ``--set`` takes them."""
        return dict(self.choice.settings)

    @property
    def words(self) -> str:
        """Return the chosen settings as a command line has them, such as ``--set run.lr=0.003``."""
        return " ".join(f"--set {path}={shown_value(value)}" for path, value in self.settings.items())


def tune(
    method: "str | Method",
    space: Mapping[str, Any],
    *,
    out: str | os.PathLike[str],
    task: Any = "movies",
    model: str = "minilm",
    loading: Mapping[str, Any] | None = None,
    targets: str | Sequence[str] = "all-linear",
    train_also: str | Sequence[str] = "auto",
    seeds: int | Sequence[int] = 2,
    seed: int = 0,
    sampler: str = "grid",
    trials: int | None = None,
    batch: int = 4,
    halving: int | None = None,
    run: Mapping[str, Any] | None = None,
    set: Mapping[str, Any] | None = None,
    executor: str | Executor = "local",
    workers: int | None = None,
    address: str | None = None,
) -> Tuned:
    """Choose settings of a method: train with each, and score on rows set aside from the training data.

    The validation rows are never looked at. Called again with the same folder it runs what is missing, and
    `lrkit.ablate` with the same folder and `tune` goes on with the test cells.

    >>> tuned = lrkit.tune("adalora", {"run.lr": [3e-3, 1e-2, 3e-2]}, out="tuned")
    >>> tuned.settings
    {'run.lr': 0.01}

    Args:
        method: a method's name, or a `lrkit.Method`.
        space: setting to a list of values, or to ``"log(1e-4,1e-2,5)"``: of the run (``"run.lr"``), of the method
            (``"parameterization.alpha"``), or an argument of a named method (``"alpha"``).
        out: the study's folder.
        task: a task's name, or a table as in a study file: one task.
        model: ``"minilm"``, a folder or a hub id.
        loading: how it is loaded: settings of `lrkit.study.loading.Loading`.
        targets: which layers, as `lrkit.attach` takes it.
        train_also: which modules train in full, likewise.
        seeds: how many seeds each trial has (1000, 1001, ...), or which.
        seed: of the split that sets rows aside, and of the sampler.
        sampler: ``"grid"``, or ``"tpe"`` for Optuna's.
        trials: how many, for ``"tpe"``.
        batch: how many are proposed at a time, for ``"tpe"``.
        halving: of so many trials one goes on to so many times the steps; None: all have all steps.
        run: settings of every run.
        set: settings of the method.
        executor: as of `lrkit.ablate`.
        workers: likewise.
        address: likewise.

    Raises:
        LrkitError: something cannot run, or every trial diverged.
    """
    study = study_from(
        {
            "base": to_plain(method) if isinstance(method, Method) else method,
            "set": dict(set or {}),
            "run": dict(run or {}),
            "tasks": [task],
            "model": os.fspath(model),
            "loading": dict(loading or {}),
            "targets": targets if isinstance(targets, str) else list(targets),
            "train_also": train_also if isinstance(train_also, str) else list(train_also),
            "tune": {
                "space": dict(space),
                "seeds": seeds if isinstance(seeds, int) else list(seeds),
                "seed": seed,
                "sampler": sampler,
                "trials": trials,
                "batch": batch,
                "halving": halving,
            },
        },
        "tune",
    )
    plan = tuning_plan(study)
    outcome = execute(plan, Path(out), executor=executor, workers=workers, address=address, costs=False)
    for name, error in outcome.failed:
        warnings.warn(f"cell {name} failed: {error}", LrkitWarning, stacklevel=2)
    return tuned_by(plan, outcome)


def tuning_plan(study: Study) -> Plan:
    """Lay out the trials of a study's base on one task, without test cells."""
    plan = lay_out(attrs.evolve(study, seeds=[]))
    if len(plan.tasks) > 1:
        raise LrkitError("tune: settings are chosen for one task at a time; `lrkit ablate --tune` takes several")
    return plan


def tuned_by(plan: Plan, outcome: "Outcome") -> Tuned:
    """Read what the trials chose, and write it down as ``chosen.toml``, a study file of the method as it was chosen.

    Raises:
        LrkitError: a trial is not done, or every one diverged.
    """
    record, task = read_study(outcome.folder), plan.tasks[0]
    choice = chosen_of(record, 0, task.name)
    if choice is None:
        missing = sum(cell.status != "done" for cell in record.trials)
        why = f"{missing} of {len(record.trials)} cells are not done" if missing else "every trial diverged"
        raise LrkitError(f"{outcome.folder}: nothing is chosen, {why}")
    found = Tuned(method=plan.study.base, choice=choice, trials=trials_of(record, 0, task.name), folder=outcome.folder)
    with replacing(outcome.folder / "chosen.toml") as draft:
        draft.write_text(_toml(plan.study, task, found), encoding="utf-8")
    return found


def _toml(study: Study, task: TaskSpec, found: Tuned) -> str:
    """Write the study file of a method with its chosen settings."""
    settings = found.settings
    run = {path.removeprefix("run."): value for path, value in settings.items() if path.startswith("run.")}
    own = {path: value for path, value in settings.items() if not path.startswith("run.")}
    mean = found.trials[[trial.number for trial in found.trials].index(found.choice.trial)].mean
    # The task's own settings come before the chosen ones, as they did in the trials: so they are written as the study's.
    where = {key: value for key, value in attrs.asdict(task).items() if value and key not in ("run", "set")}
    # Code from a repository is for the command line to allow.
    shared = {key: value for key, value in study.loading.items() if key != "trust_remote_code"}
    lines = [
        f"# chosen on rows set aside from training: trial {found.choice.trial} of {len(found.trials)}, mean {mean:.4f}",
        f"base = {toml.value(study.base)}",
        f"tasks = [{toml.value(where)}]",
        f"model = {toml.value(study.model)}",
        *([f"loading = {toml.value(shared)}"] if shared else []),
        f"targets = {toml.value(study.targets)}",
        f"train_also = {toml.value(study.train_also)}",
        f"\n[set]\n{toml.table({**study.set, **task.set, **own})}",
        f"[run]\n{toml.table({**study.run, **task.run, **run})}",
    ]
    return "\n".join(lines)


__all__ = ["Choice", "TrialRecord", "Tuned", "tune"]
