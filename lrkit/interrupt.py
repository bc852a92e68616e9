"""Handle Ctrl-C in the command line: the first ends the work in order, the second ends the process at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_state: dict[str, Any] = {"pressed": 0, "stop": None}


def second_ends_at_once() -> None:
    """Let a second Ctrl-C end this process without a traceback, even during its last clean-up.

    Nothing is changed outside of the main thread, or if somebody else handles the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, _handler):
        return
    _state["pressed"] = 0
    signal.signal(signal.SIGINT, _handler)


def _handler(number: int, frame: Any) -> None:
    _state["pressed"] += 1
    if _state["pressed"] > 1:
        os.write(2, b"lrkit: interrupted twice: ended at once\n")
        os._exit(130)
    if _state["stop"] is not None:
        _state["stop"]()
        return
    raise KeyboardInterrupt


@contextmanager
def stopping(gently: bool) -> Iterator[Callable[[], bool]]:
    """Ask the work in the block to stop at the first Ctrl-C. For example, a run then ends its step and saves it.

    Args:
        gently: whether to do so; if not, a Ctrl-C raises `KeyboardInterrupt` as ever.

    Yields:
        A function that says whether the user has asked to stop.
    """
    asked: list[int] = []

    def stop() -> None:
        asked.append(1)
        print("lrkit: stopping after this step; Ctrl-C again ends it at once", file=sys.stderr)  # noqa: T201

    _state["stop"] = stop if gently else None
    try:
        yield lambda: bool(asked)
    finally:
        _state["stop"] = None
