"""Methods by name: to plain data (JSON, TOML) and back, and composed from a name, settings and swaps.

Plain data of a method is a table per part, each with a registered name and all settings::

    {"parameterization": {"name": "svd", "rank": 12, ...}, "metric": {...}, "scheduler": {...}, "action": {...}, "also": []}

A *path* names a place in it by names that are joined by dots: ``metric``, ``scheduler.target``, ``also.0.action.ties``.
"""

import inspect
import typing
from collections.abc import Mapping
from typing import Any

import attrs

from lrkit import registry as registries
from lrkit.errors import LrkitError, nearest, quoted, shown
from lrkit.hookspecs import Kind
from lrkit.method import FIELDS, POLICY, Method, Policy
from lrkit.registry import Registry
from lrkit.settings import annotated_as, as_annotated, as_plain, check_settings, defaults, refuse_others

# ---- there and back --------------------------------------------------------------------------------------------------


def to_plain(method: Method, registry: Registry | None = None) -> dict[str, Any]:
    """Write a method as plain data: dicts, lists, strings, numbers.

    Returns:
        ``{"parameterization": {"name": "svd", "rank": 12, ...}, "metric": {...} or None, ..., "also": [...]}``, with
        every setting written out. `from_plain` gives an equal method back.

    Raises:
        LrkitError: a component's class is not registered.
    """
    registry = registry or registries.current()

    def parts(owner: Method | Policy, kinds: tuple[Kind, ...]) -> dict[str, Any]:
        return {kind: component_to_plain(kind, getattr(owner, kind), registry) for kind in kinds}

    return {**parts(method, FIELDS), "also": [parts(policy, POLICY) for policy in method.also]}


def component_to_plain(kind: Kind, value: Any, registry: Registry | None = None) -> dict[str, Any] | None:
    """Write one component as a table with its name and settings; None stays None. Raises LrkitError like `to_plain`."""
    if value is None:
        return None
    settings = {field.name: as_plain(getattr(value, field.name)) for field in attrs.fields(type(value))}
    return {"name": (registry or registries.current()).name_of(kind, type(value)), **settings}


def from_plain(plain: Mapping[str, Any], registry: Registry | None = None) -> Method:
    """Build a method from plain data, the inverse of `to_plain`. Settings that are left out take their defaults.

    Raises:
        LrkitError: an unknown field, name or setting (with the nearest right one), a setting of the wrong type or
            range, or parts that do not fit together.
    """
    registry = registry or registries.current()
    if not isinstance(plain, Mapping):
        raise LrkitError(f"a method must be a table with a parameterization, not {shown(plain)}")
    refuse_others(plain, (*FIELDS, "also"), "method")
    if plain.get("parameterization") is None:
        raise LrkitError("a method needs a parameterization")
    parts = {kind: _component(registry, kind, plain.get(kind), kind) for kind in FIELDS}
    policies = []
    also = plain.get("also") or ()
    if not isinstance(also, list | tuple):
        raise LrkitError(f"also must be a list of policies, not {shown(also)}")
    for index, policy in enumerate(also):
        place = f"also.{index}"
        if not isinstance(policy, Mapping):
            raise LrkitError(f"{place} must be a table with metric, scheduler and action, not {shown(policy)}")
        refuse_others(policy, POLICY, place)
        built = {kind: _component(registry, kind, policy.get(kind), f"{place}.{kind}") for kind in POLICY}
        empty = [kind for kind, value in built.items() if value is None]
        if empty:
            raise LrkitError(f"{place} lacks {' and '.join(empty)}")
        policies.append(Policy(**built))
    return Method(**parts, also=tuple(policies))


def _component(registry: Registry, kind: Kind, plain: Any, place: str) -> Any:
    if plain is None:
        return None
    table = _table(plain, place)
    cls = registry.get(kind, table.pop("name"))
    settings = check_settings(cls, table, place)
    try:
        return cls(**settings)
    except LrkitError:
        raise
    except (TypeError, ValueError) as error:
        # A plug-in's settings may be checked by attrs' own validators, or have no default.
        raise LrkitError(f"{place}: {' '.join(str(error).split())}") from error


