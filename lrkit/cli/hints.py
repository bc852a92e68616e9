"""Find out what was meant by a word in the wrong place: ``--lr 1e-3`` is ``--set run.lr=1e-3``.

A setting has one of four places: the run (``--set run.lr=1e-3``), the method (``--set rank=8``, ``--set metric.beta1=0.5``),
the task (``--set task.num_beams=4``) or the command itself (``--model minilm``). Other tools have one place, and other
names. If a setting is given in the wrong place, is spelt otherwise, or has the name that transformers, PEFT or a paper
gives it, the error tells the right words.
"""

import difflib
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from lrkit.cli import other_names
from lrkit.errors import LrkitError

PARTS = ("parameterization", "metric", "scheduler", "action")


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower())


def meant(word: str, known: Iterable[str], others: Mapping[str, str] | None = None, *, near: bool = True) -> str | None:
    """Find the name that a word stands for.

    Args:
        word: what was given, such as ``"batch-size"`` or ``"learning_rate"``.
        known: the right names.
        others: other tools' names of the same things.
        near: whether a letter may be wrong.

    Returns:
        The right name: one that differs in dashes, capitals or a letter, or that another tool calls so; else None.
    """
    names = {_plain(name): name for name in known}
    other = {_plain(name): right for name, right in (others or {}).items()}.get(_plain(word))
    if (same := names.get(_plain(word))) or (other is not None and (same := names.get(_plain(other)))):
        return same
    found = difflib.get_close_matches(_plain(word), names, n=1, cutoff=0.85) if near and len(word) < 100 else []
    return names[found[0]] if found else None


def run_settings() -> list[str]:
    """Return the names of a run's settings."""
    import attrs

    from lrkit.study.run_settings import RunSettings

    return [field.name for field in attrs.fields(RunSettings)]


def given(key: str, value: str | None) -> str:
    """Write a setting as it is typed after ``--set``."""
    return shlex.quote(f"{key}={'VALUE' if value is None else value}")


# ---- settings --------------------------------------------------------------------------------------------------------


def check_settings(texts: Mapping[str, str], arguments: Collection[str], *, runs: bool = True) -> None:
    """Refuse a setting that is given as one of the run and belongs to the method, or the other way round.

    Args:
        texts: what was typed after ``--set``, key to value.
        arguments: the arguments of the method's function.
        runs: False for a command that trains nothing, so that no setting of a run can be meant.

    Raises:
        LrkitError: such a setting, or one that another tool calls so, with the right one. Any other wrong name is left
            to those who read settings: they know what the method's parts have.
    """
    for key, value in texts.items():
        if key.startswith("run."):
            _check_run(key, value, arguments)
        elif key in PARTS:
            raise LrkitError(f"{key} is a part of the method, and no setting: --swap {given(key, value)}")
        elif "." not in key and key not in arguments:
            _check_method(key, value, arguments, runs)


def _check_run(key: str, value: str, arguments: Collection[str]) -> None:
    name = key.removeprefix("run.")
    known = run_settings()
    if name in known:
        return
    if (right := meant(name, known, other_names.RUN)) is not None:
        raise LrkitError(f'run has no setting "{name}" (did you mean "{right}"?): --set {given(f"run.{right}", value)}')
    if (right := meant(name, arguments, other_names.METHOD, near=False)) is not None:
        raise LrkitError(f'run has no setting "{name}", the method has: --set {given(right, value)}')
    if (right := other_names.TASK.get(name)) is not None:
        raise LrkitError(f'run has no setting "{name}", tasks may have: --set {given(f"task.{right}", value)}')


def _check_method(key: str, value: str, arguments: Collection[str], runs: bool) -> None:
    if (right := meant(key, arguments, other_names.METHOD, near=False)) is not None:
        raise LrkitError(f'no setting "{key}" (did you mean "{right}"?): --set {given(right, value)}')
    if runs and (right := other_names.TASK.get(key)) is not None:
        raise LrkitError(f'no setting "{key}": tasks may have it, --set {given(f"task.{right}", value)}')
    if (right := meant(key, run_settings(), other_names.RUN)) is None:
        return
    if not runs:
        raise LrkitError(f'no setting "{key}": {right} is a setting of a run, and nothing runs here')
    raise LrkitError(f'no setting "{key}": the run has it, --set {given(f"run.{right}", value)}')


def check_parts(texts: Mapping[str, str]) -> None:
    """Refuse a setting that is given as one of a part and is one of the run: ``parameterization.lr``.

    Called if a method could not be composed, since a plug-in's part may have a setting of such a name.

    Args:
        texts: what was typed after ``--set``, key to value.

    Raises:
        LrkitError: such a setting, with the right one.
    """
    for key, value in texts.items():
        part, _, name = key.rpartition(".")
        if part in PARTS and name in (*run_settings(), *other_names.RUN):
            right = given(f"run.{other_names.RUN.get(name, name)}", value)
            raise LrkitError(f'no setting "{key}": the run has it, --set {right}')


