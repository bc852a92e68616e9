"""Windows hold what run_qa.py's do, answers come back from perfect logits, and what cannot be learnt is said."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import folders
import killed_answers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lrkit.errors import LrkitError, LrkitWarning
from lrkit.models import minilm_folder
from lrkit.tasks import QuestionAnswering, load_task
from lrkit.tasks.windows import position_of
from lrkit.testing import TaskContract

HERE = Path(__file__).parent
WORDS = (
    "Normandy",
    "is",
    "a",
    "region",
    "in",
    "France,",
    "unbelievably",
    "(10th",
    "century)",
    "café",
    "日本",
    "🙂",
    "U.S.",
)


def byte_tokens() -> Any:
    """A tokenizer of single bytes, as GPT-2's are at worst: é is two tokens, 🙂 four; it pads on the left."""
    words = Tokenizer(models.BPE(unk_token=None))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.post_processor = processors.ByteLevel(trim_offsets=True)
    words.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="Ġ", padding_side="left")


def marked_tokens() -> Any:
    """A tokenizer whose tokens begin with the blank before a word, as T5's and DeBERTa's do."""
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.train_from_iterator(
        [" ".join(WORDS)] * 3, trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<cls>", "<sep>"])
    )
    words.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=[("<cls>", 1), ("<sep>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, cls_token="<cls>", pad_token="<sep>", unk_token="<unk>")


TOKENIZERS = {
    "pieces": AutoTokenizer.from_pretrained(minilm_folder()),
    "bytes": byte_tokens(),
    "marked": marked_tokens(),
}


def make(*rows: tuple[str, str, list[tuple[str, int]]], **options: Any) -> QuestionAnswering:
    split = datasets.Dataset.from_list(
        [
            {"question": q, "context": c, "answers": {"text": [t for t, _ in a], "answer_start": [s for _, s in a]}}
            for q, c, a in rows
        ]
    )
    return QuestionAnswering(name="mine", train=split, validation=split, **options)


@st.composite
def asked(draw: st.DrawFn) -> tuple[str, str, list[tuple[str, int]]]:
    """A question, a context of up to forty words, and one to three of its words for an answer."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40))
    question = " ".join(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)))
    first = draw(st.integers(0, len(words) - 1))
    text = " ".join(words[first : first + draw(st.integers(1, 3))])
    return question, " ".join(words), [(text, len(" ".join(words[:first])) + (first > 0))]


# Windows


def test_windows_by_hand() -> None:
    """Ten words in windows of five that overlap by two: what is in them, where the answer is, and where it is not."""
    context = "a region in France is a region in a region"
    task = make(("Normandy is", context, [("France is", context.index("France"))]), stride=2)
    tokenizer = TOKENIZERS["pieces"]
    rows = task.train[:]
    learnt = task.encode(rows, tokenizer, 10, training=True)
    words = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in learnt["input_ids"]]
    asks = "[CLS] normandy is [SEP]"
    assert words == [
        f"{asks} a region in france is [SEP]",
        f"{asks} france is a region in [SEP]",
        f"{asks} region in a region [SEP]",
    ]
    assert learnt["start_positions"] == [7, 4, 0]
    assert learnt["end_positions"] == [8, 5, 0]
    assert learnt["first"] == [True, False, False]
    scored = task.encode(rows, tokenizer, 10, training=False)
    assert scored["input_ids"] == learnt["input_ids"]
    places = [[context[first:after] for first, after in window if first >= 0] for window in scored["offsets"]]
    assert places[2] == ["region", "in", "a", "region"]
    assert [place for place, _ in enumerate(scored["offsets"][0]) if scored["offsets"][0][place][0] < 0] == [
        0,
        1,
        2,
        3,
        9,
    ]
    default = make(("Normandy is", context, [("France", context.index("France"))]))
    assert len(default.encode(rows, tokenizer, 12, training=False)["first"]) == 2, "seven words, four of them again"


def prepared(rows: Any, tokenizer: Any, max_length: int, stride: int) -> Any:
    """What `prepare_train_features` of run_qa.py makes of rows, for a tokenizer that pads on the right.

    Its search for the first token runs on over [SEP] and padding if that is the context's last one; here it stops before.
    """
    tokenized = tokenizer(
        [question.lstrip() for question in rows["question"]],
        rows["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    starts, ends = [], []
    for i, offsets in enumerate(tokenized["offset_mapping"]):
        cls_index = tokenized["input_ids"][i].index(tokenizer.cls_token_id)
        sequence_ids = tokenized.sequence_ids(i)
        answers = rows["answers"][tokenized["overflow_to_sample_mapping"][i]]
        start_char = answers["answer_start"][0] if answers["answer_start"] else 0
        end_char = start_char + len(answers["text"][0]) if answers["answer_start"] else 0
        first = 0
        while sequence_ids[first] != 1:
            first += 1
        last = len(offsets) - 1
        while sequence_ids[last] != 1:
            last -= 1
        if not answers["answer_start"] or not (offsets[first][0] <= start_char and offsets[last][1] >= end_char):
            starts.append(cls_index)
            ends.append(cls_index)
            continue
        end_of_context = last
        while first <= end_of_context and offsets[first][0] <= start_char:
            first += 1
        starts.append(first - 1)
        while offsets[last][1] >= end_char:
            last -= 1
        ends.append(last + 1)
    return tokenized["input_ids"], starts, ends


@settings(deadline=None, max_examples=40)
@given(
    st.lists(asked(), min_size=1, max_size=3), st.sampled_from(["pieces", "marked"]), st.integers(0, 9), st.booleans()
)
def test_windows_are_run_qa_s(rows: list[Any], kind: str, stride: int, none: bool) -> None:
    """Token by token and position by position, the windows are those of transformers' example."""
    if none:
        rows.append((*rows[0][:2], []))
    tokenizer = TOKENIZERS[kind]
    longest = max(len(tokenizer(question)["input_ids"]) for question, *_ in rows)
    length = longest + 1 + stride + 1 + 12 * (kind == "marked")
    task = make(*rows, stride=stride, unanswerable=True)
    ids, starts, ends = prepared(task.train[:], tokenizer, length, stride)
    made = task.encode(task.train[:], tokenizer, length, training=True)
    numbers = np.cumsum(task.encode(task.train[:], tokenizer, length, training=False)["first"]) - 1
    held = {row for row, start in zip(numbers, starts, strict=True) if start > 0 or not rows[row][2]}
    kept = [i for i, row in enumerate(numbers) if row in held]
    assert made["input_ids"] == [ids[i] for i in kept]
    assert made["start_positions"] == [starts[i] for i in kept]
    assert made["end_positions"] == [ends[i] for i in kept]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(asked(), min_size=1, max_size=3),
    st.sampled_from(sorted(TOKENIZERS)),
    st.integers(0, 30),
    st.integers(1, 9),
)
def test_perfect_logits_answer(rows: list[Any], kind: str, stride: int, more: int) -> None:
    """Windows overlap by the stride and leave nothing out; if one holds the answer, the best logits give it back."""
    tokenizer = TOKENIZERS[kind]
    counts = [len(tokenizer(question, add_special_tokens=False)["input_ids"]) for question, *_ in rows]
    length = max(counts) + tokenizer.num_special_tokens_to_add(pair=True) + stride + more
    task = make(*rows, stride=stride, max_answer_length=100)
    made = task.examples(tokenizer, length, training=False)
    owners = np.cumsum(made["first"]) - 1
    assert owners[-1] == len(rows) - 1
    width = max(map(len, made["input_ids"]))
    logits = np.full((2, len(made), width), -100.0, dtype=np.float32)  # as a Trainer fills up
    held = set()
    joined: dict[int, list[Any]] = {}
    for i, (owner, offsets) in enumerate(zip(owners, made["offsets"], strict=True)):
        _, context, [(text, start)] = rows[owner]
        logits[:, i, : len(offsets)] = 0.0
        inside = [made["input_ids"][i][n] for n, place in enumerate(offsets) if place[0] >= 0]
        seen = joined.setdefault(owner, inside[:stride])
        assert inside[:stride] == seen[len(seen) - stride :] or made["first"][i]
        joined[owner] = seen + inside[stride:]
        position = position_of((start, start + len(text)), offsets)
        if position is not None:
            held.add(owner)
            logits[0, i, position[0]] = logits[1, i, position[1]] = 5.0
            assert context[offsets[position[0]][0] : offsets[position[1]][1]].strip() == text
    for owner, (_, context, [(text, start)]) in enumerate(rows):
        whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
        assert joined[owner] == whole["input_ids"]
        tokens = sum(1 for first, after in whole["offset_mapping"] if after > start and first < start + len(text))
        assert owner in held or tokens > stride + 1
    answers = task.answers(tuple(logits), made, tokenizer)
    for owner in held:
        assert answers[owner] == rows[owner][2][0][0]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_padding_is_right(kind: str) -> None:
    """Batches are padded on the right whatever the tokenizer's side, so that positions stay; it keeps its side."""
    tokenizer = TOKENIZERS[kind]
    task = make(("is", "a region in France,", [("France,", 12)]), ("is a", "a region", [("region", 2)]))
    made = task.examples(tokenizer, 40, training=True)
    side = tokenizer.padding_side
    batch = task.collator(tokenizer)(made.remove_columns(["first"]).to_list())
    assert tokenizer.padding_side == side
    for i, ids in enumerate(made["input_ids"]):
        assert batch["input_ids"][i, : len(ids)].tolist() == ids
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * (batch["input_ids"].shape[1] - len(ids))
    assert batch["start_positions"].tolist() == made["start_positions"]


# What cannot be learnt


CONTEXT = "Normandy is a region in France"
GOOD = ("Where?", CONTEXT, [("France", 24)])


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        (
            {"stride": 7},
            12,
            'the question "Where?" has 2 tokens, so that a window of 12 has room for 7 of its context, and',
        ),
        ({}, 4, "has room for 0 of its context, and windows overlap by 1: raise run.max_length, or lower task.stride"),
    ],
)
def test_no_room_refused(options: dict[str, Any], length: int, message: str) -> None:
    """A window without room for more of the context than its stride is refused in one line."""
    with pytest.raises(LrkitError) as error:
        make(GOOD, **options).examples(TOKENIZERS["pieces"], length, training=False)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            [{"text": [], "answer_start": []}],
            'train row 1 ("Where?") has no answer; if questions may have none, set task',
        ),
        ([{"text": ["a"], "answer_start": [1, 2]}], 'train row 1 ("Where?") has not as many texts as answer_start'),
        (
            [{"text": "a", "answer_start": 3}],
            'train: answers must be {"text": [...], "answer_start": [...]} in each row',
        ),
        (["France"], 'train: answers must be {"text": [...], "answer_start": [...]} in each row, not string'),
        ([{"text": ["a"]}], 'train: answers must be {"text": [...], "answer_start": [...]} in each row'),
    ],
)
def test_bad_answers_refused(answers: list[Any], message: str) -> None:
    """Answers of another form, and a question without one in a task in which each has one, are refused."""
    good = make(GOOD).train
    bad = datasets.Dataset.from_dict({"question": ["Where?"], "context": [CONTEXT], "answers": answers})
    with pytest.raises(LrkitError) as error:
        QuestionAnswering(name="mine", train=bad, validation=good)
    assert message in str(error.value) and "\n" not in str(error.value)
    lacking = good.remove_columns(["answers"])
    with pytest.raises(LrkitError, match='validation has no column "answers"'):
        QuestionAnswering(name="mine", train=good, validation=lacking)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", -1), ("stride", 2.5), ("max_answer_length", 0), ("threshold", math.nan), ("threshold", "0")],
)
def test_bad_options_refused(name: str, value: Any) -> None:
    """An option that cannot have a value is named."""
    with pytest.raises(LrkitError, match=name):
        make(GOOD).with_options({name: value})


