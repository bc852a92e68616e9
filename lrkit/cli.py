"""The command line. Thin: every command is a few lines over the library, and nothing heavy is imported before it runs.

Bad input ends with exit code 2 and one line on stderr that says what was wrong and what would be right.
"""

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrkit import scaffold
from lrkit.errors import LrkitError, LrkitWarning, cut, nearest
from lrkit.interrupt import second_ends_at_once
from lrkit.reading import parse_json, read_json

if TYPE_CHECKING:
    from lrkit.method import Method
    from lrkit.study.run import Result
    from lrkit.tasks import Task

app = typer.Typer(
    name="lrkit",
    help="Adaptive parameter-efficient fine-tuning, composed from four parts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable results on stdout.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting: parameterization.rank=8, run.steps=200."),
]
Swap = Annotated[
    list[str] | None, typer.Option("--swap", metavar="PART=NAME", help="Swap a component: metric=magnitude.")
]
TaskName = Annotated[str | None, typer.Option("--task", help="movies (the default), glue/NAME, or a plug-in's.")]
Data = Annotated[
    Path | None, typer.Option("--data", help="A folder with {train,validation}.jsonl[.gz], instead of --task.")
]
Model = Annotated[str, typer.Option("--model", help="minilm, a folder, or a hub id.")]
TrainAlso = Annotated[
    str | None,
    typer.Option("--train-also", help="Modules that train in full, joined by commas; auto (the task head) or none."),
]


def _version(asked: bool) -> None:
    if asked:
        from lrkit import __version__

        typer.echo(f"lrkit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Adaptive parameter-efficient fine-tuning, composed from four parts."""


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="A new folder for table and pictures.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each method.", min=20)] = 120,
    as_json: Json = False,
) -> None:
    """Four methods on movie-review sentences, with pictures.

    Fine-tunes MiniLM with LoRA, AdaLoRA, AdaLoRA with another metric, and AFLoRA, and draws what happened.
    """
    import attrs

    from lrkit import methods, metrics
    from lrkit.study.pictures import draw
    from lrkit.study.run import RunSettings, train
    from lrkit.tasks import load_task

    folder = _new_folder(out, "lrkit-demo")
    adalora = methods.adalora(rank=8, target_rank=4, alpha=32.0)  # LoRA's scale, α/r = 4
    compositions = {
        "lora": methods.lora(rank=4),
        "adalora": adalora,
        "adalora, metric=magnitude": attrs.evolve(adalora, metric=metrics.Magnitude()),
        "aflora": methods.aflora(rank=4),
    }
    task = load_task("movies")
    settings = RunSettings(steps=steps, max_length=64)
    results: dict[str, Result] = {}
    with _progress(as_json) as bar:
        for label, method in compositions.items():
            results[label] = train(method, task, settings=settings, progress=bar(label, steps))
    plain = {label: result.to_plain() for label, result in results.items()}
    pictures: list[Path] = []

    def write(place: Path) -> None:
        (place / "results.json").write_text(json.dumps(plain, indent=1))
        pictures[:] = draw(results, place)

    folder = _written(folder, write)
    if as_json:
        _json({"folder": str(folder), "pictures": [str(p) for p in pictures], "runs": plain})
        return
    _show_results(results, f"MiniLM on {len(task.train):,} movie-review sentences, {steps} steps of 32")
    typer.echo("pictures: " + "  ".join(str(p) for p in pictures))
    typer.echo(f"every decision, layer by layer: {folder / 'results.json'}")


