"""The command line: what it prints, and that bad input is exit code 2 and one clear line."""

from __future__ import annotations

import gzip
import inspect
import json
import re
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import folders
import pytest

import lrkit
from lrkit import from_plain, hookimpl, methods
from lrkit.cli import compose, main, screen, words
from lrkit.compose import to_plain
from lrkit.errors import LrkitError
from lrkit.method import FIELDS
from lrkit.metrics import Magnitude, RatioUncertainty
from lrkit.registry import Registry
from lrkit.schedulers import Linear
from lrkit.study.catalogue import about


@pytest.fixture(autouse=True)
def _only_built_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to be installed beside lrkit is no part of these tests."""
    registry = Registry(discover=False)
    monkeypatch.setattr("lrkit.registry.current", lambda: registry)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folders.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folders.write_data(tmp_path_factory.mktemp("data")))


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs the command line in an empty folder: (exit code, stdout, stderr)."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        assert type(caught.value.code) is int
        return caught.value.code, out, err

    return run


@pytest.fixture
def refused(call: Call) -> Callable[..., str]:
    """Runs what must be refused: exit code 2, nothing on stdout, one line on stderr. Gives that line."""

    def run(*arguments: str) -> str:
        code, out, err = call(*arguments)
        assert "Traceback" not in err
        assert code == 2, err
        assert err.endswith("\n") and err.count("\n") == 1, f"one line, not:\n{err}"
        assert err.startswith("lrkit: ")
        assert out == ""
        assert list(Path.cwd().iterdir()) == [], "nothing is written"
        return err.removeprefix("lrkit: ").removesuffix("\n")

    return run


# ---- bad input: no model, no data needed -----------------------------------------------------------------------------

UNKNOWN: dict[str, tuple[list[str], str]] = {
    "command": (["plugin"], "plugins"),
    "command that is none": (["zzz"], "zzz"),
    "method": (["run", "adalor"], 'unknown method "adalor" (did you mean "adalora"?); there are full, lora, '),
    "method in capitals": (["run", "AdaLoRA"], '(did you mean "adalora"?)'),
    "metric": (
        ["run", "adalora", "--swap", "metric=magnitud"],
        'unknown metric "magnitud" (did you mean "magnitude"?)',
    ),
    "scheduler": (["run", "adalora", "--swap", "scheduler=cubik"], '(did you mean "cubic"?)'),
    "action": (["run", "adalora", "--swap", "action=prun"], '(did you mean "prune"?)'),
    "parameterization": (
        ["run", "adalora", "--swap", "parameterization=vectorscaled"],
        '(did you mean "vector-scaled"?)',
    ),
    "part": (["run", "adalora", "--swap", "metrics=magnitude"], 'no component "metrics" (did you mean "metric"?)'),
    "setting": (
        ["run", "adalora", "--set", "parameterization.rnk=3"],
        'no setting "parameterization.rnk" (did you mean "parameterization.rank"?)',
    ),
    "setting in no part": (
        ["run", "adalora", "--set", "parametrization.rank=3"],
        '(did you mean "parameterization"?)',
    ),
    "argument": (["run", "adalora", "--set", "target_rnk=3"], '(did you mean "target_rank"?)'),
    "setting without its part": (["run", "adalora", "--set", "measure=after-step"], "did you mean metric.measure?"),
    "setting that is like an argument": (
        ["run", "adalora", "--set", "orthogonality_norm=mean"],
        "did you mean parameterization.orthogonality_norm?",
    ),
    "setting of another method": (
        ["run", "lora", "--set", "parameterization.orthogonality=1"],
        "parameterization has rank, alpha, dropout",
    ),
    "run setting": (["run", "adalora", "--set", "run.stps=3"], 'run has no setting "stps" (did you mean "steps"?)'),
    "run setting that is none": (["run", "adalora", "--set", "run.zzz=3"], "there are steps, epochs, batch_size"),
    "policy": (["run", "adalora", "--set", "also.0.metric.beta1=0.5"], 'nothing at "also.0.metric.beta1"'),
    "task": (["run", "adalora", "--task", "movie"], 'unknown task "movie" (did you mean "movies"?)'),
    "GLUE task without its folder": (["run", "adalora", "--task", "rte"], 'did you mean "glue/rte"?'),
    "GLUE task": (["run", "adalora", "--task", "glue/rtee"], "rte"),
    "option": (["run", "adalora", "--modell", "minilm"], "No such option: --modell"),
    "option of another command": (["methods", "--set", "rank=3"], "No such option: --set"),
    "argument that is too much": (["run", "adalora", "aflora"], "aflora"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_names_are_refused(refused: Callable[..., str], case: str) -> None:
    """With the nearest right one, or with all that there are."""
    arguments, hint = UNKNOWN[case]
    assert hint in refused(*arguments)


BAD: dict[str, tuple[list[str], str]] = {
    "no method": (["run"], "give a method's name"),
    "no value": (["run", "adalora", "--set"], "requires an argument"),
    "--set without a value": (["run", "adalora", "--set", "rank"], '--set takes KEY=VALUE, not "rank"'),
    "--set with an empty value": (["run", "adalora", "--set", "rank="], '--set takes KEY=VALUE, not "rank="'),
    "--set without a key": (["run", "adalora", "--set", "=3"], '--set takes KEY=VALUE, not "=3"'),
    "--swap without a name": (["run", "adalora", "--swap", "metric"], '--swap takes PART=NAME, not "metric"'),
    "--swap with a number": (
        ["run", "adalora", "--swap", "metric=3"],
        "metric must be a name, or a table with a name and settings, not 3",
    ),
    "--swap with two": (
        ["run", "adalora", "--swap", "metric=magnitude,sensitivity"],
        "--swap metric=magnitude,sensitivity: a run has one metric",
    ),
    "--swap that leaves half a policy": (["run", "adalora", "--swap", "metric=none"], "metric missing"),
    "a swap that does not fit": (
        ["run", "adalora", "--swap", "parameterization=lora"],
        "does not fit parameterization LoRA(",
    ),
    "two swaps that do not fit": (
        ["run", "adalora", "--swap", "action=freeze", "--swap", "metric=magnitude"],
        "does not fit action Freeze(together=False",
    ),
    "target_rank above rank": (
        ["run", "adalora", "--set", "target_rank=20"],
        "Cubic.target = 20 is above the initial rank 12 of SVD(",
    ),
    "rank below target_rank": (
        ["run", "adalora", "--set", "rank=4"],
        "Cubic.target = 8 is above the initial rank 4 of SVD(",
    ),
    "scheduler.target above rank": (
        ["run", "adalora", "--set", "scheduler.target=13"],
        "Cubic.target = 13 is above the initial rank 12 of SVD(",
    ),
    "parameterization.rank below target": (
        ["run", "adalora", "--set", "parameterization.rank=4"],
        "Cubic.target = 8 is above the initial rank 4 of SVD(",
    ),
    "a fraction for a count": (["run", "adalora", "--set", "rank=4.5"], "rank must be int, not 4.5"),
    "a float for a count": (["run", "adalora", "--set", "rank=8.0"], "rank must be int, not 8.0"),
    "a string for a count": (["run", "adalora", "--set", 'rank="8"'], "rank must be int, not '8'"),
    "a word for a count": (["run", "adalora", "--set", "parameterization.rank=many"], "rank must be int, not 'many'"),
    "a flag for a count": (["run", "adalora", "--set", "target_rank=true"], "target_rank must be int, not True"),
    "a fraction for a target rank": (
        ["run", "adalora", "--set", "target_rank=0.5"],
        "target_rank must be int, not 0.5",
    ),
    "nothing for a count": (["run", "adalora", "--set", "parameterization.rank=none"], "rank must be int, not None"),
    "a list": (["run", "adalora", "--set", "metric.beta1=[0.5]"], "metric.beta1 must be float, not [0.5]"),
    "a word for a number": (["run", "adalora", "--set", "metric.beta1=high"], "metric.beta1 must be float, not 'high'"),
    "a number for a flag": (["run", "aflora", "--set", "together=1"], "together must be bool, not 1"),
    "a word that is none of a few": (["run", "aflora", "--set", "train=all"], "'all'"),
    "below the range": (["run", "lora", "--set", "rank=0"], "LoRA.rank must be an int of at least 1, not 0"),
    "above the range": (["run", "lora", "--set", "dropout=1.5"], "LoRA.dropout must be a number"),
    "not a number": (["run", "lora", "--set", "alpha=NaN"], "LoRA.alpha must be a number above 0, not nan"),
    "infinite": (["run", "lora", "--set", "alpha=Infinity"], "LoRA.alpha must be a number above 0, not inf"),
    "a share above one": (["run", "adalora", "--set", "warmup=1.5"], "Cubic.warmup must be "),
    "an interval of zero": (["run", "adalora", "--set", "interval=0"], "Cubic.interval must be "),
    "run: a fraction of a step": (["run", "lora", "--set", "run.steps=3.5"], "run.steps must be int"),
    "run: no steps": (["run", "lora", "--set", "run.steps=0"], "run.steps must be an int of at least 1, not 0"),
    "run: a word": (["run", "lora", "--set", "run.lr=fast"], "run.lr must be float"),
    "run: a flag": (["run", "lora", "--set", "run.seed=true"], "run.seed must be int, not True"),
    "run: negative": (["run", "lora", "--set", "run.weight_decay=-1"], "run.weight_decay must be a number at least 0"),
    "run: not a number": (["run", "lora", "--set", "run.lr=NaN"], "run.lr must be a number above 0, not nan"),
    "run: no name": (["run", "lora", "--set", "run.=3"], 'run has no setting ""'),
    "demo: a word": (["demo", "--steps", "many"], "--steps"),
    "demo: too few": (["demo", "--steps", "3"], "--steps"),
    "task and data": (["run", "lora", "--task", "movies", "--data", "."], "not both"),
    "parts of movies": (["run", "lora", "--task", "movies/short"], '"movies" has no parts'),
    "data that is not there": (["run", "lora", "--data", "nowhere"], "nowhere: no such folder"),
    "data with an endless name": (["run", "lora", "--data", "n" * 300], "n" * 300),
    "out with an endless name": (["run", "lora", "--out", "n" * 300], "n" * 300),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(refused: Callable[..., str], case: str) -> None:
    """With exit code 2 and one line that says what is wrong."""
    arguments, message = BAD[case]
    assert message in refused(*arguments)


def test_absent_parts_are_named(refused: Callable[..., str]) -> None:
    """A setting of a part that the method does not have is not answered with its own name."""
    line = refused("run", "lora", "--set", "scheduler.target=4")
    assert 'did you mean "scheduler"' not in line
    assert "scheduler" in line


@pytest.mark.parametrize("value", ["1", "true", "none"])
def test_values_keep_their_type(refused: Callable[..., str], value: str) -> None:
    """`--set` reads JSON: what is no number is no number, and what is one is no string."""
    assert "parameterization.orthogonality_norm must be" in refused(
        "run", "adalora", "--set", f"parameterization.orthogonality_norm={value}"
    )


# ---- bad input: data files -------------------------------------------------------------------------------------------

ROW = '{"sentence": "the film was good", "label": 1}'
OTHER = '{"sentence": "the film was bad", "label": 0}'
FILES: dict[str, tuple[dict[str, list[str]], str]] = {
    "not JSON": ({"train": [ROW, OTHER, "the film was good\t1"]}, "train.jsonl:3: not JSON"),
    "cut off": ({"train": [ROW, OTHER[:20]]}, "train.jsonl:2: not JSON"),
    "not an object": ({"validation": [ROW, "[1, 2]"]}, "validation.jsonl:2: not a JSON object"),
    "no text field": ({"train": ['{"words": "good", "label": 1}', OTHER]}, "train.jsonl:1: no text field"),
    "a field missing": ({"train": [ROW, OTHER, '{"label": 1}']}, 'train.jsonl:3: field "sentence" is missing'),
    "a label missing": ({"train": [ROW, OTHER, '{"sentence": "x"}']}, 'train.jsonl:3: field "label" is missing'),
    "a label that is a word": ({"train": [ROW, '{"sentence": "x", "label": "good"}']}, "train.jsonl:2: label is "),
    "a label that is a flag": ({"train": [ROW, '{"sentence": "x", "label": true}']}, "train.jsonl:2: label is true"),
    "a text that is a number": (
        {"train": [ROW, '{"sentence": 5, "label": 1}']},
        'train.jsonl:2: field "sentence" is 5',
    ),
    "a label that training has not": (
        {"validation": [ROW, OTHER, '{"sentence": "x", "label": 2}']},
        "validation.jsonl:3: label 2",
    ),
    "a hidden label": ({"validation": [ROW, '{"sentence": "x", "label": -1}']}, "validation.jsonl:2: label is -1"),
    "a gap in the labels": (
        {"train": [ROW, OTHER, '{"sentence": "x", "label": 7}']},
        "train.jsonl:3: label is 7, but no row has label 2",
    ),
    "nothing in it": ({"train": [""]}, "train.jsonl: has no rows"),
}


@pytest.mark.parametrize("case", FILES)
def test_malformed_data_is_named(refused: Callable[..., str], tmp_path: Path, case: str) -> None:
    """The file and the line are in the error."""
    lines, message = FILES[case]
    folder = folders.write_data(tmp_path / "data", lines)
    assert f"{folder}/{message}" in refused("run", "lora", "--data", str(folder))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_missing_data_is_named(refused: Callable[..., str], tmp_path: Path, split: str) -> None:
    """The folder and the file are in the error."""
    folder = folders.write_data(tmp_path / "data")
    (folder / f"{split}.jsonl").unlink()
    line = refused("run", "lora", "--data", str(folder))
    assert str(folder) in line and f"{split}.jsonl" in line


def test_truncated_archives_are_named(refused: Callable[..., str], tmp_path: Path) -> None:
    """A .gz that ends too early is told with the line it ends at."""
    folder = folders.write_data(tmp_path / "data")
    text = (folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(text)[:-12])
    assert re.search(r"train\.jsonl\.gz:\d+: ", refused("run", "lora", "--data", str(folder)))


# ---- bad input: folders to write to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["run", "lora"], ["demo"]], ids=["run", "demo"])
def test_out_is_never_overwritten(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """A folder that holds anything is refused before data are loaded."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it went on to load data, or to train")

    monkeypatch.setattr("lrkit.tasks.load_task", never)
    monkeypatch.setattr("lrkit.study.run.train", never)
    out = tmp_path / "results"
    out.mkdir()
    (out / "result.json").write_text("precious")
    line = refused(*command, "--out", str(out))
    assert str(out) in line and "not empty" in line and "--out" in line
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("result.json", "precious")]


