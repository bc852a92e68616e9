"""The task `teacher`: a known ΔW, the loss that learns it, and the measure of what an allocation finds."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import studies
import torch
from folders import WORDS, rows, write_model
from hypothesis import given
from hypothesis import strategies as st
from models import make
from scipy import stats
from transformers import BertConfig, BertModel

import lrkit
from lrkit import LrkitError
from lrkit.adapt.targets import find_targets
from lrkit.study.checkpoints import Record
from lrkit.study.loaded import model_for
from lrkit.study.models import empty_model
from lrkit.study.recall import mean_interval, recalls_of
from lrkit.study.records import read_study
from lrkit.study.report import write_report
from lrkit.study.run import RunSettings, train
from lrkit.tasks.lesson import delta, recall_of
from lrkit.tasks.teacher import Teacher, layer_named, load_teacher
from lrkit.testing import check

NAMES = [
    f"encoder.layer.{i}.{module}"
    for i in range(6)
    for module in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]


def teacher(**settings: Any) -> Teacher:
    """The task on sentences that the tiny model's tokenizer knows: more words than a run of a few steps learns by heart."""
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS[5:], size=draw.integers(3, 9))) for _ in range(256)]
    table = {"sentence": texts, "label": [0.0] * len(texts)}
    split = [
        datasets.Dataset.from_dict({k: v[part] for k, v in table.items()}) for part in (slice(224), slice(224, 256))
    ]
    return Teacher(name="teacher", train=split[0], validation=split[1], fields=("sentence",), **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model"), layers=3))


def tiny(dtype: torch.dtype = torch.float64) -> BertModel:
    torch.manual_seed(3)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    config = BertConfig(vocab_size=30, max_position_embeddings=16, **sizes)  # type: ignore[arg-type]
    return BertModel(config, add_pooling_layer=False).to(dtype).eval()


def batch(seed: int, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(len(lengths))}


@given(st.integers(1, 5), st.floats(1e-3, 10), st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_delta_has_rank_and_norm(rank: int, size: float, seed: int, place: int) -> None:
    """By its singular values: so many are not 0, and their norm is the share of the weight's that was asked for."""
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((9, 7)))
    values = np.linalg.svd(delta(weight, seed, place, rank, size).numpy(), compute_uv=False)
    assert (values > 1e-10 * values[0]).sum() == rank
    assert np.sqrt((values**2).sum()) == pytest.approx(size * np.linalg.norm(weight.numpy()), rel=1e-12)
    assert not torch.equal(delta(weight, seed + 1, place, rank, size), delta(weight, seed, place, rank, size))
    assert not torch.equal(delta(weight, seed, place + 1, rank, size), delta(weight, seed, place, rank, size))


def test_loss_is_the_formula() -> None:
    """In float64: mean over rows of the mean squared distance per token and dimension, over the base's; padding left out."""
    net, first, second = tiny(), batch(0, (5, 9)), batch(1, (4, 8, 2))
    task = teacher(layers=("1.output.dense", "0.value"), rank=3, size=0.5)
    lesson = task.objective(net, lambda n: first, seed=7)
    names = [target.name for target in find_targets(net, "all-linear")]
    taught = copy.deepcopy(net)
    for name in ("encoder.layer.1.output.dense", "encoder.layer.0.attention.self.value"):
        weight = taught.get_submodule(name).weight
        weight.data += delta(weight.data, 7, names.index(name), 3, 0.5)
    student = copy.deepcopy(net)
    for p in student.parameters():
        p.data += 0.01

    def errors(model: BertModel, given: dict[str, torch.Tensor]) -> list[float]:
        found = []
        for row in range(len(given["input_ids"])):
            length = int(given["attention_mask"][row].sum())
            ids = given["input_ids"][row : row + 1, :length]  # alone and unpadded
            with torch.no_grad():
                own, wanted = (m(input_ids=ids).last_hidden_state[0].numpy() for m in (model, taught))
            found.append(float(((own - wanted) ** 2).sum() / own.size))
        return found

    loss, outputs = lesson.loss(student, second)
    own, base = errors(student, second), errors(net, second)
    assert loss.item() == pytest.approx(np.mean(own) / np.mean(errors(net, first)), rel=1e-5)  # squares are float32
    with torch.no_grad():
        told = lesson.loss(student, second)[1]["errors"].numpy()
    assert told == pytest.approx(np.array([own, base]).T, rel=1e-5)
    assert task.score(told, np.zeros(3)) == {"explained": pytest.approx(1 - sum(own) / sum(base), rel=1e-5)}
    assert lesson.truth == ("encoder.layer.0.attention.self.value", "encoder.layer.1.output.dense")
    loss.backward()
    assert all(p.grad is not None for n, p in student.named_parameters() if "output.dense.weight" in n)
    assert outputs["errors"].requires_grad is False


def test_scores_of_base_and_copy() -> None:
    """The untouched base has exactly 0, and a model with the teacher's weights 1."""
    net, rows = tiny(torch.float32), batch(2, (6, 3, 9))
    lesson = teacher(layers=("0.query",)).objective(net, lambda n: rows, seed=1)
    with torch.no_grad():
        assert teacher().score(lesson.loss(net, rows)[1]["errors"].numpy(), np.zeros(3)) == {"explained": 0.0}
        places = [target.name for target in find_targets(net, "all-linear")]
        weight = net.get_submodule("encoder.layer.0.attention.self.query").weight
        weight += delta(weight, 1, places.index("encoder.layer.0.attention.self.query"), 4, 0.7)
        score = teacher().score(lesson.loss(net, rows)[1]["errors"].numpy(), np.zeros(3))
    assert score["explained"] == pytest.approx(1, abs=1e-9)
    assert np.isnan(teacher().score([[np.nan, 1.0]], [0])["explained"])
    with pytest.raises(LrkitError, match="two errors"):
        teacher().score([[1.0]], [0])


def test_layers_are_drawn_evenly() -> None:
    """Over many seeds every pair of layers is as likely as any other (chi-squared)."""
    net = tiny()
    names = [target.name for target in find_targets(net, "all-linear")]
    pairs = list(itertools.combinations(names, 2))
    task, seeds = teacher(), 20 * len(pairs)
    drawn = [task.truth(net, seed) for seed in range(seeds)]
    counts = [drawn.count(pair) for pair in pairs]
    assert sum(counts) == seeds
    assert stats.chisquare(counts).pvalue > 0.001
    assert {len(each) for each in (teacher(drawn=3).truth(net, seed) for seed in range(5))} == {3}


def test_draws_touch_no_generator(folder: str) -> None:
    """The teacher is a function of seed and weights: the same each time, and torch's and numpy's generators stay."""
    task = teacher()
    net = model_for(folder, task).model
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    given = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
    one, two, other = (task.objective(net, lambda n: given, seed) for seed in (4, 4, 5))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    with torch.no_grad():
        found = [each.loss(net, given)[1]["errors"] for each in (one, two, other)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_truth_needs_no_weights(folder: str) -> None:
    """On the meta device the same layers are named as in the run; a task that does not know has none."""
    task = teacher()
    empty = empty_model(folder, task.head)
    net = model_for(folder, task).model
    for seed in range(6):
        assert task.truth(empty, seed) == task.truth(net, seed)
    assert next(empty.parameters()).is_meta
    assert not any("pooler" in name for each in (empty, net) for name, _ in each.named_parameters())
    movies = lrkit.tasks.load_task("movies")
    assert movies.truth(empty, 0) == ()
    assert movies.objective(net, dict, 0) is None
    assert movies.primary == "accuracy"


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("1.value", "encoder.layer.1.attention.self.value"),
        ("4.output.dense", "encoder.layer.4.output.dense"),
        ("4.attention.output.dense", "encoder.layer.4.attention.output.dense"),
        ("layer.3.intermediate.dense", "encoder.layer.3.intermediate.dense"),
        (NAMES[7], NAMES[7]),
    ],
)
def test_layers_by_short_names(asked: str, found: str) -> None:
    """A layer is named by its end, or by its block's number and its end."""
    assert layer_named(asked, NAMES) == found


