"""A cell: one method on one task with one seed, named by a hash of everything that decides its result.

For example, two studies in the same folder that ask for the same method, task, model, seed, settings and code share a
cell, and it is trained once.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from functools import cache, cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs

from lrkit.reading import opened
from lrkit.settings import as_plain
from lrkit.study.loading import loading_from
from lrkit.study.needs import Need, needs_from
from lrkit.study.run_settings import ATTACH, rates
from lrkit.study.store import digest_of
from lrkit.study.task_spec import TaskSpec

_BEFORE: dict[str, Any] = {"train_also": "auto", "needs": (), "selection": None, "stop": None, "loading": {}}
"""The attributes that a cell did not always have, and the values that leave its name as it was then."""

_LATER = (*ATTACH, "group_by_length")
"""The settings of a run that there were not always: at their defaults, which are false, they are not in a cell's name."""

_NUMBER = "0.1.0"
"""The version under which lrkit and plug-ins count in a cell's name: their code counts itself, and a number is no code."""


@attrs.frozen(kw_only=True)
class Cell:
    """One run of a study, as plain data.

    Args:
        task: `TaskSpec`'s task, data and metric, and its options if it has any.
        model: the model that was asked for.
        loading: how it is loaded, as `lrkit.study.loading.Loading.to_plain` has it.
        targets: as `lrkit.attach` takes it.
        method: plain data.
        run: plain data of `RunSettings` with the learning rates in force; seed included; without threads, and
            without those of `_LATER` that are at their defaults.
        versions: of whatever can change the result; file digests of a data or model folder, and of the code.
        train_also: as `lrkit.attach` takes it.
        needs: what it takes from other cells, in the order in which it is filled in.
        selection: the seed of the split that sets rows of the training data aside, and scores the run on them instead of
            on the validation rows; None for the validation rows. See `lrkit.tasks.Task.selection`.
        stop: the step after which the run ends and is scored, its schedules being bound to all of its steps; None for
            the last one.
    """

    task: dict[str, Any]
    model: str
    targets: Any
    method: dict[str, Any]
    run: dict[str, Any]
    versions: dict[str, str]
    train_also: Any = "auto"
    needs: tuple[Need, ...] = attrs.field(default=(), converter=needs_from)
    selection: int | None = None
    stop: int | None = None
    loading: dict[str, Any] = attrs.field(factory=dict)

    @cached_property
    def key(self) -> str:
        """Return its name: the first 16 hexadecimal digits of a SHA-256 over its canonical JSON.

        A folder of data or of a model counts by its content, not by its path.
        """
        plain = {**self.to_plain(), "versions": self._counted}
        for name, default in _BEFORE.items():
            if getattr(self, name) == default:
                del plain[name]  # as it was named before there was a choice
        if "data" in self.versions:
            plain["task"]["data"] = self.versions["data"]
        if "model" in self.versions:
            plain["model"] = self.versions["model"]
        return digest_of(plain)

    @property
    def setup(self) -> str:
        """Hash what all cells of a study on one task must share: task, model, and versions but plug-ins'."""
        # A cell of other code is a cell of this study all the same: it is shown as such, and computed again.
        counted = self._counted
        common = {name: counted.get(name) for name in ("lrkit", "torch", "transformers", "data", "model")}
        return digest_of([{**self.task, "data": None}, common])

    @property
    def _counted(self) -> dict[str, str]:
        """Return the versions as they count: of packages that the digest of the code covers, whatever their number is."""
        foreign = {"torch", "transformers", "data", "model", "code", loading_from(self.loading).package}
        return {name: each if name in foreign else _NUMBER for name, each in self.versions.items()}

    @property
    def seed(self) -> int:
        """Return its seed."""
        return int(self.run["seed"])

    def to_plain(self) -> dict[str, Any]:
        """Return plain data; `Cell(**plain)` is an equal cell."""
        return attrs.asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, planned: bool = False) -> "Cell":
        """Make a cell from a ``config.json``: as it was trained, or as it was planned before its needs were settled."""
        plain = {**config, **config.get("planned", {})} if planned else {**config, "needs": ()}
        return cls(**{field.name: plain[field.name] for field in attrs.fields(cls) if field.name in plain})

    def to_config(self, planned: "Cell", sources: Mapping[str, str]) -> dict[str, Any]:
        """Return the content of ``config.json`` for this cell, which was planned as another one if that has needs.

        Args:
            planned: the other one.
            sources: digests of the results of the cells that it needs, by key.
        """
        plain = {"key": planned.key, "seed": self.seed, **self.to_plain()}
        if not planned.needs:
            return plain
        before = {name: each for name, each in planned.to_plain().items() if name not in ("task", "model", "versions")}
        return plain | {"sources": dict(sources), "planned": before}