@pytest.mark.parametrize("below", ["", "/deeper", "/deeper/still"])
def test_out_may_be_no_file(refused: Callable[..., str], tmp_path: Path, below: str) -> None:
    """A file in the folder's place, or above it, is left alone."""
    out = tmp_path / "results"
    out.write_text("precious")
    assert f"{out}{below}" in refused("run", "lora", "--out", f"{out}{below}")
    assert out.read_text() == "precious"


# ---- bad input: only the model or the length of the run shows it ------------------------------------------------------

TRAINED: dict[str, tuple[list[str], str]] = {
    "warm-up and final phase in steps": (
        ["--set", "scheduler.warmup=8", "--set", "scheduler.final=7", "--set", "run.steps=10"],
        "Cubic: warmup 8 + final 7 steps are more than total_steps 10",
    ),
    "warm-up and final phase as shares": (
        ["--set", "warmup=0.6", "--set", "final=0.6", "--set", "run.steps=10"],
        "Cubic: warmup 6 + final 6 steps are more than total_steps 10",
    ),
    "warm-up and final phase against epochs": (
        ["--set", "warmup=6", "--set", "run.batch_size=8", "--set", "run.epochs=2", "--set", "final=1"],
        "Cubic: warmup 6 + final 1 steps are more than total_steps 6",
    ),
    "warm-up and final phase of another scheduler": (
        [
            "--swap",
            "scheduler=linear",
            "--set",
            "scheduler.warmup=11",
            "--set",
            "run.steps=10",
            "--set",
            "scheduler.final=0",
        ],
        "Linear: warmup 11 + final 0 steps are more than total_steps 10",
    ),
    "no target matched": (["--targets", "queri"], '(did you mean "query"?)'),
    "no target of two matched": (["--targets", "query,valeu"], '(did you mean "value"?)'),
    "no target matched by a regular expression": (
        ["--targets", r"encoder\.layer\.\d+\.nothing"],
        r'targets="encoder\.layer\.\d+\.nothing" matches no linear layer of BertForSequenceClassification',
    ),
    "no regular expression": (["--targets", "(query"], 'targets="(query" is not a regular expression'),
}


