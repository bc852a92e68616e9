"""Ablations from Python: swap one component, run the seeds, get one table: `ablate`."""

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.compose import component_to_plain, to_plain
from lrkit.errors import LrkitError, LrkitWarning, shown
from lrkit.method import FIELDS, Method
from lrkit.study.asked import SEEDS, Study, standing_in, study_from, study_named
from lrkit.study.catalogue import names
from lrkit.study.execute import execute
from lrkit.study.plan import lay_out
from lrkit.study.reach import METHOD
from lrkit.study.taken import source_of

if TYPE_CHECKING:
    from lrkit.study.statistics import Table


_OF_METHOD = (
    *("swap", "task", "model", "loading", "targets", "train_also", "seeds", "run", "set", "rows", "leave_out", "grid"),
    *("title", "margin", "tune"),
)
"""Arguments of `ablate` that a study has of its own."""


def ablate(
    base: "str | Method | Study",
    swap: Mapping[str, Sequence[Any]] | None = None,
    *,
    out: str | os.PathLike[str],
    task: "str | Sequence[Any]" = "movies",
    model: str = "minilm",
    loading: Mapping[str, Any] | None = None,
    targets: str | Sequence[str] = "all-linear",
    train_also: str | Sequence[str] = "auto",
    seeds: int | Sequence[int] = SEEDS,
    run: Mapping[str, Any] | None = None,
    set: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    leave_out: Sequence[str] = (),
    grid: bool = False,
    title: str = "",
    margin: float | None = None,
    tune: Mapping[str, Any] | None = None,
    profile: str | None = None,
    executor: str | Executor = "local",
    workers: int | None = None,
    address: str | None = None,
    costs: bool = True,
    checkpoint_seconds: float = 60.0,
    report_to: Sequence[str] = (),
    keep_old: bool = False,
    recompute: bool = False,
    packed: str | os.PathLike[str] | None = None,
    data: Mapping[str, str | os.PathLike[str]] | None = None,
) -> "Table":
    """Swap parts of a method one at a time, train every row with every seed, and compare.

    Called again with the same folder it runs only what is missing or failed, and takes up what was killed at its last
    checkpoint, bit for bit.

    >>> table = lrkit.ablate("adalora", {"metric": ["sensitivity", "magnitude"]}, seeds=6, out="study")
    >>> print(table)                # and table.frame() for pandas

    Args:
        base: a method's name, a `lrkit.Method`, or a whole study: a `Study`, the name of one that ships, or a path that ends
            in ``.toml``. A study says by itself what is compared: `swap` and all that follows but `out`, `profile`, `data`
            and how to run it are of a method alone.
        swap: component or setting to the values to try: ``{"metric": ["magnitude"], "action.ties": ["threshold"]}``. A
            component is a name, a table with a name and settings, or an instance.
        out: the study's folder; a new one, or the same study's.
        task: a task's name, a list of names, or tables as in a study file.
        model: ``"minilm"``, a folder or a hub id.
        loading: how it is loaded: settings of `lrkit.study.loading.Loading`.
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
        margin: differences of the primary score that are smaller than this do not matter (0.01 is one point of accuracy):
            rows are also tested for equivalence. It is written down before the first test cell, and stays.
        tune: settings that trials choose before the test cells, for every row by itself: ``{"run.lr": [3e-4, 1e-3]}``, or
            ``[tune]`` of a study file: ``{"space": {"run.lr": "log(1e-4,1e-2,5)"}, "seeds": 2, "sampler": "grid"}``.
        profile: of a study file, such as ``"paper"``; None for its first.
        executor: ``"local"``, ``"ray"``, a plug-in's name, or any `concurrent.futures.Executor`.
        workers: cells at a time; None: one per GPU, or one per CPU core up to four. 0: in this process, which knows
            components that nobody has installed.
        address: of a cluster, for executors that have one.
        costs: measure time and memory of each row against the base, after the cells.
        checkpoint_seconds: time between checkpoints.
        report_to: trackers of transformers' Trainer that get the curves too, such as ``"tensorboard"``.
        keep_old: keep cells that are done and of other code (the sources of lrkit or of a plug-in have changed since),
            instead of computing them again.
        recompute: compute cells of other code again, and those that were taken in from a pack; the opposite of `keep_old`.
        packed: a pack (`lrkit.study.pack`), or its folder, whose finished cells are taken in first. Without it, the one in
            `out` or, for a study that ships, ``docs/replication/NAME/cells.jsonl.gz`` below the current folder, if there
            is one.
        data: task to the folder of data that stands in for it: ``{"glue/sst2": "my/sst2"}``, where there is no hub.

    Returns:
        The table; ``table.frame()`` is a pandas frame.

    Raises:
        LrkitError: something in the study cannot run (told before the first step), or `out` holds something else; or an
            argument is of a method, and a study was given.
    """
    asked = dict(locals())
    from lrkit.study.paired import too_few_seeds
    from lrkit.study.records import read_study
    from lrkit.study.report import write_report
    from lrkit.study.statistics import compare

    source = source_of(packed, base, Path(out))
    if isinstance(base, str) and (base.endswith(".toml") or base in names()):
        base, profile = study_named(base, profile=profile), None
    if profile is not None:
        raise LrkitError(f'ablate: profile="{profile}" is of a study file, and base is none')
    if isinstance(base, Study):
        _refuse_of_method(asked)
    study = (
        base
        if isinstance(base, Study)
        else _study(
            *(base, swap, task, model, targets, seeds, run, set, rows, leave_out, grid, title),
            train_also=train_also,
            margin=margin,
            tune=tune,
            loading=loading,
        )
    )
    plan = lay_out(standing_in(study, data or {}))
    if few := too_few_seeds(len(plan.rows) - 1, len(plan.seeds)):
        warnings.warn(few, LrkitWarning, stacklevel=2)
    outcome = execute(
        plan,
        Path(out),
        executor=executor,
        workers=workers,
        address=address,
        costs=costs,
        checkpoint_seconds=checkpoint_seconds,
        report_to=report_to,
        keep_old=keep_old,
        recompute=recompute,
        packed=source,
    )
    for name, error in outcome.failed:
        warnings.warn(f"cell {name} failed: {error}", LrkitWarning, stacklevel=2)
    write_report(outcome.folder)
    return compare(read_study(outcome.folder))


