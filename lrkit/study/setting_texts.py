"""Write settings in a few characters, for tables and figures. No torch here."""

import json
from collections.abc import Iterable, Mapping
from typing import Any


def setting(value: Any) -> str:
    """Write a setting in a few characters: a component by its name with its settings, ``cubic(target=2)``."""
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    if isinstance(value, dict):
        name = value.get("name", "")
        settings = ", ".join(f"{key}={setting(v)}" for key, v in value.items() if key != "name")
        return f"{name}({settings})" if settings else str(name)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(setting, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def in_words(settings: Mapping[str, Any]) -> str:
    """Write settings by path, those of the run first: ``lr 0.001, alpha 16``."""
    return ", ".join(f"{short_name(path)} {value_text(settings[path])}" for path in ordered(settings))


def ordered(paths: Iterable[str]) -> list[str]:
    """Sort settings: those of the run first, among them the learning rate."""
    return sorted(paths, key=lambda path: (path != "run.lr", not path.startswith("run."), path))


def short_name(path: str) -> str:
    """Return a setting's name without the part that it is of, if that is the run or the parameterization."""
    return path.removeprefix("run.").removeprefix("parameterization.")


def value_text(value: Any) -> str:
    """Write a value: a number in six digits, anything else as `setting` does."""
    return setting(value) if ordinal(value) is None else f"{value:g}"


def ordinal(value: Any) -> float | None:
    """Return a value that has an order; None for any other."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