@app.command()
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
    out: Annotated[Path | None, typer.Option(help="A new folder for adapters, results and pictures.")] = None,
    as_json: Json = False,
) -> None:
    """Train one method, or every one, on one task.

    After Ctrl-C the same command with the same --out goes on where it was.
    """
    from lrkit.interrupt import stopping
    from lrkit.study.run import settings_from, total_steps, train

    composed, changes = _to_run(method, all_methods, sets or [], swap or [])
    settings = settings_from(changes)
    from lrkit.study.progress import Phases
    from lrkit.study.resume import FOLDER, Unfinished

    if out is not None and not (out / FOLDER).is_dir():
        _new_folder(out, "")
    loaded = _task(task, data)
    steps = total_steps(settings, min(len(loaded.train), settings.train_rows or len(loaded.train)))
    unfinished = None
    if out is not None:
        asked = {"model": model, "targets": _targets(targets), "task": task, "data": str(data) if data else None}
        asked["train_also"] = _train_also(train_also)
        unfinished = Unfinished(out, composed, asked, settings)
    folder = out
    results: dict[str, Result] = {}
    refused: list[str] = []
    with _progress(as_json) as bar, stopping(unfinished is not None) as stop, Phases(quiet=as_json) as phases:
        for label, each in composed.items():
            place = folder if folder is None or not all_methods else folder / label
            told: list[Path] = []

            def save(adapted: Any, place: Path | None = place, told: list[Path] = told) -> None:
                if place is not None:
                    told.append(_written(place, adapted.save))

            try:
                results[label] = train(
                    each,
                    loaded,
                    model=model,
                    targets=_targets(targets),
                    train_also=_train_also(train_also),
                    settings=settings,
                    progress=bar(label, steps),
                    done=save,
                    record=None if unfinished is None else unfinished.record(label, stop),
                    say=phases.say,
                )
            except LrkitError as error:
                if not all_methods:
                    if unfinished is not None:
                        unfinished.refused()
                    raise
                refused.append(f"{label}: {error}")
                continue
            except KeyboardInterrupt:
                if unfinished is not None and (kept := unfinished.step(label)):
                    _complain(f"kept: {label} up to step {kept} of {steps}; the same command goes on from there")
                raise
            if place is not None:
                text = json.dumps(_finite(results[label].to_plain()), indent=1)
                _written(told[0], lambda where, text=text: _write(where / "result.json", text))  # type: ignore[misc]
    if folder is not None and results:
        folder = _written(folder, lambda where: _draw_into(where, results))
    if unfinished is not None:
        unfinished.end()
    if as_json:
        plain = {label: result.to_plain() for label, result in results.items()}
        _json({"runs": plain, "refused": refused} if all_methods else next(iter(plain.values())))
    elif results:
        _show_results(results, f"{model} on {loaded.name}, {steps} steps of {settings.batch_size}")
        if folder is not None:
            typer.echo("written: " + "  ".join(str(p) for p in sorted(folder.iterdir())))
    for line in refused:
        _complain(line)
    if refused:
        raise typer.Exit(1)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _draw_into(folder: Path, results: "Mapping[str, Result]") -> None:
    from lrkit.study.pictures import draw

    draw(results, folder)