@pytest.mark.parametrize(
    ("asked", "told"), [("9.value", "is called"), ("1.attention.self.valu", "did you mean"), ("self.value", "may be")]
)
def test_other_names_are_refused(asked: str, told: str) -> None:
    """A name of no layer, or of several, is refused in one line that says which there are."""
    with pytest.raises(LrkitError, match=told) as caught:
        layer_named(asked, NAMES)
    assert "\n" not in str(caught.value)


def test_task_name_says_all() -> None:
    """Layers, their number, rank and norm stand in the task's name, in any order."""
    assert (load_teacher(None).name, load_teacher(None).layers, load_teacher(None).drawn) == ("teacher", (), 2)
    task = load_teacher("1.value+4.output.dense/rank=2/norm=0.5")
    assert task.name == "teacher/1.value+4.output.dense/rank=2/norm=0.5"
    assert (task.layers, task.rank, task.size) == (("1.value", "4.output.dense"), 2, 0.5)
    assert load_teacher("norm=2/layers=3").drawn == 3
    assert len(task.train) == len(lrkit.tasks.load_task("movies").train)
    assert task.subset(train=9).layers == task.layers
    assert check(load_teacher, kind="task") == []


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ("", "no part"),
        ("value", "no part"),
        ("1.value+1.value", "each once"),
        ("1.value/rank=0", "rank must be a whole number from 1"),
        ("norm=-1", "norm must be a number from"),
        ("norm=nan", "norm must be"),
        ("rank=2/rank=3", "says rank twice"),
        ("1.value/layers=2", "not both"),
        ("ranks=2", 'did you mean "rank"'),
    ],
)
def test_odd_names_are_refused(rest: str, told: str) -> None:
    """Anything else in the name is refused in one line."""
    with pytest.raises(LrkitError, match=told) as caught:
        load_teacher(rest)
    assert "\n" not in str(caught.value)


