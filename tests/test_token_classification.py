"""Words with tags: which token bears which label, and what comes back for each word."""

import math
from functools import lru_cache

import datasets
import numpy as np
import pytest
import tiny_words
import torch
from folders import write_model
from hypothesis import given
from hypothesis import strategies as st

import lrkit
from lrkit.study.run import RunSettings, train
from lrkit.tasks import Sample, TokenClassification
from lrkit.testing import TaskContract

NER = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
POS = ("DET", "NOUN", "VERB")
PIECES = ("ada", "love", "##lace", "wrote", "to", "lon", "##don", "a", "##b")


def task(tokens, tags, labels=NER, **other):
    rows = datasets.Dataset.from_dict({"tokens": tokens, "tags": tags})
    return TokenClassification(name="t", train=rows, validation=rows, labels=labels, **other)


@lru_cache
def pieces():
    return tiny_words.word_pieces(*PIECES)


ADA = (["ada", "lovelace", "wrote", "to", "london"], [1, 2, 0, 0, 3])


def test_first_piece_labelled():
    """The first piece of a word has its label; further pieces and special tokens have none."""
    row = task([ADA[0]], [ADA[1]]).examples(pieces(), 16, training=True)[0]
    read = pieces().convert_ids_to_tokens(row["input_ids"])
    assert list(zip(read, row["labels"], strict=True)) == [
        ("[CLS]", -100),
        ("ada", 1),
        ("love", 2),
        ("##lace", -100),
        ("wrote", 0),
        ("to", 0),
        ("lon", 3),
        ("##don", -100),
        ("[SEP]", -100),
    ]
    assert set(row) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_training_row_cut():
    """A training row is cut at the longest input; the words behind are not learnt from."""
    row = task([ADA[0]], [ADA[1]]).examples(pieces(), 5, training=True)[0]
    assert row["labels"] == [-100, 1, 2, -100, -100]


def test_validation_row_goes_on():
    """A validation row goes on in further examples; a word that a cut divides is labelled once."""
    rows = task([ADA[0], ["to"]], [ADA[1], [0]]).examples(pieces(), 4, training=False)
    assert [pieces().convert_ids_to_tokens(ids) for ids in rows["input_ids"]] == [
        ["[CLS]", "ada", "love", "[SEP]"],
        ["[CLS]", "##lace", "wrote", "[SEP]"],
        ["[CLS]", "to", "lon", "[SEP]"],
        ["[CLS]", "##don", "[SEP]"],
        ["[CLS]", "to", "[SEP]"],
    ]
    assert rows["labels"] == [
        [-100, 1, 2, -100],
        [-100, -100, 0, -100],
        [-100, 0, 3, -100],
        [-100] * 3,
        [-100, 0, -100],
    ]
    assert rows["words"] == [[-100, 0, 1, -100], [-100, -100, 2, -100], [-100, 3, 4, -100], [-100] * 3, [-100, 0, -100]]
    assert rows["first"] == [True, False, False, False, True]


words = st.lists(
    st.lists(st.sampled_from(["a", "b", "ab", "abbb", "bbab", "q", "\u200b", ""]), max_size=12), min_size=1, max_size=5
)


@given(words, st.integers(3, 9), st.sampled_from(["pieces", "bytes"]))
def test_perfect_outputs_score_best(rows, length, kind):
    """If each labelled token is answered by its label, each word that has a token is answered right, whatever the cut."""
    tokenizer = pieces() if kind == "pieces" else byte_level()
    tags = [[(n + len(word)) % 3 for n, word in enumerate(words)] for words in rows]
    made = task(rows, tags, POS)
    examples = made.examples(tokenizer, length, training=False)
    assert all(len(ids) <= length for ids in examples["input_ids"])
    outputs = np.full((len(examples), length), 1)  # what stands at other tokens must not matter
    for line, labels in zip(outputs, examples["labels"], strict=True):
        line[: len(labels)] = np.where(np.array(labels) == -100, line[: len(labels)], labels)
    said = made.answers(outputs, examples, tokenizer)
    has = {
        word: bool(tokenizer([[word]], is_split_into_words=True, add_special_tokens=False)["input_ids"][0])
        for word in "ab"
    }
    assert all(has.values())
    for words, answered, truth in zip(rows, said, made.references(), strict=True):
        for word, one, other in zip(words, answered, truth, strict=True):
            assert one == other or (one == "" and word in ("", "\u200b"))


@lru_cache
def byte_level():
    return tiny_words.bytes_of_text((("Ġ", "a"), ("b", "b")))


def test_blank_before_words():
    """A tokenizer that takes the blank before a word for a part of it sees each word as it stands within a text."""
    row = task([["a", "bb"]], [[1, 0]]).examples(byte_level(), 9, training=True)[0]
    assert byte_level().convert_ids_to_tokens(row["input_ids"]) == ["Ġa", "Ġ", "bb"]
    assert row["labels"] == [1, 0, -100]


def test_slow_tokenizer_refused():
    """A tokenizer that does not know the word of each token is refused in one line."""

    class Slow:
        is_fast = False

    with pytest.raises(lrkit.LrkitError, match=r'task "t" needs a fast tokenizer, .*; Slow is none'):
        task([["a"]], [[0]]).examples(Slow(), 9, training=True)


