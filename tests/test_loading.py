"""How a model is loaded: dtype, attention, quantization, revision, its own code; and models of the wrong kind."""

import json
import types

import attrs
import folders
import pytest
import torch
import transformers

import lrkit
from lrkit.cli import main
from lrkit.errors import LrkitError
from lrkit.study import loading as loading_module
from lrkit.study.asked import study_from, study_named
from lrkit.study.cell import make_cell
from lrkit.study.loading import SCHEMES, Loading, loading_from
from lrkit.study.models import empty_model, load_config
from lrkit.study.pretrained import load_base, load_pretrained
from lrkit.study.run import RunSettings, train
from lrkit.study.run_settings import settings_from
from lrkit.study.task_spec import TaskSpec
from lrkit.tasks import Head, load_folder

TWO = Head(num_labels=2, problem_type="single_label_classification")
SHORT = RunSettings(steps=4, max_length=12)
CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification, BertModel

(Path("{marks}") / "ran").touch()

class OddConfig(BertConfig):
    model_type = "odd"

class OddForSequenceClassification(BertForSequenceClassification):
    config_class = OddConfig
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    folders.write_place(folder)
    return folder


@pytest.fixture
def odd(tmp_path):
    """A model whose code comes with it, and leaves a mark where it runs."""
    folder = folders.write_model(tmp_path / "odd")
    (folder / "odd.py").write_text(CODE.replace("{marks}", str(tmp_path)))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "OddConfig", "AutoModelForSequenceClassification": "OddForSequenceClassification"}
    config |= {"model_type": "odd", "auto_map": {key: f"odd.{name}" for key, name in names.items()}}
    config["architectures"] = ["OddForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def trained(place, **settings):
    """Train a few steps, and say what the model was."""
    seen = []
    result = train(
        lrkit.methods.lora(rank=2),
        load_folder(str(place / "data")),
        model=str(place / "model"),
        loading=Loading(**settings),
        settings=SHORT,
        done=lambda adapted: seen.append(adapted.model.dtype),
    )
    return result, seen[0]


# ---- dtype and attention ---------------------------------------------------------------------------------------------


def test_dtypes_train(place):
    """The weights have the dtype that was asked for, and the result says so; the default is as it always was."""
    plain, dtype = trained(place)
    assert (dtype, plain.loading, "loading" in plain.to_plain()) == (torch.float32, {}, False)
    for name in ("bfloat16", "float16"):
        result, dtype = trained(place, dtype=name)
        assert (dtype, result.to_plain()["loading"]) == (getattr(torch, name), {"dtype": name})
        assert result.losses == pytest.approx(plain.losses, abs=0.02)
        assert result.losses != plain.losses
    assert trained(place, dtype="auto")[1] == torch.float32


def test_auto_dtype_stays(place, tmp_path):
    """Weights stored in half precision become float32, unless "auto" leaves them as they are."""
    load_pretrained(str(place / "model"), TWO).model.bfloat16().save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path)
    assert load_pretrained(str(tmp_path), TWO).model.dtype == torch.float32
    assert load_pretrained(str(tmp_path), TWO, Loading(dtype="auto")).model.dtype == torch.bfloat16


def test_attention_is_chosen(place):
    """transformers is told of the attention, with weights and without; one that does not exist is one line."""
    model, eager = str(place / "model"), Loading(attn_implementation="eager")
    assert load_pretrained(model, TWO).model.config._attn_implementation == "sdpa"
    assert load_pretrained(model, TWO, eager).model.config._attn_implementation == "eager"
    assert empty_model(model, TWO, eager).config._attn_implementation == "eager"
    with pytest.raises(LrkitError, match=r"^.*attn_implementation=\"odd\"[^\n]*$"):
        empty_model(model, TWO, Loading(attn_implementation="odd"))


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_checked():
    """A wrong name or value is one line with the right one, by the name that was typed."""
    for given, told in (
        ({"dtyp": "float16"}, 'model has no setting "dtyp".*dtype'),
        ({"dtype": "bfloat"}, "model.dtype must be one of 'float32', 'bfloat16', 'float16', 'auto'.*, not .bfloat"),
        ({"dtype": 16}, "model.dtype must be"),
        ({"quantization": "bnb-4bits"}, f"model.quantization must be one of {', '.join(map(repr, SCHEMES))}"),
        ({"revision": ""}, "model.revision must be a text"),
    ):
        with pytest.raises(LrkitError, match=told):
            loading_from(given)


def test_plain_leaves_defaults():
    """Plain data hold what was set, and make the same record again."""
    assert Loading().to_plain() == loading_from({"dtype": "float32"}).to_plain() == {}
    given = Loading(dtype="auto", revision="v2", trust_remote_code=True)
    assert given.to_plain() == {"dtype": "auto", "revision": "v2", "trust_remote_code": True}
    assert loading_from(given.to_plain()) == given