@pytest.mark.parametrize("case", TRAINED)
def test_misfits_are_one_line(refused: Callable[..., str], model: str, data: str, case: str) -> None:
    """A schedule longer than the run, or targets that match nothing in the model."""
    arguments, message = TRAINED[case]
    line = refused("run", "adalora", "--model", model, "--data", data, *arguments)
    assert message in line


def test_models_need_layers(refused: Callable[..., str], tmp_path: Path, data: str) -> None:
    """A model without blocks has nothing to adapt, and the error says so."""
    model = folders.write_model(tmp_path / "model", layers=0)
    line = refused("run", "lora", "--model", str(model), "--data", data, "--set", "run.steps=2")
    assert 'targets="all-linear" found no linear layer inside transformer blocks' in line


def test_missing_models_are_named(refused: Callable[..., str], tmp_path: Path, data: str) -> None:
    """A misspelt name, an empty folder, no folder, and an endless name."""
    line = refused("run", "lora", "--model", "minilmm", "--data", data)
    assert 'model "minilmm"' in line and 'did you mean "minilm"?' in line
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("run", "lora", "--model", str(tmp_path / "empty"), "--data", data)
    assert "no such folder" in refused("run", "lora", "--model", str(tmp_path / "nowhere"), "--data", data)
    assert "n" * 300 in refused("run", "lora", "--model", "n" * 300, "--data", data)


