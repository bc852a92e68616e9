"""Read the settings of jobs from an address: ``partition=gpu,time=4h,mem=16GB,gpus=1``."""

import re
from pathlib import Path
from typing import Any

import attrs

from lrkit.errors import LrkitError, nearest

_MINUTES = {"": 1, "m": 1, "h": 60, "d": 24 * 60}
_TEXTS = ("partition", "mem", "account", "qos", "constraint", "gres", "exclude", "nodelist", "comment")
_LISTS = ("partition", "gres", "exclude", "nodelist")
"""Those that may have several values, with commas between them."""
_ALL = (*_TEXTS, "time", "gpus", "folder", "cluster")


@attrs.frozen(kw_only=True)
class Asked:
    """The jobs that are asked for.

    Args:
        cluster: ``slurm``, or ``local`` for jobs that are processes of this machine.
        folder: where submitit keeps the files of jobs; all nodes must reach it by one path.
        minutes: the longest that a job may take.
        gpus: of each job.
        rest: what else sbatch is told, by its option's name.
    """

    cluster: str = "slurm"
    folder: Path = Path("slurm-jobs")
    minutes: int = 240
    gpus: int = 0
    rest: dict[str, str] = attrs.field(factory=dict)

    def parameters(self, threads: int) -> dict[str, Any]:
        """Return the settings as submitit's executor takes them, for jobs of so many threads."""
        if self.cluster == "local":
            return {"timeout_min": self.minutes, "gpus_per_node": self.gpus}
        found: dict[str, Any] = {"time": self.minutes, "cpus_per_task": threads, "job_name": "lrkit", **self.rest}
        found["setup"] = [f"export {name}={threads}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
        return found | ({"gpus_per_node": self.gpus} if self.gpus else {})


def asked_in(address: str) -> Asked:
    """Read an address: settings with commas between them; empty for the defaults.

    What has no "=" goes on with the value before it, as in ``exclude=node1,node2,time=4h``; unless it is a setting's name.

    Raises:
        LrkitError: a setting that is not known, given twice, or without a value that fits.
    """
    given: dict[str, str] = {}
    parts: list[str] = []
    for text in filter(None, (each.strip() for each in address.split(","))):
        listed = parts and "=" not in text and text not in _ALL and parts[-1].partition("=")[0] in _LISTS
        parts[-1:] = [f"{parts[-1]},{text}"] if listed else [*parts[-1:], text]
    for text in parts:
        name, equals, value = text.partition("=")
        if name not in _ALL:
            raise LrkitError(f'--address: there is no "{name}"{nearest(name, _ALL)}; there are {", ".join(_ALL)}')
        if not equals or not value:
            raise LrkitError(f'--address takes NAME=VALUE,... for slurm, not "{text}"')
        if name in given:
            raise LrkitError(f'--address has "{name}" twice')
        given[name] = value
    cluster = given.get("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise LrkitError(f'--address: cluster must be slurm or local, not "{cluster}"')
    rest = {name: value for name, value in given.items() if name in _TEXTS}
    if rest and cluster == "local":
        raise LrkitError(f"--address: cluster=local is this machine, which has no {next(iter(rest))}")
    return Asked(
        cluster=cluster,
        folder=Path(given.get("folder", "slurm-jobs")).expanduser().absolute(),
        minutes=_minutes(given.get("time", "4h")),
        gpus=_count(given.get("gpus", "0")),
        rest=rest,
    )


def _minutes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,6})([mhd]?)", text, re.ASCII)
    if not found or not int(found[1]):
        raise LrkitError(f'--address: time must be minutes, or such as 90m, 4h or 2d, not "{text}"')
    return int(found[1]) * _MINUTES[found[2]]


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII):
        raise LrkitError(f'--address: gpus must be a number, not "{text}"')
    return int(text)
