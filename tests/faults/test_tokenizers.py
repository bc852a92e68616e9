"""A run on unknown tokens, or on another model's tokens, is refused before its first step."""

import json
import warnings

import folders
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from lrkit import LrkitError
from lrkit.models import quiet_transformers
from lrkit.study.pretrained import load_base, load_pretrained
from lrkit.tasks import Head, load_task
from lrkit.tasks.tokens import check_texts

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "good", "bad", "film", "plot", "the", "was", "fine", "dull", "a"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
FAMILIES = {
    "Bert": SMALL,
    "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "Roberta": SMALL,
    "T5": T5,
    "DebertaV2": SMALL,
    "Llama": SMALL,
    "Qwen2": SMALL | {"num_key_value_heads": 2},
    "XLMRoberta": SMALL,
    "DistilBert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
    "Albert": SMALL | {"embedding_size": 16},
    "XLNet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24},
    "MPNet": SMALL,
}


def write_model(folder, family, vocabulary=20, **settings):
    """Random weights of a family, without a tokenizer."""
    config = getattr(transformers, f"{family}Config")(vocab_size=vocabulary, **FAMILIES[family], **settings)
    with quiet_transformers():
        getattr(transformers, f"{family}ForSequenceClassification")(config).save_pretrained(folder)
    return folder


def write_tokenizer(folder, words=WORDS, **settings):
    """A tokenizer of whole words."""
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "unk_token": "<unk>"} | settings
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **tokens).save_pretrained(folder)
    return folder


def loaded(folder):
    return load_pretrained(str(folder), Head(num_labels=2, problem_type="single_label_classification"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_a_tokenizer(tmp_path, family):
    """Whatever family: transformers' made-up tokenizer is never trained on."""
    with pytest.raises(LrkitError, match="tokenizer"):
        loaded(write_model(tmp_path, family))


def test_a_made_up_tokenizer_is_not_exported(tmp_path):
    """`export --to merged` writes no tokenizer for a model that has none."""
    model = transformers.BertForSequenceClassification.from_pretrained(write_model(tmp_path, "Bert"))
    base = {"class": "BertForSequenceClassification", "config": model.config.to_dict(), "dtype": "float32"}
    assert load_base(base | {"name": str(tmp_path)})[1] is None


def test_its_own_tokenizer_loads(tmp_path):
    """A tokenizer of the model's size passes without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(write_tokenizer(write_model(tmp_path, "Bert", len(WORDS))))


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [(12, "its tokenizer has 14 tokens"), (40, "it is another model's tokenizer")],
)
def test_another_vocabulary_size(tmp_path, vocabulary, message):
    """A tokenizer with more tokens than embeddings is warned of at once, one with less than half of them refused."""
    write_tokenizer(write_model(tmp_path, "Bert", vocabulary))
    if vocabulary > len(WORDS):
        with pytest.raises(LrkitError, match=message):
            loaded(tmp_path)
    else:
        with pytest.warns(UserWarning, match=message):
            loaded(tmp_path)


def task_of(folder, *texts):
    lines = [json.dumps({"sentence": text, "label": n % 2}) for n, text in enumerate(texts * 4)]
    return load_task(data=folders.write_data(folder, {"train": lines, "validation": lines}))


def test_text_that_the_tokenizer_does_not_know(tmp_path):
    """More than half unknown is refused, more than a tenth warned of, less passes."""
    pretrained = loaded(write_tokenizer(write_model(tmp_path / "m", "Bert", len(WORDS))))
    with pytest.raises(LrkitError, match=r"75% of the text's tokens are unknown \(<unk>\)"):
        check_texts(task_of(tmp_path / "1", "gute Filme sind good", "kein good Film da"), pretrained.tokenizer, None)
    with pytest.warns(UserWarning, match="25% of the text's tokens"):
        check_texts(task_of(tmp_path / "2", "the film was ok", "the film was meh"), pretrained.tokenizer, None)
    check_texts(task_of(tmp_path / "3", "the film was good", "the film was bad"), pretrained.tokenizer, None)


def test_text_of_which_nothing_is_left(tmp_path):
    """A tokenizer without an unknown token drops what it does not know."""
    plain = Tokenizer(models.BPE(vocab={"<pad>": 0, "a": 1, "b": 2, "c": 3}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>")
    with pytest.raises(LrkitError, match=r"(100|50)% of the texts come to no token at all|nothing to learn"):
        check_texts(task_of(tmp_path, "ЖЖ ЖЖ", "ЩЩ"), tokenizer, None)


def test_a_token_beyond_the_model(tmp_path):
    """A token that the model has no embedding for is told before it is looked up."""
    write_tokenizer(write_model(tmp_path / "m", "Bert", 12))
    with pytest.warns(UserWarning, match="14 tokens"):
        pretrained = loaded(tmp_path / "m")
    with pytest.raises(LrkitError, match=r"gives token 13, and the model has 12 tokens \(0 to 11\)"):
        check_texts(task_of(tmp_path / "d", "a film", "a plot"), pretrained.tokenizer, pretrained.model)


def test_padding_that_the_model_would_read(tmp_path, monkeypatch):
    """A model that pads with another token is told the tokenizer's; if its outputs then change with padding, refused."""
    write_tokenizer(write_model(tmp_path, "GPT2", len(WORDS), pad_token_id=3))
    with pytest.warns(UserWarning, match=r"pads with token 3 and its tokenizer with token 0"):
        pretrained = loaded(tmp_path)
    assert pretrained.model.config.pad_token_id == 0
    with monkeypatch.context() as patch:
        forward = transformers.GPT2ForSequenceClassification.forward
        unmasked = lambda self, attention_mask=None, **given: forward(self, **given)  # noqa: E731
        patch.setattr(transformers.GPT2ForSequenceClassification, "forward", unmasked)
        patch.setattr(transformers.GPT2Config, "pad_token_id", property(lambda _: 3, lambda *_: None), raising=False)
        with pytest.raises(LrkitError, match="would read padding as text"):
            loaded(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_max_length": "x"},
        {"model_max_length": -3},
        {"model_max_length": True},
        {"model_max_length": [512]},
        {"padding_side": "up"},
        {"model_input_names": "input_ids"},
        {"model_input_names": []},
        {"pad_token": 5},
        {"pad_token": "<never seen>"},
        {"truncation_side": 3},
        {"extra_special_tokens": 7},
        {"tokenizer_class": 5},
        [],
        "text",
    ],
    ids=str,
)
def test_an_odd_tokenizer_config(tmp_path, settings):
    """Each loads and encodes, or is refused in one line."""
    write_tokenizer(write_model(tmp_path, "Bert", len(WORDS)))
    path = tmp_path / "tokenizer_config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, **settings} if isinstance(settings, dict) else settings))
    try:
        pretrained = loaded(tmp_path)
    except LrkitError:
        return
    assert pretrained.tokenizer(["a film", "the plot"], padding=True)["input_ids"]
