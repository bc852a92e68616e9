"""Keep so many jobs in a cluster's queue: an executor of `concurrent.futures` around one of submitit's."""

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import Any

from lrkit.errors import LrkitError
from lrkit_slurm.address import Asked

_EVERY = 1.0
"""Seconds between two looks at the jobs. Most looks are at files alone: submitit asks Slurm itself now and then."""


class Requeued:
    """Run a function in a job, so that a job which is preempted or out of time is put into the queue again.

    submitit raises `SystemExit` from the signal's handler, in the midst of the function; lrkit would take it for an error of
    the cell. Here the process ends at once, and the next job goes on from the cell's checkpoint.
    """

    def __call__(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        from submitit import JobEnvironment

        asked = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")
        theirs = signal.getsignal(asked)

        def leave(number: int, frame: Any) -> None:
            try:
                if callable(theirs):
                    theirs(number, frame)
            except SystemExit as end:
                os._exit(end.code % 256 if isinstance(end.code, int) else 1)
            except BaseException:  # it will not be put into the queue again; lrkit tries it once more by itself
                os._exit(1)

        signal.signal(asked, leave)
        return fn(*args, **kwargs)

    def checkpoint(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return the same call: submitit asks for it before it puts a job into the queue again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, fn, *args, **kwargs)


class Jobs(Executor):
    """Run functions as jobs.

    Args:
        asked: the jobs' settings.
        workers: jobs at a time, those that wait in the cluster's queue included.
        threads: CPUs of each job.

    Raises:
        LrkitError: there is no such cluster here, or it does not know a setting.
    """

    def __init__(self, asked: Asked, workers: int, threads: int) -> None:
        self._cluster = _cluster(asked, threads)
        self._workers = workers
        self._waiting: deque[tuple[Future[Any], tuple[Any, ...], dict[str, Any]]] = deque()
        self._running: dict[Future[Any], Any] = {}
        self._lock, self._news = threading.Lock(), threading.Event()
        self._ended, self._unwanted = False, False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Hand it in. It becomes a job as soon as there are fewer jobs than workers."""
        future: Future[Any] = Future()
        with self._lock:
            if self._ended:
                raise RuntimeError("this executor was shut down")
            self._waiting.append((future, (fn, *args), kwargs))
        self._news.set()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more functions. Whoever cancels and does not wait does not want the jobs that run, either."""
        with self._lock:
            self._ended, self._unwanted = True, cancel_futures and not wait
            dropped = [self._waiting.popleft()[0] for _ in range(len(self._waiting) if cancel_futures else 0)]
            jobs = list(self._running.values()) if self._unwanted else []
        for future in dropped:
            future.cancel()
        for job in jobs:
            _cancel(job)
        self._news.set()
        if wait:
            self._thread.join()

    def _watch(self) -> None:
        while True:
            self._news.wait(_EVERY)
            self._news.clear()
            for future, job in list(self._running.items()):
                if _is_done(job):
                    with self._lock:
                        del self._running[future]
                    self._answer(future, job)
            self._begin()
            with self._lock:
                if self._ended and not self._waiting and not self._running:
                    return

    def _begin(self) -> None:
        """Make jobs of functions that wait, as many as there are workers."""
        while len(self._running) < self._workers:
            with self._lock:
                if not self._waiting:
                    return
                future, called, named = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                job = self._cluster.submit(Requeued(), *called, **named)
            except Exception as error:
                self._refused(future, error)
                return
            with self._lock:
                self._running[future] = job
                unwanted = self._unwanted
            if unwanted:
                _cancel(job)

    def _refused(self, future: Future[Any], error: Exception) -> None:
        """Give up all that waits, since the cluster takes no job; those that run come to their ends."""
        broken = BrokenExecutor(f"no job is taken: {' '.join(str(error).split())}")
        with self._lock:
            rest = [each for each, *_ in self._waiting]
            self._waiting.clear()
        future.set_exception(broken)
        for each in rest:
            if each.set_running_or_notify_cancel():
                each.set_exception(broken)

    def _answer(self, future: Future[Any], job: Any) -> None:
        """Give a job's result. Its files are deleted if it has one; a job that died leaves its log."""
        try:
            result = job.result()
        except Exception as error:
            future.set_exception(RuntimeError(f"job {job.job_id}, log {job.paths.stderr}: {_cause(job, error)}"))
            return
        for path in job.paths.folder.glob(f"{job.job_id}_*"):
            path.unlink(missing_ok=True)
        future.set_result(result)


def _is_done(job: Any) -> bool:
    try:
        return bool(job.done())
    except Exception:  # the cluster does not answer now
        return False


def _cancel(job: Any) -> None:
    with contextlib.suppress(Exception):  # it has ended by itself, or the cluster does not answer
        job.cancel(check=False)


def _cause(job: Any, error: Exception) -> str:
    """Return one line for an error of submitit's, which has a whole traceback or log in it."""
    from submitit.core.utils import FailedJobError

    if not isinstance(error, FailedJobError):
        return f"it ended without a result (state: {job.state})"
    trace = str(error).split("-" * 22)[1].strip().splitlines()
    return trace[-1].strip() if trace else type(error).__name__


def _cluster(asked: Asked, threads: int) -> Any:
    import submitit

    kinds = {"slurm": submitit.SlurmExecutor, "local": submitit.LocalExecutor}
    try:
        made = kinds[asked.cluster](folder=asked.folder)
        made.update_parameters(**asked.parameters(threads))
        asked.folder.mkdir(parents=True, exist_ok=True)
    except Exception as error:
        raise LrkitError(f"no jobs of {asked.cluster} can be had here: {' '.join(str(error).split())}") from None
    return made
