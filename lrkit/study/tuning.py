"""Tuning as it is asked for: which settings are tried, on which seeds, and what a setting is called in each row.

For example, ``space = {"run.lr": [3e-4, 1e-3, 3e-3], "alpha": "log(4,32,3)"}`` is a grid of nine trials for every row.
Nothing is built or trained here: `lrkit.study.graph` makes cells of it, and `lrkit.study.choosing` chooses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.compose import arguments_of, from_plain, to_plain, with_setting
from lrkit.errors import LrkitError, nearest
from lrkit.settings import check_settings, is_at
from lrkit.study.run_settings import RunSettings, settings_from
from lrkit.study.space import Domain, TuneSpec, domain, ends, grid, optuna_version, space_of

if TYPE_CHECKING:
    from lrkit.study.plan import Plan

SAMPLERS = ("grid", "tpe")
RUN = ("lr", "head_lr", "lr_warmup", "weight_decay", "grad_clip", "batch_size")
"""Settings of a run that may be tuned: the others say how long a run is, what it sees or where it runs."""


def check_tune(tune: TuneSpec, seeds: Sequence[int]) -> None:
    """Raise LrkitError if a study of some test seeds cannot be tuned so."""
    if not tune.space:
        raise LrkitError('tune: space is empty: {"run.lr": [3e-4, 1e-3, 3e-3]} for example')
    if tune.sampler not in SAMPLERS:
        hint = nearest(tune.sampler, SAMPLERS)
        raise LrkitError(f'tune: there is no sampler "{tune.sampler}"{hint}; there are {", ".join(SAMPLERS)}')
    if both := sorted({*tune.tuning_seeds} & {*seeds}):
        raise LrkitError(f"tune: seed {both[0]} is one of the study's own: settings are chosen on seeds of their own")
    if tune.sampler == "grid" and tune.trials is not None:
        raise LrkitError(f"tune: a grid has as many trials as combinations ({tune.count}): trials is for tpe")
    if tune.sampler == "tpe" and (tune.trials or 0) < 1:
        raise LrkitError('tune: sampler = "tpe" needs trials, how many each row has: trials = 16')
    if tune.sampler == "tpe":
        optuna_version()
    for name, least in (("batch", 1), ("halving", 2), ("seed", 0)):
        if (value := getattr(tune, name)) is not None and not least <= value < 2**31:
            raise LrkitError(f"tune: {name} must be {least} or more, not {value}")
    if tune.halving is not None and (tune.sampler != "grid" or "run.batch_size" in tune.space):
        raise LrkitError("tune: halving goes with a grid, and with batches of one size: leave one of the two out")
    if tune.halving is not None and tune.count < tune.halving:
        raise LrkitError(
            f"tune: of {tune.count} trials none in {tune.halving} can go on: try more values, or leave halving out"
        )
    for path, tried in tune.domains.items():
        kind, _, name = path.partition(".")
        if kind == "run" and name not in RUN:
            allowed = ", ".join(f"run.{each}" for each in RUN)
            raise LrkitError(f"tune: {path} is the same for every trial{nearest(name, RUN)}; of a run: {allowed}")
        if kind == "run":
            for value in ends(tried):
                settings_from({name: value})


# ---- the space of a row ----------------------------------------------------------------------------------------------


def paths_in(
    tune: TuneSpec, base: Any, compose: Callable[[Mapping[str, Any]], dict[str, Any]], label: str
) -> dict[str, str]:
    """Find what each setting that is tuned is called in a row.

    Args:
        tune: what is asked for.
        base: the row's method by name, or as plain data.
        compose: makes the row's method with further settings.
        label: the row's, for errors.

    Returns:
        Setting as it is asked for to its path in plain data. With a sampler, settings that the row lacks are left out.

    Raises:
        LrkitError: the row lacks a setting of a grid, or an argument is not one setting of it.
    """
    found: dict[str, str] = {}
    for name, tried in tune.domains.items():
        path: str | None = name
        if not name.startswith("run."):
            path = _path_of(name, tried, base, compose)
        if path in found.values():
            raise LrkitError(f"tune {name}: {path} is tuned already, under another name")
        if path is not None:
            found[name] = path
        elif tune.sampler == "grid":
            raise LrkitError(_lacks(name, label))
    return found


def inherited(tune: TuneSpec, source: Mapping[str, str], plain: Mapping[str, Any], label: str) -> dict[str, str]:
    """Find what each setting that is tuned is called in a row that begins with another one; as `paths_in`.

    Args:
        tune: what is asked for.
        source: what they are called in the other row.
        plain: the row's method.
        label: the row's, for errors.
    """
    found = {name: path for name, path in source.items() if path.startswith("run.") or is_at(plain, path)}
    lacking = [name for name in tune.space if name not in found]
    if lacking and tune.sampler == "grid":
        raise LrkitError(_lacks(lacking[0], label))
    return found


def _lacks(name: str, label: str) -> str:
    if name in attrs.fields_dict(RunSettings):
        return f'tune: row "{label}" has no setting "{name}" (did you mean "run.{name}"?)'
    return (
        f'tune: row "{label}" has no setting "{name}", and a grid would give it fewer trials than the others: tune it in a '
        'study without this row, or take sampler = "tpe" (--sampler tpe --trials N), which gives each row as many'
    )


def _path_of(name: str, tried: Domain, base: Any, compose: Callable[[Mapping[str, Any]], dict[str, Any]]) -> str | None:
    """Return the path of a setting of the method; None if it has none."""
    plain = compose({})
    if "." in name:
        return name if is_at(plain, name) else None
    if name not in arguments_of(base):
        return None
    low, high = ends(tried)[0], ends(tried)[-1]
    if low == high:
        raise LrkitError(f"tune {name}: one value is nothing to choose from: --set {name}={low} sets it")
    one, other = (dict(_leaves(to_plain(from_plain(compose({name: value}))))) for value in (low, high))
    differ = [path for path in {**one, **other} if one.get(path) != other.get(path)]
    if len(differ) != 1 or one[differ[0]] != low or other[differ[0]] != high:
        which = ", ".join(differ) or "nothing"
        raise LrkitError(
            f"tune {name}: this argument moves {which}, not one setting to its value: tune the setting itself"
        )
    return differ[0]


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """List path and value of every setting."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, Mapping):
        return [(path, value)]
    return [leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}" if path else key)]


