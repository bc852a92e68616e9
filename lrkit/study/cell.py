"""A cell: one method on one task with one seed, named by a hash of everything that decides its result.

`run_cell` is what a worker calls: a function of plain data, so that any executor can carry it anywhere.
"""

import contextlib
import datetime
import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs

from lrkit.errors import LrkitError, cut
from lrkit.foreign import line_of
from lrkit.reading import opened
from lrkit.study.plan import TaskSpec, load_task_of
from lrkit.study.store import LIST, Lines, canonical, check_sum, json_bytes, lock, read_json, write_bytes, write_json

FORMAT = 1
_SPLITS = ("train", "validation")
_training = threading.Lock()
"""Model and random generators are the process's own: an executor of threads runs one cell at a time in each process."""


@attrs.frozen(kw_only=True)
class Cell:
    """One run of a study, as plain data.

    Args:
        task: `TaskSpec`'s task, data and metric.
        model: what was asked for as the model.
        targets: as `lrkit.attach` takes it.
        method: plain data.
        run: plain data of `RunSettings` with the learning rates in force; seed included, threads left out.
        versions: of whatever can change the result; file digests of a data or model folder, and of the code.
        train_also: as `lrkit.attach` takes it.
    """

    task: dict[str, Any]
    model: str
    targets: Any
    method: dict[str, Any]
    run: dict[str, Any]
    versions: dict[str, str]
    train_also: Any = "auto"

    @property
    def key(self) -> str:
        """Its name: the first 16 hexadecimal digits of a SHA-256 over its canonical JSON.

        A folder counts by what is in it, not by where it stands.
        """
        plain = self.to_plain()
        if self.train_also == "auto":
            del plain["train_also"]  # as it was named before there was a choice
        if "data" in self.versions:
            plain["task"]["data"] = self.versions["data"]
        if "model" in self.versions:
            plain["model"] = self.versions["model"]
        return hashlib.sha256(canonical(plain).encode()).hexdigest()[:16]

    @property
    def setup(self) -> str:
        """A hash of what all cells of a study on one task must share: task, model, and versions but plug-ins'."""
        # Of other code it is a cell of this study all the same: it is shown as such, and computed again.
        common = {name: self.versions.get(name) for name in ("lrkit", "torch", "transformers", "data", "model")}
        return hashlib.sha256(canonical([{**self.task, "data": None}, common]).encode()).hexdigest()[:16]

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.run["seed"])

    def to_plain(self) -> dict[str, Any]:
        """Plain data; `Cell(**plain)` is an equal cell."""
        return attrs.asdict(self)


def make_cell(
    method: Mapping[str, Any],
    task: TaskSpec,
    model: str,
    targets: Any,
    run: Mapping[str, Any],
    train_also: Any = "auto",
) -> Cell:
    """A cell with the versions of this machine.

    Args:
        method: plain data.
        task: the task.
        model: ``"minilm"``, a folder or a hub id.
        targets: as `lrkit.attach` takes it.
        run: plain data of `RunSettings`.
        train_also: as `lrkit.attach` takes it.
    """
    # Threads change the speed, and the last bits; they are in env.json.
    settings = {key: value for key, value in run.items() if key != "threads"}
    settings["lr"], settings["head_lr"] = _rates(method, run)
    where = {
        "task": task.task,
        "data": None if task.data is None else os.path.abspath(task.data),
        "metric": task.metric,
    }
    folder = os.path.abspath(model) if os.path.isdir(model) else model
    versions = _versions(method, task.task, where["data"], folder)
    return Cell(
        task=where,
        model=folder,
        targets=targets,
        method=dict(method),
        run=settings,
        versions=versions,
        train_also=train_also,
    )


