"""The options that named tasks have, beside their data: a folder that stands in for a task has them as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrkit.tasks.glue import GLUE

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "squad": {"unanswerable": False},
    "squad_v2": {"unanswerable": True},
    "xsum": {"max_target_length": 64},
    "cnn_dailymail": {"lead": 3},
    "gsm8k": {"metric": "final_number", "max_new_tokens": 256},
    **{f"glue/{name}": {"metric": row.metric} for name, row in GLUE.items()},
}
"""Task to the options in which it differs from others of its kind; none of a plug-in's task."""