def test_packages_are_named(place, monkeypatch):
    """A package that is missing is named before the model is looked for."""
    monkeypatch.setattr(loading_module, "_is_installed", lambda module: module == "accelerate")
    for scheme, package in {
        "bnb-4bit": "bitsandbytes",
        "torchao-int8": "torchao",
        "quanto-int8": "optimum-quanto",
    }.items():
        for load in (load_pretrained, empty_model):
            with pytest.raises(LrkitError, match=f"model.quantization={scheme} needs {package}: pip install {package}"):
                load("some/model", TWO, Loading(quantization=scheme))
    with pytest.raises(LrkitError, match="flash_attention_2 needs flash-attn and a GPU"):
        load_config("some/model", Loading(attn_implementation="flash_attention_2"))


def test_quantized_stays_quantized(place, monkeypatch):
    """Weights that are quantized already are not quantized another time."""
    monkeypatch.setattr(loading_module, "_is_installed", lambda module: True)
    config = load_config(str(place / "model"))
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(LrkitError, match='model "some/model" is quantized already'):
        Loading(quantization="bnb-8bit").settings(config, "some/model", [])


# ---- revisions -------------------------------------------------------------------------------------------------------


def test_revision_reaches_the_hub(place, monkeypatch):
    """Config, tokenizer and weights are of the revision that was asked for."""
    asked = []
    folder = str(place / "model")
    for auto in ("AutoConfig", "AutoTokenizer", "AutoModelForSequenceClassification"):
        loads = getattr(transformers, auto).from_pretrained

        def stand_in(source, *, auto=auto, loads=loads, **given):
            asked.append((auto, source, given.pop("revision", None), given["trust_remote_code"]))
            return loads(folder, **given)

        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", stand_in)
    load_pretrained("some/model", TWO, Loading(revision="v2"))
    names = ("AutoConfig", "AutoTokenizer", "AutoModelForSequenceClassification")
    assert set(asked) - {("AutoConfig", folder, None, False)} == {(name, "some/model", "v2", False) for name in names}


@pytest.mark.parametrize("spec", ["minilm", "smollm2", "deberta-v3-base"])
def test_others_have_no_revisions(spec, place):
    """A folder, and a model that lrkit knows, has no revision."""
    for name in (spec, str(place / "model")):
        with pytest.raises(LrkitError, match="has no revisions, since it does not come from the hub"):
            load_config(name, Loading(revision="v2"))


# ---- code that comes with a model --------------------------------------------------------------------------------------


def test_code_needs_the_flag(odd, place, tmp_path, capsys):
    """Code beside the weights does not run, and the line says how it would; with the flag it trains and is exported."""
    given = ["run", "lora", "--model", str(odd), "--data", str(place / "data"), "--set", "rank=2"]
    given += ["--set", "run.steps=4", "--set", "run.max_length=12"]
    with pytest.raises(SystemExit) as ended:
        main(given)
    told = capsys.readouterr().err
    assert (ended.value.code, told.count("\n"), (tmp_path / "ran").exists()) == (2, 1, False)
    assert "then say --trust-remote-code" in told
    with pytest.raises(SystemExit) as ended:
        main([*given, "--trust-remote-code", "--out", str(tmp_path / "out"), "--json"])
    assert (ended.value.code, (tmp_path / "ran").exists()) == (0, True)
    assert json.loads(capsys.readouterr().out)["loading"] == {"trust_remote_code": True}
    export = ["export", str(tmp_path / "out"), "--to", "peft-lora", "--out", str(tmp_path / "peft")]
    with pytest.raises(SystemExit) as ended:
        main(export)
    assert ended.value.code == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*export, "--trust-remote-code"])
    assert (ended.value.code, (tmp_path / "peft" / "adapter_model.safetensors").exists()) == (0, True)


def test_no_file_trusts(tmp_path):
    """A study file makes no code run: neither by itself nor by a profile."""
    for text in ("[loading]\ntrust_remote_code = true\n", "[profile.a.loading]\ntrust_remote_code = true\n"):
        file = tmp_path / "study.toml"
        file.write_text(f'base = "lora"\n{text}')
        with pytest.raises(LrkitError, match=r"study.toml: loading.trust_remote_code: .*--trust-remote-code"):
            study_named(str(file))


def test_set_does_not_trust(capsys):
    """Code is allowed by the flag alone."""
    with pytest.raises(SystemExit) as ended:
        main(["run", "lora", "--set", "model.trust_remote_code=true"])
    assert ended.value.code == 2
    assert "allowed by --trust-remote-code" in capsys.readouterr().err


# ---- studies and commands --------------------------------------------------------------------------------------------