def _rates(method: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[float, float]:
    from lrkit.compose import from_plain
    from lrkit.study.run import rates

    return rates(from_plain(method).parameterization, run.get("lr"), run.get("head_lr"))


def code_of(method: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """The digest of the code that a cell's result depends on.

    Args:
        method: plain data.
        task: of a cell, or ``{"task": name}``.
    """
    from lrkit.study.code import digest_of

    name = None if task.get("data") else task.get("task")
    return digest_of([*components_of(method), *([] if name is None else [("task", name.partition("/")[0])])])


def _versions(method: Mapping[str, Any], task: str | None, data: str | None, model: str) -> dict[str, str]:
    from lrkit.registry import current

    packages = {"lrkit", "torch", "transformers"}
    found = {}
    offers = current().offers()
    for kind, name in components_of(method):
        packages |= {o.distribution.partition(" ")[0] for o in offers if (o.kind, o.name) == (kind, name)}
    if data is not None:
        found["data"] = _digest([p for p in Path(data).glob("*.jsonl*") if p.name.split(".")[0] in _SPLITS])
    elif task is not None:
        name = task.partition("/")[0]
        packages |= {o.distribution.partition(" ")[0] for o in offers if (o.kind, o.name) == ("task", name)}
    if os.path.isdir(model):
        found["model"] = _digest([p for p in Path(model).iterdir() if p.is_file() and not p.name.startswith(".")])
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


def components_of(method: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Kind and name of every component of a method in plain data."""
    for kind, part in method.items():
        if kind == "also":
            for policy in part:
                yield from components_of(policy)
        elif part is not None:
            yield kind, part["name"]


def _digest(files: list[Path]) -> str:
    """A hash of files' names and contents."""
    digest = hashlib.sha256()
    for path in sorted(files):
        stat = path.stat()
        digest.update(f"{path.name} {_content(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)} ".encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1024)
def _content(path: str, size: int, changed: int, inode: int) -> str:
    """A hash of a file as it is now: what stands beside the path says when it must be read again."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- running ---------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Conditions:
    """How a cell is run: what changes its speed and not its result.

    Args:
        threads: CPU threads; None for torch's own choice.
        checkpoint_seconds: time between checkpoints.
        report_to: trackers of transformers' Trainer.
        keep: keep the trained adapters (``lrkit.safetensors``) of a cell that is done.
    """

    threads: int | None = None
    checkpoint_seconds: float = 60.0
    report_to: tuple[str, ...] = ()
    keep: bool = True


def is_done(folder: Path) -> bool:
    """Whether a cell's folder holds a result, and every file beside it is whole; a damaged one counts as none."""
    return has_result(folder) and damaged(folder) is None


def has_result(folder: Path) -> bool:
    """Whether a cell's folder holds a result, whatever its other files are like."""
    try:
        result = read_json(folder / "result.json")
    except LrkitError:
        return False
    return isinstance(result, dict) and result.get("key") == folder.name and bool(result.get("scores"))


def damaged(folder: Path) -> str | None:
    """The first file of a cell with a result that is not as it was written, or gone; None where all are whole."""
    try:
        listed = read_json(folder / LIST)
    except LrkitError:
        return LIST
    if not isinstance(listed, dict):  # of a cell from before there was a list: what can be read is whole
        return None if listed is None and _can_be_read(folder / "config.json") else "config.json"
    for name, expected in listed.items():
        try:
            if check_sum(folder / name) != expected:
                return str(name)
        except (LrkitError, OSError):
            return str(name)
    return None


def _can_be_read(path: Path) -> bool:
    try:
        return isinstance(read_json(path), dict)
    except LrkitError:
        return False


def run_cell(plain: dict[str, Any], folder: str, conditions: dict[str, Any]) -> dict[str, Any]:
    """Run a cell to its end, from its last checkpoint if there is one. What any executor calls.

    Nothing is raised for a cell that fails: its traceback is kept in ``error.txt``.

    Args:
        plain: `Cell.to_plain`.
        folder: the cell's folder, which all workers reach under this path.
        conditions: plain data of `Conditions`.

    Returns:
        ``{"key", "status": "done" | "failed" | "busy", "score", "error", "seconds"}``; busy: another process runs it now;
        seconds: that it took here, None where it did not come to its end.
    """
    from lrkit.process import as_it_was

    begin = time.monotonic()
    cell, place = Cell(**plain), Path(folder)
    settled = Conditions(**{**conditions, "report_to": tuple(conditions.get("report_to", ()))})
    place.mkdir(parents=True, exist_ok=True)
    answer: dict[str, Any] = {"key": cell.key, "status": "done", "score": None, "error": None, "seconds": None}
    with _training, as_it_was(), lock(place / "lock") as mine:
        if not mine:
            return answer | {"status": "busy"}
        if not is_done(place):
            try:
                _run(cell, place, settled)
            except (KeyboardInterrupt, GeneratorExit):
                raise
            except BaseException as error:
                line = cut(" ".join(str(error).split())) if isinstance(error, LrkitError) else line_of(error)
                note_failure(place, line, traceback.format_exc())
                return answer | {"status": "failed", "error": line}
        tidy(place)
        scores = read_json(place / "result.json")["scores"]
        return answer | {"score": next(iter(scores.values()), None), "seconds": time.monotonic() - begin}


def note_failure(place: Path, line: str, detail: str) -> None:
    """Write down why a cell failed, as far as the disk lets us."""
    with contextlib.suppress(OSError):
        write_bytes(place / "error.txt", cut(detail, 100_000).encode(errors="replace"))
        _attempt(place, {"event": "failed", "error": cut(line)})


def _run(cell: Cell, place: Path, conditions: Conditions) -> None:
    from lrkit.study.run import Record

    record = Record(folder=place, checkpoint_seconds=conditions.checkpoint_seconds, report_to=conditions.report_to)
    now = code_of(cell.method, cell.task)
    if cell.versions.get("code", now) != now:
        raise LrkitError(
            f"this process has other code than the study was begun with ({now}, not {cell.versions['code']}): the same "
            "sources of lrkit and plug-ins must be everywhere, and not change meanwhile"
        )
    write_json(place / "config.json", {"format": FORMAT, "key": cell.key, "seed": cell.seed, **cell.to_plain()})
    write_json(place / "env.json", _environment(conditions))
    host = socket.gethostname()
    _attempt(place, {"event": "begin", "from_step": record.step(), "host": host, "pid": os.getpid()})
    if cell.run.get("devices", 1) > 1 and "LOCAL_RANK" not in os.environ:
        _launch(cell, place, conditions)
    else:
        _train(cell, record, conditions)


def _train(cell: Cell, record: "Any", conditions: Conditions) -> None:
    """Train, and write what came of it: ``result.json`` last."""
    import numpy as np

    from lrkit.compose import from_plain
    from lrkit.study.run import settings_from, train

    place = record.folder
    first = os.environ.get("RANK", "0") == "0"
    if conditions.report_to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(place / "runs")

    def keep(adapted: Any) -> None:
        if conditions.keep and first:
            adapted.save(place)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = train(
            from_plain(cell.method),
            _task(canonical(cell.task), cell.versions.get("data")),
            model=cell.model,
            targets=cell.targets,
            train_also=cell.train_also,
            settings=settings_from({**cell.run, "threads": conditions.threads}),
            done=keep,
            record=record,
        )
    if not first:
        return
    import io

    predictions = io.BytesIO()
    np.savez_compressed(predictions, predictions=result.predictions)
    write_bytes(place / "predictions.npz", predictions.getvalue())
    summary = result.summary.to_plain()
    layers = summary.pop("layers")
    written = {
        "format": FORMAT,
        "key": cell.key,
        "scores": result.scores,
        "majority": result.majority,
        "steps": result.steps,
        "parameters": summary,
        "layers": layers,
        "flops": attrs.asdict(result.flops),
    }
    content = json_bytes(written)
    names = ("config.json", "predictions.npz", *(["lrkit.safetensors"] if conditions.keep else []))
    sums = {name: check_sum(place / name) for name in names}
    write_json(place / LIST, {**sums, "result.json": zlib.crc32(content)})
    write_bytes(place / "result.json", content)
    took = {"step_seconds": result.step_seconds, "train_seconds": result.train_seconds}
    _attempt(place, {"event": "end", "step": result.steps, **took})


@lru_cache(maxsize=4)
def _task(plain: str, digest: str | None) -> Any:
    """Kept between the cells of a worker, as long as its files are the same."""
    import json

    return load_task_of(TaskSpec(**json.loads(plain)))


def tidy(place: Path) -> None:
    """Take away what a cell that is done needs no longer, whenever it was killed."""
    shutil.rmtree(place / "checkpoints", ignore_errors=True)
    for leftover in _leftovers(place):
        leftover.unlink(missing_ok=True)


def _leftovers(place: Path) -> list[Path]:
    return [p for p in (place / "error.txt", place / "conditions.json", *place.glob(".*.*")) if p.is_file()]


def tidy_done(place: Path) -> None:
    """`tidy` a cell that is done, if there is anything to tidy and no other process is at it."""
    if (place / "checkpoints").exists() or _leftovers(place):
        with lock(place / "lock") as mine:
            if mine:
                tidy(place)


def _attempt(place: Path, event: dict[str, Any]) -> None:
    lines = Lines(place / "attempts.jsonl")
    lines.write({**event, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})
    lines.close()


def _environment(conditions: Conditions) -> dict[str, Any]:
    import torch

    names = ("lrkit", "torch", "transformers", "datasets", "numpy", "attrs", "pluggy")
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "threads": conditions.threads or torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": platform.processor() or platform.machine(),
        "packages": {name: metadata.version(name) for name in names},
    }


# ---- several devices -------------------------------------------------------------------------------------------------


def _launch(cell: Cell, place: Path, conditions: Conditions) -> None:
    """Run a cell in as many processes as it has devices, by torchrun."""
    conditions_file = place / "conditions.json"
    write_json(conditions_file, attrs.asdict(conditions))
    devices = str(cell.run["devices"])
    here = [sys.executable, "-m", "lrkit.study.cell", "launch", devices, str(place)]
    done = subprocess.run(here, capture_output=True, text=True, check=False)
    conditions_file.unlink(missing_ok=True)
    if done.returncode or not is_done(place):
        raise LrkitError(f"torchrun ended with {done.returncode}: {cut(_last_error(done.stderr))}")


def _last_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "Error" in line and "ChildFailedError" not in line]
    return lines[0] if lines else text.strip()[-300:]


def _end_with_parent() -> None:
    """End this process when the one that started it has ended: nobody would hold the cell's lock any more."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _main(what: str, *rest: str) -> None:
    """The launcher, or one of the processes that it starts."""
    _end_with_parent()
    if what == "launch":
        from torch.distributed.run import main

        devices, folder = rest
        main(["--standalone", "--nproc-per-node", devices, "-m", "lrkit.study.cell", "rank", folder])
        return
    from lrkit.study.run import Record

    place = Path(rest[0])
    config = read_json(place / "config.json")
    cell = Cell(**{field.name: config[field.name] for field in attrs.fields(Cell) if field.name in config})
    stored = read_json(place / "conditions.json")
    conditions = Conditions(**{**stored, "report_to": tuple(stored["report_to"])})
    record = Record(folder=place, checkpoint_seconds=conditions.checkpoint_seconds, report_to=conditions.report_to)
    _train(cell, record, conditions)


if __name__ == "__main__":
    _main(*sys.argv[1:])
