"""Tell on a terminal how a run or a study goes: each cell that ends, and every so often how far the running ones are."""

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrkit.errors import cut
from lrkit.study.cell_folder import attempts_size

if TYPE_CHECKING:
    from rich.console import Console

    from lrkit.study.jobs import Job

EVERY = 15.0
"""Seconds between two lines about running cells."""


def time_left(taken: Sequence[float], elapsed: float, workers: int, missing: int) -> float | None:
    """Estimate the seconds until the last cell ends, to within a cell or so; None if nothing is known, or nothing is left.

    Args:
        taken: seconds of each cell that was run to its end.
        elapsed: seconds since the first began.
        workers: cells at a time.
        missing: cells that have not ended.
    """
    if not taken or not missing:
        return None
    mean, busy = sum(taken) / len(taken), min(workers, missing)
    # Time that the running cells have behind them.
    behind = min(max(0.0, elapsed * workers - sum(taken)), busy * mean)
    left = (missing * mean - behind) / busy
    return max(left, mean) if missing >= workers else left


def steps_left(
    at: Mapping[str, int], steps: Mapping[str, int], taken: int, elapsed: float, workers: int
) -> float | None:
    """Estimate the seconds until the last step, from the steps so far; None if there were none.

    Args:
        at: of each running cell, the step that it is at.
        steps: of each cell that has not ended, its steps.
        taken: steps taken since the beginning, those of cells that have ended included.
        elapsed: seconds since then.
        workers: cells at a time.
    """
    left = {key: max(0, total - at.get(key, 0)) for key, total in steps.items()}
    if not taken or not left:
        return None
    pace = elapsed * min(workers, max(1, len(at))) / taken
    return pace * max(sum(left.values()) / max(1, min(workers, len(left))), max(left.values()))


def duration(seconds: float) -> str:
    """Write a duration in words, two figures or so."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    hours = seconds / 3600
    return f"{round(seconds / 60)} min" if hours < 1.5 else f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"


def step_of(place: Path) -> int:
    """Read the last step that a cell's curve has; 0 if there is none yet."""
    return int(_last(place).get("step", 0))


def scored_of(place: Path) -> str:
    """Say how much of the validation rows is scored, if a cell has said nothing since; empty if it does not score."""
    line = _last(place)
    return f", scored {line['scored']:,} of {line['of']:,}" if {"scored", "of"} <= line.keys() else ""


def _last(place: Path) -> dict[str, Any]:
    """Read the last whole line of a cell's curve that has a step; empty if there is none yet."""
    try:
        with (place / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
            return {**found, "step": int(found["step"])}
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return {}


class Phases:
    """Tells on stderr of a run before its first step.

    A line comes when it has been true for two seconds, or the training begins: an input that is refused at once is answered
    by its refusal alone.

    Args:
        quiet: say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet, self._waiting = quiet, list[str]()
        self._lock, self._timer = threading.Lock(), threading.Timer(0.0, self._flush)

    def __enter__(self) -> "Phases":
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def say(self, line: str) -> None:
        """Say it, soon."""
        self._timer.cancel()
        with self._lock:  # what was said of scoring is over
            self._waiting = [*(each for each in self._waiting if not each.startswith("scor")), line]
        if line.startswith("training"):
            self._flush()
        else:
            self._timer = threading.Timer(2.0, self._flush)
            self._timer.daemon = True
            self._timer.start()

    def _flush(self) -> None:
        with self._lock:
            lines, self._waiting = self._waiting, []
        for line in lines if not self._quiet else ():
            print(f"{line} ...", file=sys.stderr, flush=True)  # noqa: T201


class Teller:
    """Tells of a study on a console; `lrkit.study.execute.execute` calls `started`, `told` and `cost_told`.

    Args:
        console: the console.
        folder: the study's.
        every: seconds between two lines about running cells.
    """

    def __init__(self, console: "Console", folder: Path, every: float = EVERY) -> None:
        self._console, self._folder, self._every = console, folder, every
        self._jobs: dict[str, Job] = {}
        self._from: dict[str, tuple[int, int]] = {}
        self._begin, self._workers, self._steps = time.monotonic(), 1, 0
        self._taken: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Teller":
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _say(self, line: str) -> None:
        self._console.print(cut(line), highlight=False, markup=False, soft_wrap=True)

    def started(self, jobs: "Sequence[Job]", total: int, at_once: int) -> None:
        """Say how many cells there are to run, and begin to look at the running ones."""
        self._workers, self._begin = at_once, time.monotonic()
        self._jobs = {job.key: job for job in jobs}
        self._from = {key: (self._attempts(key), step_of(self._place(key))) for key in self._jobs}
        there = f", {total - len(jobs)} are there already" if len(jobs) < total else ""
        self._say(f"{total} cells{there}; {len(jobs)} to run")
        if jobs:
            self._thread.start()

    def told(self, job: "Job", answer: Mapping[str, Any], ended: int, total: int) -> None:
        """Say how a cell ended."""
        if answer.get("seconds") is not None:
            self._taken.append(answer["seconds"])
        self._jobs.pop(job.key, None)
        self._steps += job.steps or 0
        left = time_left(self._taken, time.monotonic() - self._begin, self._workers, total - ended)
        score = answer["score"]
        what = {"done": "nan" if score is None else f"{score:.4f}", "busy": "another process is running it"}
        said = what.get(answer["status"], f"failed: {answer['error']}")
        rest = "" if left is None else f" (about {duration(left)} left)"
        self._say(f"[{ended}/{total}] {job}: {said}{rest}")

    def cost_told(self, label: str) -> None:
        """Say that a row's cost is measured."""
        self._end.set()
        self._say(f"measuring {label}")

    def running(self) -> dict[str, int]:
        """Find the step that each running cell is at, by key."""
        begun = [key for key in list(self._jobs) if self._attempts(key) > self._from[key][0]]
        return {key: step_of(self._place(key)) for key in begun}

    def _watch(self) -> None:
        while not self._end.wait(self._every):
            at = self.running()
            jobs = dict(self._jobs)
            known = {key: job.steps for key, job in jobs.items() if job.steps is not None}
            new = sum(max(0, step - self._from[key][1]) for key, step in at.items())
            left = steps_left(at, known, self._steps + new, time.monotonic() - self._begin, self._workers)
            lines = [
                f"{job}: step {at[key]} of {job.steps or '?'}{scored_of(self._place(key))}"
                for key, job in jobs.items()
                if key in at
            ]
            if lines:
                rest = "" if left is None else f" (about {duration(left)} left)"
                self._say(f"running: {'; '.join(lines)}{rest}")

    def _place(self, key: str) -> Path:
        return self._folder / "cells" / key

    def _attempts(self, key: str) -> int:
        return attempts_size(self._place(key))
