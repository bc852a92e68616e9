"""Folders of data: which kind of task they are, which files are read, and what a study's cell knows of them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from row_forms import GOOD, Row, rows_of

from lrkit.cli import main
from lrkit.compose import to_plain
from lrkit.errors import LrkitError
from lrkit.methods import lora
from lrkit.study.cell import Cell, make_cell
from lrkit.study.task_spec import TaskSpec, load_task_of
from lrkit.tasks import hub, load_folder
from lrkit.tasks.forms import FORMS, form_of
from lrkit.tasks.splits import divided, place_of

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "questions": ("QuestionAnswering", {"unanswerable": False}),
    "summaries": ("TextToText", {"source": "document", "target": "summary", "metric": "rouge"}),
    "news": ("TextToText", {"source": "article", "target": "highlights"}),
    "translations": ("TextToText", {"source": "source", "target": "target"}),
    "completions": ("Completion", {"metric": "perplexity"}),
    "chats": ("Completion", {"metric": "perplexity"}),
    "instructions": ("Completion", {"metric": "perplexity"}),
    "solutions": ("Completion", {"metric": "final_number"}),
    "entities": ("TokenClassification", {"labels": ("B-PER", "O")}),
    "words": ("TokenClassification", {"labels": ("N", "V")}),
    "plain texts": ("LanguageModelling", {}),
    "sentences": ("Classification", {"fields": ("sentence",), "metric": "accuracy"}),
    "pairs": ("Classification", {"fields": ("premise", "hypothesis"), "labels": ("0", "1")}),
}
"""What each form becomes, with a few of its attributes."""


def as_jsonl(file: Path, rows: list[Row]) -> None:
    file.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))


def as_gzip(file: Path, rows: list[Row]) -> None:
    file.with_suffix(".jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def as_parquet(file: Path, rows: list[Row]) -> None:
    datasets.Dataset.from_list(rows).to_parquet(file.with_suffix(".parquet"))


def as_csv(file: Path, rows: list[Row]) -> None:
    with file.with_suffix(".csv").open("w", newline="") as text:
        table = csv.writer(text)
        table.writerow(rows[0])
        table.writerows([v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows)


WRITERS: tuple[Callable[[Path, list[Row]], None], ...] = (as_jsonl, as_gzip, as_parquet, as_csv)


def write(folder: Path, form: str, *splits: str, writer: Callable[[Path, list[Row]], None] = as_jsonl) -> Path:
    folder.mkdir(exist_ok=True)
    for split in splits or ("train", "validation"):
        writer(folder / split, rows_of(form))
    return folder


@pytest.mark.parametrize("form", KINDS)
def test_forms_become_kinds(tmp_path: Path, form: str) -> None:
    """Each form becomes its kind of task, and the same one out of JSON lines, of gzip, of Parquet and of CSV."""
    kind, attributes = KINDS[form]
    tasks = [load_folder(write(tmp_path / writer.__name__, form, writer=writer)) for writer in WRITERS]
    for task in tasks:
        assert type(task).__name__ == kind
        assert {name: getattr(task, name) for name in attributes} == attributes
        assert task.train.to_list() == task.validation.to_list() == tasks[0].train.to_list()
    if kind != "Completion" and kind != "TokenClassification":
        assert tasks[0].train.to_list() == rows_of(form)


def test_every_form_is_tried() -> None:
    """No form of the table is left out of these tests, but for those that are another one's with another name."""
    tried = {str(form_of(row)) for row in GOOD.values()}
    same = {"dialogue + summary", "text + summary", "tokens + tags"}
    assert {str(form) for form in FORMS} - tried == same


def test_prompts_are_written(tmp_path: Path) -> None:
    """Instructions become Alpaca's prompts, and solutions GSM8K's."""
    prompts = load_folder(write(tmp_path / "a", "instructions")).train[0]
    assert prompts == {"prompt": "### Instruction:\nName a bird.\n\n### Response:\n", "completion": "A wren."}
    folder = write(tmp_path / "b", "instructions")
    row = {"instruction": "Translate.", "input": "Vogel", "output": "bird"}
    (folder / "train.jsonl").write_text(json.dumps(row))
    assert load_folder(folder).train[0]["prompt"] == (
        "### Instruction:\nTranslate.\n\n### Input:\nVogel\n\n### Response:\n"
    )
    row.pop("input")
    (folder / "train.jsonl").write_text(json.dumps(row))
    assert load_folder(folder).train[0]["prompt"] == "### Instruction:\nTranslate.\n\n### Response:\n"
    solved = load_folder(write(tmp_path / "c", "solutions"))
    assert solved.train[0] == {"prompt": "Question: 1 + 1?\nAnswer:", "completion": " It is 2.\n#### 2"}
    unsolved = [*rows_of("solutions"), {"question": "Who?", "answer": "A bird."}]
    as_jsonl(tmp_path / "c" / "validation", unsolved)
    assert load_folder(tmp_path / "c").metric == "perplexity"


