"""Names in state dicts: an adapted layer's tensors have the plain layer's names, and the longer names still load."""

import copy

import models
import pytest
import torch
import torch.multiprocessing as mp
import zoo
from safetensors.torch import load_file, save_file
from test_trainer import trainer
from torch import nn

import lrkit

METHODS = [name for name in lrkit.current().names("method") if name != "peft"]


def adapted_model(name):
    """A model with a registered method, and the same model without."""
    kind = "llama" if "prefix" in name else "bert"
    model = models.make(kind)
    return lrkit.attach(model, lrkit.current().get("method", name)()), models.make(kind)


def old_state(model):
    """What a model's state dict was when the modules' own names were used: parameters and lasting buffers by their paths."""
    lasting = {id(t) for t in model.state_dict(keep_vars=True).values()}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named if id(tensor) in lasting}


@torch.no_grad()
def stir(model):
    for p in model.parameters():
        if p.is_floating_point():  # LoSparse's row numbers are not
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))


def is_equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", METHODS)
def test_base_names_stay(name):
    """A state dict has all of the plain model's keys and values, and the adapters' beside them."""
    adapted, plain = adapted_model(name)
    wanted, found = plain.state_dict(), adapted.model.state_dict()
    assert is_equal({key: found[key] for key in wanted if key in found}, wanted)
    added = {id(p) for p in adapted.added_parameters()}
    tensors = adapted.model.state_dict(keep_vars=True)
    assert added == {id(t) for key, t in tensors.items() if key not in wanted and isinstance(t, nn.Parameter)}
    keys = list(wanted)
    assert list(adapted.detach().state_dict()) == keys, "and no hook is left behind"
    assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in adapted.adapters.values())


