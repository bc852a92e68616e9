"""A method is a parameterization and its policy: a metric, a scheduler and an action.

AdaLoRA is `SVD` + `SensitivityUncertainty` + `Cubic` + `Prune`. AFLoRA is `VectorScaled` + `GradientUncertainty` +
`Cubic` + `Freeze`. An ablation swaps one field (``attrs.evolve``), and `also` carries further policies: prune and
freeze in one run is AFLoRA's method with one more `Policy`.

A method is frozen configuration. What cannot work is refused when it is built, with both sides named. It goes to plain
data (JSON, TOML) and back by registered names; it has no name itself, since after a swap a name would lie.
"""

import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

import attrs

from lrkit.actions import Action
from lrkit.errors import LrkitError, cut, nearest, shown
from lrkit.metrics import Metric
from lrkit.parameterizations import Parameterization
from lrkit.schedulers import Scheduler

if typing.TYPE_CHECKING:
    from lrkit.registry import Kind, Registry

FIELDS: tuple["Kind", ...] = ("parameterization", "metric", "scheduler", "action")
_POLICY_FIELDS: tuple["Kind", ...] = FIELDS[1:]
T = TypeVar("T")


def _is_a(base: type, *, optional: bool = False) -> Any:
    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if isinstance(value, base) or (optional and value is None):
            return
        hint = f" (an instance: write {value.__name__}())" if isinstance(value, type) else ""
        raise LrkitError(
            f"{type(instance).__name__}.{attribute.name} must be a {base.__name__}, not {shown(value)}{hint}"
        )

    return check


@attrs.frozen(kw_only=True)
class Policy:
    """A metric, a scheduler and an action that work together."""

    metric: Metric = attrs.field(validator=_is_a(Metric))
    scheduler: Scheduler = attrs.field(validator=_is_a(Scheduler))
    action: Action = attrs.field(validator=_is_a(Action))

    def refusal(self, parameterization: Parameterization) -> str | None:
        """Why this policy cannot run on a parameterization, with both sides named; None where it can."""
        action, scheduler, metric = self.action, self.scheduler, self.metric
        reason = action.refusal(parameterization)
        if reason is not None:
            return f"action {action!r} does not fit parameterization {parameterization!r}: {reason}"
        if action.grows and (action.unit != "component" or not parameterization.grows):
            return (
                f"action {action!r} does not fit parameterization {parameterization!r}: the action adds rank components, "
                "and this parameterization does not say how a new one begins"
            )
        most = parameterization.units(action.unit)
        if most == 0:
            return (
                f"action {action!r} does not fit parameterization {parameterization!r}: "
                f"it acts on units of kind {action.unit!r}, and there are none that train"
            )
        if metric.reads in ("core", "component") and action.unit != "component":
            what = "the core value of a component" if metric.reads == "core" else "whole components"
            return (
                f"metric {metric!r} does not fit action {action!r}: the metric reads {what}, "
                f"and the action's units are of kind {action.unit!r}"
            )
        if metric.reads == "core" and not any(part.core and part.trains for part in parameterization.parts):
            return (
                f"metric {metric!r} does not fit parameterization {parameterization!r}: "
                "the metric reads core values, and there are none"
            )
        start, target = scheduler.start, scheduler.target
        if type(target) is type(start) and target > start and not action.grows:
            return (
                f"{type(scheduler).__name__}.target = {target!r} is above start = {start!r}, and {action!r} adds no units: "
                "such a budget never grows"
            )
        for name in ("start", "target") if not action.grows else ():
            amount = getattr(scheduler, name)
            if isinstance(amount, int) and amount > most:
                what = "initial rank" if action.unit == "component" else f"number of units ({action.unit})"
                return (
                    f"{type(scheduler).__name__}.{name} = {amount} is above the {what} {most} "
                    f"of {parameterization!r}: it must be at most {most}, or a share such as 0.5"
                )
        return None


def _as_tuple(policies: Iterable[Policy]) -> tuple[Policy, ...]:
    if isinstance(policies, Policy):
        return (policies,)
    if not isinstance(policies, Iterable) or isinstance(policies, type):
        raise LrkitError(f"Method.also must hold lrkit.Policy(metric=..., ...), not {shown(policies)}")
    return tuple(policies)


