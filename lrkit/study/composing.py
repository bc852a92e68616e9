"""Compose a method from a name, settings and swaps, as plain data.

For example, ``composed("adalora", {"rank": 8, "metric.beta1": 0.5}, {"metric": "sensitivity"})`` is AdaLoRA of rank 8
whose metric is swapped and then set. The order is always the same: arguments of the method's function first, since they
move several settings together; then swaps; then settings, since one may be of a component that was swapped in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lrkit.compose import arguments_of, compose, from_plain, to_plain, with_setting, with_setting_of
from lrkit.errors import LrkitError, nearest, shown
from lrkit.method import FIELDS

LEAVE_OUT = ("penalty", "policy", "also")


def composed(
    base: Any,
    settings: Mapping[str, Any] | None = None,
    swaps: Mapping[str, Any] | None = None,
    leave_out: Sequence[str] = (),
    *,
    beneath: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compose a method.

    Args:
        base: a registered method's name, or a method as plain data.
        settings: arguments of a named method's function (``"rank"``), and settings (``"metric.beta1"``).
        swaps: component or setting to value: ``{"metric": "magnitude"}``.
        leave_out: parts that it goes without: ``"penalty"``, ``"policy"``, ``"also"``.
        beneath: settings that the base has already, and that swaps and settings come on top of.

    Returns:
        Plain data, which `from_plain` may still refuse.

    Raises:
        LrkitError: an unknown name, argument or setting (with the nearest right one).
    """
    settings, swaps = settings or {}, swaps or {}
    if not isinstance(base, str | Mapping):
        raise LrkitError(f"base must be a method's name, or a table with a parameterization, not {shown(base)}")
    base = base if isinstance(base, str) else to_plain(from_plain(base))
    known = arguments_of(base)
    arguments = {key: value for key, value in {**swaps, **settings}.items() if key in known}
    plain = compose(base, {**(beneath or {}), **arguments})
    plain = compose(plain, swaps={key: value for key, value in swaps.items() if key not in arguments})
    for name in leave_out:
        plain = without(plain, name)
    for path, value in settings.items():
        if path not in arguments:
            plain = with_setting_of(base, plain, path, value)
    return plain


def without(plain: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return plain data of a method without its penalty, its policy or its further policies.

    Args:
        plain: the method.
        name: ``"penalty"``, ``"policy"`` or ``"also"``.

    Raises:
        LrkitError: an unknown name, or a method that has no such part.
    """
    from lrkit.registry import current

    if name not in LEAVE_OUT:
        raise LrkitError(f'leave_out: there is no "{name}"{nearest(name, LEAVE_OUT)}; there are {", ".join(LEAVE_OUT)}')
    copy = dict(plain)
    if name == "also":
        if not copy["also"]:
            raise LrkitError("leave_out: the method has no further policies (also)")
        return copy | {"also": []}
    if name == "policy":
        if copy["metric"] is None:
            raise LrkitError("leave_out: the method has no policy")
        return copy | {"metric": None, "scheduler": None, "action": None}
    part = copy["parameterization"]
    weight = current().get("parameterization", part["name"]).penalty_weight
    if weight is None:
        raise LrkitError(f'leave_out: parameterization "{part["name"]}" has no penalty')
    return with_setting(copy, f"parameterization.{weight}", 0.0)


def check_path(base: Any, plain: Mapping[str, Any], path: str) -> None:
    """Raise LrkitError if a path to swap leads nowhere, before any value of it is looked at.

    Args:
        base: a registered method's name, or anything else.
        plain: the base with its settings.
        path: of a component, a setting or an argument.
    """
    kind = path.rpartition(".")[2]
    if kind in FIELDS or path in arguments_of(base):
        return
    if isinstance(base, str) and not nearest(kind, FIELDS):
        with_setting_of(base, plain, path, None)
    else:
        compose(plain, swaps={path: None})
