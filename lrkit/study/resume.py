"""The folder that `lrkit run --out` keeps while it trains, so that the same command goes on from there."""

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.compose import to_plain
from lrkit.errors import LrkitError
from lrkit.study.cell import make_cell
from lrkit.study.checkpoints import Record
from lrkit.study.place import missing
from lrkit.study.run_settings import RunSettings
from lrkit.study.store import FORMAT, read_json, write_json
from lrkit.study.task_spec import TaskSpec

if TYPE_CHECKING:
    from lrkit.method import Method

FOLDER = "unfinished"
"""In the run's folder, until it is done."""


class Unfinished:
    """A run's folder while it trains.

    Args:
        out: the run's folder.
        methods: the methods that are trained, by label.
        asked: model, loading (plain), targets, train_also, task, data and options of the task.
        settings: of the run.

    Raises:
        LrkitError: the folder holds an unfinished run that is another one.
    """

    def __init__(
        self, out: Path, methods: "Mapping[str, Method]", asked: Mapping[str, Any], settings: RunSettings
    ) -> None:
        self._place = out / FOLDER
        # Folders that are not there yet; they are deleted again if the run is refused.
        self._made = missing(out)
        spec = TaskSpec(
            task=None if asked["data"] else asked["task"] or "movies",
            data=asked["data"],
            options=asked.get("options", {}),
        )
        run = attrs.asdict(settings)
        plains = {label: to_plain(method) for label, method in methods.items()}
        cells = {
            label: make_cell(
                plain,
                spec,
                asked["model"],
                asked["targets"],
                run,
                asked.get("train_also", "auto"),
                asked.get("loading"),
            ).key
            for label, plain in plains.items()
        }
        self._request: dict[str, Any] = {"format": FORMAT, "cells": cells}
        self.there = self._place.is_dir()
        if self.there and read_json(self._place / "request.json") != self._request:
            raise LrkitError(
                f"{out} holds an unfinished run that is another one (method, settings, data, or the code have changed): "
                f"nothing is overwritten, choose another --out, or delete {self._place}"
            )

    def record(self, label: str, stop: Callable[[], bool]) -> Record:
        """Return the record that the run of a method writes as it goes."""
        folder = self._folder(label)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(self._place / "request.json", self._request)
        return Record(folder=folder, stop=stop)

    def step(self, label: str) -> int:
        """Return the step that the run of a method can go on from; 0 if there is none."""
        return Record(folder=self._folder(label)).step()

    def _folder(self, label: str) -> Path:
        return self._place / str(self._request["cells"][label])

    def refused(self) -> None:
        """Leave nothing behind, since the run cannot begin."""
        if self.there:
            return  # an earlier run's work stays
        self.end()
        for each in self._made:
            with contextlib.suppress(OSError):
                each.rmdir()

    def end(self) -> None:
        """Delete the folder, since the run is done."""
        shutil.rmtree(self._place, ignore_errors=True)
