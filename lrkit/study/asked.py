"""A study as it is asked for: plain data from TOML, from the command line or from Python becomes one `Study`.

`study_from` takes plain data, `study_named` a file or the name of a study that ships. Nothing is built here yet:
`lrkit.study.plan.lay_out` does that.
"""

import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError, nearest, shown
from lrkit.reading import TOML_BYTES, check_plain, parse_toml, read_text
from lrkit.strict import Misfit, strict_converter, structured
from lrkit.study.catalogue import check_required, names, text_of
from lrkit.study.claim import Claim
from lrkit.study.loading import loading_from, without_trust
from lrkit.study.published import Published
from lrkit.study.scores import MARGIN
from lrkit.study.shipped import with_profile
from lrkit.study.space import TuneSpec, tune_from
from lrkit.study.task_spec import TaskSpec

if TYPE_CHECKING:
    import cattrs


SEEDS = 6
"""With fewer seeds no two-sided paired permutation test can reach p < 0.05: with n pairs the least p is 2/2^n."""


@attrs.frozen(kw_only=True)
class RowSpec:
    """A row that is written out.

    Args:
        label: its name in tables; None: made from the settings that it changes.
        base: a method's name, or a method as plain data; None for the study's base.
        set: settings: of the method (``"metric.beta1"``), or arguments of the method's function (``"rank"``).
        swap: component or setting to value: ``{"metric": "magnitude"}``.
        leave_out: of ``"penalty"``, ``"policy"``, ``"also"``.
        run: settings of the run for this row alone, such as ``lr``.
        targets: which layers, for this row alone; None for the study's.
        train_also: which modules train in full, for this row alone; None for the study's. An empty list for none.
        source: the label of an earlier row that this one begins with, instead of a base; ``from`` in a study file.
        control: makes it a control of that row (`lrkit.study.controls`): ``"found"``, ``"transplanted"``, ``"shuffled"``,
            ``"random"``, ``"uniform"``, ``"oracle"`` or ``"cut-at-end"``.
        from_task: the task whose ranks are transplanted; None for those of the next seed.
    """

    label: str | None = None
    base: Any = None
    set: dict[str, Any] = attrs.field(factory=dict)
    swap: dict[str, Any] = attrs.field(factory=dict)
    leave_out: list[str] = attrs.field(factory=list)
    run: dict[str, Any] = attrs.field(factory=dict)
    targets: str | list[str] | None = None
    train_also: str | list[str] | None = None
    source: str | None = None
    control: str | None = None
    from_task: str | None = None


