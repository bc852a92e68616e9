"""What a study is to run: a base method, what is swapped in it, tasks and seeds; laid out in rows and cells.

A *row* is one method, a *cell* is one row on one task with one seed. A study is plain data: from TOML, from the command
line or from Python, it becomes the same `Plan`, and every method in it is built before a step is spent.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.compose import arguments_of, compose, from_plain, to_plain, with_setting
from lrkit.errors import LrkitError, nearest, shown
from lrkit.method import FIELDS, Method
from lrkit.reading import TOML_BYTES, check_plain, parse_toml, read_text
from lrkit.settings import defaults
from lrkit.study.run import RunSettings, settings_from
from lrkit.study.shipped import catalogue, check_required, names, text_of, with_profile

if TYPE_CHECKING:
    from lrkit.tasks import Task

LEAVE_OUT = ("penalty", "policy", "also")
SEEDS = 6
"""With fewer seeds no two-sided paired permutation test can reach p < 0.05: with n pairs the least p is 2/2^n."""

ROWS, CELLS = 2_000, 100_000
"""The most that a study may have."""


@attrs.frozen(kw_only=True)
class RowSpec:
    """A row that is written out.

    Args:
        label: what tables call it; None: made from what it changes.
        base: a method's name, or a method as plain data; None for the study's base.
        set: settings: of the method (``"metric.beta1"``), or arguments of the method's function (``"rank"``).
        swap: component or setting to value: ``{"metric": "magnitude"}``.
        leave_out: of ``"penalty"``, ``"policy"``, ``"also"``.
        run: settings of the run for this row alone, such as ``lr``.
        targets: which layers, for this row alone; None for the study's.
        train_also: which modules train in full, for this row alone; None for the study's. An empty list for none.
    """

    label: str | None = None
    base: Any = None
    set: dict[str, Any] = attrs.field(factory=dict)
    swap: dict[str, Any] = attrs.field(factory=dict)
    leave_out: list[str] = attrs.field(factory=list)
    run: dict[str, Any] = attrs.field(factory=dict)
    targets: str | list[str] | None = None
    train_also: str | list[str] | None = None


@attrs.frozen(kw_only=True)
class TaskSpec:
    """A task of a study: by name, or a folder of data.

    Args:
        task: a task's name.
        data: a folder with ``{train,validation}.jsonl[.gz]``.
        metric: what scores a folder's task.
        run: settings of the run on this task alone.
        set: settings of every row's method on this task alone, such as the schedule. What a row changes itself stays, and a
            row whose parts have no such setting is left as it is.
    """

    task: str | None = None
    data: str | None = None
    metric: str | None = None
    run: dict[str, Any] = attrs.field(factory=dict)
    set: dict[str, Any] = attrs.field(factory=dict)

    @property
    def name(self) -> str:
        """What the study calls it."""
        return self.task or (Path(self.data).resolve().name if self.data else "movies")


@attrs.frozen(kw_only=True)
class Study:
    """A study as it is asked for.

    Args:
        base: a method's name, or a method as plain data.
        label: what tables call the base; None for its name.
        requires: distributions whose components it needs.
        title: for the report.
        note: for the report.
        set: settings of every row, as `RowSpec.set`.
        swap: component or setting to the values to try, one at a time.
        leave_out: leave-one-out rows: ``"penalty"`` (its weight zero), ``"policy"`` (no allocation at all), ``"also"``
            (without the further policies).
        grid: all combinations of `swap` instead of one at a time.
        rows: further rows.
        tasks: tasks' names or `TaskSpec`; ``movies`` where none is given.
        model: ``"minilm"``, a folder or a hub id.
        targets: as `lrkit.attach` takes it.
        train_also: likewise.
        seeds: how many (0, 1, ...), or which.
        run: settings of every run.
    """

    base: Any
    label: str | None = None
    requires: list[str] = attrs.field(factory=list)
    title: str = ""
    note: str = ""
    set: dict[str, Any] = attrs.field(factory=dict)
    swap: dict[str, list[Any]] = attrs.field(factory=dict)
    leave_out: list[str] = attrs.field(factory=list)
    grid: bool = False
    rows: list[RowSpec] = attrs.field(factory=list)
    tasks: list[TaskSpec] = attrs.field(factory=list)
    model: str = "minilm"
    targets: str | list[str] = "all-linear"
    train_also: str | list[str] = "auto"
    seeds: int | list[int] = SEEDS
    run: dict[str, Any] = attrs.field(factory=dict)


# ---- reading ---------------------------------------------------------------------------------------------------------


def shipped() -> dict[str, str]:
    """Names of the studies that ship with lrkit and installed plug-ins, and their titles."""
    return {study.name: study.title for study in catalogue()}


def read_study(source: str, changes: Mapping[str, Any] | None = None, *, profile: str | None = None) -> Study:
    """A study from a TOML file, or from one that ships.

    Args:
        source: a path that ends in ``.toml``, or a name in `shipped`.
        changes: what replaces the file's values, by field.
        profile: one of the file's profiles; None for its first.

    Raises:
        LrkitError: no such file, no TOML, no such profile, an unknown key (with the nearest right one), a value of the wrong
            type, or a plug-in that it needs and that is not installed.
    """
    path = Path(source)
    if source in names() and not path.exists():
        text = text_of(source)
    else:
        try:
            text = read_text(path, TOML_BYTES)
        except FileNotFoundError:
            raise LrkitError(
                f'study "{source}": no such file{nearest(source, names())}; a study is a .toml file or one of '
                f"{', '.join(names())}"
            ) from None
        except LrkitError as error:
            raise LrkitError(f'study "{source}" cannot be read: {error}') from None
    plain = with_profile(parse_toml(text, source), profile, source)
    return study_from(plain | dict(changes or {}), source)


def study_from(plain: Mapping[str, Any], where: str = "study") -> Study:
    """A study from plain data.

    Args:
        plain: as in a TOML file. A task may be a name alone.
        where: what errors call it.

    Raises:
        LrkitError: an unknown key (with the nearest right one), or a value of the wrong type.
    """
    check_plain(plain, where)
    data = with_profile(plain, None, where)
    if "task" in data and "tasks" not in data:
        data["tasks"] = [data.pop("task")]
    if isinstance(data.get("tasks"), list):
        data["tasks"] = [{"task": each} if isinstance(each, str) else each for each in data["tasks"]]
    if "base" not in data:
        raise LrkitError(f"{where}: base is missing: the method that rows are compared with")
    study: Study = _structure(data, Study, where)
    check_required(study.requires, where)
    for spec in study.tasks:
        if (spec.task is None) == (spec.data is None):
            raise LrkitError(f"{where}: tasks: each has either task (a name) or data (a folder)")
    return study


def _structure(data: Mapping[str, Any], cls: type, where: str) -> Any:
    """An attrs class from plain data by cattrs, strictly: no unknown keys, and no value becomes another type."""
    import cattrs
    from cattrs.gen import make_dict_structure_fn

    converter = cattrs.Converter(forbid_extra_keys=True)

    def strictly(*types: type) -> Any:
        def structure(value: Any, _: Any) -> Any:
            if type(value) not in types:
                raise LrkitError(f"must be {' or '.join(_WORDS[t] for t in types)}, not {shown(value)}")
            return value

        return structure

    for kind in (int, str, bool):
        converter.register_structure_hook(kind, strictly(kind))

    def seeds(value: Any, _: Any) -> Any:
        numbers = value if isinstance(value, list) and value else [value]
        if any(type(number) is not int or not 0 <= number < 2**32 for number in numbers) or value == 0:
            raise LrkitError(f"must be a number of seeds (6), or a list of seeds ([0, 1, 2]), not {shown(value)}")
        if len(set(numbers)) < len(numbers) or len(numbers) > 10_000 or (isinstance(value, int) and value > 10_000):
            raise LrkitError("must be different seeds, and at most 10,000")
        return value

    def names(value: Any, _: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            return value
        raise LrkitError(f"must be a text or a list of texts, not {shown(value)}")

    def table(value: Any, hint: Any) -> Any:
        if not isinstance(value, Mapping):
            raise LrkitError(f"must be a table, not {shown(value)}")
        lists = hint == dict[str, list[Any]]
        for key, item in value.items():
            if lists and (not isinstance(item, list) or not item):
                raise LrkitError(f'"{key}" must be a list of values to try, not {shown(item)}')
        return {str(key): item for key, item in value.items()}

    converter.register_structure_hook(int | list[int], seeds)
    converter.register_structure_hook(str | list[str], names)
    converter.register_structure_hook(str | list[str] | None, lambda v, t: None if v is None else names(v, t))
    converter.register_structure_hook_func(lambda t: str(t).startswith("dict["), table)

    def some(value: Any, hint: Any) -> Any:
        if not isinstance(value, list):
            raise LrkitError(f"must be a list, not {shown(value)}")
        inner = hint.__args__[0]
        return [converter.structure(item, inner) for item in value]

    converter.register_structure_hook_func(lambda t: str(t).startswith("list["), some)

    def record(inner: type) -> Any:
        build: Any = make_dict_structure_fn(inner, converter, _cattrs_forbid_extra_keys=True)

        def structure(value: Any, hint: Any) -> Any:
            if not isinstance(value, Mapping):
                raise LrkitError(f"must be a table, not {shown(value)}")
            return build(value, hint)

        return structure

    for inner in (RowSpec, TaskSpec, Study):
        converter.register_structure_hook(inner, record(inner))
    try:
        return converter.structure(data, cls)
    except Exception as error:
        raise LrkitError(f"{where}: {_first(error)}") from None


_WORDS = {int: "a whole number", str: "a text", bool: "true or false"}


def _first(error: BaseException) -> str:
    """The first thing that cattrs found wrong, with its place, in one line."""
    from cattrs.errors import AttributeValidationNote, ForbiddenExtraKeysError

    places: list[str] = []
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
        places += [n.name for n in getattr(error, "__notes__", ()) if isinstance(n, AttributeValidationNote)]
    if isinstance(error, ForbiddenExtraKeysError):
        known = [field.name for field in attrs.fields(error.cl)]
        key = sorted(error.extra_fields)[0]
        error = LrkitError(f'there is no key "{key}"{nearest(key, known)}; there are {", ".join(known)}')
    text = " ".join(str(error).split())
    return f"{'.'.join(places)} {text}" if places else text


# ---- laying out ------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Row:
    """One method of a study.

    Args:
        label: what tables call it; unique in the study.
        method: the method.
        run: settings of its runs that differ from the study's.
        attach: what `lrkit.attach` takes beside the method: ``targets`` and ``train_also``.
        own: paths of the method's settings that the row itself changes.
    """

    label: str
    method: Method
    run: dict[str, Any]
    attach: dict[str, Any]
    own: frozenset[str] = frozenset()


@attrs.frozen(kw_only=True)
class Plan:
    """A study laid out: all methods built, all tasks known.

    Args:
        study: as it was asked for.
        rows: the base first.
        seeds: which.
    """

    study: Study
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """The tasks."""
        return tuple(self.study.tasks) or (TaskSpec(task="movies"),)

    def settings(self, row: Row, task: TaskSpec, seed: int) -> RunSettings:
        """How a cell trains: the study's settings, then the task's, then the row's."""
        return settings_from({**self.study.run, **task.run, **row.run, "seed": seed})

    def method(self, row: Row, task: TaskSpec) -> Method:
        """A row's method on a task, with the task's own settings."""
        plain = to_plain(row.method)
        for path, value in task.set.items():
            # The row comes after the task; and a task's schedule means nothing to a row without one.
            if path not in row.own and (row is self.rows[0] or _has(plain, path)):
                plain = with_setting(plain, path, value)
        return from_plain(plain)


