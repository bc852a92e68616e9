"""Texts that become texts: what the model is given and writes, how it is scored, and runs against transformers' own."""

import contextlib
import json
import sys
import types
import warnings
from pathlib import Path
from typing import ClassVar

import datasets
import killed_task
import numpy as np
import pytest
import text_models
import torch
from command_line import ask
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

import lrkit
from lrkit import LrkitError
from lrkit.study.run import Record, RunSettings, train
from lrkit.tasks import TextToText, generated, hub, load_task
from lrkit.tasks.generating import IGNORED, generate, read
from lrkit.testing import check

ROWS = [
    ("the cat was old . the dog was new .", ["old cat", "the old cat"]),
    ("a sad man", ["a man"]),
    ("the good girl sat . a bad boy was young and fat", ["girl"]),
    ("mat", ["the new red mat", "mat"]),
] * 3


def task(**options):
    rows = datasets.Dataset.from_dict({"source": [s for s, _ in ROWS], "target": [t for _, t in ROWS]})
    options = {"metric": "exact_match", "prefix": "sum : ", "max_target_length": 6} | options
    return TextToText(name="mine", train=rows, validation=rows, **options)


def batches(kind, examples, size):
    collate = kind.collator(text_models.tokenizer(), training=False)
    keys = ("input_ids", "attention_mask")
    rows = [{key: row[key] for key in keys} for row in examples]
    return [collate(rows[at : at + size]) for at in range(0, len(rows), size)]


# What the model is given


