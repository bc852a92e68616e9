"""Write plain data as TOML. `lrkit.reading` reads it."""

import json
from collections.abc import Mapping
from typing import Any

from lrkit.errors import LrkitError, shown


def table(values: Mapping[str, Any]) -> str:
    """Write the lines of a table, a key each. Null, which TOML does not have, is left out."""
    return "".join(f"{value(key)} = {value(each)}\n" for key, each in values.items() if each is not None)


def value(plain: Any) -> str:
    """Write a value on one line.

    Raises:
        LrkitError: TOML has no such value.
    """
    if isinstance(plain, bool):
        return "true" if plain else "false"
    if isinstance(plain, str):
        return json.dumps(plain, ensure_ascii=False)  # JSON's quotes are TOML's, but for halves of characters
    if isinstance(plain, int | float):
        return repr(plain)
    if isinstance(plain, Mapping):
        return "{" + ", ".join(f"{value(k)} = {value(v)}" for k, v in plain.items() if v is not None) + "}"
    if isinstance(plain, list | tuple):
        return "[" + ", ".join(map(value, plain)) + "]"
    raise LrkitError(f"TOML cannot hold {shown(plain)}")