def test_lost_answers_counted() -> None:
    """Rows whose answer stands elsewhere, or in no window, are left out of training, and the warning counts them."""
    rows = (
        GOOD,
        ("Which?", CONTEXT, [("France", 3)]),
        ("Who?", CONTEXT, [("a region in France", 12)]),
        ("Really?", CONTEXT, [("Spain", 0), ("region", 14)]),
    )
    task = make(*rows, stride=1)
    with pytest.warns(LrkitWarning) as told:
        learnt = task.examples(TOKENIZERS["pieces"], 8, training=True)
    [warning] = told
    assert str(warning.message) == (
        'task "mine": 2 of 4 training rows are left out: of 1 the answer is not in the context at its answer_start, of 1 no '
        "window of 8 tokens holds it (raise run.max_length or task.stride)"
    )
    assert sum(learnt["first"]) == 2
    assert sum(task.examples(TOKENIZERS["pieces"], 8, training=False)["first"]) == 4, "all are scored"


# Answers and scores


def test_null_score_decides() -> None:
    """With 2.0's rules a question has no answer if the lowest null score is above the best span's by the threshold."""
    rows = (("Where?", CONTEXT, [("France", 24)]), ("Who?", CONTEXT, []))
    task = make(*rows, unanswerable=True, stride=1)
    tokenizer = TOKENIZERS["pieces"]
    made = task.examples(tokenizer, 8, training=False)
    assert made["first"] == [True, False, False, True, False, False]
    logits = np.zeros((2, 6, 8))
    logits[:, :, 0] = [3.0, 2.0, 4.0, 3.0, 2.5, 4.0]  # [CLS]: 4 and 5 are the lowest sums
    [place] = [(i, made["offsets"][2].index([24, 30])) for i in (2,)]
    logits[0, place[0], place[1]] = logits[1, place[0], place[1]] = 2.25  # "France": 4.5
    answers = task.answers(tuple(logits), made, tokenizer)
    assert answers[0] == {"text": "France", "doubt": -0.5}
    assert answers[1]["doubt"] == 5.0
    answers = json.loads(json.dumps(answers))
    truth = task.references()
    assert truth == [["France"], []]
    scores = task.score(answers, truth)
    assert list(scores)[:2] == ["f1", "em"]
    assert scores["f1"] == scores["has_answer_f1"] == scores["no_answer_f1"] == scores["best_f1"] == 1.0
    for threshold, share in ((-0.6, [0.0, 1.0]), (5.0, [1.0, 0.0])):
        moved = task.with_options({"threshold": threshold}).score(answers, truth)
        assert [moved["has_answer_em"], moved["no_answer_em"]] == share
    assert task.score(task.perfect(), truth)["f1"] == 1.0
    assert task.majority == 0.5, "no answer to any"


