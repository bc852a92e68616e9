"""Read what is typed after a command: ``KEY=VALUE``, values, lists of names, and a method with its changes."""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrkit.cli import hints
from lrkit.cli.ranks import Reader, reader
from lrkit.cli.screen import left_out
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.reading import parse_json

if TYPE_CHECKING:
    from lrkit.method import Method
    from lrkit.study.loading import Loading
    from lrkit.tasks import Task


_MANY = 50  # seeds, beyond which a number of them is rather the name of one


def value(text: str) -> Any:
    """Read a value as JSON; true, false, none and null in any case; any other text is itself."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return parse_json(text.lower() if text.lower() in ("true", "false") else text, "a value")
    except LrkitError:  # no JSON, a number of thousands of digits, brackets without end
        return text


_TAKEN = {"--swap": "PART=NAME", "--tune": "PATH=A,B,... or PATH=log(LOW,HIGH,POINTS)"}


def pair(text: str, option: str = "--set") -> tuple[str, str]:
    """Take ``KEY=VALUE`` apart.

    Raises:
        LrkitError: there is no key, no value, or no sign of equality.
    """
    key, equals, said = text.partition("=")
    if not equals or not key or not said:
        raise LrkitError(f'{option} takes {_TAKEN.get(option, "KEY=VALUE")}, not "{text}"')
    return key, said


def names(text: str) -> list[str]:
    """Read names joined by commas."""
    return [name for name in text.split(",") if name]


def targets(text: str) -> str | list[str]:
    """Read ``--targets``.

    Plain names (letters, digits, dots, commas) are a list of suffixes; anything else is a regular expression.
    """
    return text if text == "all-linear" or not re.fullmatch(r"[\w.,]+", text) else names(text)


def ranks(text: str, model: str, within: str, sets: Sequence[str], *, trust: bool = False) -> Reader:
    """Read ``--ranks`` for the layers that ``--model``, ``--targets`` and ``--set run.exclude`` or ``run.slices`` name."""
    from lrkit.study.models import empty_model
    from lrkit.study.run_settings import attach_settings

    how = loading(sets, trust=trust)
    return reader(
        text, lambda: empty_model(model, None, how), {"targets": targets(within), **attach_settings(divided(sets)[1])}
    )


def train_also(text: str | None) -> str | list[str]:
    """Read ``--train-also``: names joined by commas, "auto", or "none" for an empty list."""
    if text is None or text == "auto":
        return "auto"
    return [] if text == "none" else names(text)


def task(name: str | None, data: Path | None, options: Mapping[str, Any]) -> "Task":
    """Load the task that ``--task`` or ``--data`` names, with its options. Raises LrkitError if it cannot be had."""
    from lrkit.registry import registered_tasks
    from lrkit.tasks import load_task

    return load_task(name, data=data, tasks=registered_tasks()).with_options(options)


def options(sets: Sequence[str]) -> dict[str, Any]:
    """Read the options of the task among what was typed after ``--set``: ``task.num_beams=4``."""
    pairs = map(pair, sets)
    return {key.removeprefix("task."): value(said) for key, said in pairs if key.startswith("task.")}


def loading(sets: Sequence[str], *, trust: bool) -> "Loading":
    """Read how the model is loaded among what was typed after ``--set``: ``model.dtype=bfloat16``.

    Args:
        sets: what was typed.
        trust: whether code that comes with the model may run (``--trust-remote-code``).

    Raises:
        LrkitError: an unknown setting, or a wrong value.
    """
    from lrkit.study.loading import loading_from

    return loading_from(loading_given(sets, trust=trust))


def loading_given(sets: Sequence[str], *, trust: bool) -> dict[str, Any]:
    """Read the same as plain data of what was typed alone: ``model.dtype=float32`` replaces what a study file says.

    Raises:
        LrkitError: as `loading`.
    """
    from lrkit.study.loading import loading_from

    pairs = map(pair, sets)
    given = {key.removeprefix("model."): value(said) for key, said in pairs if key.startswith("model.")}
    if "trust_remote_code" in given:
        raise LrkitError("code that comes with a model is allowed by --trust-remote-code, not by --set")
    if isinstance(given.get("revision"), int | float):  # a branch or commit of digits alone
        given["revision"] = dict(map(pair, sets))["model.revision"]
    given |= {"trust_remote_code": True} if trust else {}
    checked = loading_from(given)
    return {name: getattr(checked, name) for name in given}


def _setting(key: str, said: str) -> Any:
    """Read the value of a setting: of layers' names as ``--targets`` is read, of any other as `value` does."""
    given = value(said)
    return targets(said) if key == "run.exclude" and not isinstance(given, list) else given


