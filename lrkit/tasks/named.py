"""Named tasks: their own options, which a folder that stands in for one has as well, and their names' parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrkit.errors import LrkitError
from lrkit.tasks.glue import GLUE

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "squad": {"unanswerable": False},
    "squad_v2": {"unanswerable": True},
    "xsum": {"max_target_length": 64},
    "cnn_dailymail": {"lead": 3},
    "gsm8k": {"metric": "final_number", "max_new_tokens": 256},  # enough for nearly all of the data set's own solutions
    **{f"glue/{name}": {"metric": row.metric} for name, row in GLUE.items()},
}
"""Task to the options in which it differs from others of its kind; none of a plug-in's task."""


def no_parts(name: str, rest: str | None) -> None:
    """Raise LrkitError if the name of a task that has no parts is followed by one."""
    if rest is not None:
        raise LrkitError(f'task "{name}" has no parts: write "{name}", not "{name}/{rest}"')
