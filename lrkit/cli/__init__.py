"""The command line. Thin: every command is a few lines over the library, and nothing heavy is imported before it runs.

Bad input ends with exit code 2 and one line on stderr that says what was wrong and what would be right.

- `lrkit.cli.app`: the commands by name; `runs`, `exports`, `studies`, `methods` and `plugins` hold them.
- `lrkit.cli.words` reads what is typed, `lrkit.cli.hints` says what was meant.
- `lrkit.cli.screen` and `study_screen` print, `tables` makes tables fit, `progress` shows how far a run is.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from lrkit.cli import hints
from lrkit.cli.app import app
from lrkit.cli.screen import complain
from lrkit.cli.words import compose
from lrkit.errors import LrkitError, LrkitWarning, cut
from lrkit.interrupt import second_ends_at_once

# typer's own base class of wrong usage: it carries its click along, under a private name.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit: 0, or 2 for bad input."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without λ shows a question mark, and no traceback
    with warnings.catch_warnings():
        # lrkit's own warnings are one line each; those of libraries are for their developers, unless asked for with -W.
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", LrkitWarning)
        warnings.showwarning = _warn
        try:
            second_ends_at_once()
            if not {"-h", "--help", "--version"} & set(words):
                from lrkit.vetting import spare_others

                spare_others()
            code = app(args=words, prog_name="lrkit", standalone_mode=False)
            if code == 130:  # typer's own way to end at Ctrl-C
                raise KeyboardInterrupt
        except (KeyboardInterrupt, typer.Abort):
            complain("interrupted")
            sys.exit(130)
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(error.format_message())
            else:
                complain(_usage(error, words))
            sys.exit(2)
        except LrkitError as error:
            complain(str(error))
            sys.exit(2)
        except (MemoryError, RuntimeError) as error:
            if "memory" not in str(error).lower():
                raise
            why = cut(str(error).splitlines()[0], 400) if str(error) else "a smaller rank or batch may fit"
            complain(f"out of memory: {why}")
            sys.exit(2)
        except OSError as error:
            told = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
            complain(cut(told, 800))
            sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any, words: Sequence[str]) -> str:
    """Say in one line what is wrong with a command line, and what was meant."""
    option = getattr(error, "option_name", None)
    unknown = option is not None and hasattr(error, "possibilities")
    message = f"No such option: {option}" if unknown else error.format_message()
    command = "lrkit" if error.ctx is None else error.ctx.command_path
    return f"{cut(message, 800)}{hints.of_usage(error, words)} (see `{command} --help`)"


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    complain(str(message))


__all__ = ["compose", "main"]
