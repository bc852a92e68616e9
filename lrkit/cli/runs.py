"""``lrkit run``: train methods, and show what came of it."""

import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrkit.cli import outcome, progress, screen, words
from lrkit.cli.folders import new_folder, write_into, write_text
from lrkit.cli.interrupt import stopping
from lrkit.cli.options import Data, Json, Model, Ranks, Set, Swap, TaskName, TrainAlso, Trust
from lrkit.errors import LrkitError, LrkitWarning

if TYPE_CHECKING:
    from lrkit.adapt.adapted import Adapted
    from lrkit.method import Method
    from lrkit.study.resume import Unfinished
    from lrkit.study.run import Result


def run(
    method: Annotated[str | None, typer.Argument(help="A method's name; `lrkit methods` lists them.")] = None,
    all_methods: Annotated[
        bool, typer.Option("--all-methods", help="Every registered method, one after another.")
    ] = False,
    task: TaskName = None,
    data: Data = None,
    model: Model = "minilm",
    targets: Annotated[
        str, typer.Option(help="all-linear, names or name suffixes joined by commas, or a regular expression.")
    ] = "all-linear",
    train_also: TrainAlso = None,
    sets: Set = None,
    swap: Swap = None,
    ranks: Ranks = None,
    trust_remote_code: Trust = False,
    out: Annotated[Path | None, typer.Option(help="A new folder for adapters, results and pictures.")] = None,
    as_json: Json = False,
) -> None:
    """Train one method, or every one, on one task.

    After Ctrl-C the same command with the same --out goes on where it was.
    """
    given = None if ranks is None else words.ranks(ranks, model, targets, sets or [], trust=trust_remote_code)
    composed, changes = words.to_run(method, all_methods, sets or [], swap or [], given)
    # After the line above, so that a command without a method is answered at once.
    from lrkit.study.progress import Phases
    from lrkit.study.resume import FOLDER, Unfinished
    from lrkit.study.run import settings_from, train
    from lrkit.study.run_settings import steps_of

    settings, loading = settings_from(changes), words.loading(sets or [], trust=trust_remote_code)
    if out is not None and not (out / FOLDER).is_dir():
        new_folder(out)
    loaded = words.task(task, data, words.options(sets or []))
    # Of a task whose rows are no examples, the steps are known once it is tokenized.
    known = loaded.by_row or settings.steps is not None
    steps = steps_of(settings, len(loaded.train)) if known else None
    asked: dict[str, Any] = {
        "model": model,
        "targets": words.targets(targets),
        "train_also": words.train_also(train_also),
    }
    unfinished = None
    if out is not None:
        source = {
            "loading": loading.to_plain(),
            "task": task,
            "data": str(data) if data else None,
            "options": words.options(sets or []),
        }
        unfinished = Unfinished(out, composed, asked | source, settings)
    with progress.bars(as_json) as bar, stopping(unfinished is not None) as stop, Phases(quiet=as_json) as phases:
        results, refused = _train_each(
            composed,
            steps,
            partial(train, task=loaded, settings=settings, loading=loading, say=phases.say, **asked),
            bar,
            folder_of=lambda label: None if out is None else out / label if all_methods else out,
            unfinished=unfinished,
            stop=stop,
            all_methods=all_methods,
        )
    folder = write_into(out, partial(_draw, results)) if out is not None and results else out
    if unfinished is not None:
        unfinished.end()
    if as_json:
        plain = {label: result.to_plain() for label, result in results.items()}
        screen.say_json({"runs": plain, "refused": refused} if all_methods else next(iter(plain.values())))
    elif results:
        taken = next(iter(results.values())).steps
        options = "".join(f", {name} {json.dumps(value)}" for name, value in words.options(sets or []).items())
        outcome.show(results, f"{model} on {loaded.name}{options}, {taken} steps of {settings.batch_size}")
        if folder is not None:
            screen.say("written: " + " ".join(str(p) for p in sorted(folder.iterdir())))
    for line in refused:
        screen.complain(line)
    if refused:
        raise typer.Exit(1)


def _train_each(
    composed: "Mapping[str, Method]",
    steps: int | None,
    train: "Callable[..., Result]",
    bar: Callable[[str, int | None], progress.Told | None],
    *,
    folder_of: Callable[[str], Path | None],
    unfinished: "Unfinished | None",
    stop: Callable[[], bool],
    all_methods: bool,
) -> "tuple[dict[str, Result], list[str]]":
    """Train methods one after another, and save each as soon as it is trained.

    Args:
        composed: the methods by label.
        steps: optimizer steps of each; None if they are not known yet.
        train: trains a method on the task; `lrkit.study.run.train` with all that the runs have in common.
        bar: gives what is called after each step of a run.
        folder_of: gives the folder that a run is saved in; None to save nothing.
        unfinished: what is kept of a run that does not end; None to keep nothing.
        stop: says whether the user has asked to stop.
        all_methods: whether a method that cannot run is left out instead of an error.

    Returns:
        The results by label, and a line for each method left out.
    """
    results: dict[str, Result] = {}
    refused = []
    for label, method in composed.items():
        place = folder_of(label)
        saved: list[Path] = []

        def save(adapted: "Adapted", place: Path | None = place, saved: list[Path] = saved) -> None:
            def write(folder: Path) -> None:
                adapted.save(folder)

            if place is not None:
                saved.append(write_into(place, write))

        record = None if unfinished is None else unfinished.record(label, lambda: _is_pause(stop))
        try:
            results[label] = train(method, progress=bar(label, steps), done=save, record=record)
        except LrkitError as error:
            if all_methods:
                refused.append(f"{label}: {error}")
                continue
            if unfinished is not None:
                unfinished.refused()
            raise
        except KeyboardInterrupt:
            of = "" if steps is None else f" of {steps}"
            if unfinished is not None and (kept := unfinished.step(label)):
                screen.complain(f"kept: {label} up to step {kept}{of}; the same command goes on from there")
            raise
        if saved:
            write_into(saved[0], partial(_write_result, results[label]))
    return results, refused


def _is_pause(stop: Callable[[], bool]) -> bool:
    """Ask whether to stop; a pause is no end of the training, so do not warn that the budget was not reached."""
    if asked := stop():
        warnings.filterwarnings("ignore", "training ends at step", LrkitWarning)
    return asked


def _write_result(result: "Result", folder: Path) -> None:
    from lrkit.study.answers import keep_answers

    keep_answers(result, folder)
    write_text(folder / "result.json", json.dumps(screen.finite(result.to_plain()), indent=1))


def _draw(results: "Mapping[str, Result]", folder: Path) -> None:
    from lrkit.study.pictures import draw

    draw(results, folder)