# ---- options ---------------------------------------------------------------------------------------------------------


def of_option(
    option: str,
    value: str | None,
    options: Collection[str],
    elsewhere: Mapping[str, Collection[str]],
    method: Callable[[], Mapping[str, str]],
) -> str:
    """Say what was meant by an option that a command does not have.

    Args:
        option: as it was given, such as ``"--learning-rate"``.
        value: what followed it, if anything did.
        options: the command's own options.
        elsewhere: the options of every other command, by the command's name.
        method: gives the settings of the method that is named, each with its path; slow, and asked last.

    Returns:
        The end of a message, with a blank in front; empty if there is nothing to say.
    """
    word = option.lstrip("-").replace("-", "_")
    own = [each.removeprefix("--") for each in options]
    settings = run_settings() if {"--set", "--out"} <= {*options} else []

    def setting(path: str) -> str:
        return f' (did you mean "--set {given(path, value)}"?)'

    def of_method() -> str:
        paths = method() if value is not None and "--set" in options else {}
        return (
            setting(paths[right]) if (right := meant(word, paths, other_names.METHOD, near=False)) is not None else ""
        )

    if (right := meant(word, own, other_names.OPTIONS, near=False)) is not None:
        return f' (did you mean "--{right}"?)'
    if settings and (right := other_names.TASK.get(word)) is not None:
        return setting(f"task.{right}")
    if word in PARTS and "--swap" in options:
        return f' (did you mean "--swap {given(word, value)}"?)'
    if (right := meant(word, settings, other_names.RUN, near=False)) is not None:
        return setting(f"run.{right}")
    if meant(word, other_names.METHOD.values(), other_names.METHOD, near=False) is not None and (hint := of_method()):
        return hint
    if (right := meant(word, own)) is not None:
        return f' (did you mean "--{right}"?)'
    if (right := meant(word, settings)) is not None:
        return setting(f"run.{right}")
    if word == "method" and "--swap" in options:
        return " (a method is named without an option: lrkit run adalora)"
    if hint := of_method():
        return hint
    if where := [name for name, there in elsewhere.items() if option in there]:
        return f" (an option of lrkit {', '.join(where)})"
    found = difflib.get_close_matches(_plain(word), map(_plain, own), n=1) if len(word) < 100 else []
    return next((f' (did you mean "--{name}"?)' for name in own if _plain(name) in found), "")


def of_argument(words: Sequence[str], options: Collection[str]) -> str:
    """Say what was meant by arguments that a command does not take: ``rank=8`` is ``--set rank=8``."""
    pairs = [word for word in words if re.fullmatch(r"[\w.]+=.+", word)]
    if not pairs or "--set" not in options:
        return ""
    key, _, value = pairs[0].partition("=")
    option = "--swap" if key in PARTS and "--swap" in options else "--set"
    return f' (did you mean "{option} {given(key, value)}"?)'


def of_usage(error: Any, words: Sequence[str]) -> str:
    """Say what was meant by a command line that was refused.

    Args:
        error: typer's error about wrong usage.
        words: the command line.

    Returns:
        The end of a message, with a blank in front; empty if there is nothing to say.
    """
    context = error.ctx
    if context is None:
        return ""
    options = _options_of(context.command)
    if (option := getattr(error, "option_name", None)) is not None and hasattr(error, "possibilities"):
        root = context.find_root().command
        others = {
            name: _options_of(command) for name, command in root.commands.items() if command is not context.command
        }
        return of_option(option, _value_of(option, words), options, others, lambda: _settings(words))
    if "unexpected extra argument" in error.format_message():
        return of_argument(words, options)
    return ""


def _options_of(command: Any) -> list[str]:
    return [name for parameter in command.params for name in parameter.opts if name.startswith("--")]


def _value_of(option: str, words: Sequence[str]) -> str | None:
    for index, word in enumerate(words):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option:
            follows = words[index + 1] if index + 1 < len(words) else ""
            return None if not follows or re.match(r"-+[a-z]", follows, re.IGNORECASE) else follows
    return None


def _settings(words: Sequence[str]) -> dict[str, str]:
    """Find the settings of the method that a command line names: the last part of each path, and the path."""
    from lrkit.compose import arguments_of, to_plain
    from lrkit.registry import current

    registry = current()
    known = registry.names("method")
    name = next((word for word in words[1:] if word in known), None)
    if name is None:
        return {}
    try:
        plain = to_plain(registry.method(name))
    except LrkitError:
        plain = {}
    found = {key: f"{part}.{key}" for part in reversed(PARTS) for key in plain.get(part) or {} if key != "name"}
    return found | {key: key for key in arguments_of(name)}