def test_examples_token_by_token():
    """A source has its prefix and its end; the labels of a step are the first target, cut; a score has none."""
    words = text_models.tokenizer()
    with pytest.warns(lrkit.LrkitWarning, match="are cut"):
        train, validation = task(max_target_length=3).tokenize(words, 8)
    said = [
        " ".join(words.convert_ids_to_tokens(train[n][key]))
        for n, key in ((0, "input_ids"), (0, "labels"), (3, "labels"))
    ]
    assert said == ["sum : the cat was old . </s>", "old cat </s>", "the new </s>"], "cut, and ended"
    assert set(validation.column_names) == {"input_ids", "attention_mask"}
    assert validation["input_ids"][:] == train["input_ids"][:]


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_padded_right(side):
    """Whatever the tokenizer's side: sources on the right, masked; labels by -100, which no loss reads."""
    words = text_models.tokenizer(padding_side=side)
    kind = task()
    examples = [kind.train[n] for n in (0, 1)]
    encoded = kind.encode({key: [row[key] for row in examples] for key in examples[0]}, words, 32, training=True)
    batch = kind.collator(words, training=True)([{k: v[n] for k, v in encoded.items()} for n in (0, 1)])
    long, short = (len(ids) for ids in encoded["input_ids"])
    assert batch["attention_mask"].sum(1).tolist() == [long, short] and batch["attention_mask"][1, :short].all()
    assert (batch["labels"][1] == IGNORED).sum() == len(encoded["labels"][0]) - len(encoded["labels"][1])
    assert words.padding_side == side
    assert set(kind.collator(words, training=False)([{k: v[0] for k, v in encoded.items() if k != "labels"}])) == {
        "input_ids",
        "attention_mask",
    }


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "marian"])
def test_labels_are_shifted(name):
    """Each model goes on from its start token and the labels before: the loss is the mean of what they leave to say."""
    model, words = text_models.make(name), text_models.tokenizer()
    train, _ = task().tokenize(words, 32)
    batch = task().collator(words)([train[n] for n in range(4)])
    given = torch.where(batch["labels"] == IGNORED, words.pad_token_id, batch["labels"])
    start = torch.full((len(given), 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        loss = model(**batch).loss
        sources = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits = model(**sources, decoder_input_ids=torch.cat([start, given[:, :-1]], 1)).logits
    each = -torch.log_softmax(logits, -1).gather(2, given[..., None])[..., 0]
    assert loss == pytest.approx(float(each[batch["labels"] != IGNORED].mean()), rel=1e-5)


# What it writes


@pytest.mark.parametrize(("name", "beams"), [("t5", 1), ("t5", 3), ("bart", 3), ("mbart", 1), ("marian", 1)])
def test_rows_alone_or_together(name, beams):
    """The texts are those of the plain model row by row, whatever the batch, and padded to the longest."""
    model, words = text_models.make(name), text_models.tokenizer()
    options = {"no_repeat_ngram_size": 2} | ({"length_penalty": 2.0} if beams > 1 else {})
    kind = task(num_beams=beams, max_new_tokens=7, **options)
    _, examples = kind.tokenize(words, 32)
    with torch.no_grad():
        plain = [
            model.generate(
                torch.tensor([row["input_ids"]]), num_beams=beams, do_sample=False, max_new_tokens=7, **options
            )[0]
            for row in examples
        ]
        expected = [words.decode(row, skip_special_tokens=True).strip() for row in plain]
        assert len({*expected}) > 1, "the test would see nothing"
        for size in (1, 5, 12):
            written = [kind.predict(model, batch)[1] for batch in batches(kind, examples, size)]
            longest = max(each.shape[1] for each in written)
            outputs = np.concatenate(  # as a Trainer gathers them
                [np.pad(each, ((0, 0), (0, longest - each.shape[1])), constant_values=IGNORED) for each in written]
            )
            assert kind.answers(outputs, examples, words) == expected
            assert longest <= 8


def test_forced_language_is_written():
    """An mBART writes the language that its config forces, and a reader does not see it."""
    model, words = text_models.make("mbart"), text_models.tokenizer()
    batch = batches(task(), task().tokenize(words, 32)[1], 2)[0]
    written = generate(model, batch, max_new_tokens=5)
    assert (written[:, 1] == words.convert_tokens_to_ids("<de>")).all()
    assert all("<" not in text for text in read(written, words))


def test_samples_are_read():
    """A sample is the source with its prefix, the first reference, and the same text as in a score."""
    model, words = text_models.make("bart"), text_models.tokenizer()
    kind = task()
    samples = kind.samples(model, words, 32, 3)
    assert [(s.input, s.reference) for s in samples] == [("sum : " + s, t[0]) for s, t in ROWS[:3]]
    batch = batches(kind, kind.tokenize(words, 32)[1], 5)[0]
    assert [s.output for s in samples] == read(kind.predict(model, batch)[1][:3], words)
    assert len(kind.samples(model, words, 32, 99)) == len(ROWS)


# Scores


def test_exact_match_counts():
    """White space does not count, any reference does."""
    kind = task()
    said = ["old  cat", "a man ", "boy", "mat"] * 3
    assert kind.score(said, kind.references()) == {"em": 0.75}
    assert kind.score(kind.perfect(), kind.references()) == {"em": 1.0}
    assert kind.majority == 0.25
    with pytest.raises(LrkitError, match="1 predictions for 12 rows"):
        kind.score(["a"], kind.references())


class Scorer:
    """Stands in for rouge-score's scorer, and keeps what it was given: the share of lines that are the reference's."""

    seen: ClassVar[list] = []

    def __init__(self, names, use_stemmer=False):
        self.names = names

    def score_multi(self, targets, prediction):
        self.seen.append((targets, prediction))
        best = max(len({*target.split("\n")} & {*prediction.split("\n")}) for target in targets)
        return dict.fromkeys(self.names, types.SimpleNamespace(fmeasure=best / (1 + prediction.count("\n"))))


@pytest.fixture
def rouge(monkeypatch):
    package, inside = types.ModuleType("rouge_score"), types.ModuleType("rouge_score.rouge_scorer")
    inside.RougeScorer = Scorer
    monkeypatch.setitem(sys.modules, "rouge_score", package)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", inside)
    monkeypatch.setattr(Scorer, "seen", [])


def test_rouge_reads_sentences(rouge):
    """Lsum is given a sentence per line, on both sides; the trivial summary is the lead, with as many as asked for."""
    kind = task(metric="rouge").subset(validation=12)
    found = kind.score(["One. Two!  Three"] * 12, [["Two!\nOne."]] * 12)
    assert Scorer.seen[0] == (["Two!\nOne."], "One.\nTwo!\nThree")
    assert list(found) == ["rougeL", "rouge1", "rouge2", "rougeLsum"] and found["rougeL"] == pytest.approx(2 / 3)
    for lead, text in ((1, "the cat was old ."), (2, ROWS[0][0]), (0, ROWS[0][0])):
        Scorer.seen.clear()
        assert task(metric="rouge", lead=lead).majority is not None
        assert Scorer.seen[0][1] == text.replace(". the", ".\nthe")
    assert kind.primary == "rougeL" and kind.higher_is_better


@given(st.text(alphabet="ab.!? \n\t"))
def test_sentences_keep_words(text):
    """Nothing but white space is lost between sentences, and none is empty."""
    found = generated.sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(found) and not any("\n" in sentence for sentence in found)
    assert generated.first_sentences(text, 0).split() == text.split()
    assert generated.sentences("\n".join(found)) == found


@pytest.mark.parametrize(("metric", "package"), [("rouge", "rouge_score.rouge_scorer"), ("bleu", "sacrebleu.metrics")])
def test_absent_package_refused(metric, package, monkeypatch, folder):
    """Without the metric's package a run ends in one line before it trains."""
    for name in (package.split(".")[0], package):
        monkeypatch.setitem(sys.modules, name, None)
    steps = []
    named = package.split(".")[0].replace("_", "-")
    with pytest.raises(LrkitError, match=named + r': pip install "lrkit\[text\]"'):
        train(
            lrkit.methods.lora(rank=2),
            task(metric=metric),
            model=str(folder),
            settings=RunSettings(steps=2),
            progress=lambda *step: steps.append(step),
        )
    assert not steps


def test_bleu_is_of_all_rows(monkeypatch):
    """BLEU and chrF get each row's references, of which rows may have unlike numbers, and are shares."""

    class Corpus:
        def corpus_score(self, said, streams):
            assert said == ["a", "b"] and streams == [["a", "c"], ["x", None]]
            return types.SimpleNamespace(score=50.0)

    package, inside = types.ModuleType("sacrebleu"), types.ModuleType("sacrebleu.metrics")
    inside.BLEU = inside.CHRF = Corpus
    monkeypatch.setitem(sys.modules, "sacrebleu", package)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", inside)
    kind = task(metric="bleu")
    assert kind.score(["a", "b"], [["a", "x"], "c"]) == {"bleu": 0.5, "chrf": 0.5} and kind.primary == "bleu"
    with pytest.raises(LrkitError, match="row 1: no reference text"):
        kind.score(["a", "b"], [["a"], []])


# What is said


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"metric": "rogue"}, r"did you mean \"rouge\""),
        ({"length_penalty": 2.0}, "length_penalty weighs beams, and num_beams is 1"),
        ({"num_beams": 0}, "an int of at least 1"),
        ({"max_target_length": 1}, "an int of at least 2"),
        ({"target": "summary"}, 'train has no column "summary", only source, target'),
    ],
)
def test_wrong_options_refused(option, message):
    """Options that fit nothing are refused in one line, however they are given."""
    for make in (lambda: task(**option), lambda: task().with_options(option)):
        with pytest.raises(LrkitError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
    assert task().with_options({"num_beams": 4, "metric": "rouge"}).num_beams == 4


def test_cuts_are_counted():
    """Texts longer than their limits are counted once, with the setting; if none is, nothing is said."""
    words = text_models.tokenizer()
    with pytest.warns(lrkit.LrkitWarning) as told:
        task(max_target_length=4).tokenize(words, 9)
    said = [str(warning.message) for warning in told]
    assert said == [
        'task "mine": 12 of 24 source texts that were looked at are longer than run.max_length = 9 tokens, and are cut '
        "(the longest has 15)",
        'task "mine": 3 of 12 target texts that were looked at are longer than task.max_target_length = 4 tokens, and '
        "are cut (the longest has 5)",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task(max_target_length=5).tokenize(words, 15)


@pytest.mark.parametrize(("foreign", "told"), [(1, None), (4, lrkit.LrkitWarning), (11, LrkitError)])
def test_foreign_targets_are_told(foreign, told):
    """Targets in words that the tokenizer does not know are warned of, and refused if most are: sources may be known."""
    rows = datasets.Dataset.from_dict(
        {"source": ["a cat"] * 20, "target": ["eine Katze"] * foreign + ["cat"] * (20 - foreign)}
    )
    kind = TextToText(name="mine", train=rows, validation=rows, metric="exact_match")
    expected = contextlib.nullcontext()
    if told is not None:
        expected = (pytest.raises if told is LrkitError else pytest.warns)(told, match="target's tokens are unknown")
    with warnings.catch_warnings(), expected:
        kind.tokenize(text_models.tokenizer(), 32)


# Tasks by name


@pytest.mark.parametrize(
    ("name", "asked", "columns", "lead"),
    [
        ("xsum", ("EdinburghNLP/xsum",), ("document", "summary"), 1),
        ("cnn_dailymail", ("abisee/cnn_dailymail", "3.0.0"), ("article", "highlights"), 3),
    ],
)
def test_news_from_hub(name, asked, columns, lead, monkeypatch, rouge):
    """The news come from the hub's splits and columns, and keep the contract of tasks."""
    rows = {columns[0]: ["One. Two.", "Three."], columns[1]: ["Two.\nOne.", "Three."], "id": ["1", "2"]}
    splits = {split: datasets.Dataset.from_dict(rows) for split in ("train", "validation", "test")}
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *what: calls.append(what) or datasets.DatasetDict(splits))
    monkeypatch.setattr(hub, "reachable", lambda: True)
    found = load_task(name)
    assert calls == [asked] and (found.source, found.target) == columns and found.lead == lead
    assert found.references() == [["Two.\nOne."], ["Three."]] and found.metric == "rouge"
    loader = {"xsum": lrkit.tasks.load_xsum, "cnn_dailymail": lrkit.tasks.load_cnn_dailymail}[name]
    assert check(loader, kind="task") == []
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: 1 / 0)
    with pytest.raises(LrkitError, match=f"cannot load {name}: the Hugging Face hub cannot be reached.*--data FOLDER"):
        load_task(name)


