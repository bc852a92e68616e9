"""``lrkit ablate``: compare methods over many seeds. What came of it is shown by `lrkit.cli.reports`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrkit.cli import hints, screen, study_screen, words
from lrkit.cli.findings import Findings
from lrkit.cli.options import (
    Address,
    Executor,
    Halving,
    Json,
    Sampler,
    Set,
    Targets,
    Threads,
    TrainAlso,
    Trials,
    Trust,
    Tune,
    TuneSeeds,
)
from lrkit.errors import LrkitError

if TYPE_CHECKING:
    from lrkit.study.plan import Plan, Study


def ablate(
    what: Annotated[
        str | None, typer.Argument(help="A method's name, a .toml study file, or a study that ships.")
    ] = None,
    swap: Annotated[
        list[str] | None,
        typer.Option(
            "--swap", metavar="PATH=A,B,...", help="Values to try, one at a time: metric=sensitivity,magnitude."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The study's folder; the same command again goes on with it.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME", help="movies, glue/NAME, squad, ...; may be repeated.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FOLDER|TASK=FOLDER",
            help="A data folder as a task, or in place of a task's data, with :validation=NAME if need be; repeatable.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="minilm, smollm2, ..., a folder, or a hub id.")] = None,
    seeds: Annotated[str | None, typer.Option(help="How many, or which: 6, or 3,4,5.")] = None,
    trust_remote_code: Trust = False,
    targets: Targets = None,
    train_also: TrainAlso = None,
    sets: Set = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option("--leave-out", metavar="PART", help="penalty, policy, or also: a row without it."),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="All combinations of the swaps.")] = False,
    tune: Tune = None,
    tune_seeds: TuneSeeds = None,
    sampler: Sampler = None,
    trials: Trials = None,
    halving: Halving = None,
    executor: Executor = "local",
    workers: Annotated[
        int | None, typer.Option(help="Cells at a time; one per GPU or core (up to 4). 0: in this process.", min=0)
    ] = None,
    threads: Threads = None,
    address: Address = None,
    costs: Annotated[bool, typer.Option(help="Measure time and memory of each row after the cells.")] = True,
    checkpoint: Annotated[float, typer.Option(help="Seconds between checkpoints.", min=0.0)] = 60.0,
    report_to: Annotated[
        list[str] | None,
        typer.Option("--report-to", metavar="NAME", help="Trackers for the curves, such as tensorboard."),
    ] = None,
    keep_old: Annotated[
        bool, typer.Option("--keep-old", help="Keep cells of other code, instead of computing them again.")
    ] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute cells of other code and those taken in from a pack again.")
    ] = False,
    packed: Annotated[
        Path | None, typer.Option(help="A pack of `lrkit pack`, whose finished cells are taken in first.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(help="Smaller differences do not matter (0.01: a point): rows are tested for equivalence, too."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Of a study file: minilm (the first one is the default), paper, ...")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the rows, run nothing.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="The studies that ship.")] = False,
    as_json: Json = False,
) -> None:
    """Swap one part at a time, over many seeds; restartable.

    lrkit ablate adalora --swap metric=sensitivity,magnitude --seeds 7 --out study

    The same command again goes on with what is missing. lrkit ablate --list shows the studies that ship.
    """
    from lrkit.study.asked import standing_in, with_options
    from lrkit.study.catalogue import catalogue
    from lrkit.study.execute import check, check_trackers
    from lrkit.study.missing import count_done
    from lrkit.study.old import check_old
    from lrkit.study.plan import lay_out
    from lrkit.study.pool import chosen
    from lrkit.study.precision import slow_bf16
    from lrkit.study.taken import offered, source_of

    if list_:
        study_screen.list_studies(catalogue(), as_json)
        return
    if what is None:
        raise LrkitError("say what to ablate: a method's name, a .toml study file, or a study of `lrkit ablate --list`")
    folders, in_place = _divided(data or [])
    changes = _changes(swap, task, folders, seeds, targets, train_also, sets, leave_out)
    changes |= {"model": model} if model is not None else {}
    changes |= {"margin": margin} if margin is not None else {}
    changes |= {"loading": words.loading_given(sets or [], trust=trust_remote_code)}
    changes |= {"grid": True} if grid else {}
    changes |= {"tune": words.tuning(tune, tune_seeds, sampler, trials, halving)}
    asked = standing_in(_study(what, changes, sets or [], profile), in_place)
    plan = lay_out(with_options(asked, words.options(sets or [])))
    if dry_run:
        check_old(keep_old, recompute)
        chosen(executor, 1 if workers is None else workers, threads or 1, address)
        check_trackers(report_to or [])
        tasks = check(plan)
        done = None if out is None else count_done(plan, tasks, out, keep_old=keep_old, recompute=recompute)
        source = None if recompute else source_of(packed, what, out or Path())
        taken = None if source is None else (offered(source, plan, tasks, out), source.path)
        study_screen.show_plan(plan, tasks, as_json, done, taken)
        each_run = (plan.settings(row, each, 0).bf16 for row in plan.rows for each in plan.tasks)
        if executor == "local" and (line := slow_bf16(each_run)) is not None:
            screen.complain(line)
        return
    if out is None:
        raise LrkitError("give the study's folder: --out DIR")
    how: dict[str, Any] = {
        "executor": executor,
        "workers": workers,
        "threads": threads,
        "address": address,
        "costs": costs,
    }
    how |= {"checkpoint_seconds": checkpoint, "report_to": report_to or [], "keep_old": keep_old}
    how |= {"recompute": recompute, "packed": source_of(packed, what, out)}
    _carry_out(plan, out, how, as_json)


# ---- what is asked for -----------------------------------------------------------------------------------------------


def _divided(data: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Divide what --data has into folders that are tasks, and folders that stand in for a task, by its name."""
    from lrkit.tasks.splits import divided

    folders, in_place = [], {}
    for text in data:
        whole, splits = divided(text)
        name, equals, folder = whole.partition("=")
        if not equals or Path(whole).is_dir():
            folders.append(Path(text))
        elif not name or not folder:
            raise LrkitError(f'--data takes FOLDER, or TASK=FOLDER, not "{text}"')
        else:
            in_place[name] = f"{folder}:{splits}" if splits else folder
    return folders, in_place


