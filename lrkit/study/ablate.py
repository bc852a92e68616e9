"""Ablations from Python: swap one component, run the seeds, get one table."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.compose import component_to_plain, to_plain
from lrkit.errors import LrkitError, LrkitWarning, nearest, shown
from lrkit.foreign import text_of
from lrkit.method import FIELDS, Method
from lrkit.study.cell import Conditions, components_of
from lrkit.study.execute import Job, Outcome, Told, carry_out
from lrkit.study.executors import Here, gpus
from lrkit.study.plan import SEEDS, Plan, Study, lay_out, read_study, study_from
from lrkit.study.shipped import names

if TYPE_CHECKING:
    from lrkit.study.statistics import Table


def ablate(
    base: "str | Method | Study",
    swap: Mapping[str, Sequence[Any]] | None = None,
    *,
    out: str | os.PathLike[str],
    task: "str | Sequence[Any]" = "movies",
    model: str = "minilm",
    targets: str | Sequence[str] = "all-linear",
    train_also: str | Sequence[str] = "auto",
    seeds: int | Sequence[int] = SEEDS,
    run: Mapping[str, Any] | None = None,
    set: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    leave_out: Sequence[str] = (),
    grid: bool = False,
    title: str = "",
    profile: str | None = None,
    executor: str | Executor = "local",
    workers: int | None = None,
    address: str | None = None,
    costs: bool = True,
    checkpoint_seconds: float = 60.0,
    report_to: Sequence[str] = (),
    keep_old: bool = False,
) -> "Table":
    """Swap parts of a method one at a time, train every row with every seed, and compare.

    Called again with the same folder it runs only what is missing or failed, and takes up what was killed at its last
    checkpoint, bit for bit.

    >>> table = lrkit.ablate("adalora", {"metric": ["sensitivity", "magnitude"]}, seeds=6, out="study")
    >>> print(table)                # and table.frame() for pandas

    Args:
        base: a method's name, a `lrkit.Method`, or a whole study: a `Study`, the name of one that ships, or a path that ends
            in ``.toml`` (then only how to run it is taken from here).
        swap: component or setting to the values to try: ``{"metric": ["magnitude"], "action.ties": ["threshold"]}``. A
            component is a name, a table with a name and settings, or an instance.
        out: the study's folder; new, or the same study's.
        task: a task's name, a list of names, or tables as in a study file.
        model: ``"minilm"``, a folder or a hub id.
        targets: which layers, as `lrkit.attach` takes it.
        train_also: which modules train in full, likewise.
        seeds: how many, or which. With n seeds no p can be below 2/2ⁿ times the rows beside the base: a `LrkitWarning`
            says so before the first step if that is 0.05 or more.
        run: settings of every run: ``{"steps": 200}``.
        set: settings of every row's method: ``{"rank": 8}``.
        rows: further rows as tables: ``{"label": ..., "base": ..., "set": ..., "swap": ...}``.
        leave_out: ``"penalty"``, ``"policy"``, ``"also"``: a row without it each.
        grid: all combinations of `swap`.
        title: for the report.
        profile: of a study file, such as ``"paper"``; None for its first.
        executor: ``"local"``, ``"ray"``, a plug-in's name, or any `concurrent.futures.Executor`.
        workers: cells at a time; None: one for each GPU, or for each CPU core up to four. 0: in this process, where
            components that only this process has registered are known.
        address: of a cluster, for executors that have one.
        costs: measure time and memory of each row against the base, after the cells.
        checkpoint_seconds: time between checkpoints.
        report_to: trackers of transformers' Trainer that get the curves too, such as ``"tensorboard"``.
        keep_old: keep cells that are done and of other code (the sources of lrkit or of a plug-in have changed since),
            instead of computing them again.

    Returns:
        The table; ``table.frame()`` is a pandas frame.

    Raises:
        LrkitError: something in the study cannot run (told before the first step), or `out` holds something else.
    """
    from lrkit.study.paired import too_few_seeds
    from lrkit.study.records import read_study as read_records
    from lrkit.study.report import write_report
    from lrkit.study.statistics import compare

    if isinstance(base, str) and (base.endswith(".toml") or base in names()):
        base, profile = read_study(base, profile=profile), None
    if profile is not None:
        raise LrkitError(f'ablate: profile="{profile}" is of a study file, and base is none')
    study = (
        base
        if isinstance(base, Study)
        else _study(base, swap, task, model, targets, seeds, run, set, rows, leave_out, grid, title, train_also)
    )
    import warnings

    plan = lay_out(study)
    if few := too_few_seeds(len(plan.rows) - 1, len(plan.seeds)):
        warnings.warn(few, LrkitWarning, stacklevel=2)
    outcome = perform(
        plan,
        Path(out),
        executor=executor,
        workers=workers,
        address=address,
        costs=costs,
        checkpoint_seconds=checkpoint_seconds,
        report_to=report_to,
        keep_old=keep_old,
    )
    for name, error in outcome.failed:
        warnings.warn(f"cell {name} failed: {error}", LrkitWarning, stacklevel=2)
    write_report(outcome.folder)
    return compare(read_records(outcome.folder))


def _study(
    base: "str | Method",
    swap: Mapping[str, Sequence[Any]] | None,
    task: "str | Sequence[Any]",
    model: str,
    targets: str | Sequence[str],
    seeds: int | Sequence[int],
    run: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    leave_out: Sequence[str],
    grid: bool,
    title: str,
    train_also: str | Sequence[str] = "auto",
) -> Study:
    values = {path: [_plain(path, v) for v in _listed(path, tried)] for path, tried in (swap or {}).items()}
    return study_from(
        {
            "base": _plain("base", base),
            "title": title,
            "set": dict(settings or {}),
            "swap": values,
            "leave_out": list(leave_out),
            "grid": grid,
            "rows": [_row(row) for row in rows],
            "tasks": [task] if isinstance(task, str | Mapping) else list(task),
            "model": os.fspath(model),
            "targets": targets if isinstance(targets, str) else list(targets),
            "train_also": train_also if isinstance(train_also, str) else list(train_also),
            "seeds": seeds if isinstance(seeds, int) else list(seeds),
            "run": dict(run or {}),
        },
        "ablate",
    )


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: _plain(key, value) for key, value in row.items()}
    if isinstance(plain.get("swap"), Mapping):
        plain["swap"] = {path: _plain(path, value) for path, value in plain["swap"].items()}
    return plain


def _listed(path: Any, values: Any) -> list[Any]:
    if not isinstance(path, str):
        raise LrkitError(f"ablate: swap must have components or settings as keys, not {shown(path)}")
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise LrkitError(f'ablate: swap "{path}" must be a list of values to try, not {shown(values)}')
    return list(values)


def _plain(path: str, value: Any) -> Any:
    """A method's or a component's instance as a table; anything else as it is."""
    if path == "base" and isinstance(value, Method):
        return to_plain(value)
    kind = path.rpartition(".")[2] if isinstance(path, str) else ""
    if kind not in FIELDS or not attrs.has(type(value)):
        return value
    return component_to_plain(kind, value)


class _Borrowed(Executor):
    """Somebody else's executor: used, and left running."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.submit = executor.submit  # type: ignore[method-assign]


