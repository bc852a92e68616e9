"""``lrkit demo``: methods side by side on data that need no hub, with pictures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from lrkit.cli import outcome, progress, screen
from lrkit.cli.folders import new_folder, write_into, write_text
from lrkit.cli.options import Json

if TYPE_CHECKING:
    from lrkit.method import Method
    from lrkit.study.run import Result, RunSettings
    from lrkit.tasks import Task

_STEPS, _CAUSAL_STEPS = 120, 50


@attrs.frozen(kw_only=True)
class Demo:
    """A demo: methods by label, and all that their runs have in common."""

    title: str
    methods: "Mapping[str, Method]"
    task: "Task"
    settings: "RunSettings"
    run: Mapping[str, Any] = attrs.field(factory=dict)
    rates: Mapping[str, float] = attrs.field(factory=dict)  # of the methods whose own rate is not for runs so short


def demo(
    causal: Annotated[
        bool, typer.Option("--causal", help="A causal language model on prompts instead: SmolLM2, in some ten minutes.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="A new folder for table and pictures.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(help=f"Optimizer steps of each method: {_STEPS}, or {_CAUSAL_STEPS} with --causal.", min=20),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train four methods on movie-review sentences, with pictures.

    Fine-tunes MiniLM with LoRA, AdaLoRA, AdaLoRA with another metric, and AFLoRA, and draws what happened. With --causal:
    SmolLM2 with LoRA, AdaLoRA and AFLoRA, which learn to answer a review with a verdict.
    """
    from lrkit.study.pictures import draw
    from lrkit.study.run import train

    folder = new_folder(out, "lrkit-demo")
    shown = _causal(steps or _CAUSAL_STEPS) if causal else _sentences(steps or _STEPS)
    results: dict[str, Result] = {}
    with progress.bars(as_json) as bar:
        for label, method in shown.methods.items():
            told = bar(label, shown.settings.steps)
            settings = attrs.evolve(shown.settings, lr=shown.rates.get(label))
            results[label] = train(method, shown.task, settings=settings, progress=told, **shown.run)
    plain = {label: result.to_plain() for label, result in results.items()}
    pictures: list[Path] = []

    def write(place: Path) -> None:
        write_text(place / "results.json", json.dumps(plain, indent=1))
        pictures[:] = draw(results, place)

    folder = write_into(folder, write)
    if as_json:
        screen.say_json({"folder": str(folder), "pictures": [str(p) for p in pictures], "runs": plain})
        return
    outcome.show(results, shown.title)
    screen.say("pictures: " + " ".join(str(p) for p in pictures))
    screen.say(f"every decision, layer by layer: {folder / 'results.json'}")


def _sentences(steps: int) -> Demo:
    """Four methods on the task `movies`."""
    from lrkit import methods, metrics
    from lrkit.study.run import RunSettings
    from lrkit.tasks import load_task

    adalora = methods.adalora(rank=8, target_rank=4, alpha=32.0)  # LoRA's scale, α/r = 4
    task = load_task("movies")
    return Demo(
        title=f"MiniLM on {len(task.train):,} movie-review sentences, {steps} steps of 32",
        methods={
            "lora": methods.lora(rank=4),
            "adalora": adalora,
            "adalora, metric=magnitude": attrs.evolve(adalora, metric=metrics.Magnitude()),
            "aflora": methods.aflora(rank=4),
        },
        task=task,
        settings=RunSettings(steps=steps, max_length=64, group_by_length=True),  # nearly half the time
        rates={"lora": 3e-3, "aflora": 3e-2},  # the best of docs/decisions.md for 120 steps on this task
    )


def _causal(steps: int) -> Demo:
    """Three methods on the task `verdicts`; short rows and few steps, since a step of SmolLM2 takes seconds on two cores."""
    from lrkit import methods
    from lrkit.study.run import RunSettings
    from lrkit.tasks.verdicts import load_verdicts

    return Demo(
        title=f"SmolLM2 (135M) on verdicts on movie-review sentences, {steps} steps of 8",
        methods={
            "lora": methods.lora(rank=8),
            "adalora": methods.adalora(rank=12, target_rank=8, alpha=48.0),  # LoRA's scale, α/r = 4
            "aflora": methods.aflora(rank=8),
        },
        task=load_verdicts(),
        settings=RunSettings(steps=steps, batch_size=8, eval_batch_size=16, max_length=96, validation_rows=64),
        run={"model": "smollm2"},
        rates={"aflora": 4e-2},
    )
