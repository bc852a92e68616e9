"""Executors, which run a study's cells: each is a function that returns a `concurrent.futures.Executor`.

`local` is processes on this machine, `ray` is Ray's cluster, and `Here` is this very process.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import IO, Any

from lrkit.errors import LrkitError
from lrkit.hookspecs import hookimpl


class Here(Executor):
    """Run cells in this process, one after the other: for example, with a component that is not installed."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run it now, as a new process would. The caller's seeds, threads and modes are restored before it returns."""
        from lrkit.process import as_if_new

        future: Future[Any] = Future()
        try:
            with as_if_new():
                future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def gpus() -> int:
    """Count the GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def local(workers: int, threads: int, address: str | None) -> Executor:
    """Make worker processes on this machine (loky), each with its own threads and, if there are GPUs, its own GPU.

    Args:
        workers: how many.
        threads: CPU threads of each.
        address: must be None.

    Raises:
        LrkitError: an address.
    """
    if address is not None:
        raise LrkitError("--address is for executors on other machines, such as ray and slurm; local has none")
    from loky import ProcessPoolExecutor

    class Local(ProcessPoolExecutor):  # type: ignore[misc]  # loky ships no types
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            # A caller that does not wait does not want the running cells either; they go on from their checkpoints later.
            super().shutdown(wait=wait, kill_workers=cancel_futures and not wait)

    # At Ctrl-C the tracker of a pool's semaphores would have the last word, and nothing is wrong.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    pool: Executor = Local(
        max_workers=workers,
        timeout=None,
        env={**environment, "TOKENIZERS_PARALLELISM": "false"},
        initializer=_begin,
        initargs=(os.getpid(), gpus() // workers),
    )
    return pool


_leases: list[Any] = []


def _begin(parent: int, devices: int) -> None:
    """Lease GPUs for a new worker, and end it when the process that wants the results has ended."""
    import threading
    import time

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if devices:
        _lease(devices)


def _lease(devices: int) -> None:
    """Lease so many GPUs for as long as this process lives, by a lock on a file per GPU."""
    import fcntl
    import tempfile

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(gpus())]
    leased = []
    for name in names:
        try:
            file = _lock_file(os.path.join(tempfile.gettempdir(), f"lrkit-gpu-{name}.lock"))
        except OSError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        _leases.append(file)
        leased.append(name)
        if len(leased) == devices:
            break
    if not leased:
        raise LrkitError("every GPU is leased to another cell")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(leased)


def _lock_file(path: str) -> IO[bytes]:
    """Open a file to lock, made by whoever came first: another user's can be read alone, which suffices."""
    try:
        return open(path, "ab")
    except PermissionError:
        return open(path, "rb")


class _Ray(Executor):
    """Run cells on Ray core, behind the interface of `concurrent.futures`."""

    def __init__(self, workers: int, threads: int, address: str | None) -> None:
        try:
            import ray
        except ImportError:
            raise LrkitError("the executor ray needs Ray: pip install 'lrkit[ray]'") from None
        self._ray = ray
        _knock(address)
        self._owns = not ray.is_initialized()
        if self._owns:
            cpus = None if address else workers * threads
            try:
                ray.init(address=address, num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=40)
            except Exception as error:
                text = " ".join(str(error).split())
                raise LrkitError(f"no Ray cluster answers at {address!r}: {type(error).__name__}: {text}") from None
        share = 1.0 if ray.cluster_resources().get("GPU") else 0.0  # type: ignore[no-untyped-call]
        self._options = {
            "num_cpus": threads,
            "num_gpus": share,
            "max_retries": 3,  # a worker or node that dies costs a retry, which goes on from the checkpoint
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}},
        }

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Hand it to Ray."""
        reference = self._ray.remote(fn).options(**self._options).remote(*args, **kwargs)
        future: Future[Any] = reference.future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster, if this joined or began it."""
        if self._owns and self._ray.is_initialized():
            self._ray.shutdown()


def _knock(address: str | None) -> None:
    """Raise LrkitError if nobody answers at an address: Ray itself would wait for minutes."""
    import re
    import socket

    place = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address or "")
    if place:
        try:
            socket.create_connection((place[1], int(place[2])), timeout=5.0).close()
        except (OSError, OverflowError) as error:
            raise LrkitError(f"no Ray cluster answers at {address!r}: {error}") from None


def ray(workers: int, threads: int, address: str | None) -> Executor:
    """Join or begin Ray: this machine, or a cluster by its address. All nodes must reach the study's folder by one path.

    Args:
        workers: cells at a time on this machine; a cluster runs as many as its CPUs and GPUs allow.
        threads: CPUs that each cell takes.
        address: of a running cluster, such as ``"auto"`` or ``"ray://head:10001"``; None: one is begun here.

    Raises:
        LrkitError: Ray is not installed, or no cluster answers.
    """
    return _Ray(workers, threads, address)


@hookimpl
def lrkit_executors() -> Mapping[str, Callable[..., Executor]]:
    """Offer the built-in executors."""
    return {"local": local, "ray": ray}