def test_broken_models_are_named(refused: Callable[..., str], tmp_path: Path, data: str) -> None:
    """Weights or a configuration that cannot be read are told with the folder."""
    model = folders.write_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    assert str(model) in refused("run", "lora", "--model", str(model), "--data", data)
    (model / "config.json").write_text("{")
    assert str(model) in refused("run", "lora", "--model", str(model), "--data", data)


def test_misfits_are_told_first(refused: Callable[..., str], data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that does not fit is refused before the model is loaded."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lrkit.study.pretrained.load_model", never)
    refused("run", "adalora", "--data", data, "--set", "warmup=8", "--set", "final=7", "--set", "run.steps=10")


# ---- what it prints --------------------------------------------------------------------------------------------------

SHORT = ["--set", "run.steps=4", "--set", "run.batch_size=8", "--set", "run.threads=1"]


def test_a_run_in_full(call: Call, model: str, data: str, tmp_path: Path) -> None:
    """It says what it does, prints one table, writes its folder once, and never again."""
    out = tmp_path / "new" / "results"
    code, stdout, stderr = call("run", "adalora", "--model", model, "--data", data, "--out", str(out), *SHORT)
    assert code == 0
    said = [
        "tokenizing 24 of 24 training rows, and those for validation ...",
        "training 4 steps ...",
        "adalora: 4 steps",
    ]
    assert stderr.splitlines() == [f"loading {model} ...", *said]
    assert "trainable at start" in stdout and "mean 8.0" in stdout
    assert {p.name for p in out.iterdir()} >= {"result.json", "lrkit.safetensors", "ranks.png", "budget.png"}
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 4
    from transformers import AutoModelForSequenceClassification

    from lrkit.models import quiet_transformers

    with quiet_transformers():
        net = AutoModelForSequenceClassification.from_pretrained(model)
    adapted = lrkit.load(net, out)
    assert adapted.method == methods.adalora()
    assert adapted.step == 4
    # and once more into the same folder
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    code, stdout, stderr = call("run", "adalora", "--model", model, "--data", data, "--out", str(out), *SHORT)
    assert code == 2 and stdout == ""
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("name", ["full", "lora", "dora", "svd-lora", "elora", "adalora", "aflora"])
def test_every_method_trains(call: Call, model: str, data: str, name: str) -> None:
    """With --json there is JSON on stdout, and nothing else."""
    code, stdout, stderr = call("run", name, "--model", model, "--data", data, "--json", *SHORT)
    assert (code, stderr) == (0, "")
    result = json.loads(stdout, parse_constant=pytest.fail)
    assert result["steps"] == len(result["losses"]) == 4
    assert 0 <= result["scores"]["accuracy"] <= 1
    assert result["majority"] == 0.5
    assert from_plain(result["method"]) == lrkit.registry.current().get("method", name)()
    assert list(Path.cwd().iterdir()) == [], "without --out nothing is written"


