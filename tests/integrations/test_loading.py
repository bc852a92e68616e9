"""Models that are quantized while they are loaded, by the real packages: trained, saved, loaded again, and compared."""

import json
import sys
from pathlib import Path

import pytest
import torch

import lrkit
from lrkit.adapt import checkpoint
from lrkit.adapt.adapted import load
from lrkit.study.loading import SCHEMES, Loading
from lrkit.study.pretrained import load_base, load_pretrained
from lrkit.study.run import RunSettings, train
from lrkit.tasks import Head, load_folder

sys.path.insert(0, str(Path(__file__).parents[1]))
import folders

pytestmark = pytest.mark.filterwarnings("ignore:.*:Warning")
TWO = Head(num_labels=2, problem_type="single_label_classification")
SHORT = RunSettings(steps=12, max_length=12)
ADALORA = lrkit.methods.adalora(rank=4, target_rank=2)
LAYERS = {"bnb-8bit": "Linear8bitLt", "bnb-4bit": "Linear4bit", "torchao-int8": "Linear"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    return folders.write_place(folder)


# quanto's kernel for bfloat16 ends the process on layers as narrow as these.
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [*((scheme, "float32") for scheme in SCHEMES), ("bnb-4bit", "bfloat16"), ("torchao-int8", "bfloat16")],
)
def test_quantized_runs_load_again(place, tmp_path, scheme, dtype):
    """The encoder is quantized and the new head is not; the saved run's base is quantized the same way again."""
    seen = {}
    ids = torch.arange(2, 12)[None]

    def keep(adapted):
        net = adapted.model.eval()
        query = net.bert.encoder.layer[0].attention.self.query.base
        seen.update(layer=type(query).__name__, head=net.classifier.weight.dtype, logits=net(ids).logits.detach())
        adapted.save(tmp_path)

    result = train(
        ADALORA,
        load_folder(str(place / "data")),
        model=str(place / "model"),
        loading=Loading(quantization=scheme, dtype=dtype),
        settings=SHORT,
        done=keep,
    )
    assert result.loading["quantization"] == scheme
    assert seen["layer"] == LAYERS.get(scheme, "QLinear")
    assert seen["head"] == torch.float32
    state = checkpoint.read(tmp_path)
    trained = {name.removeprefix("weight.") for name in state["tensors"]}
    net, _ = load_base(state["meta"]["base"], trained=trained)
    adapted = load(net, tmp_path)
    assert type(net.bert.encoder.layer[0].attention.self.query.base).__name__ == seen["layer"]
    assert torch.allclose(adapted.model.eval()(ids).logits.float(), seen["logits"].float(), atol=1e-2)


def test_quantized_weights_are_close(place):
    """The layers in 8 bits answer nearly as those in float32, which quantized ones never do exactly."""
    ids, answers = torch.arange(2, 12)[None], []
    for loading in (Loading(), Loading(quantization="quanto-int8")):
        torch.manual_seed(0)
        net = load_pretrained(str(place / "model"), TWO, loading).model.eval()
        answers.append(net.bert(ids).last_hidden_state)
    assert 0 < float((answers[0] - answers[1]).abs().max()) < 0.1


def test_quantized_study_with_costs(place, tmp_path):
    """A study's cells and costs are measured on the quantized model, and the package's version is in a cell's name."""
    lrkit.ablate(
        "lora",
        {"alpha": [2.0]},
        out=tmp_path / "study",
        task={"data": str(place / "data")},
        model=str(place / "model"),
        loading={"quantization": "bnb-4bit"},
        seeds=1,
        run={"steps": 4, "max_length": 12},
        set={"rank": 2},
        workers=0,
    )
    configs = [json.loads(path.read_text()) for path in (tmp_path / "study").glob("cells/*/config.json")]
    assert [config["loading"] for config in configs] == [{"quantization": "bnb-4bit"}] * 2
    assert all("bitsandbytes" in config["versions"] for config in configs)
    costs = [json.loads(path.read_text()) for path in (tmp_path / "study" / "costs").glob("*.json")]
    assert costs
    assert not any("error" in cost for cost in costs if "key" in cost)


def test_already_quantized_stays(place, tmp_path):
    """A checkpoint in 4 bits loads as it is; another scheme on top of it is one line."""
    net = load_pretrained(str(place / "model"), TWO, Loading(quantization="bnb-4bit"))
    net.model.save_pretrained(tmp_path)
    net.tokenizer.save_pretrained(tmp_path)
    again = load_pretrained(str(tmp_path), TWO).model
    assert type(again.bert.encoder.layer[0].attention.self.query).__name__ == "Linear4bit"
    with pytest.raises(lrkit.LrkitError, match="is quantized already"):
        load_pretrained(str(tmp_path), TWO, Loading(quantization="bnb-8bit"))
