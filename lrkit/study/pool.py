"""Choose an executor, and run cells on it, each after those that it needs; run a cell whose worker died again.

A cell goes on from its last checkpoint.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import attrs

from lrkit.errors import LrkitError
from lrkit.foreign import line_of, text_of
from lrkit.study.cell_folder import attempts_size, note_failure
from lrkit.study.executors import Here
from lrkit.study.jobs import Job, Told
from lrkit.study.worker import Conditions, run_cell

_TRIES = 4


class _Borrowed(Executor):
    """Somebody else's executor: used, and left running."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.submit = executor.submit  # type: ignore[method-assign]


def chosen(executor: str | Executor, workers: int, threads: int, address: str | None) -> Callable[[], Executor]:
    """Choose what makes an executor.

    Args:
        executor: an executor's name, or somebody's own.
        workers: cells at a time; 0 for in this process.
        threads: CPU threads of each.
        address: of a cluster.

    Raises:
        LrkitError: no executor of that name, or an address for this machine.
    """
    if isinstance(executor, Executor):
        return lambda: _Borrowed(executor)
    from lrkit.registry import current

    current().get("executor", executor)
    if address is not None and executor == "local":
        raise LrkitError(
            "--address is for executors on other machines, such as ray, and the executor local is on this one"
        )
    if workers == 0:
        if executor != "local":
            raise LrkitError(f"--workers 0 trains in this process, and not by --executor {executor}: give 1 or more")
        return Here
    return lambda: _made(executor, workers, threads, address)


def _made(name: str, workers: int, threads: int, address: str | None) -> Executor:
    from lrkit.registry import current

    made = current().made("executor", name, workers, threads, address)
    if not issubclass(type(made), Executor):
        raise LrkitError(f'executor "{name}" gives {text_of(made)}, which is no concurrent.futures.Executor')
    executor: Executor = made
    return executor


def run_jobs(
    waiting: Mapping[str, Job],
    cells: Path,
    first: Executor,
    make: Callable[[], Executor],
    conditions: Conditions,
    told: Told | None,
    total: int,
) -> dict[str, Mapping[str, Any]]:
    """Run every cell on the executor, after the cells that it needs; try one whose worker dies again, up to four times.

    A cell that needs one that failed fails in one line, and is not begun.

    Args:
        waiting: the cells to run, by key.
        cells: the folder that holds the cells' folders.
        first: the executor.
        make: makes another one, after workers died and took the pool with them.
        conditions: how cells run.
        told: called when a cell has ended.
        total: cells in all, those that are done already included.

    Returns:
        What `run_cell` returned, by key.

    Raises:
        LrkitError: the executor does not run cells.
    """
    answers: dict[str, Mapping[str, Any]] = {}
    tries = dict.fromkeys(waiting, 0)
    plain = attrs.asdict(conditions)
    left = dict(waiting)
    needing: dict[str, list[str]] = {}  # the cells that wait for each cell
    for key, job in waiting.items():
        for source in job.sources:
            needing.setdefault(source, []).append(key)
    pool, idle = first, 0

    def end(job: Job, answer: Mapping[str, Any]) -> None:
        answers[job.key] = answer
        del left[job.key]
        if told is not None:
            told(job, answer, total - len(left), total)
        if answer["status"] != "done":
            # Ending one may end others with it, which need both.
            for other in [left[key] for key in needing.get(job.key, ()) if key in left]:
                if other.key in left:
                    end(other, _without_source(other, job, answer["status"], cells))

    while left:
        futures: dict[Future[Any], Job] = {}
        clean = False
        begun = {key: attempts_size(cells / key) for key in left}
        cause: BaseException | None = None

        ended: SimpleQueue[Future[Any]] = SimpleQueue()

        def submit(keys: Iterable[str]) -> None:
            """Hand in those of some cells that wait for no other any more, and take what ends meanwhile."""
            for key in [key for key in keys if key in left and not any(source in left for source in left[key].sources)]:
                future = pool.submit(run_cell, left[key].cell.to_plain(), str(cells / key), plain)  # noqa: B023 (this round's)
                futures[future] = left[key]  # noqa: B023
                future.add_done_callback(ended.put)  # noqa: B023
                while not ended.empty():  # noqa: B023
                    take(ended.get())  # noqa: B023

        def take(future: Future[Any]) -> None:
            """Tell of a cell that has ended, and hand in those that waited for it."""
            nonlocal cause
            job = futures.pop(future)  # noqa: B023
            key = job.key
            error = future.exception()
            if error is None:
                answer: Mapping[str, Any] = future.result()
            else:
                cause = error
                # A pool whose worker died fails all that it had; a cell that had not begun is not to blame.
                innocent = isinstance(error, BrokenExecutor) and attempts_size(cells / key) == begun[key]  # noqa: B023
                tries[key] += not innocent
                if tries[key] < _TRIES:
                    return
                line = f"its worker died {tries[key]} times ({line_of(error)})"
                note_failure(cells / key, line, line)
                answer = {"key": key, "status": "failed", "score": None, "error": line}
            end(job, answer)
            if not isinstance(cause, BrokenExecutor):
                submit(needing.get(key, ()))

        try:
            submit(left)
            while futures:
                take(ended.get())
            clean = True
        except BrokenExecutor as error:
            cause = (
                error  # it broke while cells were handed in: those that came back were told, the rest is tried again
            )
        finally:
            pool.shutdown(wait=clean, cancel_futures=True)
        if left:
            # Cells that never begin cost no try, so rounds in which none does are counted.
            idle = 0 if any(attempts_size(cells / key) > at for key, at in begun.items()) else idle + 1
            if idle == _TRIES:
                text = "" if cause is None else line_of(cause)
                raise LrkitError(f"the executor does not run cells: {text}")
            time.sleep(0.5)
            pool = make()
    return answers


def _without_source(job: Job, source: Job, status: str, cells: Path) -> dict[str, Any]:
    """Answer for a cell that cannot be run, since one that it needs failed or is run by another process."""
    answer = {"key": job.key, "status": status, "score": None, "error": None, "seconds": None}
    if status == "busy":
        return answer
    line = f"it needs the cell of {source}, which failed"
    (cells / job.key).mkdir(parents=True, exist_ok=True)
    note_failure(cells / job.key, line, line)
    return answer | {"error": line}