def with_settings(
    method: Mapping[str, Any], run: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Change settings of a method and of a run, both plain data.

    Args:
        method: the method.
        run: the run.
        settings: path to value: ``{"run.lr": 1e-3, "parameterization.alpha": 16.0}``.

    Raises:
        LrkitError: a value that the method or the run does not take.
    """
    plain, of_run = dict(method), {}
    for path, value in settings.items():
        if path.startswith("run."):
            of_run[path.removeprefix("run.")] = value
        else:
            plain = with_setting(plain, path, value)
    return to_plain(from_plain(plain)), {**run, **check_settings(RunSettings, of_run, "run")}


def check_schedules(tune: TuneSpec, paths: Mapping[str, str], method: Mapping[str, Any], steps: int) -> None:
    """Raise LrkitError if a schedule that is tried does not fit a run.

    Args:
        tune: what is tuned.
        paths: what each setting is called in the row.
        method: the row's, as plain data.
        steps: of the run.
    """
    space = {path: value for path, value in space_of(tune, paths).items() if not path.startswith("run.")}
    if tune.sampler == "tpe":
        each = [(path, value) for path, tried in space.items() for value in ends(domain(tried, path))]
        tried_settings = [{path: value} for path, value in each]
    else:
        tried_settings = grid(space)
    for settings in tried_settings:
        changed, _ = with_settings(method, {}, settings)
        try:
            for policy in from_plain(changed).policies:
                policy.scheduler.over(steps, units=1, layers=1)
        except LrkitError as error:
            told = ", ".join(f"{path}={value}" for path, value in settings.items())
            raise LrkitError(f"tuned, {told}: {error}") from None


def check_rows(tune: TuneSpec, plan: "Plan") -> None:
    """Raise LrkitError if a row cannot take a value that is tried, or two rows differ in nothing but in what is tuned."""
    seen: dict[str, str] = {}
    for row in plan.rows:
        space = {path: domain(value, path) for path, value in space_of(tune, row.tuned).items()}
        first = {path: ends(tried)[0] for path, tried in space.items()}
        for spec in plan.tasks:
            method, run = to_plain(plan.method(row, spec)), attrs.asdict(plan.settings(row, spec, 0))
            for settings in [first] if tune.sampler == "tpe" else grid(space_of(tune, row.tuned)):
                try:
                    with_settings(method, run, settings)
                except LrkitError as error:
                    raise LrkitError(f"row {row.label}, tuned: {error}") from None
            if spec is plan.tasks[0]:
                same = repr([*with_settings(method, run, first), row.attach, row.control])
                if same in seen:
                    raise LrkitError(f'rows "{seen[same]}" and "{row.label}" differ in nothing but in what is tuned')
                seen[same] = row.label