def test_diverged_runs_are_json(call: Call, model: str, data: str, tmp_path: Path) -> None:
    """Scores and losses that are not finite are null."""
    arguments = ["--model", model, "--data", data, *SHORT, "--set", "run.lr=1e30", "--set", "run.grad_clip=0"]
    out = tmp_path / "results"
    code, stdout, stderr = call("run", "adalora", *arguments, "--json", "--out", str(out))
    assert code == 0, stderr
    assert all(line.startswith("lrkit: ") for line in stderr.splitlines())
    assert json.loads(stdout, parse_constant=pytest.fail)["steps"] == 4
    json.loads((out / "result.json").read_text(), parse_constant=pytest.fail)


def test_settings_reach_the_run(call: Call, model: str, data: str) -> None:
    """Settings of the method, of its parts and of the run, and swaps, are in the result."""
    code, stdout, stderr = call(
        *("run", "adalora", "--model", model, "--data", data, "--json"),
        *("--set", "rank=6", "--set", "target_rank=3", "--set", "scheduler.interval=1"),
        *("--set", "parameterization.alpha=8", "--set", "metric.beta1=0.5"),
        *("--swap", "metric=ratio-uncertainty", "--swap", "scheduler=linear"),
        *("--set", "run.steps=5", "--set", "run.batch_size=4", "--set", "run.lr=0.002", "--set", "run.head_lr=0.003"),
        *("--set", "run.train_rows=16", "--set", "run.validation_rows=4", "--set", "run.seed=7"),
    )
    assert (code, stderr) == (0, "")
    result = json.loads(stdout)
    method = from_plain(result["method"])
    assert method == attrs.evolve(
        methods.adalora(rank=6, target_rank=3, alpha=8.0),
        metric=RatioUncertainty(beta1=0.5, beta2=0.85),
        scheduler=Linear(target=3, warmup=0.15, final=0.5, interval=1),
    )
    settings = {k: v for k, v in result["settings"].items() if v is not None}
    for name, value in {
        "steps": 5,
        "batch_size": 4,
        "lr": 0.002,
        "head_lr": 0.003,
        "train_rows": 16,
        "validation_rows": 4,
        "seed": 7,
    }.items():
        assert settings[name] == value
    layers = [layer["rank"] for layer in result["summary"]["layers"]]
    assert sum(layers) == 3 * len(layers)


def test_ranks_reach_the_run(call: Call, model: str, data: str, tmp_path: Path) -> None:
    """A run begins with a file's ranks, and the next one with those that it ended with."""
    lrkit.Allocation({"query": 6, "*": 2}).save(tmp_path / "ranks.toml")
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    asked = ["--model", model, "--data", data, *SHORT]
    given = ["--ranks", str(tmp_path / "ranks.toml"), "--set", "target_rank=1", "--set", "interval=1"]
    assert call("run", "adalora", *asked, *given, "--out", first)[0] == 0
    found = lrkit.Allocation.from_run(first)
    assert found.total == len(found)
    assert found.sizes is not None
    assert call("run", "svd-lora", *asked, "--ranks", first, "--out", second)[0] == 0
    assert lrkit.Allocation.from_run(second) == found
    assert call("run", "--all-methods", *asked, "--ranks", "uniform")[0] == 2


def test_none_leaves_parts_out() -> None:
    """AdaLoRA without its policy is the SVD parameterization alone."""
    swaps = [f"{part}=none" for part in ("metric", "scheduler", "action")]
    method, run = compose("adalora", ["run.steps=3", "parameterization.rank=5"], swaps)
    assert method == methods.svd_lora(rank=5)
    assert run == {"steps": 3}


def test_swaps_come_first() -> None:
    """A setting may be one of a component that is swapped in."""
    method, _ = compose("adalora", ["metric.epsilon=0.001", "rank=9"], ["metric=ratio-uncertainty"])
    assert method == attrs.evolve(methods.adalora(rank=9), metric=RatioUncertainty(beta2=0.85, epsilon=0.001))


def test_values_are_json() -> None:
    """Numbers, none and true in any case, and words; a whole number stays one."""
    method, run = compose("adalora", ["alpha=none", "target_rank=1", "warmup=1", "run.lr=1e-3", "run.threads=null"], [])
    assert method == methods.adalora(alpha=None, target_rank=1, warmup=1)
    assert type(method.scheduler.warmup) is int  # type: ignore[union-attr]
    assert run == {"lr": 1e-3, "threads": None}
    assert type(compose("adalora", ["warmup=1.0"], [])[0].scheduler.warmup) is float  # type: ignore[union-attr]
    for text in ("true", "True", "TRUE"):
        assert compose("aflora", [f"together={text}"], [])[0] == methods.aflora(together=True)
    assert compose("aflora", ["train=attention"], [])[0] == methods.aflora(train="attention")


@pytest.mark.parametrize("targets", ["query,value", "query", r".*\.(query|value|key)"])
def test_targets_choose_layers(call: Call, model: str, data: str, targets: str) -> None:
    """Names joined by commas are suffixes; anything else is a regular expression."""
    code, stdout, stderr = call("run", "lora", "--model", model, "--data", data, "--targets", targets, "--json", *SHORT)
    assert (code, stderr) == (0, "")
    names = [layer["name"].rpartition(".")[2] for layer in json.loads(stdout)["summary"]["layers"]]
    wanted = {"query,value": ["query", "value"], "query": ["query"]}.get(targets, ["query", "key", "value"])
    assert names == wanted