def test_keys_stay(place):
    """A cell is called as it was if nothing is set, and otherwise if something is."""
    spec, run = TaskSpec(data=str(place / "data")), attrs.asdict(settings_from({"steps": 4}))
    method = lrkit.to_plain(lrkit.methods.lora(rank=2))
    made = [
        make_cell(method, spec, "minilm", "all-linear", run, loading=given) for given in (None, {}, {"dtype": "auto"})
    ]
    plain = made[0].to_plain()
    before = types.SimpleNamespace(**{key: value for key, value in plain.items() if key != "loading"})
    assert not hasattr(before, "loading")
    assert made[0].key == made[1].key != made[2].key
    assert "loading" not in made[0].to_plain() or made[0].loading == {}


def test_study_is_loaded_so(place, tmp_path):
    """A study's cells are trained on the model as it asks for it; its folder takes no other one in."""
    given = {"task": {"data": str(place / "data")}, "model": str(place / "model"), "seeds": 1, "costs": False}
    given |= {"run": {"steps": 4, "max_length": 12}, "set": {"rank": 2}, "out": tmp_path / "study", "workers": 0}
    with pytest.warns(lrkit.LrkitWarning):
        lrkit.ablate("lora", {"alpha": [2.0]}, loading={"dtype": "bfloat16"}, **given)
    configs = [json.loads(path.read_text()) for path in (tmp_path / "study").glob("cells/*/config.json")]
    assert [config["loading"] for config in configs] == [{"dtype": "bfloat16"}] * 2
    assert "dtype bfloat16" in (tmp_path / "study" / "report.html").read_text()
    with pytest.raises(LrkitError, match=r'loading is \{"dtype":"bfloat16"\} there and \{\} here'), pytest.warns():
        lrkit.ablate("lora", {"alpha": [2.0]}, **given)


def test_study_file_is_read(tmp_path):
    """The table [loading] is checked, and defaults are nothing."""
    assert study_from({"base": "lora", "loading": {"dtype": "float32"}}).loading == {}
    assert study_from({"base": "lora", "loading": {"revision": "v2"}}).loading == {"revision": "v2"}
    with pytest.raises(LrkitError, match='loading has no setting "typ'):
        study_from({"base": "lora", "loading": {"type": "float16"}})


def test_command_line_joins(place, capsys):
    """`--set model.NAME` comes on top of a study's own; `params` counts no weights."""
    main_ = ["ablate", "lora", "--swap", "alpha=2,4", "--data", str(place / "data"), "--model", str(place / "model")]
    with pytest.raises(SystemExit) as ended:
        main([*main_, "--set", "model.dtype=half", "--dry-run"])
    assert ended.value.code == 2
    assert "model.dtype must be one of" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["params", "lora", "--set", "model.dtype=bfloat16"])
    assert ended.value.code == 2
    assert "model.dtype is of weights, and nothing is loaded here" in capsys.readouterr().err


def test_base_keeps_dtype(place, tmp_path):
    """A saved run's base is loaded in its dtype."""
    train(
        lrkit.methods.lora(rank=2),
        load_folder(str(place / "data")),
        model=str(place / "model"),
        loading=Loading(dtype="bfloat16"),
        settings=SHORT,
        done=lambda adapted: adapted.save(tmp_path),
    )
    state = lrkit.adapt.checkpoint.read(tmp_path)
    model, _ = load_base(state["meta"]["base"], trained={name.removeprefix("weight.") for name in state["tensors"]})
    assert model.dtype == torch.bfloat16


# ---- models of the wrong kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "auto_class", "told"),
    [
        ("minilm", "CausalLM", r"is an encoder \(bert\), and the task needs a causal .* give --model smollm2"),
        ("distilbert", "CausalLM", r"is an encoder \(distilbert\)"),
        ("flan-t5-small", "CausalLM", r"is an encoder-decoder \(t5\), .* give --model smollm2"),
        (
            "smollm2",
            "Seq2SeqLM",
            r"is a decoder \(llama\), and the task needs an encoder-decoder.* --model flan-t5-small",
        ),
        ("minilm", "Seq2SeqLM", r"is an encoder \(bert\).* give --model flan-t5-small"),
    ],
)
def test_wrong_kinds_refused(spec, auto_class, told):
    """A model that cannot do a task is one line, which names one that can; no weights are fetched to find out."""
    head = Head(auto_class=f"AutoModelFor{auto_class}")
    for load in (empty_model, load_pretrained) if spec == "minilm" else (empty_model,):
        with pytest.raises(LrkitError, match=told):
            load(spec, head)


@pytest.mark.parametrize("spec", ["minilm", "distilbert", "mpnet", "smollm2", "flan-t5-small"])
def test_new_heads_fit_all(spec):
    """Encoders, decoders and encoder-decoders all classify, tag and mark answers."""
    for kind in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        assert empty_model(spec, Head(auto_class=f"AutoModelFor{kind}", num_labels=2)).num_parameters()