@attrs.frozen(kw_only=True)
class Study:
    """A study as it is asked for.

    Args:
        base: a method's name, or a method as plain data.
        label: the base's name in tables; None for its own.
        requires: distributions whose components it needs.
        title: for the report.
        note: for the report.
        set: settings of every row, as `RowSpec.set`.
        swap: component or setting to the values to try, one at a time.
        leave_out: leave-one-out rows: ``"penalty"`` (its weight zero), ``"policy"`` (no allocation at all), ``"also"``
            (without the further policies).
        grid: all combinations of `swap` instead of one at a time.
        rows: further rows.
        tasks: tasks' names or `TaskSpec`; ``movies`` if none is given.
        model: ``"minilm"``, a folder or a hub id.
        loading: how it is loaded: settings of `lrkit.study.loading.Loading`, those at their defaults left out.
        targets: as `lrkit.attach` takes it.
        train_also: likewise.
        seeds: how many (0, 1, ...), or which.
        run: settings of every run.
        margin: differences of the primary score that are smaller than this do not matter (0.01 is one point of accuracy);
            rows are then tested for equivalence, too. None: for a difference alone. Below 1 where the score is a share.
        claims: what is claimed of the rows, and judged by the rule of `lrkit.study.claims`.
        tune: how settings of every row are chosen by trials before its test cells; None to run them as they are given.
        published: values that others published, for a column of their own.
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
    loading: dict[str, Any] = attrs.field(factory=dict)
    targets: str | list[str] = "all-linear"
    train_also: str | list[str] = "auto"
    seeds: int | list[int] = SEEDS
    run: dict[str, Any] = attrs.field(factory=dict)
    margin: float | None = None
    claims: list[Claim] = attrs.field(factory=list)
    tune: TuneSpec | None = None
    published: Published | None = None


def study_named(source: str, changes: Mapping[str, Any] | None = None, *, profile: str | None = None) -> Study:
    """Read a study from a TOML file, or take one that ships.

    Args:
        source: a path that ends in ``.toml``, or a name in `lrkit.study.catalogue.shipped`. A file of that name goes first;
            a folder of that name, for example the one that the study was run into, does not.
        changes: values that replace the file's, by field.
        profile: one of the file's profiles; None for its first.

    Raises:
        LrkitError: no such file, no TOML, no such profile, an unknown key (with the nearest right one), a value of the wrong
            type, or a plug-in that it needs and that is not installed.
    """
    path = Path(source)
    if source in names() and not path.is_file():
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
    without_trust(plain.get("loading"), source)
    return study_from(plain | dict(changes or {}), source)


def study_from(plain: Mapping[str, Any], where: str = "study") -> Study:
    """Make a study from plain data.

    Args:
        plain: as in a TOML file. A task may be a name alone.
        where: the name that errors call it by.

    Raises:
        LrkitError: an unknown key (with the nearest right one), or a value of the wrong type.
    """
    check_plain(plain, where)
    data = with_profile(plain, None, where)
    if "task" in data and "tasks" not in data:
        data["tasks"] = [data.pop("task")]
    if isinstance(data.get("tasks"), list):
        data["tasks"] = [{"task": each} if isinstance(each, str) else each for each in data["tasks"]]
    if isinstance(data.get("rows"), list):
        data["rows"] = [_row(each) if isinstance(each, Mapping) else each for each in data["rows"]]
    if "base" not in data:
        raise LrkitError(f"{where}: base is missing: the method that rows are compared with")
    try:
        study = structured(data, Study, _converter())
    except LrkitError as error:
        raise LrkitError(f"{where}: {error}") from None
    check_required(study.requires, where)
    if study.margin is not None and not 0 < study.margin < math.inf:
        raise LrkitError(f"{where}: margin must be a number above 0{MARGIN}, not {study.margin:g}")
    loading = loading_from(study.loading, f"{where}: loading")
    for spec in study.tasks:
        if spec.task is None and spec.data is None:
            raise LrkitError(
                f"{where}: tasks: each has task (a name), data (a folder), or both, if it stands in for the task's"
            )
    return attrs.evolve(study, loading=loading.to_plain())


def standing_in(study: Study, data: Mapping[str, Any]) -> Study:
    """Let folders of data stand in for tasks that a study names, which keep their names and metrics.

    Args:
        study: the study.
        data: the task's name to the folder.

    Raises:
        LrkitError: the study names no such task.
    """
    known = [spec.task for spec in study.tasks if spec.task is not None] or [TaskSpec().name]
    for name in data:
        if name not in known:
            raise LrkitError(
                f'data: the study has no task "{name}"{nearest(name, known)} that a folder could stand in for; it has '
                f"{', '.join(known)}"
            )
    if not data:
        return study
    tasks = list(study.tasks) or [TaskSpec(task=TaskSpec().name)]
    folders = {name: os.fspath(folder) for name, folder in data.items()}
    return attrs.evolve(study, tasks=[attrs.evolve(t, data=folders.get(t.task or "", t.data)) for t in tasks])


def with_options(study: Study, options: Mapping[str, Any]) -> Study:
    """Give every task of a study further options (``--set task.NAME=VALUE``)."""
    if not options:
        return study
    tasks = list(study.tasks) or [TaskSpec(task=TaskSpec().name)]
    return attrs.evolve(study, tasks=[attrs.evolve(task, options={**task.options, **options}) for task in tasks])


def _row(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with ``from``, which Python keeps for itself, as ``source``."""
    return {"source" if key == "from" else key: value for key, value in plain.items()}


@cache
def _converter() -> "cattrs.Converter":
    """Make the strict converter with the unions that only a study has, and refuse unknown keys."""
    converter = strict_converter(forbid_extra_keys=True)
    converter.register_structure_hook(int | list[int], _seeds)
    converter.register_structure_hook(str | list[str], _names)
    converter.register_structure_hook(str | list[str] | None, lambda v, t: None if v is None else _names(v, t))
    converter.register_structure_hook_func(lambda hint: hint == dict[str, list[Any]], _tried)
    converter.register_structure_hook(TuneSpec | None, lambda v, _: None if v is None else _tune(v))
    return converter


def _tune(value: Any) -> TuneSpec:
    try:
        return tune_from(value, "tune")
    except LrkitError as error:
        raise Misfit(str(error).removeprefix("tune").lstrip(".")) from None


def _seeds(value: Any, _: Any) -> Any:
    numbers = value if isinstance(value, list) and value else [value]
    if any(type(number) is not int or not 0 <= number < 2**32 for number in numbers) or value == 0:
        raise Misfit(f"must be a number of seeds (6), or a list of seeds ([0, 1, 2]), not {shown(value)}")
    if len(set(numbers)) < len(numbers) or len(numbers) > 10_000 or (isinstance(value, int) and value > 10_000):
        raise Misfit("must be different seeds, and at most 10,000")
    return value


def _names(value: Any, _: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return value
    raise Misfit(f"must be a text or a list of texts, not {shown(value)}")


def _tried(value: Any, _: Any) -> dict[str, list[Any]]:
    if not isinstance(value, Mapping):
        raise Misfit(f"must be a table, not {shown(value)}")
    for key, item in value.items():
        if not isinstance(item, list) or not item:
            raise Misfit(f'"{key}" must be a list of values to try, not {shown(item)}')
    return {str(key): item for key, item in value.items()}