def test_methods_lists_parts(call: Call) -> None:
    """Each method with its four parts, as a table and as JSON."""
    code, stdout, stderr = call("methods")
    assert (code, stderr) == (0, "")
    rows = {line.split()[0]: line.split()[1:5] for line in stdout.splitlines() if line.split()}
    assert rows["adalora"] == ["svd", "sensitivity-uncertainty", "cubic", "prune"]
    assert rows["aflora"] == ["vector-scaled", "gradient-uncertainty", "cubic", "freeze"]
    assert rows["lora"] == ["lora", "-", "-", "-"]
    code, stdout, stderr = call("methods", "--json")
    assert (code, stderr) == (0, "")
    listed = json.loads(stdout)
    assert list(listed) == ["full", "lora", "dora", "svd-lora", "elora", "adalora", "aflora"]
    for name, plain in listed.items():
        assert from_plain(plain) == lrkit.registry.current().get("method", name)()


def test_plugins_lists_distributions(call: Call) -> None:
    """Each component with who brought it, as a table and as JSON."""
    code, stdout, stderr = call("plugins")
    assert (code, stderr) == (0, "")
    assert re.search(rf"metric +magnitude +lrkit {re.escape(lrkit.__version__)} +lrkit\.metrics", stdout)
    code, stdout, stderr = call("plugins", "--json")
    assert (code, stderr) == (0, "")
    listed = json.loads(stdout)
    assert listed["problems"] == []
    assert {(c["kind"], c["name"]) for c in listed["components"]} == {
        (o.kind, o.name) for o in lrkit.registry.current().offers()
    }
    assert {"kind": "action", "name": "prune", "object": "lrkit.actions.prune.Prune", "distribution": f"lrkit {lrkit.__version__}"} in listed["components"]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("name", sorted({offer.name for offer in Registry(discover=False).offers()}))
def test_everything_can_be_shown(call: Call, name: str) -> None:
    """With its parts, and with each setting, its default and its meaning."""
    code, stdout, stderr = call("plugins", "show", name)
    assert (code, stderr) == (0, "")
    shown = json.loads(call("plugins", "show", name, "--json")[1])
    assert [each["kind"] for each in shown] == [o.kind for o in Registry(discover=False).offers() if o.name == name]
    assert "`" not in stdout
    for each in shown:
        value = Registry(discover=False).get(each["kind"], name)
        told = about(name) if each["kind"] == "study" else value.__doc__
        assert each["about"].split("\n")[0] in (told or "")
        if each["kind"] == "method":
            plain = to_plain(value())
            assert each["parts"] == {kind: plain[kind]["name"] for kind in FIELDS if plain[kind]}
            assert all(f"{kind}: {part}\n" in stdout for kind, part in each["parts"].items())
            paths = list(inspect.signature(value).parameters)
        else:
            paths = [f"{each['kind']}.{f.name}" for f in attrs.fields(value)] if attrs.has(value) else []
        assert [s["path"] for s in each["settings"]] == paths
        for setting in each["settings"]:
            assert setting["about"], f"{setting['path']} is not described, nor is it in a class above"
            assert setting["path"] in stdout
        if attrs.has(value):
            named = {f"{each['kind']}.{f.name}": repr(f.default) for f in attrs.fields(value)}
            assert {s["path"]: s["default"] for s in each["settings"]} == named


def test_items_flow_on_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A list's item of a docstring is one text, broken anew for the terminal; what is indented further stays as it is."""
    monkeypatch.setattr("lrkit.cli.screen.width", lambda: 40)
    text = "First line\nsecond.\n\n- an item that is\n  written in two lines\n- another\n\n    code = 1\n    more = 2"
    screen.say(text, reflow=True)
    assert capsys.readouterr().out.splitlines() == [
        "First line second.",
        "",
        "- an item that is written in two lines",
        "- another",
        "",
        "    code = 1",
        "    more = 2",
    ]


def test_seeds_by_number_or_name() -> None:
    """A number is how many, a comma makes it a name, and a number that looks like a name is told."""
    assert (words.seeds("6"), words.seeds("3,4"), words.seeds("101,")) == (6, [3, 4], [101])
    with pytest.warns(lrkit.LrkitWarning, match="for the one seed 101 write 101,"):
        assert words.seeds("101") == 101


def test_packs_are_named(refused: Callable[..., str], tmp_path: Path) -> None:
    """A packed study where a study's folder is wanted: the command that unpacks it."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "cells.jsonl.gz").write_bytes(b"")
    assert f"is a packed study: `lrkit unpack {tmp_path / 'pack'}" in refused("report", str(tmp_path / "pack"))


def test_nothing_else_is_shown(refused: Callable[..., str]) -> None:
    """A name that is not registered is refused, with the nearest one or where to look."""
    assert '"sensitivty" (did you mean "sensitivity"?)' in refused("plugins", "show", "sensitivty")
    assert "`lrkit plugins` lists" in refused("run", "adalora", "--swap", "metric=platon")


# ---- plug-ins that are in the way ------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Mine(Magnitude):
    """A metric of a good plug-in."""


def plugin(**offers: Any) -> types.ModuleType:
    made = types.ModuleType("plugin")
    for name, offered in offers.items():
        setattr(made, name, hookimpl(lambda offered=offered: offered))
    return made


@pytest.fixture
def with_plugins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts plug-ins (distribution, module) beside the built-ins, found when first asked for, as it is in a process."""

    def put(*plugins: tuple[str, types.ModuleType]) -> None:
        made: list[Registry] = []

        def current() -> Registry:
            if not made:
                made.append(Registry([(who, "entry", what) for who, what in plugins], discover=False))
            return made[0]

        monkeypatch.setattr("lrkit.registry.current", current)

    return put


