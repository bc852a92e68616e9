"""Plain data into attrs classes, strictly: no value becomes another type, and one error names the path.

For example, a study whose third row has a number for its label is refused with ``rows[2].label must be a text, not 3``.
The work is cattrs'; here are its strict settings and the one line that an error becomes. No torch here.
"""

import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from lrkit.errors import LrkitError, nearest, shown

if TYPE_CHECKING:
    import cattrs

T = TypeVar("T")

_WORDS = {int: "a whole number", str: "a text", bool: "true or false"}


class Misfit(Exception):
    """Say of one value that it does not fit.

    Args:
        text: what it must be, after its path: ``"must be a text, not 3"``.
        path: where it is, seen from the value that was looked at: ``"[2].label"``.
    """

    def __init__(self, text: str, path: str = "") -> None:
        super().__init__(f"{path} {text}")
        self.text, self.path = text, path


def strict_converter(*, forbid_extra_keys: bool = False) -> "cattrs.Converter":
    """Make a converter that is strict where cattrs is lenient: it makes no number of a text, and no list of one.

    A caller may register further hooks, for example for a union of its own; a hook raises `Misfit`.

    Args:
        forbid_extra_keys: refuse keys that a class does not have, instead of passing over them.
    """
    import cattrs

    converter = cattrs.Converter(forbid_extra_keys=forbid_extra_keys)
    for kind in _WORDS:
        converter.register_structure_hook(kind, _exactly)
    converter.register_structure_hook(float, _real)
    converter.register_structure_hook_func(lambda hint: _origin(hint) is dict, _table(converter))
    converter.register_structure_hook_func(lambda hint: _origin(hint) in (list, tuple), _series(converter))
    converter.register_structure_hook_factory(attrs.has, lambda cls: _record(cls, converter))
    return converter


def structured(data: Any, cls: type[T], converter: "cattrs.Converter", root: str = "") -> T:
    """Build an attrs class from plain data.

    Args:
        data: the data.
        cls: the class.
        converter: of `strict_converter`.
        root: what a path begins with, such as ``"study"``; empty for none.

    Raises:
        LrkitError: a value does not fit: the first one, with its path.
    """
    try:
        return converter.structure(data, cls)
    except Exception as error:
        misfit = _first(error)
    told = f"{root}{misfit.path}" if root else misfit.path.removeprefix(".")
    raise LrkitError(f"{told} {misfit.text}" if told else misfit.text)


def _first(error: BaseException) -> Misfit:
    """Find the first thing that is wrong in what cattrs raised, and its path."""
    from cattrs.errors import AttributeValidationNote, ForbiddenExtraKeysError

    path = ""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
        notes = getattr(error, "__notes__", ())
        path += "".join(f".{note.name}" for note in notes if isinstance(note, AttributeValidationNote))
    if isinstance(error, Misfit):
        return Misfit(error.text, path + error.path)
    if isinstance(error, ForbiddenExtraKeysError):
        known = [field.name for field in attrs.fields(error.cl)]
        key = sorted(error.extra_fields)[0]
        return Misfit(f'there is no key "{key}"{nearest(key, known)}; there are {", ".join(known)}', path)
    if isinstance(error, KeyError):
        return Misfit("is missing", path)
    return Misfit(" ".join(str(error).split()), path)


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def _exactly(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise Misfit(f"must be {_WORDS[kind]}, not {shown(value)}")
    return value


def _real(value: Any, _: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Misfit(f"must be a number, not {shown(value)}")
    return float(value)


def _table(converter: "cattrs.Converter") -> Callable[[Any, Any], dict[str, Any]]:
    def structure(value: Any, hint: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise Misfit(f"must be a table, not {shown(value)}")
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is not None:
            raise Misfit(f"must have texts as keys, not {shown(odd)}")
        inner = (*typing.get_args(hint), Any, Any)[1]
        return {key: _inside(item, inner, f".{key}", converter) for key, item in value.items()}

    return structure


def _series(converter: "cattrs.Converter") -> Callable[[Any, Any], Any]:
    def structure(value: Any, hint: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise Misfit(f"must be a list, not {shown(value)}")
        inner = (*typing.get_args(hint), Any)[0]
        items = (_inside(item, inner, f"[{index}]", converter) for index, item in enumerate(value))
        return tuple(items) if _origin(hint) is tuple else list(items)

    return structure


def _inside(value: Any, hint: Any, path: str, converter: "cattrs.Converter") -> Any:
    """Structure one item of a list or a table."""
    try:
        return value if hint is Any else converter.structure(value, hint)
    except Exception as error:
        inner = _first(error)
        raise Misfit(inner.text, path + inner.path) from None


def _record(cls: type, converter: "cattrs.Converter") -> Callable[[Any, Any], Any]:
    from cattrs.gen import make_dict_structure_fn

    build: Any = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=converter.forbid_extra_keys)

    def structure(value: Any, hint: Any) -> Any:
        if not isinstance(value, Mapping):
            raise Misfit(f"must be a table, not {shown(value)}")
        return build(value, hint)

    return structure