def _changes(
    swap: list[str] | None,
    task: list[str] | None,
    data: Sequence[Path],
    seeds: str | None,
    targets: str | None,
    train_also: str | None,
    sets: list[str] | None,
    leave_out: list[str] | None,
) -> dict[str, Any]:
    """Turn the command line's part of a study into what a study file would have; only what was given."""
    settings, run = words.divided(sets or [])
    changes: dict[str, Any] = {"set": settings, "run": run, "swap": {}}
    tasks = [{"task": name} for text in task or [] for name in text.split(",")]
    tasks += [{"data": str(folder)} for folder in data]
    given = {
        "leave_out": [name for text in leave_out or [] for name in text.split(",")] if leave_out else None,
        "tasks": tasks or None,
        "targets": None if targets is None else words.targets(targets),
        "train_also": None if train_also is None else words.train_also(train_also),
    }
    changes |= {key: value for key, value in given.items() if value is not None}
    for text in swap or []:
        path, _, values = text.partition("=")
        if not path or not values:
            raise LrkitError(f'--swap takes PATH=A,B,..., not "{text}"')
        changes["swap"][path] = [*changes["swap"].get(path, []), *map(words.value, words.names(values))]
    if seeds is not None:
        changes["seeds"] = words.seeds(seeds)
    return changes


def _study(what: str, changes: dict[str, Any], sets: Sequence[str], profile: str | None) -> "Study":
    """Make the study that is asked for: of a method, or of a study file with the command line's changes.

    Raises:
        LrkitError: there is no such study, or a change does not fit.
    """
    import attrs

    from lrkit.compose import arguments_of
    from lrkit.method import FIELDS
    from lrkit.study.asked import study_from, study_named
    from lrkit.study.catalogue import names

    if what.endswith(".toml") or what in names():
        given = study_named(what, profile=profile)
        # The command line's settings come on top of the file's, and of those of its tasks.
        file = attrs.asdict(given)
        own = {*changes["set"], *(f"{kind}.{key}" for kind in FIELDS for key in changes["set"])}
        for spec in file["tasks"]:
            spec["run"] = {key: each for key, each in spec["run"].items() if key not in changes["run"]}
            spec["set"] = {path: each for path, each in spec["set"].items() if path not in own}
        for key in ("set", "run", "swap", "tune", "loading"):
            changes[key] = {**(file[key] or {}), **changes[key]}
        changes = {**file, **changes}
    elif profile is not None:
        raise LrkitError(
            f'--profile is of a study file, and "{what}" is none: `lrkit ablate --list` shows which have any'
        )
    else:
        changes = {"base": what, **changes}
    changes["tune"] = changes["tune"] or None
    study = study_from(changes, what if what.endswith(".toml") or what in names() else "ablate")
    named = [each for each in (study.base, *study.swap.get("method", ())) if sets and isinstance(each, str)]
    hints.check_settings(dict(map(words.pair, sets)), [name for each in named for name in arguments_of(each)])
    return study


# ---- running ---------------------------------------------------------------------------------------------------------


def _carry_out(plan: "Plan", out: Path, how: Mapping[str, Any], as_json: bool) -> None:
    """Run a study, write its report, and show its table; exit code 1 if a cell failed."""
    from rich.console import Console

    from lrkit.study.execute import execute
    from lrkit.study.progress import Teller

    for line in study_screen.limits(plan):
        screen.complain(line)
    with Teller(Console(stderr=True, quiet=as_json), out.absolute()) as teller:
        outcome = execute(plan, out, told=teller.told, started=teller.started, cost_told=teller.cost_told, **how)
    found = Findings.of(outcome.folder)
    if as_json:
        failed = [{"cell": name, "error": error} for name, error in outcome.failed]
        screen.say_json({"folder": str(out), **found.to_plain(), "failed": failed, "busy": outcome.busy})
    else:
        found.show()
        screen.say(f"report: {out / 'report.html'}")
    for name, error in outcome.failed:
        screen.complain(f"cell {name} failed: {error}")
    if outcome.busy:
        screen.complain(f"{outcome.busy} cells are run by another process: the same command later takes them in")
    if outcome.failed:
        raise typer.Exit(1)