def _refuse_of_method(asked: Mapping[str, Any]) -> None:
    """Raise LrkitError for an argument of `ablate` that a study has of its own, by name to value."""
    defaults = inspect.signature(ablate).parameters
    given = [name for name in _OF_METHOD if asked[name] != defaults[name].default]
    if given:
        raise LrkitError(
            f"ablate: {', '.join(given)} {'is' if len(given) == 1 else 'are'} of a method that is ablated, and a study has "
            "its own: change the study, attrs.evolve(study, seeds=...), or the file"
        )


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
    margin: float | None = None,
    tune: Mapping[str, Any] | None = None,
    loading: Mapping[str, Any] | None = None,
) -> Study:
    """Make a study of `ablate`'s arguments."""
    values = {
        path: [_plain("base" if path == METHOD else path, v) for v in _listed(path, tried)]
        for path, tried in (swap or {}).items()
    }
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
            "loading": dict(loading or {}),
            "targets": targets if isinstance(targets, str) else list(targets),
            "train_also": train_also if isinstance(train_also, str) else list(train_also),
            "seeds": seeds if isinstance(seeds, int) else list(seeds),
            "run": dict(run or {}),
            "margin": margin,
            "tune": None if tune is None else dict(tune) if "space" in tune else {"space": dict(tune)},
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
    """Return a method's or a component's instance as a table; anything else as it is."""
    if path == "base" and isinstance(value, Method):
        return to_plain(value)
    kind = path.rpartition(".")[2] if isinstance(path, str) else ""
    if kind not in FIELDS or not attrs.has(type(value)):
        return value
    return component_to_plain(kind, value)


__all__ = ["ablate"]
