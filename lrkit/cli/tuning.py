"""``lrkit tune``: choose a method's settings by trials."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lrkit.cli import hints, screen, study_screen, words
from lrkit.cli.options import (
    Address,
    Data,
    Executor,
    Halving,
    Json,
    Model,
    Sampler,
    Set,
    Targets,
    TaskName,
    Threads,
    TrainAlso,
    Trials,
    Trust,
    Tune,
    TuneSeeds,
)
from lrkit.errors import LrkitError


def tune(
    method: Annotated[str, typer.Argument(help="A method's name; `lrkit methods` lists them.")],
    tune: Tune = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the trials; the same command again goes on.")] = None,
    task: TaskName = None,
    data: Data = None,
    model: Model = "minilm",
    trust_remote_code: Trust = False,
    targets: Targets = None,
    train_also: TrainAlso = None,
    sets: Set = None,
    tune_seeds: TuneSeeds = None,
    sampler: Sampler = None,
    trials: Trials = None,
    halving: Halving = None,
    executor: Executor = "local",
    workers: Annotated[int | None, typer.Option(help="Cells at a time. 0: in this process.", min=0)] = None,
    threads: Threads = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Choose a method's settings by trials, on rows set aside from training.

    lrkit tune adalora --tune run.lr=3e-3,1e-2,3e-2 --out tuned

    Prints the --set line for `lrkit run` and `lrkit ablate`, and writes chosen.toml, a study file.
    """
    import attrs
    from rich.console import Console

    from lrkit.compose import arguments_of
    from lrkit.study.asked import study_from, with_options
    from lrkit.study.execute import execute
    from lrkit.study.progress import Teller
    from lrkit.study.tune import tuned_by, tuning_plan

    if not tune:
        raise LrkitError("say what to tune: --tune run.lr=3e-4,1e-3,3e-3")
    if out is None:
        raise LrkitError("give a folder for the trials: --out DIR")
    settings, run = words.divided(sets or [])
    hints.check_settings(dict(map(words.pair, sets or [])), arguments_of(method))
    if task is not None and data is not None:
        raise LrkitError("give --task or --data, not both")
    asked: dict[str, Any] = {
        "base": method,
        "set": settings,
        "run": run,
        "model": model,
        "loading": words.loading(sets or [], trust=trust_remote_code).to_plain(),
        "tasks": [{"data": str(data)} if data is not None else {"task": task or "movies"}],
        "train_also": words.train_also(train_also),
        "tune": words.tuning(tune, tune_seeds, sampler, trials, halving),
    }
    asked |= {} if targets is None else {"targets": words.targets(targets)}
    plan = tuning_plan(with_options(study_from(asked, "tune"), words.options(sets or [])))
    with Teller(Console(stderr=True, quiet=as_json), out.absolute()) as teller:
        outcome = execute(
            plan,
            out,
            executor=executor,
            workers=workers,
            threads=threads,
            address=address,
            costs=False,
            told=teller.told,
            started=teller.started,
        )
    for name, error in outcome.failed:
        screen.complain(f"cell {name} failed: {error}")
    if outcome.failed:
        raise typer.Exit(1)
    found = tuned_by(plan, outcome)
    if as_json:
        told = {"settings": found.settings, "choice": attrs.asdict(found.choice), "folder": str(out)}
        screen.say_json(told | {"trials": [attrs.asdict(trial) for trial in found.trials]})
        return
    study_screen.show_trials(found)
    screen.say(found.words)
    screen.say(f"written: {out / 'chosen.toml'}")