@pytest.mark.parametrize(
    ("tokens", "tags", "training", "says"),
    [
        (["a", "b"], [0], False, 'the row "a b" has 2 words and 1 tags'),
        (["a"], [5], False, 'the row "a" has tag 5; tags are 0 to 4'),
        (["a"], [-1], True, 'the row "a" has tag -1'),
        ([], [], True, "for training has no words"),
    ],
)
def test_unsound_rows_refused(tokens, tags, training, says):
    """A row whose words and tags do not fit is refused."""
    with pytest.raises(lrkit.LrkitError, match=says):
        task([["a"], tokens], [[0], tags]).examples(pieces(), 9, training=training)


@pytest.mark.parametrize("labels", [("O",), ("O", "B-X", "O")])
def test_unsound_labels_refused(labels):
    """One label, or one twice, is refused."""
    with pytest.raises(lrkit.LrkitError, match="two labels or more are needed, and none twice"):
        task([["a"]], [[0]], labels)


def test_entities_or_accuracy():
    """F1 of entities comes first if all labels are tags of entities, and accuracy is all there is if not."""
    ner, pos = task([ADA[0]], [ADA[1]]), task([["a", "b", "b", "a"]], [[0, 1, 1, 2]], POS)
    said = [["B-PER", "O", "O", "O", "B-LOC"]]
    assert ner.score(said, ner.references()) == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 0.8}
    assert ner.primary == "f1" and ner.score(ner.perfect(), ner.references())["f1"] == 1
    assert pos.score([["DET", "NOUN", "DET", ""]], pos.references()) == {"accuracy": 0.5}
    assert pos.majority == 0.5


def test_majority_is_best_constant():
    """O alone finds no entity; if a row is nothing but entities of a word, one tag for all words is better."""
    assert task([["a"] * 4], [[0, 0, 1, 2]]).majority == 0
    # B-PER for all: four entities, two of them right, of two
    assert task([["a"] * 4], [[0, 1, 0, 1]]).majority == pytest.approx(2 * 2 / (4 + 2))


def test_diverged_has_no_score():
    """If a word's logits are not finite, all scores are nan."""

    class Model(torch.nn.Module):
        def forward(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, len(NER))
            logits[:, 1, 2] = torch.nan
            return {"logits": logits}

    made = task([ADA[0]], [ADA[1]])
    examples = made.examples(pieces(), 16, training=False)
    loss, kept = made.predict(Model(), {"input_ids": torch.tensor(examples["input_ids"])})
    said = made.answers(kept.numpy(), examples, pieces())
    assert loss is None and kept.dtype == torch.int64 and said == [[None, "O", "O", "O", "O"]]
    scores = made.score(said, made.references())
    assert list(scores) == ["f1", "precision", "recall", "accuracy"] and all(map(math.isnan, scores.values()))


# ---- whole runs ----

LABELS = ("O", "B-GOOD", "B-BAD")


def sentences(count):
    """The film was good, of which one word is an entity; some rows are longer than an example."""
    found = {"tokens": [], "tags": []}
    for n in range(count):
        good = n % 2
        long = 1 + 3 * (n % 3 == 0)
        found["tokens"].append(["the", ("film", "plot")[n % 3 == 1], "was", ("bad", "good")[good]] * long)
        found["tags"].append([0, 0, 0, 2 - good] * long)
    return datasets.Dataset.from_dict(found)


def sentences_task(rest=None):
    """Find good and bad words. Source: none."""
    if rest is not None:
        raise lrkit.LrkitError(f'task "sentences" has no parts, not "{rest}"')
    return TokenClassification(name="sentences", train=sentences(48), validation=sentences(12), labels=LABELS)


class TestSentences(TaskContract):
    component = sentences_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tagger") / "model")


def test_run_learns_tags(folder):
    """A run learns which words are entities, and answers each word of each validation row."""
    said = []

    def ask(adapted):
        from lrkit.study.loaded import model_for

        tokenizer = model_for(str(folder), sentences_task()).tokenizer
        said.extend(sentences_task().samples(adapted.model.eval(), tokenizer, 10, 2))

    settings = RunSettings(steps=100, batch_size=8, lr=3e-2, head_lr=3e-2, max_length=10)
    result = train(lrkit.methods.lora(), sentences_task(), model=str(folder), settings=settings, done=ask)
    assert result.scores["f1"] > 0.9 and result.majority < 0.5
    assert [len(row) for row in result.predictions] == [len(row) for row in sentences(12)["tokens"]]
    assert said[1] == Sample("the plot was good", "the plot was good/B-GOOD", "the plot was good/B-GOOD")
    assert said[0].output.split()[3] == "bad/B-BAD" and len(said[0].output.split()) == 16


def test_left_padding_tokenizer():
    """Batches are padded on the right, whatever side the tokenizer pads on: answers are read from the left."""
    left = tiny_words.word_pieces(*PIECES)
    left.padding_side = "left"
    kind = task([ADA[0], ["ada"]], [ADA[1], [1]])
    rows = [kind.examples(left, 16, training=True)[n] for n in (0, 1)]
    batch = kind.collator(left, training=True)(rows)
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert batch["labels"][1].tolist() == [-100, 1, -100, *[-100] * 6]
