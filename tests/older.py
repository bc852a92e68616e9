"""Files and states of an earlier lrkit, compared with those that are written now."""

from __future__ import annotations

from typing import Any


def told(old: Any, new: Any) -> Any:
    """Return what new plain data says of all that old plain data says. Keys that there were not yet are left out."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: told(value, new[key]) for key, value in old.items() if key in new}
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [told(a, b) for a, b in zip(old, new, strict=True)]
    return new
