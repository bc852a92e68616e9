"""Labels as words: which tokens are learnt, which word is answered, and what is refused."""

import json
import math
from functools import lru_cache

import datasets
import numpy as np
import pytest
import tiny_words
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import lrkit
from lrkit.cli.app import app
from lrkit.study.run import RunSettings, train
from lrkit.tasks import Classification, Verbalized
from lrkit.tasks.asking import ask
from lrkit.tasks.generating import padding_on
from lrkit.testing import TaskContract

TEXTS = ["good", "so bad", "a fine film", "dull", "it is the very best of them all"]
LABELS = [1, 0, 1, 0, 1]


def classification(texts=TEXTS, labels=LABELS, **other):
    rows = datasets.Dataset.from_dict({"sentence": texts, "label": labels})
    names = {"labels": ("negative", "positive"), "fields": ("sentence",)} | other
    return Classification(name="t", train=rows, validation=rows, **names)


def verbalized(words="bad,good", **options):
    task = classification().with_options({"words": words, **options})
    assert isinstance(task, Verbalized)
    return task


@lru_cache
def tokenizer():
    return tiny_words.bytes_of_text((("Ġ", "g"), ("Ġg", "o"), ("o", "d")))


@lru_cache
def model():
    return tiny_words.llama(tokenizer()).eval()


def read(ids):
    return tokenizer().decode(ids)


def test_only_word_is_learnt():
    """In training the right word's tokens alone are labels, and the prompt's are -100."""
    row = verbalized().examples(tokenizer(), 64, training=True)[1]
    assert read(row["input_ids"]) == "sentence: so bad\nlabel: bad"
    assert read([one for one in row["labels"] if one != -100]) == " bad"
    assert row["labels"][-4:] == row["input_ids"][-4:] and {*row["labels"][:-4]} == {-100}
    assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_score_asks_each_word():
    """In a score every row is an example per label, in the labels' order."""
    rows = verbalized().examples(tokenizer(), 64, training=False)
    assert len(rows) == 2 * len(TEXTS)
    assert [read(ids).rsplit("\n", 1) for ids in rows["input_ids"][:2]] == [
        ["sentence: good", "label: bad"],
        ["sentence: good", "label: good"],
    ]


def test_long_prompt_loses_beginning():
    """A prompt that is too long loses its beginning, all words have the same prompt, and nothing is longer than allowed."""
    rows = verbalized("b,excellent").examples(tokenizer(), 24, training=False)
    assert [read(ids) for ids in rows["input_ids"][-2:]] == ["hem all\nlabel: b", "hem all\nlabel: excellent"]
    assert max(map(len, rows["input_ids"])) == 24
    with pytest.raises(lrkit.LrkitError, match='task "t": 10 tokens have no room for a prompt and the longest word'):
        verbalized("b,excellent").examples(tokenizer(), 10, training=False)


def test_templates():
    """A template names the fields; a blank stands before the word unless the template ends in white space."""
    first = {"template": "Is it good? {sentence}\n"}
    assert (
        read(verbalized(**first).examples(tokenizer(), 64, training=True)[0]["input_ids"]) == "Is it good? good\ngood"
    )
    pair = datasets.Dataset.from_dict({"premise": ["a {b}"], "hypothesis": ["c"], "label": [0]})
    task = Classification(name="t", train=pair, validation=pair, fields=("premise", "hypothesis"), labels=("yes", "no"))
    row = task.with_options({"words": "labels"}).examples(tokenizer(), 64, training=True)[0]
    assert read(row["input_ids"]) == "premise: a {b}\nhypothesis: c\nlabel: yes"


def test_text_begins_as_tokenizer_says():
    """If a tokenizer begins every text with a token, so does an example, a prompt that is cut as well."""
    from tokenizers.processors import TemplateProcessing

    other = tiny_words.bytes_of_text()
    other.bos_token = "<|endoftext|>"
    end = other.bos_token_id
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{other.bos_token} $A", special_tokens=[(other.bos_token, end)]
    )
    rows = verbalized().examples(other, 20, training=False)
    assert all(ids[0] == end and end not in ids[1:] for ids in rows["input_ids"])
    assert {len(ids) for ids in rows["input_ids"]} == {19, 20}


def by_hand(task, likelihood):
    """Each word's log-likelihood, a token at a time and a row at a time, in float64."""
    net, found = tiny_words.llama(tokenizer()).double().eval(), []
    for text in TEXTS:
        prompt = tokenizer()(f"sentence: {text}\nlabel:")["input_ids"]
        for word in task.chosen:
            ids, each = list(prompt), []
            for token in tokenizer()(f" {word}")["input_ids"]:
                with torch.no_grad():
                    each.append(float(net(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token]))
                ids.append(token)
            found.append(sum(each) / (len(each) if likelihood == "mean" else 1))
    return np.array(found).reshape(-1, 2)