def test_unfit_models_are_refused(folder: str) -> None:
    """An encoder with a decoder, more layers than there are, and a rank above a layer's are refused in one line."""
    net = model_for(folder, teacher()).model
    given = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2)}
    with pytest.raises(LrkitError, match="rank 17 is more than"):
        teacher(rank=17).objective(net, lambda n: given, 0)
    one = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1)}  # nothing to attend to but itself
    with pytest.raises(LrkitError, match="nothing can be learnt"):
        teacher(layers=("1.query",)).objective(net, lambda n: one, 0)
    with pytest.raises(LrkitError, match="names one layer twice"):
        teacher(layers=("1.value", "1.self.value")).truth(net, 0)
    with pytest.raises(LrkitError, match="99 layers cannot be drawn from the 18"):
        teacher(drawn=99).truth(net, 0)
    net.config.is_encoder_decoder = True
    try:
        with pytest.raises(LrkitError, match="encoder with a decoder"):
            teacher().objective(net, lambda n: given, 0)
    finally:
        net.config.is_encoder_decoder = False


def method(rank: int = 4) -> lrkit.Method:
    return lrkit.methods.adalora(rank=rank, target_rank=1)


def test_resumed_run_is_bitwise(folder: str, tmp_path: Path) -> None:
    """Stopped halfway and begun anew, a run has the same losses, scores and ranks."""
    settings = RunSettings(steps=10, batch_size=8, lr=1e-2, seed=3)
    whole = train(method(), teacher(), model=folder, settings=settings)
    asked = iter([False] * 4 + [True] * 99)
    with pytest.raises(KeyboardInterrupt):
        train(
            method(),
            teacher(),
            model=folder,
            settings=settings,
            record=Record(folder=tmp_path, stop=lambda: next(asked)),
        )
    assert Record(folder=tmp_path).step() == 5
    again = train(method(), teacher(), model=folder, settings=settings, record=Record(folder=tmp_path))
    assert again.scores == whole.scores
    assert np.array_equal(again.predictions, whole.predictions)
    assert again.layers == whole.layers
    assert again.flops == whole.flops
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == list(whole.losses)
    assert whole.parameters.head == 0
    assert len(whole.truth) == 2


@pytest.mark.parametrize("layers", [("0.value", "2.output.dense"), ("1.attention.output.dense", "2.value")])
def test_allocation_finds_the_layers(folder: str, layers: tuple[str, ...]) -> None:
    """End to end: AdaLoRA gives planted layers at least twice the rank that an allocation blind to them would."""
    settings = RunSettings(steps=100, batch_size=16, lr=1e-2)
    found = train(method(), teacher(layers=layers, rank=2), model=folder, settings=settings)
    assert sum(layer.rank or 0 for layer in found.layers) == 18  # in 18 layers: blind, two of them would keep 2 of 8
    assert found.scores["recall"] == recall_of([(each.name, each.rank, 4) for each in found.layers], found.truth)
    assert found.scores["recall"] >= 0.5
    assert found.scores["explained"] > 0.9


