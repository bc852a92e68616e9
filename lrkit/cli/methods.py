"""``lrkit methods`` and ``lrkit params``: which methods there are, and what each costs on a model, without weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrkit import foreign
from lrkit.cli import screen, words
from lrkit.cli.options import Json, Ranks, Set, Swap, Trust
from lrkit.cli.ranks import Reader
from lrkit.cli.tables import Column
from lrkit.errors import LrkitError

if TYPE_CHECKING:
    from lrkit.method import Method

_ALL_PARTS = 140  # columns in which a description fits beside four parts


def list_methods(as_json: Json = False) -> None:
    """List the named methods and their four parts."""
    from lrkit.compose import to_plain
    from lrkit.method import FIELDS
    from lrkit.registry import current

    plain = {}
    for name, method in words.registered_methods().items():
        try:
            plain[name] = to_plain(method)
        except LrkitError as error:  # a part that is not registered
            screen.left_out(name, error)
    if as_json:
        screen.say_json(plain)
        return
    parts = {name: [each[kind]["name"] if each[kind] else "-" for kind in FIELDS] for name, each in plain.items()}
    room = screen.width()
    if room is None or room >= _ALL_PARTS:
        about = {name: foreign.doc(current().get("method", name)).partition("\n")[0] for name in parts}
        columns = [Column("method"), *map(Column, FIELDS), Column("")]
        screen.table(columns, [[name, *each, about[name]] for name, each in parts.items()])
    else:
        composed = [[name, " + ".join(part for part in each if part != "-")] for name, each in parts.items()]
        screen.table([Column("method"), Column("composition")], composed)
        screen.say("lrkit plugins show NAME: what one is, and what can be set")


def params(
    method: Annotated[list[str] | None, typer.Argument(help="Methods' names; all of them if none is given.")] = None,
    model: Annotated[
        str, typer.Option("--model", help="deberta-v3-base, minilm, smollm2, ..., or a folder with config.json.")
    ] = ("deberta-v3-base"),
    steps: Annotated[int, typer.Option(help="Optimizer steps that averages are over.", min=1)] = 10_000,
    tokens: Annotated[int, typer.Option(help="Count FLOPs for so many tokens; 0 for none.", min=0, max=65_536)] = 0,
    sets: Set = None,
    swap: Swap = None,
    ranks: Ranks = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Count parameters and FLOPs, without weights.

    Trainable parameters at the start, at the end and on average over a run of so many steps, from the schedule alone.
    """
    import attrs

    from lrkit.accounting import count, flops_on
    from lrkit.study.models import empty_model
    from lrkit.study.run_settings import attach_settings

    if ranks is not None and not method:
        raise LrkitError("--ranks is of methods that are named: name one")
    given = None if ranks is None else words.ranks(ranks, model, "all-linear", sets or [], trust=trust_remote_code)
    composed = _composed(method or [], sets or [], swap or [], given)
    if of_task := words.options(sets or []):
        raise LrkitError(
            f"task.{min(of_task)} is a setting of a task, and nothing is trained here: parameters are counted"
        )
    where = attach_settings(words.divided(sets or [])[1])
    loading = words.loading(sets or [], trust=trust_remote_code)
    if others := [name for name in loading.to_plain() if name not in ("revision", "trust_remote_code")]:
        raise LrkitError(f"model.{others[0]} is of weights, and nothing is loaded here: parameters are counted alike")
    net = empty_model(model, None, loading)
    plain: dict[str, Any] = {}
    rows = []
    for name, each in composed.items():
        try:
            counted = count(each, net, total_steps=steps, **where)
        except LrkitError as error:
            if method:
                raise
            screen.left_out(name, error)
            continue
        plain[name] = attrs.asdict(counted)
        rows.append([name, *_counts(each, counted)])
        if tokens:
            work = flops_on(each, net, tokens, **where)
            plain[name]["flops"] = {"forward": work.forward, "backward": work.backward, "tokens": tokens}
            rows[-1] += [screen.whole(f"{way / tokens / 2e6:,.2f} M") for way in (work.forward, work.backward)]
    if as_json:
        screen.say_json({"model": model, "steps": steps, "methods": plain})
        return
    if not rows:
        raise LrkitError(f"no method fits {model}")
    numbers = ["trainable at start", "at end", "on average"]
    columns = [Column("method"), *(Column(name, number=True) for name in numbers)]
    columns += [Column("of these λ or d", number=True, extra=True), Column("layers", number=True, extra=True)]
    if tokens:
        columns += [Column("multiply-adds per token, forward", number=True), Column("backward", number=True)]
    screen.table(columns, rows, f"{model}: {counted.model:,} parameters without its head")
    head = f"the head (classifier, pooler: {counted.head:,}) is not counted" if counted.head else "no head is trained"
    screen.say(f"Averages are over {steps:,} steps; {head}.")
    if any("≈" in cell for row in rows for cell in row):
        screen.say(
            "≈: layers differ in size, and in which of them units go is known after a run: --json has the range."
        )


def _composed(
    names: Sequence[str], sets: Sequence[str], swaps: Sequence[str], ranks: Reader | None
) -> "dict[str, Method]":
    """Compose the methods that are named; or all, without those that cannot be made even as they are."""
    from lrkit.registry import current
    from lrkit.study.run_settings import ATTACH

    composed = {}
    for name in names or current().names("method"):
        try:
            composed[name], run = words.compose(name, sets, swaps, runs=False, ranks=ranks)
        except LrkitError as error:
            if names or not _is_broken(name):
                raise
            screen.left_out(name, error)
            continue
        if others := [key for key in run if key not in ATTACH]:
            raise LrkitError(
                f"run.{others[0]} is a setting of a run, and nothing runs here: use --steps for its length"
            )
    return composed


def _is_broken(name: str) -> bool:
    """Check whether a registered method cannot be made even as it is."""
    from lrkit.registry import current

    try:
        current().method(name)
    except LrkitError:
        return True
    return False


def _counts(method: "Method", counted: Any) -> list[str]:
    ranges = ((counted.end, counted.end_range), (counted.average, counted.average_range))
    end, average = (f"{'≈ ' if low < high else ''}{number:,.0f}" for number, (low, high) in ranges)
    if any(policy.action.turnover(1, 1, 1) is None for policy in method.policies):
        # The number of units that go is known only after a run: any number would be a guess.
        end, average = (f"{low:,.0f} to {high:,.0f}" for low, high in (counted.end_range, counted.average_range))
    return [f"{counted.start:,}", end, average, f"{counted.core:,}", str(counted.layers)]