def divided(sets: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide what was typed after ``--set`` into settings of the method and, without "run.", settings of the run.

    Those of the task and of the model are left out: see `options` and `loading`.
    """
    pairs = {key: _setting(key, said) for key, said in map(pair, sets) if not key.startswith(("task.", "model."))}
    run = {key.removeprefix("run."): each for key, each in pairs.items() if key.startswith("run.")}
    return {key: each for key, each in pairs.items() if not key.startswith("run.")}, run


def seeds(text: str) -> Any:
    """Read seeds: how many (``"6"``), or which (``"3,4,5"``; one is ``"3,"``). A number that may be meant as one is told."""
    numbers = [value(part) for part in text.removesuffix(",").split(",")]
    if "," in text:
        return numbers
    if isinstance(numbers[0], int) and numbers[0] > _MANY:
        warnings.warn(f"{text} is how many seeds: for the one seed {text} write {text},", LrkitWarning, stacklevel=2)
    return numbers[0]


def tuning(
    spaces: Sequence[str] | None, of_each: str | None, sampler: str | None, trials: int | None, halving: int | None
) -> dict[str, Any]:
    """Read what is to be tuned, as a study file has it; only what was given.

    Args:
        spaces: ``"run.lr=3e-4,1e-3"``, ``"alpha=log(4,32,3)"``.
        of_each: the seeds of each trial.
        sampler: how trials are chosen.
        trials: how many.
        halving: one of so many goes on.
    """
    found: dict[str, Any] = {"space": {}} if spaces else {}
    for text in spaces or []:
        path, said = pair(text, "--tune")
        if path in found["space"]:
            raise LrkitError(f"--tune {path} is given twice: join its values with commas, --tune {path}=VALUE,VALUE")
        tried = said if said.startswith("log(") else [value(name) for name in names(said)]
        found["space"][path] = tried
    given = {
        "seeds": None if of_each is None else seeds(of_each),
        "sampler": sampler,
        "trials": trials,
        "halving": halving,
    }
    return found | {key: each for key, each in given.items() if each is not None}


def compose(
    name: str, sets: Sequence[str], swaps: Sequence[str], *, runs: bool = True, ranks: Reader | None = None
) -> "tuple[Method, dict[str, Any]]":
    """Compose a method from a name, with components swapped and settings changed; and collect the run's settings.

    Args:
        name: a registered method.
        sets: ``"parameterization.rank=8"``; an argument of the method's function, ``"rank=8"``; or ``"run.steps=200"``.
        swaps: ``"metric=magnitude"``.
        runs: False if nothing is trained, so that an error names no setting of a run.
        ranks: gives the method its ranks, layer by layer; None to leave them.

    Raises:
        LrkitError: an unknown name or setting, or a combination that does not fit.
    """
    from lrkit.compose import arguments_of, from_plain
    from lrkit.compose import compose as composed

    settings, run = divided(sets)
    texts = dict(map(pair, sets))
    arguments = arguments_of(name)
    hints.check_settings(texts, arguments, runs=runs)
    swapped = {}
    for text in swaps:
        path, said = pair(text, "--swap")
        swapped[path] = value(said)
        if isinstance(swapped[path], str) and "," in said:
            raise LrkitError(f"--swap {text}: a run has one {path}; `lrkit ablate` compares several")
    # As in a study, a swap may be of an argument of the method's function.
    settings = {path: swapped.pop(path) for path in arguments if path in swapped} | settings
    try:
        plain = composed(name, settings, swapped)
    except LrkitError:
        hints.check_parts(texts)
        raise
    method = from_plain(plain)
    if ranks is not None:
        if "rank" not in plain["parameterization"]:
            raise LrkitError(f'--ranks: parameterization "{plain["parameterization"]["name"]}" has no setting rank')
        if typed := [path for path in ("rank", "parameterization.rank") if path in settings and not ranks.shares]:
            raise LrkitError(f"--ranks gives every layer its rank, and --set {typed[0]} another one: give one of them")
        table = ranks.of(method)
        # As an argument first, since a method may make other settings of it, and again for what was swapped in.
        argument = {"rank": table} if "rank" in arguments else {}
        method = from_plain(composed(name, settings | argument | {"parameterization.rank": table}, swapped))
    return method, run


def to_run(
    name: str | None, all_methods: bool, sets: Sequence[str], swaps: Sequence[str], ranks: Reader | None = None
) -> "tuple[dict[str, Method], dict[str, Any]]":
    """Compose the methods that ``lrkit run`` is to train, by label, and collect the run's settings.

    Raises:
        LrkitError: no method is named or too many are, or as `compose`.
    """
    if (name is None) != all_methods:
        raise LrkitError("give a method's name (`lrkit methods` lists them), or --all-methods")
    if name is not None:
        method, run = compose(name, sets, swaps, ranks=ranks)
        return {" ".join([name, *swaps]): method}, run
    if ranks is not None:
        raise LrkitError("--ranks is of one method: name it instead of --all-methods")
    hints.check_settings(dict(map(pair, sets)), ())
    own, run = divided(sets)
    if own or swaps:
        raise LrkitError(f"--all-methods takes settings of the run alone (run.steps=200), not {[*own, *swaps][0]}")
    return registered_methods(), run


def registered_methods() -> "dict[str, Method]":
    """Make every registered method by name; warn of each that cannot be made, and leave it out."""
    from lrkit.registry import current

    registry = current()
    made: dict[str, Method] = {}
    for name in registry.names("method"):
        try:
            made[name] = registry.method(name)
        except LrkitError as error:
            left_out(name, error)
    return made
