"""A setting in the wrong place, or under another tool's name: the error says what to type, and that is right."""

from __future__ import annotations

import re
import shlex

import attrs
import pytest

import lrkit
from lrkit.cli import compose, hints, main, other_names
from lrkit.registry import Registry
from lrkit.study.run_settings import RunSettings, settings_from

RUN = [field.name for field in attrs.fields(RunSettings)]
VALUES = {
    "slices": "true",
    "lr_warmup": "0.1",
    "eval_every": "0.5",
    "bf16": "true",
    "group_by_length": "true",
    "devices": "1",
    "lr": "1e-3",
    "head_lr": "1e-3",
}


@pytest.fixture(autouse=True)
def _only_built_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to be installed beside lrkit is no part of these tests."""
    registry = Registry(discover=False)
    monkeypatch.setattr("lrkit.registry.current", lambda: registry)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command is refused with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(list(words))
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def hinted(line: str) -> str:
    """What the line says to type after ``--set``; it must be a setting that is there, and of the value that was given."""
    (said,) = re.findall(r'--set (\S+?)"?(?:\?|$|\s)', line.replace("\n", " "))
    (setting,) = shlex.split(said)
    settings_from(compose("adalora", [setting], [])[1])
    return setting


def spellings(name: str) -> set[str]:
    """A setting's name as it may be typed."""
    return {name, name.replace("_", "-"), name.replace("_", ""), name.upper()}


@pytest.mark.parametrize("name", RUN)
def test_run_settings_are_found(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Any setting of a run, as an option, without "run." and misspelt, is answered with itself."""
    value = VALUES.get(name, "32")
    for word in spellings(name):
        given = [
            [f"--{word}", value],
            [f"--{word}={value}"],
            ["--set", f"{word}={value}"],
            *([] if word == name else [["--set", f"run.{word}={value}"]]),
        ]
        for words in given:
            assert hinted(refused(capsys, "run", "adalora", *words)) == f"run.{name}={value}", words


OTHERS = {
    "learning_rate": "run.lr=1",
    "max_steps": "run.steps=1",
    "num_train_epochs": "run.epochs=1",
    "per_device_train_batch_size": "run.batch_size=1",
    "warmup_ratio": "run.lr_warmup=1",
    "max_grad_norm": "run.grad_clip=1",
    "lora_alpha": "alpha=1",
    "init_r": "rank=1",
    "target_r": "target_rank=1",
    "deltaT": "interval=1",
    "epoch": "run.epochs=1",
    "step": "run.steps=1",
}


@pytest.mark.parametrize("word", OTHERS)
def test_other_tools_names_are_known(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The names of transformers, PEFT and the papers, as an option and as a setting."""
    for words in (["--" + word.replace("_", "-"), "1"], ["--set", f"{word}=1"]):
        line = refused(capsys, "run", "adalora", *words)
        assert re.search(rf"--set {re.escape(OTHERS[word])}\b", line), line


def test_synonyms_lead_somewhere() -> None:
    """Each name on the right is a setting of a run, of a method, or an option."""
    assert set(other_names.RUN.values()) <= set(RUN)
    arguments = {key for name in ("adalora", "lora") for key in hints._settings(["run", name])}
    assert set(other_names.METHOD.values()) <= arguments
    assert not {*other_names.RUN} & set(RUN)
    kinds = (lrkit.tasks.QuestionAnswering, lrkit.tasks.TextToText, lrkit.tasks.Completion, lrkit.tasks.Verbalized)
    assert {*other_names.TASK.values()} <= {name for kind in kinds for name in kind.options()}


SAID = {
    "a method's argument": (["run", "lora", "--rank", "8"], 'did you mean "--set rank=8"?'),
    "a part's setting": (["run", "adalora", "--first-step", "0"], 'did you mean "--set scheduler.first_step=0"?'),
    "an argument of the run": (["run", "lora", "--set", "run.rank=8"], "the method has: --set rank=8"),
    "a run's setting in a part": (["run", "lora", "--set", "parameterization.lr=1"], "the run has it, --set run.lr=1"),
    "a part as an option": (["run", "adalora", "--metric", "magnitude"], 'did you mean "--swap metric=magnitude"?'),
    "a part as a setting": (["run", "adalora", "--set", "metric=magnitude"], "--swap metric=magnitude"),
    "a bare setting": (["run", "lora", "rank=8"], 'did you mean "--set rank=8"?'),
    "a bare swap": (["run", "adalora", "metric=magnitude"], 'did you mean "--swap metric=magnitude"?'),
    "a method as an option": (["run", "--method", "lora"], "a method is named without an option"),
    "another tool's option": (["run", "lora", "--output-dir", "x"], 'did you mean "--out"?'),
    "an option of other commands": (["demo", "--set", "run.steps=20"], "an option of lrkit run, tune, ablate, params"),
    "seeds of a study": (["ablate", "lora", "--seed", "3"], 'did you mean "--seeds"?'),
    "a study's setting": (["ablate", "lora", "--set", "lr=1e-3"], "--set run.lr=1e-3"),
    "a study's option": (["ablate", "lora", "--lr", "1e-3"], "--set run.lr=1e-3"),
    "a study's argument": (["ablate", "lora", "--set", "run.rank=3"], "--set rank=3"),
    "a count's setting": (["params", "lora", "--set", "lr=1"], "lr is a setting of a run, and nothing runs here"),
    "all methods": (["run", "--all-methods", "--set", "lr=1"], "--set run.lr=1"),
    "where to read on": (["run", "lora", "--zzz"], "(see `lrkit run --help`)"),
    "a value with a blank": (["run", "lora", "--lr", "1 3"], "--set 'run.lr=1 3'"),
}


@pytest.mark.parametrize("case", SAID)
def test_places_are_told(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is right in another place is answered with that place."""
    words, said = SAID[case]
    assert said in refused(capsys, *words)


def test_nothing_is_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    """A word that is like nothing gets no hint."""
    assert refused(capsys, "run", "lora", "--zzz", "3") == "lrkit: No such option: --zzz (see `lrkit run --help`)\n"


def test_swaps_may_be_arguments() -> None:
    """As for a study, a swap may be an argument of the method's function."""
    assert compose("adalora", [], ["rank=9"]) == compose("adalora", ["rank=9"], [])


@pytest.mark.parametrize("words", [[], ["run"], ["plugins"], ["plugins", "new"]], ids=" ".join)
def test_h_is_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """-h shows what --help shows."""
    told = []
    for option in ("-h", "--help"):
        with pytest.raises(SystemExit) as left:
            main([*words, option])
        assert left.value.code == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != ""