@app.command()
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
    task: Annotated[list[str] | None, typer.Option("--task", help="movies, glue/NAME, ...; may be repeated.")] = None,
    data: Annotated[list[Path] | None, typer.Option("--data", help="A data folder as a task; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="minilm, a folder, or a hub id.")] = None,
    seeds: Annotated[str | None, typer.Option(help="How many, or which: 6, or 3,4,5.")] = None,
    targets: Annotated[str | None, typer.Option(help="As of `lrkit run`.")] = None,
    train_also: TrainAlso = None,
    sets: Set = None,
    leave_out: Annotated[
        list[str] | None, typer.Option("--leave-out", help="penalty, policy, or also: a row without it.")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="All combinations of the swaps.")] = False,
    executor: Annotated[str, typer.Option(help="local, ray, or a plug-in's.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Cells at a time; one for each GPU or core (up to 4). 0: in this process.", min=0)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each worker.", min=1, max=1024)] = None,
    address: Annotated[str | None, typer.Option(help="Of a cluster, for --executor ray.")] = None,
    costs: Annotated[bool, typer.Option(help="Measure time and memory of each row after the cells.")] = True,
    checkpoint: Annotated[float, typer.Option(help="Seconds between checkpoints.", min=0.0)] = 60.0,
    report_to: Annotated[
        list[str] | None, typer.Option("--report-to", help="Trackers for the curves, such as tensorboard.")
    ] = None,
    keep_old: Annotated[
        bool, typer.Option("--keep-old", help="Keep cells of other code, instead of computing them again.")
    ] = False,
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
    from lrkit.study.catalogue import catalogue, names
    from lrkit.study.plan import lay_out, read_study, study_from

    if list_:
        _list_studies(catalogue(), as_json)
        return
    if what is None:
        raise LrkitError("say what to ablate: a method's name, a .toml study file, or a study of `lrkit ablate --list`")
    changes = _changes(swap, task, data, model, seeds, targets, train_also, sets, leave_out, grid)
    if what.endswith(".toml") or what in names():
        given = read_study(what, profile=profile)
        # What the file says stays, but for what the command line says otherwise.
        import attrs

        for key in ("set", "run", "swap"):
            if key in changes:
                changes[key] = {**getattr(given, key), **changes[key]}
        study = study_from({**attrs.asdict(given), **changes}, what)
    elif profile is not None:
        raise LrkitError(
            f'--profile is of a study file, and "{what}" is none: `lrkit ablate --list` shows which have any'
        )
    else:
        study = study_from({"base": what, **changes}, "ablate")
    plan = lay_out(study)
    if dry_run:
        _show_plan(plan, as_json)
        return
    if out is None:
        raise LrkitError("give the study's folder: --out DIR")
    _carry_out(plan, out, executor, workers, threads, address, costs, checkpoint, report_to or [], keep_old, as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A study's folder; it may still be running.")],
    as_json: Json = False,
) -> None:
    """Write a study's report, in HTML and as tables.

    report.html, table.csv, table.md, table.tex and cells.csv, in the study's folder.
    """
    import attrs

    from lrkit.study.records import read_study
    from lrkit.study.report import write_report
    from lrkit.study.statistics import compare

    written = write_report(folder)
    table = compare(read_study(folder))
    if as_json:
        _json({"files": [str(path) for path in written], "rows": [attrs.asdict(row) for row in table.rows]})
        return
    typer.echo(str(table))
    typer.echo("written: " + "  ".join(str(path) for path in written))


@app.command()
def params(
    method: Annotated[list[str] | None, typer.Argument(help="Methods' names; all of them where none is given.")] = None,
    model: Annotated[str, typer.Option("--model", help="deberta-v3-base, minilm, or a folder with config.json.")] = (
        "deberta-v3-base"
    ),
    steps: Annotated[int, typer.Option(help="Optimizer steps that averages are over.", min=1)] = 10_000,
    tokens: Annotated[int, typer.Option(help="Count FLOPs for so many tokens; 0 for none.", min=0, max=65_536)] = 0,
    sets: Set = None,
    swap: Swap = None,
    as_json: Json = False,
) -> None:
    """Count parameters and FLOPs, without weights.

    Trainable parameters at the start, at the end and on average over a run of so many steps, from the schedule alone.
    """
    import attrs

    from lrkit.accounting import count, flops_on
    from lrkit.models import empty_model
    from lrkit.registry import current

    names = method or current().names("method")
    composed = {}
    for name in names:
        try:
            composed[name], run = compose(name, sets or [], swap or [])
        except LrkitError as error:
            if name in (method or ()) or not _is_broken(name):
                raise
            warnings.warn(f'method "{name}" is left out: {error}', LrkitWarning, stacklevel=1)
            continue
        if run:
            raise LrkitError(
                f"run.{next(iter(run))} is a setting of a run, and nothing runs here: use --steps for its length"
            )
    net = empty_model(model)
    plain: dict[str, Any] = {}
    rows = []
    for name, each in composed.items():
        try:
            counted = count(each, net, total_steps=steps)
        except LrkitError as error:
            if name in (method or ()):
                raise
            warnings.warn(f"{name} is left out: {error}", LrkitWarning, stacklevel=1)
            continue
        plain[name] = attrs.asdict(counted)
        # How many units go is known only after a run: a number would be a guess.
        open_ended = not all(policy.action.budgeted for policy in each.policies)
        row = [
            name,
            f"{counted.start:,}",
            _between(counted.end_range) if open_ended else f"{counted.end:,.0f}",
            _between(counted.average_range) if open_ended else f"{counted.average:,.0f}",
            f"{counted.core:,}",
            str(counted.layers),
        ]
        if tokens:
            work = flops_on(each, net, tokens)
            plain[name]["flops"] = {"forward": work.forward, "backward": work.backward, "tokens": tokens}
            row += [f"{work.forward / tokens / 2e6:,.2f} M", f"{work.backward / tokens / 2e6:,.2f} M"]
        rows.append(row)
    if as_json:
        _json({"model": model, "steps": steps, "methods": plain})
        return
    header = ["method", "trainable at start", "at end", "on average", "of these λ or d", "layers"]
    header += ["multiply-adds a token, forward", "backward"] if tokens else []
    _table(header, rows, f"{model}: {counted.model:,} parameters without its head", numbers=1)
    typer.echo(f"averages are over {steps:,} steps; the head (classifier, pooler: {counted.head:,}) is left out.")


def _is_broken(name: str) -> bool:
    """Whether a registered method cannot be made even as it is."""
    from lrkit.registry import current

    try:
        current().method(name)
    except LrkitError:
        return True
    return False


def _between(ends: tuple[float, float]) -> str:
    return f"{ends[0]:,.0f} to {ends[1]:,.0f}"


@app.command(name="methods")
def list_methods(as_json: Json = False) -> None:
    """The named methods and their four parts."""
    from lrkit import foreign
    from lrkit.method import FIELDS, to_plain
    from lrkit.registry import current

    registry = current()
    rows, plain = [], {}
    for name in registry.names("method"):
        try:
            composition = to_plain(registry.method(name))
        except LrkitError as error:
            warnings.warn(f'method "{name}" is left out: {error}', LrkitWarning, stacklevel=1)
            continue
        plain[name] = composition
        parts = [composition[kind]["name"] if composition[kind] else "-" for kind in FIELDS]
        about = foreign.doc(registry.get("method", name)).partition("\n")[0]
        rows.append([name, *parts, about])
    if as_json:
        _json(plain)
        return
    from rich.console import Console

    console = Console()
    if console.is_terminal and console.width < 140:
        # Six columns would be cut to pieces: the composition in one, and no description.
        short = [[name, " + ".join(part for part in parts if part != "-")] for name, *parts, _ in rows]
        _table(["method", "composition"], short)
        typer.echo("lrkit plugins show NAME: what one is, and what can be set")
    else:
        _table(["method", *FIELDS, ""], rows)


plugins_app = typer.Typer()
app.add_typer(plugins_app, name="plugins")
scaffold.commands(plugins_app)


@plugins_app.callback(invoke_without_command=True)
def plugins(context: typer.Context, as_json: Json = False) -> None:
    """What is registered, by which distribution; what is wrong with a plug-in, if anything (exit code 2)."""
    if context.invoked_subcommand is not None:
        return
    from lrkit.foreign import where
    from lrkit.registry import current

    registry = current()
    offers = registry.offers()
    if as_json:
        _json(
            {
                "components": [
                    {"kind": o.kind, "name": o.name, "object": where(o.value), "distribution": o.distribution}
                    for o in offers
                ],
                "problems": [
                    {"distribution": p.distribution, "plugin": p.plugin, "message": p.message}
                    for p in registry.problems
                ],
            }
        )
    else:
        _table(
            ["kind", "name", "distribution", "object"],
            [[o.kind, o.name, o.distribution, where(o.value)] for o in offers],
        )
    if registry.problems:
        raise typer.Exit(2)


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="What `lrkit run --out` wrote, or a study's cell: a folder with lrkit.safetensors."
        ),
    ],
    to: Annotated[str, typer.Option(help="peft-lora, peft-adalora, vllm-lora or merged.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The base model, where RUN's own is not at hand.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a trained run for PEFT, vLLM or transformers.

    What was written is read back and compared: the same outputs, or nothing is left.
    """
    import attrs

    from lrkit import checkpoint, peft
    from lrkit.adapted import load
    from lrkit.models import load_base
    from lrkit.states import meta_of

    if to not in peft.TARGETS:
        raise LrkitError(
            f'there is no export to "{to}"{nearest(to, peft.TARGETS)}; there are {", ".join(peft.TARGETS)}'
        )
    _new_folder(out, "")
    with checkpoint.stored(run) as stored:
        base = meta_of({"meta": stored.meta, "tensors": {}}).get("base")
        trained = {name.removeprefix("weight.") for name in stored.shapes}
    if base is None:
        raise LrkitError(f"{run} does not say which transformers model it was attached to: export it with lrkit.export")
    net, tokenizer = load_base(base, model or _model_of(run), trained)
    adapted = load(net, run)
    if to == "merged" and tokenizer is None:
        warnings.warn("the base model has no tokenizer, so none is written", LrkitWarning, stacklevel=1)
    exported = peft.export(adapted, out, to=to, tokenizer=tokenizer)
    if as_json:
        _json(attrs.asdict(exported) | {"tolerance": peft.TOLERANCE})
        return
    ranks = exported.ranks.values()
    low, high = (min(ranks), max(ranks)) if ranks else (0, 0)
    rank = f"rank {low}" if low == high else f"rank {low} to {high}"
    out_of = f" of {len(adapted.adapters)}" if len(ranks) < len(adapted.adapters) else ""
    what = f"{len(ranks)}{out_of} layers, {rank}" if ranks else "a plain model"
    typer.echo(
        f"{what}; read back, logits are within {exported.difference:.1g} (the largest is {exported.largest:.3g})"
    )
    typer.echo("written: " + "  ".join(str(out / name) for name in exported.files))


def _model_of(run: Path) -> str | None:
    """What a run was told as its model; None where it left no word."""
    for name in ("result.json", "config.json"):
        try:
            found = read_json(run / name)
        except (FileNotFoundError, LrkitError):
            continue
        if isinstance(found, dict) and isinstance(found.get("model"), str):
            return str(found["model"])
    return None


# ---- studies ---------------------------------------------------------------------------------------------------------


def _changes(
    swap: list[str] | None,
    task: list[str] | None,
    data: list[Path] | None,
    model: str | None,
    seeds: str | None,
    targets: str | None,
    train_also: str | None,
    sets: list[str] | None,
    leave_out: list[str] | None,
    grid: bool,
) -> dict[str, Any]:
    """The command line's part of a study, as a study file would have it; only what was given."""
    pairs = dict(_pair(text, "--set") for text in sets or [])
    changes: dict[str, Any] = {
        "set": {key: value for key, value in pairs.items() if not key.startswith("run.")},
        "run": {key.removeprefix("run."): value for key, value in pairs.items() if key.startswith("run.")},
        "swap": {},
    }
    tasks = [{"task": name} for text in task or [] for name in text.split(",")]
    tasks += [{"data": str(folder)} for folder in data or []]
    given = {
        "leave_out": [name for text in leave_out or [] for name in text.split(",")] if leave_out else None,
        "tasks": tasks or None,
        "model": model,
        "targets": None if targets is None else _targets(targets),
        "train_also": None if train_also is None else _train_also(train_also),
        "grid": grid or None,
    }
    changes |= {key: value for key, value in given.items() if value is not None}
    for text in swap or []:
        path, _, values = text.partition("=")
        if not path or not values:
            raise LrkitError(f'--swap takes PATH=A,B,..., not "{text}"')
        tried = [_value(value) for value in values.split(",") if value]
        changes["swap"][path] = [*changes["swap"].get(path, []), *tried]
    if seeds is not None:
        numbers = [_value(part) for part in seeds.split(",")]
        changes["seeds"] = numbers if "," in seeds else numbers[0]
    return changes


def _list_studies(found: Sequence[Any], as_json: bool) -> None:
    import attrs

    if as_json:
        _json({study.name: attrs.asdict(study) for study in found})
        return
    rows = [[study.name, study.title, ", ".join(study.profiles), study.distribution] for study in found]
    _table(["study", "", "--profile", "from"], rows)
    typer.echo("The first profile is the default: minilm is the embedded model and data, which need no network.")


def _show_plan(plan: Any, as_json: bool) -> None:
    from lrkit.study.execute import check
    from lrkit.study.paired import too_few_seeds
    from lrkit.study.plan import changes
    from lrkit.study.rates import implied, rates_of, said

    tasks = check(plan)
    few = too_few_seeds(len(plan.rows) - 1, len(plan.seeds))
    rows = {row.label: [*changes(plan.rows[0], row), *implied(plan, row)] for row in plan.rows}
    rates = {row.label: {task.name: rates_of(plan, row, task) for task in plan.tasks} for row in plan.rows}
    cells = len(plan.rows) * len(plan.tasks) * len(plan.seeds)
    if as_json:
        _json(
            {
                "rows": rows,
                "rates": rates,
                "tasks": list(tasks),
                "seeds": plan.seeds,
                "cells": cells,
                "too_few_seeds": few,
            }
        )
        return
    shown = [
        [
            label,
            "; ".join(f"{c['path']}: {_said(c['base'])} -> {_said(c['value'])}" for c in r) or "-",
            *(str(said({each[key] for each in rates[label].values()})) for key in ("lr", "head_lr")),
        ]
        for label, r in rows.items()
    ]
    _table(["row", "changed against the base", "learning rate", "the head's"], shown)
    counted = (_count(len(plan.rows), "row"), _count(len(plan.seeds), "seed"), _count(cells, "cell"))
    typer.echo(f"{counted[2]}: {counted[0]} on {', '.join(tasks)} with {counted[1]}. Every one can run.")
    if few:
        typer.echo(few)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _carry_out(
    plan: Any,
    out: Path,
    executor: str,
    workers: int | None,
    threads: int | None,
    address: str | None,
    costs: bool,
    checkpoint: float,
    report_to: list[str],
    keep_old: bool,
    as_json: bool,
) -> None:
    import attrs
    from rich.console import Console

    from lrkit.study.execute import execute
    from lrkit.study.paired import too_few_seeds
    from lrkit.study.progress import Teller
    from lrkit.study.records import read_study
    from lrkit.study.report import write_report
    from lrkit.study.statistics import compare

    if few := too_few_seeds(len(plan.rows) - 1, len(plan.seeds)):
        _complain(few)
    with Teller(Console(stderr=True, quiet=as_json), out.absolute()) as teller:
        outcome = execute(
            plan,
            out,
            executor=executor,
            workers=workers,
            threads=threads,
            address=address,
            costs=costs,
            checkpoint_seconds=checkpoint,
            report_to=report_to,
            keep_old=keep_old,
            told=teller.told,
            started=teller.started,
            cost_told=teller.cost_told,
        )
    written = write_report(outcome.folder)
    table = compare(read_study(outcome.folder))
    if as_json:
        failed = [{"cell": name, "error": error} for name, error in outcome.failed]
        files = [str(path) for path in written]
        _json(
            {
                "folder": str(out),
                "rows": [attrs.asdict(row) for row in table.rows],
                "failed": failed,
                "busy": outcome.busy,
                "files": files,
            }
        )
    else:
        typer.echo(str(table))
        typer.echo(f"report: {out / 'report.html'}")
    for name, error in outcome.failed:
        _complain(f"cell {name} failed: {error}")
    if outcome.busy:
        _complain(f"{outcome.busy} cells are run by another process: the same command later takes them in")
    if outcome.failed:
        raise typer.Exit(1)


# ---- composing -------------------------------------------------------------------------------------------------------


def compose(name: str, sets: Sequence[str], swaps: Sequence[str]) -> "tuple[Method, dict[str, Any]]":
    """A method by name with components swapped and settings changed; and the settings meant for the run.

    Args:
        name: a registered method.
        sets: ``"parameterization.rank=8"``; an argument of the method's function, ``"rank=8"``; or ``"run.steps=200"``.
        swaps: ``"metric=magnitude"``.

    Raises:
        LrkitError: an unknown name or setting, or a combination that does not fit.
    """
    from lrkit.method import arguments_of, from_plain, swapped, with_arguments, with_setting_of

    settings = dict(_pair(text, "--set") for text in sets)
    run = {key.removeprefix("run."): value for key, value in settings.items() if key.startswith("run.")}
    arguments = {key: value for key, value in settings.items() if key in arguments_of(name)}
    plain = with_arguments(name, arguments)
    for text in swaps:
        path, value = _pair(text, "--swap")
        if isinstance(value, str) and "," in value:
            raise LrkitError(f"--swap {text}: a run has one {path}; `lrkit ablate` compares several")
        plain = swapped(plain, path, value)
    # Last, since a setting may be one of a component that was swapped in.
    for key, value in settings.items():
        if key not in arguments and not key.startswith("run."):
            plain = with_setting_of(name, plain, key, value)
    return from_plain(plain), run


def _to_run(
    name: str | None, all_methods: bool, sets: Sequence[str], swaps: Sequence[str]
) -> "tuple[dict[str, Method], dict[str, Any]]":
    """The methods that `lrkit run` is to train, by label, and the settings of the run."""
    from lrkit.registry import current

    if (name is None) != all_methods:
        raise LrkitError("give a method's name (`lrkit methods` lists them), or --all-methods")
    if name is not None:
        method, run = compose(name, sets, swaps)
        return {" ".join([name, *swaps]): method}, run
    pairs = dict(_pair(text, "--set") for text in sets)
    own = [key for key in pairs if not key.startswith("run.")]
    if own or swaps:
        raise LrkitError(f"--all-methods takes settings of the run alone (run.steps=200), not {[*own, *swaps][0]}")
    registry = current()
    methods: dict[str, Method] = {}
    for each in registry.names("method"):
        try:
            methods[each] = registry.method(each)
        except LrkitError as error:
            warnings.warn(f'method "{each}" is left out: {error}', LrkitWarning, stacklevel=1)
    return methods, {key.removeprefix("run."): value for key, value in pairs.items()}


def _pair(text: str, option: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise LrkitError(f'{option} takes {"PART=NAME" if option == "--swap" else "KEY=VALUE"}, not "{text}"')
    return key, _value(value)


def _value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    try:
        return parse_json(text.lower() if text.lower() in ("true", "false") else text, "a value")
    except LrkitError:  # no JSON, a number of thousands of digits, brackets without end
        return text


def _task(name: str | None, data: Path | None) -> "Task":
    from lrkit.registry import registered_tasks
    from lrkit.tasks import load_task

    return load_task(name, data=data, tasks=registered_tasks())


def _targets(text: str) -> str | list[str]:
    """Plain names (letters, digits, dots, commas) are a list of suffixes; anything else is a regular expression."""
    if text == "all-linear" or not re.fullmatch(r"[\w.,]+", text):
        return text
    return [name for name in text.split(",") if name]


def _train_also(text: str | None) -> str | list[str]:
    """Names joined by commas; "auto"; or "none" for an empty list."""
    if text is None or text == "auto":
        return "auto"
    return [] if text == "none" else [name for name in text.split(",") if name]


def _new_folder(wanted: Path | None, default: str) -> Path:
    """A fresh folder: the one asked for, which must not hold anything; or the default with the next free number."""
    from lrkit.study.place import try_folder

    if wanted is not None:
        if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
            raise LrkitError(f"{wanted} exists and is not empty: nothing is overwritten, choose another --out")
        folder = wanted
    else:
        number, folder = 1, Path(default)
        while os.path.lexists(folder):
            number += 1
            folder = Path(f"{default}-{number}")
    try_folder(folder)
    return folder


def _written(folder: Path, write: Callable[[Path], None]) -> Path:
    """Write results into a folder; elsewhere, and said, if that cannot be written to any more."""
    from lrkit.study.place import written

    there, why = written(folder, write)
    if why:
        _complain(f"{folder} could not be written to ({why}): what was trained is in {there}")
    return there


def _make(folder: Path) -> Path:
    """Made only when there is something to put into it: a refused run leaves nothing behind."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LrkitError(f"cannot make the folder {folder}: {error.strerror}") from None
    return folder


# ---- showing ---------------------------------------------------------------------------------------------------------


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _json(value: Any) -> None:
    typer.echo(json.dumps(_finite(value), indent=1, allow_nan=False, default=str))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, numbers: int = 99) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index >= numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    # Piped into a file there is no width to fit into: nothing is cut or wrapped.
    Console(width=max(console.width, 200) if not console.is_terminal else None).print(table)


def _show_results(results: "Mapping[str, Result]", title: str) -> None:
    rows = []
    for label, result in results.items():
        summary = result.summary
        rows.append(
            [
                label,
                f"{result.score:.1%}" if abs(result.score) <= 1 else f"{result.score:.3f}",
                f"{summary.start:,}",
                f"{summary.now:,}",
                f"{summary.average:,.0f}",
                f"{result.flops.run / 1e12:,.2f} T",
                _state(result),
                f"{result.step_seconds * 1000:,.0f} ms",
            ]
        )
    first = next(iter(results.values()))
    metric = next(iter(first.scores))
    header = ["method", metric, "trainable at start", "at end", "on average", "FLOPs", "state at the end", "a step"]
    _table(header, rows, title, numbers=1)
    typer.echo(
        f"constant best guess: {first.majority:.1%}. Trainable parameters are the adapters'; "
        f"the head's {first.summary.head:,} come on top."
    )


def _state(result: "Result") -> str:
    layers = result.summary.layers
    ranks = [layer.rank for layer in layers if layer.rank is not None]
    words = []
    if ranks:
        low, high, mean = min(ranks), max(ranks), sum(ranks) / len(ranks)
        words.append(f"rank {low}" if low == high else f"ranks {low} to {high}, mean {mean:.1f}")
    frozen = sum(len(layer.frozen) for layer in layers)
    if frozen:
        words.append(f"{frozen} matrices frozen")
    return ", ".join(words) or "-"


@contextmanager
def _progress(quiet: bool) -> "Iterator[Any]":
    """Progress bars on stderr; a line every 15 seconds where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:

        def plain(label: str, total: int) -> Any:
            begin = said = time.monotonic()

            def now_and_then(step: int, steps: int, loss: float | None) -> None:
                nonlocal said
                now = time.monotonic()
                if step == 1:
                    console.print(f"{label}: {total} steps", highlight=False, markup=False)
                elif now - said >= 15:
                    said = now
                    left = (now - begin) / step * (steps - step)
                    what = "" if loss is None else f", loss {loss:.3f}"
                    console.print(f"{label}: step {step}{what}, about {left:.0f} s left", highlight=False, markup=False)

            return None if quiet else now_and_then

        yield plain
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:

        def bar(label: str, total: int) -> Any:
            row = bars.add_task(label, total=total, loss="-")

            def update(step: int, steps: int, loss: float | None) -> None:
                bars.update(row, completed=step, total=steps, loss="-" if loss is None else f"{loss:.3f}")

            return update

        yield bar


# typer's own base class of wrong usage: it carries its click along, under a private name.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _complain(message: str) -> None:
    print(f"lrkit: {cut(' '.join(message.split()))}", file=sys.stderr)  # noqa: T201


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    _complain(str(message))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit: 0, or 2 for bad input."""
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
            if not {"--help", "--version"} & set(sys.argv[1:] if arguments is None else arguments):
                from lrkit.registry import spare_others

                spare_others()
            code = app(args=arguments, prog_name="lrkit", standalone_mode=False)
            if code == 130:  # typer's own way to end at Ctrl-C
                raise KeyboardInterrupt
        except (KeyboardInterrupt, typer.Abort):
            _complain("interrupted")
            sys.exit(130)
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(error.format_message())
                sys.exit(2)
            _complain(f"{cut(error.format_message(), 800)} (see `lrkit --help`)")
            sys.exit(2)
        except LrkitError as error:
            _complain(str(error))
            sys.exit(2)
        except (MemoryError, RuntimeError) as error:
            if "memory" not in str(error).lower():
                raise
            _complain(
                f"out of memory: {cut(str(error).splitlines()[0], 400) if str(error) else 'a smaller rank or batch may fit'}"
            )
            sys.exit(2)
        except OSError as error:
            told = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
            _complain(cut(told, 800))
            sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