def test_broken_plugins_are_listed(call: Call, with_plugins: Callable[..., None]) -> None:
    """The rest is there, the reason is on stderr, and the exit code is 2."""
    put = ("good 1.0", plugin(lrkit_metrics={"mine": Mine})), ("bad 2.0", plugin(lrkit_metrics=[Mine]))
    with_plugins(*put)
    code, stdout, stderr = call("plugins")
    assert code == 2
    assert stderr == 'lrkit: plug-in "entry" of bad 2.0: lrkit_metrics must return a mapping from names to metrics, not list\n'  # fmt: skip  # noqa: E501
    assert re.search(r"metric +mine +good 1\.0 ", stdout) and "magnitude" in stdout
    with_plugins(*put)
    code, stdout, stderr = call("plugins", "--json")
    assert code == 2 and stderr.count("\n") == 1
    listed = json.loads(stdout)
    (problem,) = listed["problems"]
    assert (problem["distribution"], problem["plugin"]) == ("bad 2.0", "entry")
    assert "mine" in [component["name"] for component in listed["components"]]


def test_broken_plugins_stop_nothing(call: Call, with_plugins: Callable[..., None], model: str, data: str) -> None:
    """A run that needs nothing of it goes on, after one line."""
    with_plugins(("bad 2.0", plugin(lrkit_metrics=[Mine])))
    code, stdout, stderr = call("run", "lora", "--model", model, "--data", data, "--json", *SHORT)
    assert code == 0
    assert stderr.startswith('lrkit: plug-in "entry" of bad 2.0: ') and stderr.count("\n") == 1
    assert json.loads(stdout)["steps"] == 4


def claimed(kind: str, value: Any) -> tuple[tuple[str, types.ModuleType], ...]:
    return tuple((f"{who} 1.0", plugin(**{f"lrkit_{kind}s": {"contested": value}})) for who in ("one", "two"))


def test_contested_methods_are_left_out(call: Call, with_plugins: Callable[..., None]) -> None:
    """A method that two claim is not in the list, and both are named."""
    with_plugins(*claimed("method", methods.lora))
    _, stdout, stderr = call("methods", "--json")
    listed = json.loads(stdout)
    assert {"lora", "adalora", "aflora"} <= set(listed) and "contested" not in listed
    assert "one 1.0" in stderr and "two 1.0" in stderr and "Traceback" not in stderr


def test_contested_tasks_stop_nothing(call: Call, with_plugins: Callable[..., None], model: str, data: str) -> None:
    """Only a run that asks for the task is refused."""
    with_plugins(*claimed("task", lambda rest: None))
    code, stdout, stderr = call("run", "lora", "--model", model, "--data", data, "--json", *SHORT)
    assert code == 0, stderr
    assert json.loads(stdout)["steps"] == 4
    with_plugins(*claimed("task", lambda rest: None))
    code, _, stderr = call("run", "lora", "--task", "contested")
    assert code == 2
    assert 'task "contested" is offered by one 1.0 and two 1.0' in stderr


def test_contested_names_are_refused(call: Call, with_plugins: Callable[..., None]) -> None:
    """A metric that two claim cannot be used, and both are named."""
    with_plugins(*claimed("metric", Mine))
    code, _, stderr = call("run", "adalora", "--swap", "metric=contested")
    warning, error = stderr.splitlines()
    assert code == 2
    assert warning == 'lrkit: plug-in "entry" of two 1.0: metric "contested" is already offered by one 1.0'
    assert error.startswith('lrkit: metric "contested" is offered by one 1.0 and two 1.0')


def _needs_an_argument(rank: int) -> lrkit.Method:
    return methods.lora(rank=rank)


def _raises() -> lrkit.Method:
    raise RuntimeError("no licence")


def _of_own_part() -> lrkit.Method:
    return attrs.evolve(methods.adalora(), metric=Mine())


@pytest.mark.parametrize("factory", [_needs_an_argument, _raises, _of_own_part, dict], ids=lambda f: f.__name__)
def test_broken_methods_are_left_out(call: Call, with_plugins: Callable[..., None], factory: Any) -> None:
    """A method that cannot be made is told, and the others are listed."""
    with_plugins(("bad 2.0", plugin(lrkit_methods={"odd": factory})))
    _, stdout, stderr = call("methods", "--json")
    assert {"lora", "adalora", "aflora"} <= set(json.loads(stdout))
    assert "odd" in stderr and "Traceback" not in stderr
    assert all(line.startswith("lrkit: ") for line in stderr.splitlines())