def test_answers_may_be_absent(tmp_path: Path) -> None:
    """One question without an answer, of either split, makes it a task in which there may be none."""
    folder = write(tmp_path / "data", "questions")
    rows = rows_of("questions")
    rows[2]["answers"] = {"text": [], "answer_start": []}
    for split in ("train", "validation"):
        as_jsonl(folder / split, rows)
        assert load_folder(folder).unanswerable
        as_jsonl(folder / split, rows_of("questions"))
    assert not load_folder(folder).unanswerable


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question": "Who?", "answer": "A bird.", "context": "A bird sang."}], "come with a context"),
        ([{"prompt": "a", "completion": "b"}, *rows_of("chats")], 'field "prompt" is missing'),
        (
            [
                {"prompt": "a", "completion": "b"},
                {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            ],
            "the prompt is messages, and that of the first row is a text",
        ),
        ([*rows_of("solutions") * 40, {"question": "Who?", "answer": "A bird."}], 'does not end in "#### number", as '),
        (
            [{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}],
            "has tool_calls, which is not learnt",
        ),
        (
            [*rows_of("entities") * 60, {"tokens": ["a"], "ner_tags": ["B_PER"]}],
            'has "B_PER", which is no tag of an entity',
        ),
    ],
)
def test_nothing_left_out_silently(tmp_path: Path, rows: list[Row], says: str) -> None:
    """What a form would have to leave out of its rows is refused, if the row means something else without it."""
    for split in ("train", "validation"):
        as_jsonl(tmp_path / split, rows)
    with pytest.raises(LrkitError, match=says):
        load_folder(tmp_path)


def test_halving_needs_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch of examples has as many steps as the tokenizer says, so that no part of it can be planned: one line."""
    folder = write(tmp_path / "data", "chats")
    words = [
        "tune",
        "lora",
        "--data",
        str(folder),
        "--model",
        "smollm2",
        "--tune",
        "run.lr=1e-3,1e-2",
        "--halving",
        "2",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "give run.steps" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["label", "ner_tags"])
def test_names_of_splits(tmp_path: Path, column: str) -> None:
    """A number stands for the name that its own file gives it: `datasets` sorts the names of each split by themselves."""

    def put(split: str, names: list[str], said: list[str]) -> None:
        tagged = column == "ner_tags"
        kind = datasets.ClassLabel(names=names)
        texts = {"tokens": [["a"] * 3] * 2} if tagged else {"text": list("abc")}
        features = {"tokens": [datasets.Value("string")]} if tagged else {"text": datasets.Value("string")}
        rows = texts | {column: [said] * 2 if tagged else said}
        made = datasets.Dataset.from_dict(rows, datasets.Features(features | {column: [kind] if tagged else kind}))
        made.to_parquet(str(tmp_path / f"{split}.parquet"))

    put("train", ["bad", "good", "mixed"], ["bad", "good", "mixed"])
    put("validation", ["good", "mixed"], ["good", "mixed", "good"])
    task = load_folder(tmp_path)
    assert task.labels == ("bad", "good", "mixed")
    found = task.validation["tags"][0] if column == "ner_tags" else task.validation["label"]
    assert [task.labels[number] for number in found] == ["good", "mixed", "good"]
    put("validation", ["good", "other"], ["good", "other", "good"])
    with pytest.raises(LrkitError, match=f'validation.parquet, row .: {column} is "other", which train.parquet'):
        load_folder(tmp_path)


def test_few_answers_astray(tmp_path: Path) -> None:
    """One answer in a hundred may be astray, and is left to the training, which leaves it out; two are refused."""
    folder = write(tmp_path / "data", "questions")
    good = rows_of("questions")[0]
    astray = {
        **good,
        "answers": {"text": list(good["answers"]["text"]), "answer_start": [99] * len(good["answers"]["text"])},
    }
    as_jsonl(folder / "train", [good] * 99 + [astray])
    assert len(load_folder(folder).train) == 100
    as_jsonl(folder / "train", [good] * 98 + [astray] * 2)
    with pytest.raises(LrkitError, match=r"train\.jsonl:99: answer .* is not at 99 .*\(2 of 100 rows are so\)"):
        load_folder(folder)


def test_tags_have_names(tmp_path: Path) -> None:
    """Tags that are numbers have the names that `datasets` wrote into the file."""
    names = ["O", "B-PER", "I-PER"]
    types = datasets.Features({"tokens": [datasets.Value("string")], "ner_tags": [datasets.ClassLabel(names=names)]})
    rows = datasets.Dataset.from_dict({"tokens": [["Bob", "slept"]] * 3, "ner_tags": [[1, 0]] * 3}, features=types)
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    task = load_folder(tmp_path)
    assert task.labels == tuple(names)
    assert task.train[0] == {"tokens": ["Bob", "slept"], "tags": [1, 0]}


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_splits_in_order(tmp_path: Path) -> None:
    """Validation rows are of the first of validation, valid and dev, or of the file that is asked for."""
    folder = write(tmp_path / "data", "summaries", "train", "dev")
    for split in ("dev", "valid", "validation"):
        write(folder, "summaries", split)
        assert place_of(folder).files() == {"train": folder / "train.jsonl", "validation": folder / f"{split}.jsonl"}
    write(folder, "summaries", "test", writer=as_csv)
    assert place_of(f"{folder}:validation=test").file("validation") == folder / "test.csv"
    assert place_of(f"{folder}:train=dev,validation=valid").files() == {
        "train": folder / "dev.jsonl",
        "validation": folder / "valid.jsonl",
    }
    assert load_folder(f"{folder}:validation=test").name == "data"


def test_colons_in_folders(tmp_path: Path) -> None:
    """A folder whose name looks like splits is a folder."""
    folder = write(tmp_path / "a:train=b", "summaries")
    assert divided(str(folder)) == (str(folder), "")
    assert divided("squad=a/b:validation=test") == ("squad=a/b", "validation=test")
    assert divided("a:b/c") == ("a:b/c", "")
    assert len(load_folder(f"{folder}:validation=train,train=validation").train) == 4


def cell(data: Path | str) -> Cell:
    return make_cell(to_plain(lora()), TaskSpec(data=str(data)), "minilm", "all-linear", {"seed": 0})


def test_cells_know_their_files(tmp_path: Path) -> None:
    """A cell's key changes with the content and the part of the files that are read, and with nothing else."""
    folder = write(tmp_path / "data", "sentences", "train", "validation", "other")
    key = cell(folder).key
    digest = hashlib.sha256()
    for name in ("train.jsonl", "validation.jsonl"):  # as it has been since there are cells
        digest.update(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()} ".encode())
    assert cell(folder).versions["data"] == digest.hexdigest()[:16]
    assert cell(f"{folder}:train=train,validation=validation").key == key
    keys = {key, cell(f"{folder}:train=other").key, cell(f"{folder}:validation=other").key}
    keys |= {
        cell(f"{folder}:train=validation,validation=train").key,
        cell(f"{folder}:train=other,validation=train").key,
    }
    assert len(keys) == 5
    (folder / "other.jsonl").write_text("changed")
    (folder / "test.parquet").write_text("another one")
    assert cell(folder).key == key and cell(f"{folder}:train=other").key not in keys
    (folder / "validation.jsonl").rename(folder / "valid.jsonl")
    assert cell(folder).key != key
    (folder / "valid.jsonl").unlink()
    with pytest.raises(LrkitError, match=r"there is no validation\.jsonl"):
        cell(folder)