def test_recall_is_the_definition() -> None:
    """Rank in the right layers over the least of their first rank and all that is left; nothing without a choice."""
    layers = [("a", 8, 8), ("b", 0, 8), ("c", 28, 40)]
    assert recall_of(layers, ("a", "b")) == 8 / 16
    assert recall_of([("a", 3, 8), ("b", 2, 8), ("c", 1, 8)], ("a", "b")) == 5 / 6  # six are left in all
    assert recall_of([("a", 1, 1), ("b", 1, 1)], ("a",)) is None
    assert recall_of([("a", None, None)], ("a",)) is None
    assert recall_of(layers, ("elsewhere",)) == 0.0
    assert recall_of([("a", 12, 8), ("b", 0, 8)], ("a",)) == 1.0  # grown


def test_interval_of_a_mean() -> None:
    """By hand: 0.4, 0.5, 0.6 have t(2) = 4.3027 times 0.1 / √3 on each side; it never leaves 0 to 1."""
    assert mean_interval([0.4, 0.5, 0.6]) == pytest.approx(
        (0.5 - 4.302653 * 0.1 / 3**0.5, 0.5 + 4.302653 * 0.1 / 3**0.5)
    )
    assert mean_interval([0.0, 1.0]) == (0.0, 1.0)
    assert mean_interval([1.0, 1.0]) == (1.0, 1.0)
    assert mean_interval([0.3]) == (None, None)


def made_up(folder: Path) -> Path:
    """A study of a method that chose its ranks and of one of fixed ranks, which knows the right layers."""
    studies.write_study(folder, labels=("adalora", "lora"), seeds=(0, 1, 2), layers=1, costs=False)
    kept = {0: (8, 8), 1: (8, 0), 2: (5, 1)}
    for path in (folder / "cells").glob("*/result.json"):
        result = json.loads(path.read_text())
        row, seed = int(path.parent.name[:2]), int(path.parent.name[4:8])
        result["truth"] = [result["layers"][i]["name"] for i in (0, 1)]
        if row == 0:
            for layer, rank in zip(result["layers"], (*kept[seed], 4, 4, 4, 4), strict=True):
                layer |= {"rank": rank, "initial_rank": 8}
        path.write_text(json.dumps(result))
    return folder


def test_study_has_recalls(tmp_path: Path) -> None:
    """Mean, found layers and misses of each row; a row of fixed ranks is held against what another could have given."""
    found, fixed = recalls_of(read_study(made_up(tmp_path)), "movies")
    assert found.recall == pytest.approx((16 / 16 + 8 / 16 + 6 / 16) / 3)
    assert (found.chosen, found.draws, found.found, found.right) == (True, 3, 4, 6)
    assert [(draw.seed, [layer.rank for layer in draw.layers]) for draw in found.misses] == [(2, [5, 1]), (1, [8, 0])]
    ranks = [layer.rank or 0 for layer in read_study(tmp_path).cells_of(1)[0].result.layers[:2]]  # type: ignore[union-attr]
    assert (fixed.chosen, fixed.misses) == (False, ())
    assert fixed.recall == pytest.approx(min(1, sum(ranks) / 16))
    assert recalls_of(read_study(studies.write_study(tmp_path / "other", seeds=(0,), costs=False)), "movies") == ()


def test_report_shows_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page, the command line's tables and its JSON have the recalls and the misses."""
    from lrkit.cli import main

    made_up(tmp_path)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Rank in the right layers" in page
    assert (
        "seed 1: bert.encoder.layer.0.attention.self.query 8 of 8, bert.encoder.layer.0.attention.self.key 0 of 8"
        in page
    )
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "missed by adalora: seed 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out)["recall"]
    assert [each["label"] for each in told] == ["adalora", "lora"]
    assert told[0]["recall"] == pytest.approx(0.625)


def test_dropout_is_off_for_the_task(folder: str) -> None:
    """The student's own dropout is 0, as the teacher's; another task's model keeps it, though both may be in memory."""
    quiet = model_for(folder, teacher()).model
    assert {m.p for m in quiet.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert {m.p for m in make("bert").modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    task = lrkit.tasks.Classification(
        name="t",
        train=datasets.Dataset.from_list(rows(4)),
        validation=datasets.Dataset.from_list(rows(4)),
        fields=("sentence",),
        labels=("no", "yes"),
    )
    other = model_for(folder, task).model
    assert {m.p for m in other.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert hasattr(other, "classifier")
