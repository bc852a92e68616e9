"""Jobs of submitit on this machine: real processes that come to their ends, fail, are killed, or are put back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path

import lrkit_slurm
import pytest
import submitit
from lrkit_slurm import Jobs, asked_in

import lrkit
from lrkit.registry import Registry
from lrkit.testing import only

NUMBER = "__import__('time').sleep(0.1) or 7"


@pytest.fixture
def registry() -> Iterator[Registry]:
    with only(lrkit_slurm, distribution="lrkit-slurm 0.2.0") as made:
        yield made


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(asked_in(f"cluster=local,time=1m,folder={tmp_path / 'jobs'}"), 3, 1)
    yield made
    made.shutdown(wait=False, cancel_futures=True)


def test_address_is_read() -> None:
    """Settings are what sbatch is told, with minutes as submitit counts them."""
    asked = asked_in("partition=gpu, time=4h,mem=16GB,gpus=2,account=us")
    assert asked.parameters(3) == {
        "time": 240,
        "cpus_per_task": 3,
        "job_name": "lrkit",
        "partition": "gpu",
        "mem": "16GB",
        "account": "us",
        "gpus_per_node": 2,
        "setup": ["export OMP_NUM_THREADS=3", "export MKL_NUM_THREADS=3"],
    }
    assert [asked_in(f"time={text}").minutes for text in ("90", "90m", "2d")] == [90, 90, 2880]
    known = set(submitit.SlurmExecutor._valid_parameters())
    assert known >= set(asked_in("".join(f"{name}=x," for name in lrkit_slurm.address._TEXTS)).parameters(1))


def test_lists_keep_their_commas() -> None:
    """A list of nodes is one value, and what comes after it another setting."""
    asked = asked_in("exclude=node1,node2,time=4h,nodelist=a[1,3-4],partition=gpu, backup,mem=16GB")
    assert asked.rest == {"exclude": "node1,node2", "nodelist": "a[1,3-4]", "partition": "gpu,backup", "mem": "16GB"}
    assert asked.minutes == 240


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("partitoin=gpu", '--address: there is no "partitoin" (did you mean "partition"?)'),
        ("partition", '--address takes NAME=VALUE,... for slurm, not "partition"'),
        ("mem=1GB,mem=2GB", '--address has "mem" twice'),
        ("time=soon", '--address: time must be minutes, or such as 90m, 4h or 2d, not "soon"'),
        ("time=0", '--address: time must be minutes, or such as 90m, 4h or 2d, not "0"'),
        ("gpus=some", '--address: gpus must be a number, not "some"'),
        ("cluster=cloud", '--address: cluster must be slurm or local, not "cloud"'),
        ("cluster=local,qos=high", "--address: cluster=local is this machine, which has no qos"),
    ],
)
def test_address_refused(address: str, says: str) -> None:
    """One line says what is wrong."""
    with pytest.raises(lrkit.LrkitError) as told:
        asked_in(address)
    assert str(told.value).startswith(says) and "\n" not in str(told.value)


def test_no_slurm_here(registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without srun one line says so."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(lrkit.LrkitError, match=r"no jobs of slurm can be had here: .*srun") as told:
        registry.made("executor", "slurm", 2, 1, f"folder={tmp_path}")
    assert "\n" not in str(told.value)


def test_jobs_end(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One comes to its end, one fails, one is killed, one is preempted and goes on; logs are left of those that died."""
    monkeypatch.setattr(submitit.LocalJob, "_results_timeout_s", 0)
    mark = tmp_path / "mark"
    again = f"open({str(mark)!r}, 'a').write('x') and len(open({str(mark)!r}).read()) > 1 or " + _kill("SIGUSR2")
    ends, fails, killed, preempted = (
        jobs.submit(eval, text) for text in (NUMBER, "1 / 0", _kill("SIGKILL"), f"({again}) and 5")
    )
    assert (ends.result(60), preempted.result(60)) == (7, 5)
    assert mark.read_text() == "xx", "submitit put it into the queue again"
    for each, says in (
        (fails, "ZeroDivisionError: division by zero"),
        (killed, r"it ended without a result \(state: FINISHED\)"),
    ):
        with pytest.raises(RuntimeError, match=rf"job \d+, log \S+: {says}$") as told:
            each.result(60)
        assert "\n" not in str(told.value)
    jobs.shutdown()
    left = {path.name.partition("_")[0] for path in (tmp_path / "jobs").iterdir()}
    assert len(left) == 2


def test_unwanted_jobs_end(jobs: Jobs) -> None:
    """Whoever cancels and does not wait has no process left, and nothing begins any more."""
    futures = [jobs.submit(eval, "__import__('time').sleep(100)") for _ in range(5)]
    while len(jobs._running) < 3:
        time.sleep(0.01)
    processes = [job._process for job in jobs._running.values()]
    jobs.shutdown(wait=False, cancel_futures=True)
    assert [future.cancelled() for future in futures] == [False] * 3 + [True] * 2
    for process in processes:
        process.wait(30)
    with pytest.raises(RuntimeError, match="shut down"):
        jobs.submit(eval, "1")


def test_no_job_taken(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the cluster takes no job, all that waits is handed back: lrkit tries a few times and says why."""
    monkeypatch.setattr(jobs._cluster, "_submit_command", lambda _: 1 / 0)
    for future in [jobs.submit(eval, "1") for _ in range(2)]:
        with pytest.raises(BrokenExecutor, match="no job is taken: division by zero"):
            future.result(30)


def _kill(name: str) -> str:
    assert hasattr(signal, name) and hasattr(os, "kill")
    return f"__import__('os').kill(__import__('os').getpid(), __import__('signal').{name})"