def test_diverged_scores_nan() -> None:
    """A row whose logits are not finite has no answer, and the run no score; padding plays no part."""
    for rows in ([GOOD, GOOD], [GOOD, ("Who?", CONTEXT, [])]):
        task = make(*rows, unanswerable=not rows[1][2])
        made = task.examples(TOKENIZERS["pieces"], 20, training=False)
        start = np.zeros((2, 22))
        start[:, -4:] = math.nan
        answers = task.answers((start, start), made, TOKENIZERS["pieces"])
        assert math.isfinite(task.score(answers, task.references())["f1"])
        start[1, 3] = math.inf
        answers = task.answers((start, start), made, TOKENIZERS["pieces"])
        assert answers[1] is None and answers[0] is not None
        assert all(math.isnan(value) for value in task.score(answers, task.references()).values())


def test_trivial_answers() -> None:
    """The floor is the best of the whole context, a sentence of it, and its first words."""
    context = "He lived in Paris. The king of France died in Rome. It was cold."
    whole = make(("Who?", "in Rome", [("in Rome", 0)])).majority
    assert whole == 1.0
    nearest = make(("Where did the king of France die?", context, [("The king of France died in Rome", 19)]))
    assert nearest.majority == 1.0, "punctuation and articles do not count"
    first = make(("What?", context, [("He lived", 0)]))
    assert first.majority == 1.0
    assert make(("Where?", context, [("Paris", 12)])).majority == pytest.approx(2 * 0.25 / 1.25), "one of four words"
    assert first.score(first.perfect(), first.references()) == {"f1": 1.0, "em": 1.0}


