"""A run's folder while it trains, and the checkpoints in it. No torch here."""

import re
from collections.abc import Callable
from pathlib import Path

import attrs

from lrkit.errors import LrkitError
from lrkit.reading import is_folder
from lrkit.study.store import LIST, check_sum, read_json

_STEP = re.compile("checkpoint-[0-9]{1,12}")


@attrs.frozen(kw_only=True)
class Record:
    """The folder that a run writes into as it goes, so that a run that is killed can go on from there.

    Args:
        folder: holds ``metrics.jsonl``, ``history.jsonl`` and ``checkpoints/``; a run goes on with what it finds there.
        checkpoint_seconds: time between checkpoints.
        report_to: transformers' names of trackers that get the curves as well, such as ``"tensorboard"``.
        stop: asked after each step. If it returns True, the run stops there with a checkpoint, and `train` raises
            KeyboardInterrupt.
    """

    folder: Path
    checkpoint_seconds: float = 60.0
    report_to: tuple[str, ...] = ()
    stop: Callable[[], bool] | None = None

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.folder / "checkpoints"

    def latest(self) -> Path | None:
        """Find the last checkpoint that is whole: its list of files was written last, and every file is as it says."""
        there = [
            path for path in self.checkpoints.glob("checkpoint-*") if _STEP.fullmatch(path.name) and is_folder(path)
        ]
        found = sorted(there, key=_step_of, reverse=True)
        return next((folder for folder in found if _is_whole(folder)), None)

    def step(self) -> int:
        """Count the optimizer steps that need not be done again."""
        latest = self.latest()
        return 0 if latest is None else _step_of(latest)


def check_sums(folder: Path) -> dict[str, int]:
    """Compute the check sum of each file in a checkpoint."""
    files = [path for path in sorted(folder.iterdir()) if path.name != LIST and not path.name.startswith(".")]
    return {path.name: check_sum(path) for path in files}


def _is_whole(folder: Path) -> bool:
    try:
        listed = read_json(folder / LIST)
        return bool(listed) and listed == check_sums(folder)
    except (LrkitError, OSError):
        return False


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))
