"""Name rows, and say in words that a table can show how they differ from the base."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from lrkit.method import FIELDS
from lrkit.settings import defaults
from lrkit.study.asked import RowSpec


def label_of(spec: RowSpec) -> str:
    """Make a row's label from the settings that it changes: ``"metric=magnitude, run.lr=0.001"``."""
    words = [f"{path}={_value(path, value)}" for path, value in {**spec.swap, **spec.set}.items()]
    words = [name for name in (spec.source, spec.control) if name] + words
    if isinstance(spec.base, str):
        words.insert(0, spec.base)
    words += [f"without {name}" for name in spec.leave_out]
    words += [f"run.{key}={shown_value(value)}" for key, value in spec.run.items()]
    own = {"targets": spec.targets, "train_also": spec.train_also}
    words += [f"{key}={shown_value(value)}" for key, value in own.items() if value is not None]
    return ", ".join(words) or "row"


def _value(path: str, value: Any) -> str:
    """Show a value in a label. Of a component that is given with all its settings, show those that are not the default."""
    from lrkit.registry import current

    kind = path.rpartition(".")[2]
    if kind in FIELDS and isinstance(value, Mapping) and value.get("name") in current().names(kind):
        usual = defaults(current().get(kind, value["name"]))
        if usual.keys() <= value.keys() - {"name"}:
            named = [
                f"{key}={shown_value(v)}"
                for key, v in value.items()
                if key != "name" and usual.get(key, attrs.NOTHING) != v
            ]
            return f"{value['name']}({', '.join(named)})"
    return shown_value(value)


def shown_value(value: Any) -> str:
    """Show plain data in a label: a component as ``name(setting=value)``."""
    if isinstance(value, Mapping) and "name" in value:
        rest = ", ".join(f"{key}={shown_value(item)}" for key, item in value.items() if key != "name")
        return f"{value['name']}({rest})" if rest else str(value["name"])
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "+".join(value) or "none"
    return "none" if value is None else str(value)


def differences(old: Any, new: Any, path: str = "") -> Iterator[dict[str, Any]]:
    """List where a method's plain data differs from another's: ``{"path", "base", "value"}`` each.

    A component that was swapped is one difference; the settings of a component that stayed are one each.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("name") == new.get("name"):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and old and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{path}.{index}")
    elif old != new:
        yield {"path": path, "base": _named(old), "value": _named(new, old)}


def _named(value: Any, before: Any = None) -> Any:
    """Show a component as its name, with the settings that are neither its defaults nor taken over from the one before."""
    if isinstance(value, Mapping):
        if "name" not in value:
            return "ranks by layer" if all(type(each) is int for each in value.values()) else "a policy"
        own = _defaults_of(value["name"])
        there = before if isinstance(before, Mapping) else value
        told = {k: v for k, v in value.items() if k in own and v != own[k] and v != there.get(k)}
        return shown_value({"name": value["name"], **told})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_named(item) for item in value] if value else None
    return value


def _defaults_of(name: str) -> dict[str, Any]:
    """Find the defaults of a component, whatever kind it is of."""
    from lrkit.registry import current

    found = [offer.value for offer in current().offers() if offer.kind in FIELDS and offer.name == name]
    return defaults(found[0]) if found else {}
