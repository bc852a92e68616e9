"""Settings: checks for attrs fields, and strict conversion from plain data.

The checks are attrs validators, which raise one clear line for a value that cannot be meant. The conversion goes by
annotations: no string becomes a number, and no 4.5 becomes 4.

Times follow one rule everywhere: an ``int`` is a number of optimizer steps, a ``float`` in [0, 1] is a share of the run's
``total_steps``.
"""

import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, Union

import attrs

from lrkit.errors import LrkitError, nearest, quoted, shown

Time = int | float
"""An ``int`` is steps, a ``float`` in [0, 1] is a share of the total steps."""

Amount = int | float
"""An ``int`` is units per adapted matrix on average, a ``float`` in [0, 1] is a share of all units."""

MOST_STEPS = 2**31 - 1
"""The longest run."""

OWN = {"own": True}
"""Metadata of a setting whose default belongs to its component, so that a swap does not carry over another one's value.

For example, `lrkit.metrics.Magnitude` measures after the step whatever the metric before it did."""

_Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _fail(instance: object, name: str, value: object, expected: str) -> LrkitError:
    return LrkitError(f"{type(instance).__name__}.{name} must be {expected}, not {shown(value)}")


def whole(minimum: int, maximum: int = 2**31 - 1) -> _Validator:
    """Accept an ``int`` from `minimum` to `maximum`, and no ``bool``."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise _fail(instance, attribute.name, value, f"an int of at least {minimum}")
        if value > maximum:
            raise _fail(instance, attribute.name, value, f"an int of at most {maximum}")

    return check


def real(minimum: float, maximum: float = math.inf, *, above: bool = False, below: bool = False) -> _Validator:
    """Accept a finite number from `minimum` to `maximum`. If `above` or `below` is set, that end itself is refused."""
    low = f"above {minimum:g}" if above else f"at least {minimum:g}"
    high = "" if maximum == math.inf else f" and {'below' if below else 'at most'} {maximum:g}"

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        good = isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
        good = good and (value > minimum if above else value >= minimum)
        good = good and (value < maximum if below else value <= maximum)
        if not good:
            raise _fail(instance, attribute.name, value, f"a number {low}{high}")

    return check


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def count_or_share(minimum: int = 0) -> _Validator:
    """Accept a `Time` or an `Amount`: an ``int`` from `minimum` to 2^31 - 1, or a ``float`` share in [0, 1]."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        good = isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= MOST_STEPS
        good = good or (isinstance(value, float) and 0.0 <= value <= 1.0)
        if not good:
            expected = f"an int of at least {minimum} (a count) or a float in [0, 1] (a share)"
            raise _fail(instance, attribute.name, value, expected)

    return check


def one_of(choices: Sequence[object]) -> _Validator:
    """Accept one of a few values, of the same type: 1 is not True."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            listed = ", ".join(repr(choice) for choice in choices)
            hint = nearest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
            raise _fail(instance, attribute.name, value, f"one of {listed}{hint}")

    return check


def flag() -> _Validator:
    """Accept True or False."""
    return one_of((True, False))


def in_steps(value: Time, total_steps: int) -> int:
    """Return a `Time` in optimizer steps: an ``int`` as it is, a share rounded to the nearest step."""
    return value if isinstance(value, int) else round(value * total_steps)


def in_units(value: Amount, *, total: int, layers: int) -> int:
    """Return an `Amount` in units: an ``int`` times the number of adapted matrices, a share of `total` rounded."""
    return value * layers if isinstance(value, int) else round(value * total)


def check_settings(cls: type, given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Convert the settings of an attrs class from plain data, exactly as its fields are annotated.

    Args:
        cls: the class.
        given: setting to value.
        place: what errors call the class, such as ``"also.0.metric"``.

    Raises:
        LrkitError: a setting that the class does not have (with the nearest one), or a value of another type.
    """
    hints = _hints(cls)
    refuse_others(given, [field.name for field in attrs.fields(cls)], place)
    return {key: as_annotated(value, hints[key], f"{place}.{key}") for key, value in given.items()}