def make_cell(
    method: Mapping[str, Any],
    task: TaskSpec,
    model: str,
    targets: Any,
    run: Mapping[str, Any],
    train_also: Any = "auto",
    loading: Mapping[str, Any] | None = None,
) -> Cell:
    """Make a cell with the versions of this machine.

    Args:
        method: plain data.
        task: the task.
        model: ``"minilm"``, a folder or a hub id.
        targets: as `lrkit.attach` takes it.
        run: plain data of `RunSettings`.
        train_also: as `lrkit.attach` takes it.
        loading: how the model is loaded, as plain data; None for the defaults.
    """
    # Threads change the speed, and the last bits; they are in env.json. Keys are as they were before there was a choice.
    settings = {key: value for key, value in as_plain(run).items() if key != "threads" and (value or key not in _LATER)}
    settings["lr"], settings["head_lr"] = _rates(method, run)
    where = {
        "task": task.task,
        "data": None if task.data is None else os.path.abspath(task.data),
        "metric": task.metric,
        **({"options": as_plain(task.options)} if task.options else {}),  # a key is as it was before there were any
    }
    folder = os.path.abspath(model) if os.path.isdir(model) else model
    return Cell(
        task=where,
        model=folder,
        targets=targets,
        method=dict(method),
        run=settings,
        versions=_versions(method, task.task, where["data"], folder, loading_from(loading or {}).package),
        train_also=train_also,
        loading=dict(loading or {}),
    )


def _rates(method: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[float, float]:
    from lrkit.compose import from_plain

    return rates(from_plain(method).parameterization, run.get("lr"), run.get("head_lr"))


def code_of(method: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """Compute the digest of the code that a cell's result depends on.

    Args:
        method: plain data.
        task: of a cell, or ``{"task": name}``.
    """
    from lrkit.study.code import digest_of

    name = None if task.get("data") else task.get("task")
    return digest_of([*components_of(method), *([] if name is None else [("task", name.partition("/")[0])])])


def components_of(method: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List kind and name of every component of a method in plain data."""
    for kind, part in method.items():
        if kind == "also":
            for policy in part:
                yield from components_of(policy)
        elif part is not None:
            yield kind, part["name"]


def _versions(
    method: Mapping[str, Any], task: str | None, data: str | None, model: str, quantizer: str | None
) -> dict[str, str]:
    from lrkit.registry import current
    from lrkit.tasks.splits import place_of

    packages = {"lrkit", "torch", "transformers"} | ({quantizer} if quantizer else set())
    found = {}
    offers = current().offers()
    for kind, name in components_of(method):
        packages |= {o.distribution.partition(" ")[0] for o in offers if (o.kind, o.name) == (kind, name)}
    if data is not None:
        found["data"] = _digest(place_of(data).named())
    elif task is not None:
        name = task.partition("/")[0]
        packages |= {o.distribution.partition(" ")[0] for o in offers if (o.kind, o.name) == ("task", name)}
    if os.path.isdir(model):
        files = (path for path in Path(model).iterdir() if path.is_file() and not path.name.startswith("."))
        found["model"] = _digest({path.name: path for path in files})
    for package in sorted(packages):
        found[package] = _version(package)
    found["code"] = code_of(method, {"task": task, "data": data})
    return found


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except Exception:  # added in this process, or with metadata that cannot be read
        return "unknown"


def _digest(files: Mapping[str, Path]) -> str:
    """Hash files' names and contents."""
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        stat = path.stat()
        digest.update(f"{name} {_content(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)} ".encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1024)
def _content(path: str, size: int, changed: int, inode: int) -> str:
    """Hash a file as it is now; it is read again if its size, its time or its inode changes."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