def perform(
    plan: Plan,
    folder: Path,
    *,
    executor: str | Executor = "local",
    workers: int | None = None,
    threads: int | None = None,
    address: str | None = None,
    costs: bool = True,
    checkpoint_seconds: float = 60.0,
    report_to: Sequence[str] = (),
    keep_old: bool = False,
    told: Told | None = None,
    started: Callable[[Sequence[Job], int, int], None] | None = None,
    cost_told: Callable[[str], None] | None = None,
) -> Outcome:
    """Carry out a plan on an executor by name; then measure its costs. Arguments as `ablate` and `carry_out` have them.

    `started` is called with the cells to run, how many there are in all, and how many run at a time.

    Raises:
        LrkitError: as `carry_out`; an unknown executor, or one that cannot be begun.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or not 0 <= workers <= 4096):
        raise LrkitError(f"workers must be a number from 0 (in this process) to 4096, not {shown(workers)}")
    at_once = (gpus() or min(cores, 4)) if workers is None else workers
    each = threads or threads_asked() or max(1, cores // max(1, at_once))
    devices = max(row_devices(plan))
    if devices > 1 and gpus():
        at_once = max(1, gpus() // devices) if workers is None else at_once
    if isinstance(executor, Executor):
        make: Callable[[], Executor] = lambda: _Borrowed(executor)  # noqa: E731
    elif at_once == 0:
        make = Here
    else:
        from lrkit.registry import current

        current().get("executor", executor)
        _check_workers_know(plan)
        make = lambda: _made(executor, at_once, each, address)  # noqa: E731
    _check_trackers(report_to)
    conditions = Conditions(
        # A cell in several processes shares its threads among them.
        threads=max(1, each // devices) if not isinstance(executor, Executor) or threads else None,
        checkpoint_seconds=checkpoint_seconds,
        report_to=tuple(report_to),
    )
    begun = None if started is None else lambda missing, total: started(missing, total, max(1, at_once))
    outcome = carry_out(plan, folder, executor=make, conditions=conditions, told=told, started=begun, keep_old=keep_old)
    if costs:
        from lrkit.study.cost import measure

        measure(plan, outcome.folder, threads=threads or threads_asked() or cores, told=cost_told)
    return outcome


def _made(name: str, workers: int, threads: int, address: str | None) -> Executor:
    from lrkit.registry import current

    made = current().made("executor", name, workers, threads, address)
    if not issubclass(type(made), Executor):
        raise LrkitError(f'executor "{name}" gives {text_of(made)}, which is no concurrent.futures.Executor')
    executor: Executor = made
    return executor


def threads_asked() -> int | None:
    """CPU threads that ``OMP_NUM_THREADS`` asks for; None where it does not."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and 0 < int(first) <= 1024 else None


def _check_workers_know(plan: Plan) -> None:
    """Worker processes have what is installed, and not what was registered in this one."""
    from lrkit.registry import current

    used = [pair for row in plan.rows for pair in components_of(to_plain(row.method))]
    used += [("task", task.name.partition("/")[0]) for task in plan.tasks if task.data is None]
    for kind, name in used:
        if not current().is_installed(kind, name):
            raise LrkitError(
                f'{kind} "{name}" is registered in this process alone, and worker processes would not know it: give '
                "workers=0, or install it as a plug-in (lrkit plugins new)"
            )


def _check_trackers(names: Sequence[str]) -> None:
    if names:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        known = sorted(INTEGRATION_TO_CALLBACK)
        for name in names:
            if name not in known:
                raise LrkitError(f'there is no tracker "{name}"{nearest(name, known)}; there are {", ".join(known)}')


def row_devices(plan: Plan) -> list[int]:
    """Devices that the cells of each row and task take."""
    return [plan.settings(row, task, 0).devices for row in plan.rows for task in plan.tasks]


__all__ = ["ablate", "perform", "read_study"]