POSTPONED = """
from __future__ import annotations
from typing import TYPE_CHECKING
from lrkit import methods
if TYPE_CHECKING:
    from lrkit import Method

def mine(*, rank: int = 3) -> Method:
    return methods.lora(rank=rank)
"""


def test_postponed_annotations_are_read(with_plugins: Callable[..., None]) -> None:
    """Its return annotation cannot be evaluated at run time, and need not be."""
    made = types.ModuleType("postponed")
    exec(compile(POSTPONED, "postponed", "exec", dont_inherit=True), vars(made))
    with_plugins(("good 1.0", plugin(lrkit_methods={"mine": made.mine})))
    assert compose("mine", ["rank=5"], [])[0] == methods.lora(rank=5)
    with pytest.raises(LrkitError, match="rank must be"):
        compose("mine", ["rank=5.5"], [])


# ---- the process -----------------------------------------------------------------------------------------------------

PROBE = """
import sys
from lrkit.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib", "lrkit.method"} & set(sys.modules)
    print("heavy:", *sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["plugins", "--help"], ["run"], ["run", "--bogus"], []], ids=" ".join
)
def test_help_imports_little(arguments: list[str]) -> None:
    """No torch, and nothing of its size, for help or for wrong usage."""
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "heavy:"
    assert done.returncode == (0 if "--help" in arguments else 2)
    if arguments == ["--help"]:
        assert all(command in done.stdout for command in ("demo", "run", "methods", "plugins"))


def test_help_is_quick() -> None:
    """In under a second, of four tries."""
    command = [sys.executable, "-c", "from lrkit.cli import main; main(['--help'])"]
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True, timeout=60)
        seconds.append(time.perf_counter() - begin)
        if seconds[-1] < 1:
            return
    pytest.fail(f"lrkit --help took {min(seconds):.1f} s")


def test_lrkit_imports_lazily() -> None:
    """torch is imported when something of lrkit is used."""
    code = "import sys, lrkit; dir(lrkit); print('torch' in sys.modules); lrkit.methods; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_no_arguments_is_help(call: Call) -> None:
    """And exit code 2."""
    code, stdout, stderr = call()
    assert code == 2
    assert "Usage: lrkit" in stdout + stderr and "Commands:" in stdout + stderr
    assert "Traceback" not in stderr


def test_interrupts_are_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is exit code 130 and at most one line."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(words, "compose", interrupt)
    code, stdout, stderr = call("run", "lora")
    assert (code, stdout) == (130, "")
    assert stderr in ("", "lrkit: interrupted\n")


def test_other_failures_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of lrkit's own is not told as bad input."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a mistake of lrkit's own")

    monkeypatch.setattr(words, "compose", fail)
    with pytest.raises(RuntimeError, match="a mistake of lrkit's own"):
        main(["run", "lora"])


def test_messages_are_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line breaks and tabs in an error become blanks."""

    def fail(*_: Any, **__: Any) -> None:
        raise LrkitError("first\n   second\tthird")

    monkeypatch.setattr(words, "compose", fail)
    assert call("run", "lora") == (2, "", "lrkit: first second third\n")


def test_only_own_warnings(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """lrkit's warnings are one line each; those of libraries are not shown; filters are put back."""

    def warn(*_: Any, **__: Any) -> None:
        warnings.warn("for developers", FutureWarning, stacklevel=1)
        for _ in range(2):
            warnings.warn("for the\nuser", lrkit.LrkitWarning, stacklevel=1)
        raise LrkitError("enough")

    monkeypatch.setattr(words, "compose", warn)
    monkeypatch.setattr(sys, "warnoptions", [])
    before, show = list(warnings.filters), warnings.showwarning
    assert call("run", "lora") == (2, "", "lrkit: for the user\nlrkit: for the user\nlrkit: enough\n")
    assert list(warnings.filters) == before and warnings.showwarning is show


def test_all_methods_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names come from the registry, one that cannot run stops no other, and the exit code says so."""
    from lrkit.registry import current

    model, data = folders.write_model(tmp_path / "model"), folders.write_data(tmp_path / "data")
    names = ["lora", "adalora", "aflora"]
    every = type(current()).names
    monkeypatch.setattr(type(current()), "names", lambda self, kind: names if kind == "method" else every(self, kind))
    monkeypatch.setattr(
        "lrkit.cli.words.task", lambda task, folder, options: __import__("lrkit.tasks").tasks.load_task(data=data)
    )
    given = ["run", "--all-methods", "--model", str(model), "--set", "run.max_length=12", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*given, "--set", "run.steps=8", "--out", str(tmp_path / "out")])
    told = json.loads(capsys.readouterr().out)
    assert (ended.value.code, list(told["runs"]), told["refused"]) == (0, names, [])
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {*names, "ranks.png", "freezing.png"}
    assert (tmp_path / "out" / "aflora" / "lrkit.safetensors").is_file()
    names.insert(1, "long")
    with (
        current().lend("method", "long", lambda: lrkit.methods.adalora(warmup=500)),
        pytest.raises(SystemExit) as ended,
    ):
        main([*given, "--set", "run.steps=8"])
    out = capsys.readouterr()
    assert ended.value.code == 1
    assert list(json.loads(out.out)["runs"]) == ["lora", "adalora", "aflora"]
    assert out.err == "lrkit: long: Cubic: warmup 500 + final 4 steps are more than total_steps 8\n"