def lay_out(study: Study) -> Plan:
    """All rows of a study, each method built.

    Raises:
        LrkitError: a method, component or setting that does not exist or does not fit, with the row's label.
    """
    base = _compose(study.base, study.set, "base")
    for path in study.swap:
        _check_path(base, path, study)
    # One at a time: each value by itself. A grid: every combination.
    _check_size(study)
    singles = [{path: value} for path, values in study.swap.items() for value in values]
    combinations = (dict(zip(study.swap, values, strict=True)) for values in itertools.product(*study.swap.values()))
    specs = [RowSpec(swap=each) for each in (combinations if study.grid and study.swap else singles)]
    specs += [RowSpec(leave_out=[name]) for name in study.leave_out]
    specs += study.rows
    name = study.label or (study.base if isinstance(study.base, str) else "base")
    where = {"targets": study.targets, "train_also": study.train_also}
    rows = [Row(label=name, method=from_plain(base), run={}, attach=where)]
    seen = {_identity(rows[0])}
    labels = {name}
    for spec in specs:
        label = spec.label or _label(spec)
        try:
            given = {"targets": spec.targets, "train_also": spec.train_also}
            where = {key: getattr(study, key) if value is None else value for key, value in given.items()}
            method, own = _row(base, spec, study)
            row = Row(label=label, method=method, run=dict(spec.run), attach=where, own=own)
            settings_from(row.run)
        except LrkitError as error:
            raise LrkitError(f"row {label}: {error}") from None
        if spec.label is None and _identity(row) in seen:
            continue  # a value that the base has already
        if label in labels:
            raise LrkitError(f'two rows are called "{label}": give each a label of its own')
        seen.add(_identity(row))
        labels.add(label)
        rows.append(row)
    seeds = tuple(range(study.seeds)) if isinstance(study.seeds, int) else tuple(study.seeds)
    names = [task.name for task in study.tasks]
    if len(set(names)) < len(names):
        raise LrkitError(f'two tasks are called "{next(n for n in names if names.count(n) > 1)}"')
    plan = Plan(study=study, rows=tuple(rows), seeds=seeds)
    for given in (study.run, *(task.run for task in plan.tasks), *(row.run for row in rows)):
        for name, instead in (("seed", "seeds"), ("threads", "--threads")):
            if name in given:
                raise LrkitError(f"run.{name} is not a cell's own: use {instead}")
    for task in plan.tasks:
        for row in rows:
            plan.settings(row, task, 0)
            plan.method(row, task)
    return plan