@pytest.mark.parametrize("name", METHODS)
def test_states_load_again(name):
    """A state dict loads strictly, under its names and under the longer ones that were written once."""
    adapted, _ = adapted_model(name)
    other, _ = adapted_model(name)
    for state in (lambda: adapted.model.state_dict(), lambda: old_state(adapted.model)):
        stir(adapted.model)
        assert not is_equal(adapted.model.state_dict(), other.model.state_dict())
        other.model.load_state_dict(state(), strict=True)
        assert is_equal(adapted.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_plain_states_load(name):
    """A plain model's state dict fills the base, and what is missing are the adapters' tensors, by their names."""
    adapted, plain = adapted_model(name)
    stir(plain)
    told = adapted.model.load_state_dict(plain.state_dict(), strict=False)
    assert not told.unexpected_keys
    state = adapted.model.state_dict()
    assert set(told.missing_keys) == state.keys() - plain.state_dict().keys()
    assert is_equal({key: state[key] for key in plain.state_dict()}, plain.state_dict())


def test_told_keys_are_plain():
    """Torch's errors name the plain layer's tensors, those that are missing and those that are too many."""
    adapted, plain = adapted_model("lora")
    told = adapted.model.load_state_dict({"bert.encoder.layer.0.attention.self.query.odd": torch.ones(1)}, strict=False)
    assert told.unexpected_keys == ["bert.encoder.layer.0.attention.self.query.odd"]
    assert set(told.missing_keys) == adapted.model.state_dict().keys() > plain.state_dict().keys()
    assert not any(".base." in key for key in told.missing_keys)


def test_copies_keep_names():
    """A copy of the model, a compiled one and an adapter alone have these names too; a copy loads for itself."""
    adapted, plain = adapted_model("adalora")
    twin = copy.deepcopy(adapted.model)
    assert is_equal(twin.state_dict(), adapted.model.state_dict())
    stir(twin)
    before = adapted.model.state_dict()["classifier.weight"].clone()
    copy.deepcopy(adapted.model).load_state_dict(twin.state_dict())
    assert torch.equal(adapted.model.state_dict()["classifier.weight"], before)
    compiled = torch.compile(adapted.model, backend="eager")
    assert {f"_orig_mod.{key}" for key in plain.state_dict()} < compiled.state_dict().keys()
    layer = next(iter(adapted.adapters.values()))
    assert list(layer.state_dict()) == ["A", "B", "core", "weight", "bias"]
    layer.load_state_dict(layer.state_dict())


class Tied(nn.Module):
    """One layer in two places, and the weight of a third shared with a fourth."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)])
        self.blocks.append(self.blocks[0])
        self.out = nn.Linear(6, 6, bias=False)
        self.out.weight = self.blocks[2].weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


@pytest.mark.filterwarnings("ignore:.* has its weight from")  # tests/test_layers.py asks for it
def test_tied_weights_keep_names():
    """A layer that stands in two places has its names at both, and a tied weight is one tensor still."""
    model = Tied()
    plain = copy.deepcopy(model.state_dict())
    lrkit.attach(model, lrkit.methods.lora(rank=2), train_also=())
    state = model.state_dict(keep_vars=True)
    assert {"blocks.0.weight", "blocks.3.weight", "blocks.3.A"} < state.keys() and plain.keys() < state.keys()
    assert state["blocks.0.weight"] is state["blocks.3.weight"] and state["blocks.2.weight"] is state["out.weight"]
    other = Tied()
    lrkit.attach(other, lrkit.methods.lora(rank=2), train_also=())
    other.load_state_dict(model.state_dict(), strict=True)
    assert is_equal(other.state_dict(), model.state_dict())


class Crowded(nn.Linear):
    """A layer with tensors that are called like an adapter's, and like the place inside of one."""

    def __init__(self):
        super().__init__(4, 4)
        self.A = nn.Parameter(torch.ones(2))
        self.base = nn.Linear(1, 1)


def test_clashing_names_stay_apart():
    """If a layer has a tensor of an adapter's name, both are saved, and both come back."""
    made = []
    for _ in range(2):
        model = nn.Sequential(Crowded())
        lrkit.attach(model, lrkit.methods.lora(rank=2), targets=["0"], train_also=())
        made.append(model)
    one, two = made
    stir(one)
    state = one.state_dict()
    assert {"0.A", "0.base.A", "0.weight", "0.base.base.weight"} < state.keys() and len(state) == 7
    two.load_state_dict(state, strict=True)
    assert is_equal(two.state_dict(), state)


def test_trainer_checkpoints_of_old(tmp_path):
    """A checkpoint of the Trainer with the longer names in ``model.safetensors`` resumes bitwise."""
    kwargs = {"save_strategy": "steps", "save_steps": 9}
    method = lrkit.methods.adalora(rank=4, target_rank=2, warmup=4, final=5, interval=2)
    t, adapted = trainer("bert", method, tmp_path, **kwargs)
    t.train()
    again, other = trainer("bert", method, tmp_path, **kwargs)
    file = tmp_path / "checkpoint-9" / "model.safetensors"
    tensors, longer = load_file(file), {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(".")
        longer[f"{layer}.base.{name}" if layer in other.adapters and name in ("weight", "bias") else key] = tensor
    assert longer.keys() == dict(again.model.named_parameters()).keys()
    save_file(longer, file, metadata={"format": "pt"})
    again.train(resume_from_checkpoint=str(file.parent))
    assert adapted.history == other.history
    assert is_equal(t.model.state_dict(), again.model.state_dict())


def test_fsdp_keeps_its_names(tmp_path):
    """FSDP, whose hooks ask for the modules' own names, gives and takes states; an adapted model loads them."""
    mp.spawn(zoo.fsdp_rank, (f"file://{tmp_path}/init", tmp_path), nprocs=1)
    before, after, loaded = torch.load(tmp_path / "states")
    own = old_state(lrkit.attach(models.make("bert"), lrkit.methods.lora(rank=2)).model)
    assert before.keys() == own.keys()
    assert all(torch.equal(after[key], before[key] + 1) for key in own)
    assert sorted(float(t.double().sum()) for t in loaded.values()) == sorted(
        float(t.double().sum()) for t in before.values()
    )


def test_saved_folders_hold_the_base(tmp_path):
    """transformers reads the base from what ``save_pretrained`` of an adapted model writes, without the adapters."""
    adapted, plain = adapted_model("lora")
    with pytest.warns(lrkit.LrkitWarning, match="from_pretrained leaves out"):
        adapted.model.save_pretrained(tmp_path)
    found = type(plain).from_pretrained(tmp_path)
    assert is_equal(found.state_dict(), plain.state_dict())
