"""Run a study's cells as jobs of Slurm, by submitit: the executor `slurm`.

A cell is one job. A job that is preempted, or that comes to the end of its time, is put into the queue again by submitit and
goes on from its cell's last checkpoint; one that dies otherwise is tried again by lrkit.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor

import lrkit
from lrkit_slurm.address import Asked as Asked
from lrkit_slurm.address import asked_in as asked_in
from lrkit_slurm.jobs import Jobs as Jobs


def slurm(workers: int, threads: int, address: str | None) -> Executor:
    """Make an executor whose workers are jobs of Slurm. All nodes must reach the study's folder by one path.

    Args:
        workers: jobs at a time, those that wait in Slurm's queue included.
        threads: CPUs of each job.
        address: settings of the jobs, such as ``"partition=gpu,time=4h,mem=16GB,gpus=1"``; None for the cluster's own.

    Raises:
        LrkitError: there is no Slurm here, or a setting that it does not know.
    """
    return Jobs(asked_in(address or ""), workers, threads)


@lrkit.hookimpl
def lrkit_executors() -> Mapping[str, Callable[..., Executor]]:
    """Offer the executor."""
    return {"slurm": slurm}
