"""Run one cell: `run_cell`, a function of plain data, so that any executor can carry it to any worker.

A cell with several devices is launched by torchrun, as so many processes of this module.
"""

import contextlib
import ctypes
import gc
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs

from lrkit.errors import LrkitError, cut
from lrkit.foreign import line_of
from lrkit.study.answers import keep_answers
from lrkit.study.cell import Cell, code_of
from lrkit.study.cell_folder import PACKED, digest_of_result, follows, forget, is_done, note_attempt, note_failure, tidy
from lrkit.study.checkpoints import Record
from lrkit.study.run_settings import settings_from
from lrkit.study.settling import settle
from lrkit.study.store import FORMAT, LIST, canonical, check_sum, json_bytes, lock, read_json, write_bytes, write_json
from lrkit.study.task_spec import TaskSpec, load_task_of

_training = threading.Lock()
"""Model and random generators belong to the process: an executor of threads runs one cell at a time in each process."""


def _texts(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen(kw_only=True)
class Conditions:
    """The conditions under which a cell runs: they change its speed, and not its result.

    Args:
        threads: CPU threads; None for torch's own choice.
        checkpoint_seconds: time between checkpoints.
        report_to: trackers of transformers' Trainer.
        keep: keep the trained adapters (``lrkit.safetensors``) of a cell that is done.
    """

    threads: int | None = None
    checkpoint_seconds: float = 60.0
    report_to: tuple[str, ...] = attrs.field(default=(), converter=_texts)
    keep: bool = True

    def record(self, folder: Path) -> Record:
        """Return the record of a cell in a folder."""
        return Record(folder=folder, checkpoint_seconds=self.checkpoint_seconds, report_to=self.report_to)


def run_cell(plain: dict[str, Any], folder: str, conditions: dict[str, Any]) -> dict[str, Any]:
    """Run a cell to its end, from its last checkpoint if there is one. Every executor calls this.

    A cell that fails raises nothing: its traceback is kept in ``error.txt``.

    Args:
        plain: `Cell.to_plain`.
        folder: the cell's folder, which all workers reach under this path.
        conditions: plain data of `Conditions`.

    Returns:
        ``{"key", "status": "done" | "failed" | "busy", "score", "error", "seconds"}``. Busy: another process runs it now.
        Seconds: the time that it took here, None if it did not come to its end.
    """
    from lrkit.process import as_it_was

    begin = time.monotonic()
    cell, place = Cell(**plain), Path(folder)
    settled = Conditions(**conditions)
    answer: dict[str, Any] = {"key": cell.key, "status": "done", "score": None, "error": None, "seconds": None}
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return answer | {
            "status": "failed",
            "error": f"{place} cannot be made ({error.strerror}): remove what is there",
        }
    with _training, as_it_was(), lock(place / "lock") as mine:
        if not mine:
            return answer | {"status": "busy"}
        if not follows(place):
            forget(place)
        if not is_done(place):
            try:
                _attempt(cell, place, settled)
            except (KeyboardInterrupt, GeneratorExit):
                raise
            except BaseException as error:
                line = cut(" ".join(str(error).split())) if isinstance(error, LrkitError) else line_of(error)
                note_failure(place, line, traceback.format_exc())
                return answer | {"status": "failed", "error": line}
            finally:
                _give_back()
        tidy(place)
        scores = read_json(place / "result.json")["scores"]
        return answer | {"score": next(iter(scores.values()), None), "seconds": time.monotonic() - begin}


def _give_back() -> None:
    """Return the memory of a trained model to the system: glibc keeps more than loky lets a worker grow, and it ends it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # elsewhere than with glibc
        ctypes.CDLL(None).malloc_trim(0)


def _attempt(cell: Cell, place: Path, conditions: Conditions) -> None:
    """Write down the cell and the machine, and train it here or in several processes."""
    now = code_of(cell.method, cell.task)
    if cell.versions.get("code", now) != now:
        raise LrkitError(
            f"this process has other code than the study was begun with ({now}, not {cell.versions['code']}): the same "
            "sources of lrkit and plug-ins must be everywhere, and not change meanwhile"
        )
    sources = {key: digest_of_result(place.parent / key) for need in cell.needs for key in need.cells}
    planned, cell = cell, settle(cell, place.parent)
    (place / PACKED).unlink(missing_ok=True)
    write_json(place / "config.json", {"format": FORMAT, **cell.to_config(planned, sources)})
    write_json(place / "env.json", _environment(conditions))
    begin = {"event": "begin", "from_step": conditions.record(place).step()}
    note_attempt(place, {**begin, "host": socket.gethostname(), "pid": os.getpid()})
    if cell.run.get("devices", 1) > 1 and "LOCAL_RANK" not in os.environ:
        _launch(cell, place, conditions)
    else:
        _train(cell, place, conditions)


def _train(cell: Cell, place: Path, conditions: Conditions) -> None:
    """Train a cell that is settled, and write down the result in its folder: ``result.json`` last."""
    from lrkit.compose import from_plain
    from lrkit.study.loaded import steps_for
    from lrkit.study.loading import loading_from
    from lrkit.study.run import train

    settings = settings_from({**cell.run, "threads": conditions.threads})
    loading = loading_from(cell.loading)
    task = load_kept(canonical(cell.task), cell.versions.get("data"))
    if cell.selection is not None:
        # As many steps as with all training rows, since it is for those that rates and schedules are chosen.
        settings = attrs.evolve(settings, steps=steps_for(task, cell.model, settings, loading))
        task = selection_kept(canonical(cell.task), cell.versions.get("data"), cell.selection)
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
            task,
            model=cell.model,
            loading=loading,
            targets=cell.targets,
            train_also=cell.train_also,
            settings=settings,
            done=keep,
            record=conditions.record(place),
            stop=cell.stop,
            samples=3 if cell.selection is None else 0,  # a trial is scored, and not read
        )
    if not first:
        return
    kept = keep_answers(result, place)
    content = json_bytes(result.to_file(place.name))
    names = ("config.json", *kept, *(["lrkit.safetensors"] if conditions.keep else []))
    sums = {name: check_sum(place / name) for name in names}
    write_json(place / LIST, {**sums, "result.json": zlib.crc32(content)})
    write_bytes(place / "result.json", content)
    took = {name: getattr(result, name) for name in ("step_seconds", "train_seconds", "tokens_per_second")}
    note_attempt(place, {"event": "end", "step": result.steps, **took})


@lru_cache(maxsize=4)
def load_kept(plain: str, digest: str | None) -> Any:
    """Load a cell's task, or take the one that a worker keeps between its cells while its files are the same.

    Args:
        plain: the task of a cell as canonical JSON.
        digest: of its files, if it is a folder.
    """
    return load_task_of(TaskSpec(**json.loads(plain)))


@lru_cache(maxsize=4)
def selection_kept(plain: str, digest: str | None, seed: int) -> Any:
    """Split the training rows of a cell's task for selection, or take the split that a worker keeps. See `load_kept`."""
    return load_kept(plain, digest).selection(seed)


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
    here = [sys.executable, "-m", "lrkit.study.worker", "launch", devices, str(place)]
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
    """Be the launcher, or one of the processes that it starts."""
    _end_with_parent()
    if what == "launch":
        from torch.distributed.run import main

        devices, folder = rest
        main(["--standalone", "--nproc-per-node", devices, "-m", "lrkit.study.worker", "rank", folder])
        return
    place = Path(rest[0])
    cell = Cell.from_config(read_json(place / "config.json"))
    _train(cell, place, Conditions(**read_json(place / "conditions.json")))


if __name__ == "__main__":
    _main(*sys.argv[1:])
