"""Fields of a row of data: what a value must be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import attrs

from lrkit.errors import LrkitError, cut

ROLES = ("system", "user", "assistant", "tool")


@attrs.frozen
class Field:
    """A field of a row.

    Attributes:
        read: from a value and the field's name to what the task is given. It raises LrkitError if the value is none of
            the field's.
        text: whether the value is a text; in CSV a cell of another field holds JSON, such as ``1`` or ``["a", "b"]``.
        optional: whether a row may go without it: it is then an empty text.
    """

    read: Callable[[Any, str], Any]
    text: bool = False
    optional: bool = False


def shown(value: object) -> str:
    """Return a value as JSON, in one short line."""
    try:
        return cut(json.dumps(value, ensure_ascii=True, default=repr), 40)
    except (RecursionError, ValueError):
        return "nested too deeply"


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise LrkitError(f'field "{name}" is {shown(value)}, not a string')
    return _unicode(value, name)


def _unicode(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise LrkitError(f'field "{name}" is not valid Unicode: a lone surrogate') from None
    return text


def _number(value: Any, name: str) -> int | float:
    if value is None:
        raise LrkitError(f'field "{name}" is missing: every row needs one')
    # A bool is a kind of int in Python, but true is not a label.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LrkitError(f"{name} is {shown(value)}, not a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        finite = False
    if not finite:
        raise LrkitError(f"{name} is {shown(value)}, not a finite number")
    return value


def _turn(value: Any, name: str) -> str | list[dict[str, str]]:
    """Read a prompt or a completion: a text, or messages."""
    return _messages(value, name) if isinstance(value, list) else _text(value, name)


def _list_of(kinds: type | tuple[type, ...], value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, kinds) and not isinstance(each, bool) for each in value)


def _words(value: Any, name: str) -> list[str]:
    if not _list_of(str, value) or not value:
        raise LrkitError(f'field "{name}" is {shown(value)}, not a list of strings, one at least')
    return [_unicode(each, name) for each in value]


def _tags(value: Any, name: str) -> list[int] | list[str]:
    if _list_of(str, value):
        return [_unicode(each, name) for each in value]
    if not _list_of(int, value):
        raise LrkitError(f'field "{name}" is {shown(value)}, not a list of strings or of whole numbers')
    if any(not 0 <= each < 2**31 for each in value):
        raise LrkitError(f'field "{name}" is {shown(value)}: a tag is a number from 0')
    return list(value)


def _answers(value: Any, name: str) -> dict[str, Any]:
    given: Any = value if isinstance(value, dict) else {}
    texts, starts = given.get("text"), given.get("answer_start")
    if not _list_of(str, texts) or not _list_of(int, starts):
        raise LrkitError(f'field "{name}" is {shown(value)}, not {{"text": ["..."], "answer_start": [0]}}')
    if len(texts) != len(starts):
        raise LrkitError(f'field "{name}" has {len(texts)} texts and {len(starts)} values of answer_start')
    return {"text": [_unicode(each, name) for each in texts], "answer_start": list(starts)}


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise LrkitError(f'field "{name}" is {shown(value)}, not a list of messages')
    return [_message(each, f"{name}[{place}]") for place, each in enumerate(value)]


def _message(value: Any, name: str) -> dict[str, str]:
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise LrkitError(f'{name} is {shown(value)}, not {{"role": "user", "content": "..."}}')
    if more := [key for key, each in value.items() if key not in ("role", "content") and each]:
        raise LrkitError(f"{name} has {more[0]}, which is not learnt here: messages have role and content")
    if role not in ROLES:
        raise LrkitError(f"{name} has the role {shown(role)}; roles are {', '.join(ROLES)}")
    return {"role": role, "content": _unicode(content, name)}


TEXT = Field(_text, text=True)
OPTIONAL_TEXT = Field(_text, text=True, optional=True)
NUMBER = Field(_number)
WORDS = Field(_words)
TAGS = Field(_tags)
ANSWERS = Field(_answers)
TURN = Field(_turn, text=True)
MESSAGES = Field(_messages)