def _check_size(study: Study) -> None:
    """Raise LrkitError for more rows or cells than anybody runs, before any is laid out."""
    tried = [len(values) for values in study.swap.values()]
    rows = 1 + (math.prod(tried) if study.grid and tried else sum(tried)) + len(study.leave_out) + len(study.rows)
    seeds = study.seeds if isinstance(study.seeds, int) else len(study.seeds)
    cells = rows * seeds * max(1, len(study.tasks))
    for what, count, most in (("rows", rows, ROWS), ("cells", cells, CELLS)):
        if count > most:
            raise LrkitError(f"the study has {count:,} {what}; at most {most:,}: try fewer values, or seeds")


def _identity(row: Row) -> tuple[Any, ...]:
    # As text: a target of 1 is a count, one of 1.0 a share, and Python has them equal.
    run = tuple(sorted((key, repr(value)) for key, value in row.run.items()))
    return repr(to_plain(row.method)), run, repr(row.attach)


def _compose(base: Any, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Plain data of a method from its name or plain data, with settings and arguments."""
    if isinstance(base, str):
        return compose(base, settings)
    if not isinstance(base, Mapping):
        raise LrkitError(f"{where} must be a method's name, or a table with a parameterization, not {shown(base)}")
    return compose(to_plain(from_plain(base)), settings)


def _has(plain: Any, path: str) -> bool:
    """Whether there is anything at a path in a method's plain data."""
    for key in path.split("."):
        if isinstance(plain, list) and key.isdecimal() and int(key) < len(plain):
            plain = plain[int(key)]
        elif isinstance(plain, Mapping) and key in plain:
            plain = plain[key]
        else:
            return False
    return True


def _row(base: Mapping[str, Any], spec: RowSpec, study: Study) -> tuple[Method, frozenset[str]]:
    """A row's method, and the paths of what the row itself changes in its base."""
    source, plain = (study.base, dict(base)) if spec.base is None else (spec.base, _compose(spec.base, {}, "base"))
    before = dict(plain)
    known = arguments_of(source) if isinstance(source, str) else []
    # Arguments of the method's function come first (they move several settings together), settings of the row last.
    arguments = {key: value for key, value in {**spec.swap, **spec.set}.items() if key in known}
    if arguments:
        plain = _compose(source, {**(study.set if spec.base is None else {}), **arguments}, "base")
    plain = compose(plain, swaps={path: value for path, value in spec.swap.items() if path not in arguments})
    for name in spec.leave_out:
        plain = _without(plain, name)
    plain = compose(plain, {path: value for path, value in spec.set.items() if path not in arguments})
    method = from_plain(plain)
    own = {change["path"] for change in _differences(before, to_plain(method), "")}
    own |= {path for path in spec.set if "." in path}
    own |= {f"{path}.{key}" for path, value in spec.swap.items() if isinstance(value, Mapping) for key in value}
    return method, frozenset(own)


def _check_path(base: Mapping[str, Any], path: str, study: Study) -> None:
    """A path that leads nowhere is told before any value of it is looked at."""
    kind = path.rpartition(".")[2]
    known = arguments_of(study.base) if isinstance(study.base, str) else []
    if kind in FIELDS or path in known:
        return
    if isinstance(study.base, str) and not nearest(kind, FIELDS):
        compose(study.base, {path: None})
    else:
        compose(base, swaps={path: None})


def _without(plain: Mapping[str, Any], name: str) -> dict[str, Any]:
    from lrkit.registry import current

    if name not in LEAVE_OUT:
        raise LrkitError(f'leave_out: there is no "{name}"{nearest(name, LEAVE_OUT)}; there are {", ".join(LEAVE_OUT)}')
    copy = dict(plain)
    if name == "also":
        if not copy["also"]:
            raise LrkitError("leave_out: the method has no further policies (also)")
        return copy | {"also": []}
    if name == "policy":
        if copy["metric"] is None:
            raise LrkitError("leave_out: the method has no policy")
        return copy | {"metric": None, "scheduler": None, "action": None}
    part = copy["parameterization"]
    weight = current().get("parameterization", part["name"]).penalty_weight
    if weight is None:
        raise LrkitError(f'leave_out: parameterization "{part["name"]}" has no penalty')
    return with_setting(copy, f"parameterization.{weight}", 0.0)


def _label(spec: RowSpec) -> str:
    words = [f"{path}={_shown(path, value)}" for path, value in {**spec.swap, **spec.set}.items()]
    if isinstance(spec.base, str):
        words.insert(0, spec.base)
    words += [f"without {name}" for name in spec.leave_out]
    words += [f"run.{key}={_show(value)}" for key, value in spec.run.items()]
    own = {"targets": spec.targets, "train_also": spec.train_also}
    words += [f"{key}={_show(value)}" for key, value in own.items() if value is not None]
    return ", ".join(words) or "row"


def _shown(path: str, value: Any) -> str:
    """A value in a label. Of a component given with all its settings, those that are not the default."""
    from lrkit.registry import current

    kind = path.rpartition(".")[2]
    if kind in FIELDS and isinstance(value, Mapping) and value.get("name") in current().names(kind):
        usual = defaults(current().get(kind, value["name"]))
        if usual.keys() <= value.keys() - {"name"}:
            named = [
                f"{key}={_show(v)}" for key, v in value.items() if key != "name" and usual.get(key, attrs.NOTHING) != v
            ]
            return f"{value['name']}({', '.join(named)})"
    return _show(value)


def _show(value: Any) -> str:
    if isinstance(value, Mapping) and "name" in value:
        rest = ", ".join(f"{key}={_show(item)}" for key, item in value.items() if key != "name")
        return f"{value['name']}({rest})" if rest else str(value["name"])
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "+".join(value) or "none"
    return "none" if value is None else str(value)


def changes(base: Row, row: Row) -> list[dict[str, Any]]:
    """What a row changed against the base: path, the base's value and the row's.

    A component that was swapped is one change; the settings of what stayed are a change each.
    """
    found = list(_differences(to_plain(base.method), to_plain(row.method), ""))
    found += [{"path": f"run.{key}", "base": base.run.get(key), "value": value} for key, value in row.run.items()]
    for key, value in row.attach.items():
        if value != base.attach[key]:
            found.append({"path": key, "base": _show(base.attach[key]), "value": _show(value)})
    return found


def _differences(old: Any, new: Any, path: str) -> Iterator[dict[str, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("name") == new.get("name"):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and old and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{path}.{index}")
    elif old != new:
        yield {"path": path, "base": _named(old), "value": _named(new, old)}


def _named(value: Any, before: Any = None) -> Any:
    """A component as its name, with the settings that are neither its defaults nor taken over from the one before."""
    if isinstance(value, Mapping):
        if "name" not in value:
            return "a policy"
        own = _settings_of(value["name"])
        there = before if isinstance(before, Mapping) else value
        told = {k: v for k, v in value.items() if k in own and v != own[k] and v != there.get(k)}
        return _show({"name": value["name"], **told})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_named(item) for item in value] if value else None
    return value


def _settings_of(name: str) -> dict[str, Any]:
    """The defaults of a component, whatever kind it is of."""
    from lrkit.registry import current

    found = [offer.value for offer in current().offers() if offer.kind in FIELDS and offer.name == name]
    return defaults(found[0]) if found else {}


def load_task_of(spec: TaskSpec) -> "Task":
    """The task that a spec names, from the registry or a folder. Raises LrkitError where it cannot be had."""
    from lrkit.registry import registered_tasks
    from lrkit.tasks import load_task

    return load_task(spec.task, data=spec.data, metric=spec.metric, tasks=registered_tasks())
