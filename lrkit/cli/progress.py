"""Progress bars of training runs on stderr; plain lines now and then if stderr is no terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lrkit.errors import cut

Told = Callable[[int, int, float | None], None]
"""Called after each step with (step, total steps, loss of the step or None)."""

EVERY = 15.0
"""Seconds between two plain lines."""

_LABEL = 28


@contextmanager
def bars(quiet: bool) -> Iterator[Callable[[str, int | None], Told | None]]:
    """Show how far runs are while the block lasts.

    Args:
        quiet: show nothing.

    Yields:
        A function of a run's label and its steps (None if not known yet), called when the run begins, that returns what to
        call after each step.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda label, total: None
        return
    if not console.is_terminal:
        yield lambda label, total: _Lines(
            lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True), label
        )
        return
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as shown:

        def bar(label: str, total: int | None) -> Told:
            row = shown.add_task(cut(label, _LABEL), total=total, loss="-")

            def update(step: int, steps: int, loss: float | None) -> None:
                shown.update(row, completed=step, total=steps, loss="-" if loss is None else f"{loss:.3f}")

            return update

        yield bar


class _Lines:
    """Says of one run when it begins, and every so often how far it is."""

    def __init__(self, say: Callable[[str], None], label: str) -> None:
        self._say, self._label = say, label
        self._begin = self._said = time.monotonic()

    def __call__(self, step: int, steps: int, loss: float | None) -> None:
        now = time.monotonic()
        if step == 1:
            self._say(f"{self._label}: {steps} steps")
        elif now - self._said >= EVERY:
            self._said = now
            left = (now - self._begin) / step * (steps - step)
            what = "" if loss is None else f", loss {loss:.3f}"
            self._say(f"{self._label}: step {step}{what}, about {left:.0f} s left")