# ---- in the place of a named task ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form", "attributes"),
    [
        ("squad", "questions", {"unanswerable": False}),
        ("squad_v2", "questions", {"unanswerable": True}),
        ("xsum", "summaries", {"max_target_length": 64}),
        ("cnn_dailymail", "summaries", {"lead": 3, "source": "document"}),
        ("gsm8k", "solutions", {"metric": "final_number", "max_new_tokens": 256}),
        ("glue/cola", "sentences", {"metric": "matthews"}),
    ],
)
def test_stand_ins_are_the_task(tmp_path: Path, name: str, form: str, attributes: dict[str, Any]) -> None:
    """A folder in the place of a task has that task's name and options, unless others are asked for."""
    folder = write(tmp_path / "data", form)
    task = load_task_of(TaskSpec(task=name, data=str(folder)))
    assert task.name == name
    assert {key: getattr(task, key) for key in attributes} == attributes


def test_options_go_first(tmp_path: Path) -> None:
    """An option that is asked for goes before the task's own."""
    folder = str(write(tmp_path / "data", "summaries"))
    task = load_task_of(TaskSpec(task="xsum", data=folder, options={"max_target_length": 9, "num_beams": 4}))
    assert (task.max_target_length, task.num_beams) == (9, 4)
    assert load_task_of(TaskSpec(task="xsum", data=folder, metric="exact_match")).metric == "exact_match"
    with pytest.raises(LrkitError, match='task "squad"'):
        load_task_of(TaskSpec(task="squad", data=folder))


def test_metric_is_an_option(tmp_path: Path) -> None:
    """A metric is the kind's own option, and refused where there is none."""
    assert load_folder(write(tmp_path / "a", "summaries"), "exact_match").metric == "exact_match"
    with pytest.raises(LrkitError, match="metric"):
        load_folder(write(tmp_path / "b", "questions"), "exact_match")


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "asked"), [(None, ("me/mine",)), ("one", ("me/mine", "one"))])
def test_hub_is_asked(monkeypatch: pytest.MonkeyPatch, config: str | None, asked: tuple[str, ...]) -> None:
    """The hub is asked for a repository and a config, quietly, and what it says goes into one line."""
    calls: list[tuple[str, ...]] = []

    def load(*arguments: str) -> str:
        calls.append(arguments)
        assert not datasets.utils.is_progress_bar_enabled()
        if len(calls) == 2:
            raise RuntimeError("first\nsecond")
        return "splits"

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    assert hub.load_hub("mine", "me/mine", config) == "splits"
    with pytest.raises(LrkitError) as error:
        hub.load_hub("mine", "me/mine", config)
    assert str(error.value).startswith("cannot load mine: RuntimeError: first; for local files")
    assert calls == [asked, asked]