@pytest.mark.parametrize("likelihood", ["sum", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_likelihood_by_hand(likelihood, side):
    """The answers are the words' log-likelihoods, for batches of rows of all lengths and a tokenizer that pads anywhere."""
    task = verbalized("bad,excellent", likelihood=likelihood)
    one = padding_on(side, tokenizer())
    said = ask(task, model(), one, 64)
    assert said.dtype == np.float32 and said == pytest.approx(by_hand(task, likelihood), rel=1e-5)
    assert one.padding_side == side


def test_padded_on_right():
    """Batches are padded on the right, where positions stay as they are, whatever side the tokenizer pads on."""
    task = verbalized()
    rows = task.examples(tokenizer(), 64, training=True).to_list()[:2]
    batch = task.collator(padding_on("left", tokenizer()), training=True)(rows)
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist(), reverse=True)
    assert batch["attention_mask"][0].sum() == len(rows[0]["input_ids"]) < batch["input_ids"].shape[1]


def test_batches_do_not_matter():
    """A row's answer is the same by itself and beside longer rows."""
    task = verbalized()
    alone = ask(classification(TEXTS[:1], LABELS[:1]).with_options({"words": "bad,good"}), model(), tokenizer(), 64)
    assert ask(task, model(), tokenizer(), 64)[:1] == pytest.approx(alone, rel=1e-5)


@given(st.lists(st.lists(st.floats(-50, 0), min_size=2, max_size=2), min_size=len(TEXTS), max_size=len(TEXTS)))
def test_likeliest_word_wins(rows):
    """The likeliest word's label is the answer; the scores are those of the classification."""
    outputs = np.array(rows, dtype=np.float32)
    task = verbalized()
    assert task.score(task.answers(outputs.reshape(-1), None, None), task.references()) == classification().score(
        outputs, np.array(LABELS)
    )


def test_stays_a_classification():
    """Metric, majority, subsets and selection are those of the classification; a run that diverged has no score."""
    plain, task = (
        classification(metric="accuracy_f1"),
        classification().with_options({"words": "a,b", "metric": "accuracy_f1"}),
    )
    assert (task.primary, task.majority, task.metric) == ("accuracy", plain.majority, "accuracy_f1")
    assert isinstance(task.subset(2, 2), Verbalized) and isinstance(task.selection(), Verbalized)
    assert task.subset(2, 2).chosen == ("a", "b") and task.head.num_labels is None
    assert all(map(math.isnan, task.score(np.full((5, 2), np.nan), task.references()).values()))
    assert isinstance(plain.with_options({"metric": "accuracy"}), Classification)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"words": "good"}, "2 words are needed, one for each of the labels negative, positive, not good"),
        ({"words": ["a", "b", "c"]}, "2 words are needed"),
        ({"words": "a, "}, "2 words are needed"),
        ({"words": 3}, r"task\.words"),
        ({"word": "a,b"}, 'did you mean "words"'),
        ({"words": "a,b", "likelihood": "max"}, "likelihood"),
        ({"words": "a,b", "template": "{text}"}, r"fields of the rows in braces \(sentence\), not text"),
        ({"words": "a,b", "template": "{sentence!r}"}, "not sentencer"),
        ({"words": "a,b", "template": "label:"}, "not none"),
        ({"words": "a,b", "template": "{sentence"}, "cannot be read"),
    ],
)
def test_odd_options_refused(options, says):
    """Words that are not one per label, and templates that do not name the fields, are refused in one line."""
    with pytest.raises(lrkit.LrkitError, match=says) as error:
        classification().with_options(options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", ["good,good", "go,good", "good,go"])
def test_same_tokens_refused(words):
    """Two words of which one begins as the other is are refused: the shorter would always be the likelier."""
    one, other = sorted(words.split(","), key=len)
    with pytest.raises(lrkit.LrkitError, match=f'word "{other}" begin with those of "{one}"'):
        verbalized(words).examples(tokenizer(), 64, training=True)


def test_regression_refused():
    """A regression has no words."""
    rows = datasets.Dataset.from_dict({"sentence": ["a"], "label": [0.5]})
    task = Classification(
        name="t", train=rows, validation=rows, fields=("sentence",), kind="regression", metric="pearson"
    )
    with pytest.raises(lrkit.LrkitError, match="words are for labels, and this is a regression"):
        task.with_options({"words": "labels"})


# ---- whole runs ----


def sentences(count):
    words = ("bad", "good", "dull", "fine")
    return [
        {"sentence": f"the {('film', 'plot')[n % 3 == 0]} was {words[n % 4]}", "label": n % 2} for n in range(count)
    ]


def films(rest=None):
    """Say whether a film was good. Source: none."""
    if rest is not None:
        raise lrkit.LrkitError(f'task "films" has no parts, not "{rest}"')
    train_rows, rows = (datasets.Dataset.from_list(sentences(count)) for count in (48, 10))
    task = Classification(name="films", train=train_rows, validation=rows, fields=("sentence",), labels=("bad", "good"))
    return task.with_options({"words": "labels"})


class TestFilms(TaskContract):
    component = films


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_words.write_llama(tmp_path_factory.mktemp("words") / "model")


def test_run_learns_words(folder):
    """A run learns which word follows, its model has no new head, and it shows what it says."""
    said = []

    def show(adapted):
        from lrkit.study.loaded import model_for

        said.extend(films().samples(adapted.model.eval(), model_for(str(folder), films()).tokenizer, 64, 3))

    settings = RunSettings(steps=100, batch_size=8, lr=1e-2, max_length=64)
    result = train(lrkit.methods.lora(), films(), model=str(folder), settings=settings, done=show)
    assert result.scores["accuracy"] == 1.0 > result.majority
    assert result.predictions.shape == (10, 2) and result.parameters.head == 0
    assert [(sample.reference, sample.output) for sample in said] == [("bad", "bad"), ("good", "good"), ("bad", "bad")]
    assert said[0].input == "sentence: the plot was bad\nlabel:"


def test_command_line(folder, tmp_path):
    """GLUE's rows run on a causal model by the command line, if words are given for the labels."""
    data = tiny_words.write_lines(tmp_path / "sst2", train=sentences(24), validation=sentences(8))
    command = ["run", "lora", "--data", str(data), "--model", str(folder), "--set", "task.words=negative,positive"]
    ran = CliRunner().invoke(app, [*command, "--set", "run.steps=2", "--set", "run.max_length=48", "--json"])
    assert ran.exit_code == 0, ran.output
    assert "accuracy" in json.dumps(json.loads(ran.stdout))
