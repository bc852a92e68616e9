"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Machine-readable results on stdout.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting: rank=8, metric.beta1=0.9, run.steps=200, task.num_beams=4, model.dtype=bfloat16.",
    ),
]
Swap = Annotated[
    list[str] | None, typer.Option("--swap", metavar="PART=NAME", help="Swap a component: metric=magnitude.")
]
Ranks = Annotated[
    str | None,
    typer.Option(
        "--ranks",
        metavar="FILE|RUN|uniform|random:SEED",
        help="Each layer's rank: of a .toml or .json file, or of a run's end; or the method's own total, shared out.",
    ),
]
TaskName = Annotated[
    str | None, typer.Option("--task", help="movies (the default), glue/NAME, squad, xsum, gsm8k, ..., or a plug-in's.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FOLDER[:SPLITS]",
        help="A folder with {train,validation}.{jsonl[.gz],parquet,csv}, instead of --task. SPLITS: validation=test.",
    ),
]
Model = Annotated[
    str, typer.Option("--model", help="minilm, smollm2, flan-t5-small, mpnet, distilbert, a folder, or a hub id.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model: look at it first.")
]
TrainAlso = Annotated[
    str | None,
    typer.Option("--train-also", help="Modules that train in full, joined by commas; auto (the task head) or none."),
]
Targets = Annotated[str | None, typer.Option("--targets", help="As of `lrkit run`.")]
Executor = Annotated[str, typer.Option("--executor", help="local, ray, or a plug-in's.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads of each worker.", min=1, max=1024)]
Address = Annotated[str | None, typer.Option("--address", help="Of a cluster (ray), or settings of its jobs (slurm).")]
Tune = Annotated[
    list[str] | None,
    typer.Option(
        "--tune",
        metavar="PATH=A,B,...",
        help="Choose a setting by trials: run.lr=3e-4,1e-3 or run.lr=log(1e-4,1e-2,5).",
    ),
]
TuneSeeds = Annotated[
    str | None, typer.Option("--tune-seeds", help="Seeds of each trial: how many (2), or which: 101,102; one is 101,")
]
Sampler = Annotated[str | None, typer.Option("--sampler", help="grid: every combination. tpe: Optuna proposes them.")]
Trials = Annotated[int | None, typer.Option("--trials", help="How many trials each row has, for --sampler tpe.", min=1)]
Halving = Annotated[int | None, typer.Option("--halving", help="Of N trials one goes on to N times the steps.", min=2)]