# Runs

SETTINGS = RunSettings(steps=6, batch_size=4, eval_batch_size=5, max_length=20, lr=1e-2, seed=3, threads=1)
METHOD = lrkit.methods.adalora(rank=4, target_rank=2, warmup=1, final=2, interval=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_models.write("t5", tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def whole(folder):
    return train(METHOD, task(), model=str(folder), settings=SETTINGS)


def test_losses_are_seq2seqtrainers(folder, whole, tmp_path):
    """The losses and the texts of a run are those of a bare Seq2SeqTrainer with the same seed."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, get_linear_schedule_with_warmup

    words = AutoTokenizer.from_pretrained(folder)
    rows = []
    for source, targets in ROWS:
        labels = words(targets[0], truncation=True, max_length=6)["input_ids"]
        rows.append({**words("sum : " + source, truncation=True, max_length=20), "labels": labels})
    set_seed(3)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(3)
    adapted = lrkit.attach(model, METHOD)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.0)
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=3,
            predict_with_generate=True,
            generation_max_length=7,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=3,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(words, model=model),
        optimizers=(optimizer, get_linear_schedule_with_warmup(optimizer, 0, 6)),
        callbacks=[lrkit.trainer.AdaptCallback(adapted)],
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert whole.losses == pytest.approx(losses, abs=0)
    tokens = trainer.predict(rows).predictions
    texts = words.batch_decode(np.where(tokens == -100, 0, tokens), skip_special_tokens=True)
    assert whole.predictions == [text.strip() for text in texts]


def killed_run_resumes(folder, whole, tmp_path):
    """A run of beams and texts whose process is killed goes on to the bytes of the one that was not."""
    record = Record(folder=tmp_path / "run", checkpoint_seconds=0.0)
    killed_task.kill_at(3, Path(__file__).stem, folder, record.folder)
    assert record.step() in (2, 3)
    again = train(METHOD, task(), model=str(folder), settings=SETTINGS, record=record)
    assert again.predictions == whole.predictions and again.scores == whole.scores
    assert again.losses == whole.losses
    assert again.history == whole.history and again.layers == whole.layers


def test_whole_model_learns(folder, whole):
    """Full fine-tuning lowers the loss; cross-attention is among the layers of either."""
    result = train(lrkit.methods.full(), task(), model=str(folder), settings=SETTINGS)
    assert result.losses[-1] < result.losses[0]
    for each in (result, whole):
        assert any("EncDecAttention" in layer.name for layer in each.layers)


# The table of AdaLoRA's paper


@pytest.mark.parametrize(("rank", "share", "printed"), [(16, 2.129, 2.20), (1, 0.133, 0.13)])
def test_budgets_of_bart(rank, share, printed, capsys):
    """BART-large's parameters, and the shares that LoRA and AdaLoRA train: the printed budgets, nearly."""
    start = {1: 2, 16: 24}[rank]
    for method, settings, core in (("lora", [rank], 0), ("adalora", [start, rank], 192 * rank)):
        words = [f"--set={name}={value}" for name, value in zip(("rank", "target_rank"), settings, strict=False)]
        told = ask(capsys, "params", method, "--model", "bart-large", *words)["methods"][method]
        assert (told["model"], told["layers"]) == (406_291_456, 192)
        assert told["end"] - core == 540_672 * rank
        assert 100 * (told["end"] - core) / told["model"] == pytest.approx(share, abs=5e-4)
    assert round(printed / 100 * 406_291_456 / 540_672) == {1: 1, 16: 17}[rank], "no whole rank is 2.20 %"


def test_table_is_laid_out(tmp_path, capsys, rouge):
    """The study's rows, with one row's budget each; a folder stands in, and so may a config for the model."""
    rows = "".join(json.dumps({"document": f"One {n}. Two.", "summary": "Two."}) + "\n" for n in range(8))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    told = ask(capsys, "ablate", "adalora-table-3", "--data", f"xsum={tmp_path}", "--dry-run")
    assert len(told["rows"]) == 4 and next(iter(told["rows"])) == "AdaLoRA, 2.20 %"