@lru_cache(maxsize=256)
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def annotation_of(cls: type, name: str) -> Any:
    """Return the annotation of one attribute of a class; the others may name what is imported for type checkers alone."""
    owner = next(each for each in cls.__mro__ if name in inspect.get_annotations(each))
    alone = type(owner.__name__, (), {"__annotations__": {name: inspect.get_annotations(owner)[name]}})
    return typing.get_type_hints(alone, globalns=vars(sys.modules[owner.__module__]))[name]


def refuse_others(given: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    """Raise LrkitError for the first key that is not among the known ones, with the nearest of them."""
    for key in given:
        if key not in known:
            listed = f"; there are {', '.join(known)}" if known else "; it has none"
            raise LrkitError(f"{place} has no setting {quoted(key)}{nearest(str(key), known)}{listed}")


def as_annotated(value: Any, hint: Any, place: str) -> Any:
    """Return a value of plain data as an annotation has it. For example, a list becomes a tuple, and 16 becomes 16.0.

    Annotations that plain data cannot hold, such as a class, accept any value: the class's own validators check it.

    Args:
        value: the value.
        hint: a plain type, a tuple of one, a ``Literal`` or a union of these.
        place: what the error calls the setting.

    Raises:
        LrkitError: the value is of another type.
    """
    origin, fits = typing.get_origin(hint), False
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    elif origin in (Union, types.UnionType):
        options = typing.get_args(hint)
        # An exact type first: 8 must stay an int if int and float mean different things.
        if type(value) in options or (value is None and type(None) in options):
            return value
        for option in options:
            if annotated_as(value, option):
                return as_annotated(value, option, place)
    elif origin is Mapping:
        inner = typing.get_args(hint)
        if isinstance(value, Mapping) and all(
            annotated_as(x, h) for item in value.items() for x, h in zip(item, inner, strict=True)
        ):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(as_annotated(item, typing.get_args(hint)[0], place) for item in value)
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        try:
            value = float(value) if fits else value
        except OverflowError:
            fits = False
    else:
        fits = type(value) is hint or hint not in (int, str, bool, type(None))
    if not fits:
        raise LrkitError(f"{place} must be {_in_words(hint, value)}, not {shown(value)}")
    return value


def _in_words(hint: Any, value: Any) -> str:
    """Name an annotation in an error: ``int | None``. A table is named only if something like one was given."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Mapping:
        return f"a table of {_in_words(inner[1], None)}"
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (Union, types.UnionType):
        told = [option for option in inner if isinstance(value, Mapping) or typing.get_origin(option) is not Mapping]
        return " | ".join("None" if option is type(None) else _in_words(option, value) for option in told)
    return str(getattr(hint, "__name__", hint)) if origin is None else str(hint).replace("typing.", "")


def annotated_as(value: Any, hint: Any) -> bool:
    """Return whether `as_annotated` accepts a value."""
    try:
        as_annotated(value, hint, "")
    except LrkitError:
        return False
    return True


def defaults(cls: type) -> dict[str, Any]:
    """Return the settings of an attrs class that have the same default for every instance, as plain data."""
    found = {}
    for field in attrs.fields(cls):
        default: Any = field.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = attrs.NOTHING if default.takes_self else default.factory()
        if default is not attrs.NOTHING:
            found[field.name] = as_plain(default)
    return found


_NOTHING = object()


def at(plain: Any, path: str, default: Any = None) -> Any:
    """Return what is at a path in plain data, for example at ``"also.0.metric"``; the default if there is nothing."""
    for key in path.split("."):
        if isinstance(plain, list) and key.isdecimal() and int(key) < len(plain):
            plain = plain[int(key)]
        elif isinstance(plain, Mapping) and key in plain:
            plain = plain[key]
        else:
            return default
    return plain


def is_at(plain: Any, path: str) -> bool:
    """Tell if there is anything at a path in plain data."""
    return at(plain, path, _NOTHING) is not _NOTHING


def as_plain(value: Any) -> Any:
    """Copy a value into what JSON can hold: dicts and lists in place of mappings and tuples, all the way down."""
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, list | tuple) else value