# SQuAD, and a whole run


def from_hub(answerless: bool) -> datasets.DatasetDict:
    """Rows with SQuAD's columns; in version 2.0 every third has no answer."""
    rows = [
        {
            "id": str(n),
            "title": "Normandy",
            "context": CONTEXT,
            "question": f"Where? {n}",
            "answers": {"text": [], "answer_start": []}
            if answerless and n % 3 == 0
            else {"text": ["France", "in France"], "answer_start": [24, 21]},
        }
        for n in range(1, 9)
    ]
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name in ("train", "validation")})


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_squad_from_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQuAD comes from the hub with its rows, and version 2.0 with questions that have no answer."""
    loaded: list[tuple[str, ...]] = []

    def load_dataset(*args: str) -> datasets.DatasetDict:
        loaded.append(args)
        return from_hub(name == "squad_v2")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(name)
    assert loaded == [(f"rajpurkar/{name}",)]
    assert isinstance(task, QuestionAnswering)
    assert (task.name, task.unanswerable, len(task.train)) == (name, name == "squad_v2", 8)
    assert [len(texts) for texts in task.references()] == [
        2,
        2,
        2 * (name == "squad"),
        2,
        2,
        2 * (name == "squad"),
        2,
        2,
    ]
    assert (task.primary, task.higher_is_better, task.by_row) == ("f1", True, False)
    assert task.head.auto_class == "AutoModelForQuestionAnswering"
    with pytest.raises(LrkitError, match=f'task "{name}" has no parts'):
        load_task(f"{name}/train")


class TestSquadContract(TaskContract):
    """Both tasks keep what every task must."""

    def components(self) -> list[Any]:
        from lrkit.tasks import TASKS

        return [TASKS["squad"], TASKS["squad_v2"]]

    @pytest.fixture(autouse=True)
    def _rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets, "load_dataset", lambda name: from_hub(name.endswith("v2")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write_model(tmp_path_factory.mktemp("model"), layers=1)


def killed_run_resumes(model: Path, tmp_path: Path) -> None:
    """A run that is killed and goes on comes to the same bits; it keeps a text per row. See tests/integrations."""
    kept: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def done(adapted: Any) -> None:
            kept[name] = {key: value.clone() for key, value in adapted.state_dict()["tensors"].items()}
            tokenizer = AutoTokenizer.from_pretrained(model)
            kept[name]["samples"] = killed_answers.task().samples(adapted.model.eval(), tokenizer, 12, 3)

        return done

    whole = killed_answers.run(model, done=keep("whole"))
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(HERE / "killed_answers.py"), str(model), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "6":
            os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    taken: list[int] = []
    resumed = killed_answers.run(
        model, tmp_path / "out", progress=lambda step, *_: taken.append(step), done=keep("resumed")
    )
    assert 5 <= taken[0] <= 7, "it began anew"
    assert resumed.predictions == whole.predictions
    assert resumed.scores == whole.scores
    one, two = kept["whole"], kept["resumed"]
    samples = one.pop("samples")
    assert samples == two.pop("samples")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert len(whole.predictions) == 8 and all(isinstance(text, str) for text in whole.predictions)
    assert [sample.output for sample in samples] == whole.predictions[:3]
    assert samples[0].reference == "good"
    assert samples[0].input.startswith("the film (... the film was good")


def test_threshold_alone_refused():
    """A threshold without unanswerable questions would do nothing: it is refused."""
    rows = datasets.Dataset.from_list(
        [{"question": "Who?", "context": "A bird.", "answers": {"text": ["bird"], "answer_start": [2]}}]
    )
    with pytest.raises(LrkitError, match=r"set task\.unanswerable=true"):
        QuestionAnswering(name="t", train=rows, validation=rows, threshold=1.0)