def _table(value: Any, place: str) -> dict[str, Any]:
    """Return a component that is given by its name alone, or by a table, as a table."""
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise LrkitError(f"{place} must be a name, or a table with a name and settings, not {shown(value)}")
    return dict(table)


def with_setting(plain: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Change one setting in a copy of a method's plain data: ``with_setting(plain, "parameterization.rank", 8)``.

    Args:
        plain: a method, as `to_plain` gives it.
        path: the setting. A number picks a policy of `also`.
        value: the new value.

    Raises:
        LrkitError: no such setting (with the nearest right one).
    """
    owner, _, key = path.rpartition(".")
    if path == "also":
        raise LrkitError('no setting "also": it holds whole policies; change one part, such as "also.0.metric"')
    copy, node = _descend(plain, owner, path)
    known = [name for name in node if name != "name"] if isinstance(node, dict) else []
    if not owner and key in FIELDS:
        raise LrkitError(f'no setting {quoted(key)}, a part: swap it, swap = {{"{key}" = "NAME"}} or --swap {key}=NAME')
    if key not in known:
        leaves = [leaf for leaf in _leaves(plain) if not leaf.endswith(".name")]
        same = [leaf for leaf in leaves if leaf.rpartition(".")[2] == key]
        hint = f" (did you mean {' or '.join(same)}?)" if same else nearest(path, leaves)
        there = f"; {owner} has {', '.join(known) or 'none'}" if owner else ""
        raise LrkitError(f"no setting {quoted(path)}{hint}{there}")
    node[key] = as_plain(value)
    return copy


def with_component(
    plain: Mapping[str, Any], path: str, name: str | None, registry: Registry | None = None
) -> dict[str, Any]:
    """Swap one component by name in a copy of a method's plain data: ``with_component(plain, "metric", "magnitude")``.

    The new component takes over the values of the settings that both have (a linear scheduler keeps the cubic's target,
    warm-up and interval), so that the ablation changes one thing. Its other settings are at their defaults, and a
    setting marked `lrkit.settings.OWN` on either side is not carried over.

    Args:
        plain: a method, as `to_plain` gives it.
        path: ``"metric"``, ``"scheduler"``, ``"action"``, ``"parameterization"``, or one in `also`: ``"also.0.metric"``.
        name: the registered name; None to leave the component out.
        registry: looks names up; None for this process's.

    Raises:
        LrkitError: no such component or name (with the nearest right one).
    """
    registry = registry or registries.current()
    owner, _, kind = path.rpartition(".")
    copy, node = _descend(plain, owner, path)
    known = POLICY if owner else FIELDS
    if not isinstance(node, dict) or kind not in known:
        raise LrkitError(f"no component {quoted(path)}{nearest(kind, known)}; there are {', '.join(known)}")
    if name is None:
        node[kind] = None
        return copy
    cls = registry.get(kind, name)
    hints = typing.get_type_hints(cls)
    there = node.get(kind) or {}
    fields = {field.name for field in attrs.fields(cls) if not field.metadata.get("own")}
    if there:
        fields -= {field.name for field in attrs.fields(registry.get(kind, there["name"])) if field.metadata.get("own")}
    kept = {key: value for key, value in there.items() if key in fields and annotated_as(value, hints[key])}
    node[kind] = {"name": name, **defaults(cls), **kept}
    return copy


def swapped(plain: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Swap a component (`with_component`) or change a setting (`with_setting`) in a copy of a method's plain data.

    Args:
        plain: a method, as `to_plain` gives it.
        path: ``"metric"``, ``"also.0.metric"``, ``"action.ties"``.
        value: for a component its name, a table with a name and settings, or None; for a setting its value.

    Raises:
        LrkitError: no such component, name or setting (with the nearest right one).
    """
    kind = path.rpartition(".")[2]
    if kind not in FIELDS:
        try:
            return with_setting(plain, path, value)
        except LrkitError:
            if nearest(kind, FIELDS):
                return with_component(plain, path, None)  # raises, with the component that may have been meant
            raise
    if value is None:
        return with_component(plain, path, None)
    table = _table(value, path)
    copy, node = _descend(with_component(plain, path, table["name"]), path, path)
    settings = {field.name for field in attrs.fields(registries.current().get(kind, table.pop("name")))}
    for key, setting in table.items():
        if key in settings:
            node[key] = setting  # one without a default is not in the copy yet
        else:
            with_setting(copy, f"{path}.{key}", setting)  # raises, with the nearest right one
    return copy


# ---- composing -------------------------------------------------------------------------------------------------------


def compose(
    base: str | Mapping[str, Any], settings: Mapping[str, Any] | None = None, swaps: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Compose the plain data of a method from a name, settings and swaps.

    For example, ``compose("adalora", {"target_rank": 4, "metric.beta1": 0.9}, {"scheduler": "linear"})``. Arguments of the
    method's function come first, since one may move several settings; then the swaps; then the settings, which may be
    those of a component that was swapped in. The result is not checked: build it with `from_plain`.

    Args:
        base: the name of a registered method, or plain data as `to_plain` gives it.
        settings: path to value, or an argument of the method's function to its value.
        swaps: component or setting to value, as `swapped` takes it.

    Raises:
        LrkitError: no such method, argument, component or setting (with the nearest right one).
    """
    settings = settings or {}
    known = arguments_of(base)
    own = {name: value for name, value in settings.items() if name in known}
    plain = as_plain(base) if isinstance(base, Mapping) else _called(base, own)
    for path, value in (swaps or {}).items():
        plain = swapped(plain, path, value)
    for path, value in settings.items():
        if path not in known:
            plain = with_setting_of(base, plain, path, value)
    return plain


def arguments_of(base: str | Mapping[str, Any]) -> list[str]:
    """List the arguments of a registered method's function; plain data has none. Raises LrkitError if it does not exist."""
    if isinstance(base, Mapping):
        return []
    factory = registries.current().get("method", base)
    try:
        return list(inspect.signature(factory).parameters)
    except Exception:  # a plug-in's, and Python cannot look into it: that is told when it is called
        return []


def with_setting_of(base: str | Mapping[str, Any], plain: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Change a setting as `with_setting` does; if it is a misspelt argument of the base's function, say so."""
    known = arguments_of(base)
    if "." not in path and not any(path in (plain[kind] or {}) for kind in FIELDS) and (hint := nearest(path, known)):
        raise LrkitError(f'method "{base}" has no argument "{path}"{hint}')
    return with_setting(plain, path, value)


def _called(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Call a registered method's function with arguments as its annotations have them."""
    try:
        hints = typing.get_type_hints(registries.current().get("method", name))
    except Exception:  # an annotation for type checkers alone, an object that can be called: the parts check the values
        hints = {}
    exact = {k: as_annotated(v, hints[k], f"{name} {k}") if k in hints else v for k, v in arguments.items()}
    try:
        return to_plain(registries.current().method(name, **exact))
    except LrkitError as error:  # it may speak of a setting of a part, which an argument went into under another name
        if not exact or any(word in str(error) for word in (name, *exact)):
            raise
        told = ", ".join(f"{key}={shown(value)}" for key, value in exact.items())
        raise LrkitError(f"{name} with {told}: {error}") from error


# ---- paths -----------------------------------------------------------------------------------------------------------


def _descend(method: Mapping[str, Any], owner: str, path: str) -> tuple[dict[str, Any], Any]:
    """Return a copy of a method's plain data, and the place in it that `owner` names."""
    copy: dict[str, Any] = as_plain(method)
    node: Any = copy
    for name in owner.split(".") if owner else ():
        places = {str(i): each for i, each in enumerate(node)} if isinstance(node, list) else {}
        if name in places:
            node = places[name]
        elif isinstance(node, dict) and name in node and node[name] is not None:
            node = node[name]
        else:
            if isinstance(node, dict) and name in node:
                raise LrkitError(f"nothing at {quoted(path)}: the method has no {name}")
            known = list(node) if isinstance(node, dict) else [str(i) for i in range(len(node or ()))]
            listed = ", ".join(known) or "nothing"
            raise LrkitError(f"nothing at {quoted(path)}: no {quoted(name)}{nearest(name, known)} (there is {listed})")
    return copy, node


def _leaves(value: Any, path: str = "") -> list[str]:
    """List the paths of all settings below a place."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, Mapping):
        return [path]
    return [leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}" if path else key)]
