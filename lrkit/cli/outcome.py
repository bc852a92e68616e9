"""Print what came of runs: a table, their further scores, and a few answers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lrkit.cli import screen
from lrkit.cli.tables import Column
from lrkit.study.scores import Scale, scale_of

if TYPE_CHECKING:
    from lrkit.study.run import Result

_SHOWN, _LONGEST = 2, 240
"""How many samples are printed, and how many characters of each text."""


def show(results: "Mapping[str, Result]", title: str) -> None:
    """Print a table of runs, and what they say."""
    first = next(iter(results.values()))
    name = next(iter(first.scores))
    scale = scale_of([name], [result.score for result in results.values()], higher_is_better=first.higher_is_better)
    rows = []
    for label, result in results.items():
        summary, speed = result.summary, result.tokens_per_second
        rows.append(
            [
                label,
                _written(result.score, scale),
                f"{summary.start:,}",
                f"{summary.now:,}",
                f"{summary.average:,.0f}",
                screen.whole(f"{result.flops.run / 1e12:,.2f} T"),
                _state(result),
                screen.whole(f"{result.step_seconds * 1000:,.0f} ms"),
                "-" if speed is None else f"{speed:,.0f}",
            ]
        )
    numbers = [name, "trainable at start", "at end", "on average", "FLOPs"]
    columns = [Column("method"), *(Column(name, number=True) for name in numbers)]
    columns += [Column("state at the end"), Column("a step", number=True, extra=True)]
    columns += [Column("tokens/s", number=True, extra=True)]
    screen.table(columns, rows, title)
    guess = "" if first.majority is None else f"best trivial answers: {_written(first.majority, scale)}. "
    lower = f"A lower {name} is better. " if scale.lower else ""
    head = f"; the head's {first.summary.head:,} come on top" if first.summary.head else ""
    screen.say(f"{lower}{guess}Trainable parameters are the adapters'{head}.")
    for label, result in results.items():
        if further := [f"{key} {scale_of([key], [value]).text(value)}" for key, value in [*result.scores.items()][1:]]:
            screen.say(f"{label}: {', '.join(further)}")
    _show_samples(results)


def _show_samples(results: "Mapping[str, Result]") -> None:
    """Print the first samples: what is asked, the right answer, the base's, and each method's."""
    for number, sample in enumerate(next(iter(results.values())).samples[:_SHOWN]):
        said = {"input": sample["input"], "reference": sample["reference"], "without training": sample["base"]}
        said |= {label: result.samples[number]["output"] for label, result in results.items()}
        screen.say("")
        for who, text in said.items():
            if text is not None:
                short = " ".join(text.split())
                screen.say(f"{who}: {short if len(short) <= _LONGEST else short[:_LONGEST] + ' ...'}")


def _written(score: float, scale: Scale) -> str:
    return f"{score:.1%}" if scale.unit or (abs(score) <= 1 and not scale.lower) else scale.number(score)


def _state(result: "Result") -> str:
    layers = result.summary.layers
    ranks = [layer.rank for layer in layers if layer.rank is not None]
    said = []
    if ranks:
        low, high, mean = min(ranks), max(ranks), sum(ranks) / len(ranks)
        said.append(f"rank {low}" if low == high else f"ranks {low} to {high}, {screen.whole(f'mean {mean:.1f}')}")
    if frozen := sum(len(layer.frozen) for layer in layers):
        said.append(f"{screen.whole(f'{frozen} matrices')} frozen")
    return ", ".join(said) or "-"