@attrs.frozen(kw_only=True)
class Method:
    """A parameterization and its policies.

    Args:
        parameterization: how ΔW is written in trainable tensors.
        metric: how much each unit matters. Metric, scheduler and action come together, or not at all.
        scheduler: how much may be kept at step t.
        action: what happens to the units that lose.
        also: further policies, carried out after the first, in order.

    Raises:
        LrkitError: a field of the wrong type, only some of metric, scheduler and action, or a combination that does not
            fit, with both sides named.
    """

    parameterization: Parameterization = attrs.field(validator=_is_a(Parameterization))
    metric: Metric | None = attrs.field(default=None, validator=_is_a(Metric, optional=True))
    scheduler: Scheduler | None = attrs.field(default=None, validator=_is_a(Scheduler, optional=True))
    action: Action | None = attrs.field(default=None, validator=_is_a(Action, optional=True))
    also: tuple[Policy, ...] = attrs.field(default=(), converter=_as_tuple)

    def __attrs_post_init__(self) -> None:
        """Refuse what cannot work."""
        missing = [name for name in _POLICY_FIELDS if getattr(self, name) is None]
        if missing and len(missing) < len(_POLICY_FIELDS):
            given = [name for name in _POLICY_FIELDS if name not in missing]
            raise LrkitError(
                f"a policy is a metric, a scheduler and an action: {' and '.join(given)} given, "
                f"{' and '.join(missing)} missing"
            )
        for policy in self.also:
            if not isinstance(policy, Policy):
                raise LrkitError(f"Method.also must hold lrkit.Policy(metric=..., ...), not {shown(policy)}")
        for policy in self.policies:
            reason = policy.refusal(self.parameterization)
            if reason is not None:
                raise LrkitError(reason)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """All policies in the order in which they act; none for a method that is not adaptive."""
        if self.metric is None or self.scheduler is None or self.action is None:
            return self.also
        return (Policy(metric=self.metric, scheduler=self.scheduler, action=self.action), *self.also)


# ---- plain data -----------------------------------------------------------------------------------------------------


def to_plain(method: Method, registry: "Registry | None" = None) -> dict[str, Any]:
    """A method as plain data: dicts, lists, strings, numbers.

    Returns:
        ``{"parameterization": {"name": "svd", "rank": 12, ...}, "metric": {...} or None, ..., "also": [...]}``, with
        every setting written out. `from_plain` gives an equal method back.

    Raises:
        LrkitError: a component's class is not registered.
    """
    registry = registry or _registry()

    def component(kind: "Kind", value: Any) -> dict[str, Any] | None:
        if value is None:
            return None
        settings = {field.name: _plain(getattr(value, field.name)) for field in attrs.fields(type(value))}
        return {"name": registry.name_of(kind, type(value)), **settings}

    plain: dict[str, Any] = {kind: component(kind, getattr(method, kind)) for kind in FIELDS}
    plain["also"] = [
        {kind: component(kind, getattr(policy, kind)) for kind in _POLICY_FIELDS} for policy in method.also
    ]
    return plain


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def from_plain(plain: Mapping[str, Any], registry: "Registry | None" = None) -> Method:
    """A method from plain data, the inverse of `to_plain`. Settings left out take their defaults.

    Raises:
        LrkitError: an unknown field, name or setting (with the nearest right one), a setting of the wrong type or
            range, or a combination that does not fit.
    """
    registry = registry or _registry()
    if not isinstance(plain, Mapping):
        raise LrkitError(f"a method must be a table with a parameterization, not {shown(plain)}")
    _no_others(plain, (*FIELDS, "also"), "method")
    if plain.get("parameterization") is None:
        raise LrkitError("a method needs a parameterization")
    parts = {kind: _component(registry, kind, plain.get(kind), kind) for kind in FIELDS}
    policies = []
    also = plain.get("also") or ()
    if not isinstance(also, list | tuple):
        raise LrkitError(f"also must be a list of policies, not {shown(also)}")
    for index, policy in enumerate(also):
        where = f"also.{index}"
        if not isinstance(policy, Mapping):
            raise LrkitError(f"{where} must be a table with metric, scheduler and action, not {shown(policy)}")
        _no_others(policy, _POLICY_FIELDS, where)
        built = {k: _component(registry, k, policy.get(k), f"{where}.{k}") for k in _POLICY_FIELDS}
        empty = [kind for kind, value in built.items() if value is None]
        if empty:
            raise LrkitError(f"{where} lacks {' and '.join(empty)}")
        policies.append(Policy(**built))
    return Method(**parts, also=tuple(policies))


def _component(registry: "Registry", kind: "Kind", plain: Any, where: str) -> Any:
    if plain is None:
        return None
    if isinstance(plain, str):
        plain = {"name": plain}
    if not isinstance(plain, Mapping) or "name" not in plain:
        raise LrkitError(f"{where} must be a name, or a table with a name and settings, not {shown(plain)}")
    if not isinstance(plain["name"], str):
        raise LrkitError(f"{where}: a name must be a text, not {shown(plain['name'])}")
    cls = registry.get(kind, plain["name"])
    settings = check_settings(cls, {key: value for key, value in plain.items() if key != "name"}, where)
    try:
        return cls(**settings)
    except LrkitError:
        raise
    except (TypeError, ValueError) as error:
        # A plug-in's settings may be checked by attrs' own validators, or have no default.
        raise LrkitError(f"{where}: {' '.join(str(error).split())}") from error


