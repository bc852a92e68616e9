"""``lrkit power``: how many seeds a study needs to see what there is, before its first step."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrkit.cli import screen
from lrkit.cli.options import Json
from lrkit.cli.tables import Column
from lrkit.errors import LrkitError

if TYPE_CHECKING:
    from lrkit.study.spreads import Spread


def power(
    folder: Annotated[Path | None, typer.Argument(help="An earlier study's folder, for the spread.")] = None,
    size: Annotated[float | None, typer.Option(help="A difference to be shown, in the score's units: 0.01.")] = None,
    margin: Annotated[
        float | None, typer.Option(help="A margin to be equivalent within; the study's where it has one.")
    ] = None,
    spread: Annotated[
        float | None, typer.Option(help="Standard deviation of paired differences from seed to seed.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Rows beside the base; the study's, or 1.")] = None,
    probability: Annotated[float, typer.Option("--power", help="Wanted probability of showing it.")] = 0.8,
    as_json: Json = False,
) -> None:
    """Say how many seeds would see a difference of a stated size.

    lrkit power --spread 0.012 --size 0.01 --margin 0.01 --rows 3

    lrkit power study --size 0.01 takes the spread from a study that has run, task by task.
    """
    from lrkit.study.power import seeds_needed
    from lrkit.study.records import read_study
    from lrkit.study.scores import check_share
    from lrkit.study.spreads import Spread, spreads_of

    if (folder is None) == (spread is None):
        raise LrkitError("say how much differences vary: a study's folder, or --spread, and not both")
    if folder is not None:
        record = read_study(folder)
        found = spreads_of(record)
        for task in record.tasks:
            check_share(size, "--size", task.metric)
            check_share(margin, "--margin", task.metric)
        margin = record.margin if margin is None else margin
        rows = max(1, len(record.rows) - 1) if rows is None else rows
    else:
        found = [Spread(task="", spread=spread)]
    if size is None and margin is None:
        raise LrkitError("say what is to be shown: --size of a difference, --margin of equivalence, or both")
    rows = 1 if rows is None else rows

    def needed(each: "Spread", **what: Any) -> int | None:
        if each.spread is None:
            return None
        return seeds_needed(spread=each.spread, rows=rows, power=probability, **what)

    asked = {"difference": {"size": size}} if size is not None else {}
    asked |= {"equivalence": {"margin": margin}} if margin is not None else {}
    seeds = {each.task: {name: needed(each, **what) for name, what in asked.items()} for each in found}
    if as_json:
        told = [{"task": each.task, "spread": each.spread, "pairs": each.pairs, **seeds[each.task]} for each in found]
        screen.say_json({"size": size, "margin": margin, "rows": rows, "power": probability, "seeds": told})
        return
    _show(found, seeds, {"difference": f"a difference of {size}", "equivalence": f"equivalence within ±{margin}"})
    screen.say(
        f"Seeds of each row for a probability of {probability:g}, with {rows} row{'s' if rows > 1 else ''} beside the base "
        "(Holm). Assumed: normal differences of this spread"
        + ("; for equivalence, that there is no difference at all." if margin is not None else ".")
    )
    if errors := [each.uncertainty for each in found if each.uncertainty]:
        screen.say(f"An estimated spread is itself uncertain: by {max(errors):.0%} here, and the seeds by twice that.")


def _show(found: "list[Spread]", seeds: dict[str, dict[str, int | None]], words: dict[str, str]) -> None:
    """Print one line per task."""
    from lrkit.study.power import MOST

    asked = list(next(iter(seeds.values())))
    head = [Column("task")] if found[0].task else []
    head += [Column("spread", number=bool(head))]
    head += [Column("estimated from", number=True)] if found[0].task else []
    head += [Column(f"seeds for {words[name]}", number=True) for name in asked]
    lines = []
    for each in found:
        line = [each.task, *_spread(each), f"{each.pairs} pairs"] if each.task else _spread(each)
        told = [seeds[each.task][name] for name in asked]
        unknown = "unknown" if each.spread is None else f"over {MOST:,}"
        lines.append([*line, *(screen.whole(unknown if n is None else str(n)) for n in told)])
    screen.table(head, lines)


def _spread(each: "Spread") -> list[str]:
    return ["no spread" if each.spread is None else f"{each.spread:.4g}"]
