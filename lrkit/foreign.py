"""Calling plug-ins' code and looking at their objects, so that whatever goes wrong in them is one line.

A plug-in may raise anything anywhere, `SystemExit` and `KeyboardInterrupt` included. If the user pressed Ctrl-C
meanwhile, and only then, `KeyboardInterrupt` stays one.
"""

import inspect
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from lrkit.errors import LrkitError, cut


class ForeignError(Exception):
    """A plug-in's code raised.

    Args:
        line: the exception, in one line.
        detail: the traceback.
    """

    def __init__(self, line: str, detail: str) -> None:
        super().__init__(line)
        self.line, self.detail = line, detail


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a plug-in's code. Send its output to stderr, since it is not part of a command's results.

    Raises:
        LrkitError: the code raised one, which is its own line about its input.
        ForeignError: the code raised anything else.
        KeyboardInterrupt: the user pressed Ctrl-C meanwhile.
    """
    with _presses() as pressed, redirect_stdout(sys.stderr):
        try:
            return function(*arguments, **named)
        except LrkitError:
            raise
        except BaseException as error:
            if pressed and isinstance(error, KeyboardInterrupt):
                raise
            raise ForeignError(line_of(error), detail()) from error


@contextmanager
def _presses() -> Iterator[list[int]]:
    """Give a list that is not empty once the user has pressed Ctrl-C. Only the main thread can know."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(before):
        yield pressed
        return

    def handler(number: int, frame: Any) -> Any:
        pressed.append(number)
        return before(number, frame)

    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        if signal.getsignal(signal.SIGINT) is handler:  # else the plug-in has one of its own
            signal.signal(signal.SIGINT, before)


def detail() -> str:
    """Return the traceback of the exception that is being handled."""
    try:
        return traceback.format_exc()
    except Exception:  # a traceback prints objects of the plug-in
        return "(its traceback cannot be printed)"


def line_of(error: BaseException) -> str:
    """Return an exception in one line, with its class's name. Its own message may raise, and be of any length."""
    try:
        text = cut(" ".join(str(error).split()), 500)
    except BaseException:  # of a plug-in's own exception class
        text = "(its message cannot be read)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def text_of(value: Any) -> str:
    """Return an object's `repr` in one line of at most 200 characters, or its class's name if that raises."""
    try:
        return cut(" ".join(repr(value).split()), 200)
    except BaseException:
        return f"an object of {type(value).__name__} whose repr raises"


def where(value: Any) -> str:
    """Return module and name of a class or function; of anything else its `repr`."""
    try:
        return f"{value.__module__}.{value.__qualname__}"
    except BaseException:
        return text_of(value)


def doc(value: Any) -> str:
    """Return an object's docstring without its indentation; an empty text if there is none, or none that can be read."""
    try:
        found = inspect.getdoc(value)
    except BaseException:
        return ""
    return found if isinstance(found, str) else ""


__all__ = ["ForeignError", "call", "detail", "doc", "line_of", "text_of", "where"]