def check_settings(cls: type, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings for an attrs class as its annotations have them, exactly: no string becomes a number.

    Raises:
        LrkitError: a setting that the class has not (with the nearest one), or of another type.
    """
    hints = typing.get_type_hints(cls)
    _no_others(settings, [field.name for field in attrs.fields(cls)], where)
    return {key: _typed(value, hints[key], f"{where}.{key}") for key, value in settings.items()}


def check_arguments(factory: Any, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keyword arguments for a method's function as its annotations have them. Raises LrkitError like `check_settings`."""
    try:
        hints = typing.get_type_hints(factory)
    except Exception:  # an annotation imported for type checkers alone, an object that can be called: the parts check
        hints = {}
    return {
        key: _typed(value, hints[key], f"{where} {key}") if key in hints else value for key, value in arguments.items()
    }


def _no_others(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            listed = f"; there are {', '.join(known)}" if known else "; it has none"
            raise LrkitError(f"{where} has no setting {_named(key)}{nearest(str(key), known)}{listed}")


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value as its annotation has it, exactly: no string becomes a number, and no 4.5 becomes 4."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    elif origin in (Union, types.UnionType):
        options = typing.get_args(hint)
        # An exact type first: where int and float mean different things, 8 must stay an int.
        if type(value) in options or (value is None and type(None) in options):
            return value
        for option in options:
            try:
                return _typed(value, option, where)
            except LrkitError:
                continue
        fits = False
    elif origin is tuple:
        inner = typing.get_args(hint)[0]
        if isinstance(value, list | tuple):
            return tuple(_typed(item, inner, where) for item in value)
        fits = False
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        try:
            value = float(value) if fits else value
        except OverflowError:
            fits = False
    elif hint in (int, str, bool, type(None)):
        fits = type(value) is hint
    else:
        fits = True
    if not fits:
        name = getattr(hint, "__name__", None) if origin is None else str(hint).replace("typing.", "")
        raise LrkitError(f"{where} must be {name or hint}, not {shown(value)}")
    return value


def defaults(cls: type) -> dict[str, Any]:
    """The settings of a component's class that have a default which is always the same."""
    found = {}
    for field in attrs.fields(cls):
        default: Any = field.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = attrs.NOTHING if default.takes_self else default.factory()
        if default is not attrs.NOTHING:
            found[field.name] = _plain(default)
    return found


def _fits(value: Any, hint: Any) -> bool:
    try:
        _typed(value, hint, "")
    except LrkitError:
        return False
    return True


def with_setting(plain: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Plain data of a method with one setting changed: ``with_setting(plain, "parameterization.rank", 8)``.

    Args:
        plain: what `to_plain` gives.
        path: names joined by dots; a number picks a policy of `also`.
        value: the new value.

    Raises:
        LrkitError: no such setting (with the nearest right one).
    """
    owner, _, key = path.rpartition(".")
    if path == "also":
        raise LrkitError('no setting "also": it holds whole policies; change one part, such as "also.0.metric"')
    copy, node = _descend(plain, owner, path)
    known = [name for name in node if name != "name"] if isinstance(node, dict) else []
    if key not in known or (not owner and key in FIELDS):
        leaves = [leaf for leaf in _leaves(plain) if not leaf.endswith(".name")]
        same = [leaf for leaf in leaves if leaf.rpartition(".")[2] == key]
        hint = f" (did you mean {' or '.join(same)}?)" if same else nearest(path, leaves)
        there = f"; {owner} has {', '.join(known) or 'none'}" if owner else ""
        raise LrkitError(f"no setting {_named(path)}{hint}{there}")
    node[key] = value
    return copy


def with_component(
    plain: Mapping[str, Any], path: str, name: str | None, registry: "Registry | None" = None
) -> dict[str, Any]:
    """Plain data of a method with one component swapped by name: ``with_component(plain, "metric", "magnitude")``.

    The component swapped in takes over the values of the settings that both have (a linear scheduler keeps the cubic's
    target, warm-up and interval), so that the ablation changes one thing; its other settings are at their defaults. A
    setting marked `lrkit.settings.OWN` on either side is not carried over.

    Args:
        plain: what `to_plain` gives.
        path: ``"metric"``, ``"scheduler"``, ``"action"``, ``"parameterization"``, or one in `also`: ``"also.0.metric"``.
        name: the registered name; None to leave the component out.
        registry: where names are looked up.

    Raises:
        LrkitError: no such component or name (with the nearest right one).
    """
    registry = registry or _registry()
    owner, _, kind = path.rpartition(".")
    copy, node = _descend(plain, owner, path)
    known = FIELDS if not owner else _POLICY_FIELDS
    if not isinstance(node, dict) or kind not in known:
        raise LrkitError(f"no component {_named(path)}{nearest(kind, known)}; there are {', '.join(known)}")
    if name is None:
        node[kind] = None
        return copy
    cls = registry.get(kind, name)
    hints = typing.get_type_hints(cls)
    there = node.get(kind) or {}
    fields = {field.name for field in attrs.fields(cls) if not field.metadata.get("own")}
    if there:
        old = attrs.fields(registry.get(kind, there["name"]))
        fields -= {field.name for field in old if field.metadata.get("own")}
    shared = {key: value for key, value in there.items() if key in fields}
    fitting = {key: value for key, value in shared.items() if _fits(value, hints[key])}
    node[kind] = {"name": name, **defaults(cls), **fitting}
    return copy


def swapped(plain: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Plain data of a method with one thing swapped: a component (`with_component`) or a setting (`with_setting`).

    Args:
        plain: what `to_plain` gives.
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
                return with_component(plain, path, None)  # a misspelt component: told as such
            raise
    if not isinstance(value, Mapping):
        if not isinstance(value, str | None):
            raise LrkitError(f"{path} must be a name, or a table with a name and settings, not {shown(value)}")
        return with_component(plain, path, value)
    if not isinstance(value.get("name"), str):
        raise LrkitError(f"{path} must be a name, or a table with a name and settings, not {shown(dict(value))}")
    copy, node = _descend(with_component(plain, path, value["name"]), path, path)
    settings = {field.name for field in attrs.fields(_registry().get(kind, value["name"]))}  # with or without a default
    for key, setting in value.items():
        if key in settings:
            node[key] = setting
        elif key != "name":
            with_setting(copy, f"{path}.{key}", setting)  # raises, with the nearest right one
    return copy


def with_arguments(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of a registered method with arguments of its function (``rank``) and settings (``metric.beta1``).

    Raises:
        LrkitError: no such method, argument or setting (with the nearest right one).
    """
    factory = _registry().get("method", name)
    arguments = {key: value for key, value in settings.items() if key in arguments_of(name)}
    plain = to_plain(_registry().method(name, **check_arguments(factory, arguments, name)))
    for key, value in settings.items():
        if key not in arguments:
            plain = with_setting_of(name, plain, key, value)
    return plain


def arguments_of(name: str) -> list[str]:
    """The arguments of a registered method's function. Raises LrkitError where there is no such method."""
    factory = _registry().get("method", name)
    try:
        return list(inspect.signature(factory).parameters)
    except Exception:  # of a plug-in, and none that Python can look into: it is told as such where it is called
        return []


def with_setting_of(name: str, plain: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`with_setting`, where a misspelt argument of the named method's function is told as such."""
    known = arguments_of(name)
    if "." not in path and not any(path in (plain[kind] or {}) for kind in FIELDS) and (hint := nearest(path, known)):
        raise LrkitError(f'method "{name}" has no argument "{path}"{hint}')
    return with_setting(plain, path, value)


def _descend(plain: Mapping[str, Any], owner: str, path: str) -> tuple[dict[str, Any], Any]:
    copy: dict[str, Any] = _deep(plain)
    node: Any = copy
    for name in owner.split(".") if owner else ():
        places = {str(i): each for i, each in enumerate(node)} if isinstance(node, list) else {}
        if name in places:
            node = places[name]
        elif isinstance(node, dict) and name in node and node[name] is not None:
            node = node[name]
        else:
            if isinstance(node, dict) and name in node:
                raise LrkitError(f"nothing at {_named(path)}: the method has no {name}")
            known = list(node) if isinstance(node, dict) else [str(i) for i in range(len(node or ()))]
            listed = ", ".join(known) or "nothing"
            raise LrkitError(f"nothing at {_named(path)}: no {_named(name)}{nearest(name, known)} (there is {listed})")
    return copy, node


def _named(path: object) -> str:
    """A name that was given, in quotes."""
    return f'"{cut(str(path), 160)}"'


def _leaves(value: Any, path: str = "") -> list[str]:
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}" if path else key)]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [leaf for i, item in enumerate(value) for leaf in _leaves(item, f"{path}.{i}" if path else str(i))]
    return [path]


def _deep(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep(item) for key, item in value.items()}
    return [_deep(item) for item in value] if isinstance(value, list | tuple) else value


def _registry() -> "Registry":
    from lrkit.registry import current

    return current()
