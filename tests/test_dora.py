"""DoRA: PEFT's numbers and files, the formula on every kind of layer, and components that can be pruned."""

import copy

import models
import peft
import pytest
import torch
import transformers
from increments import nudged
from safetensors.torch import load_file, save_file
from test_attach import METHODS, fit, logits
from test_export import ALL, FIRST, base, from_elsewhere, peft_lora, read
from torch import nn

import lrkit
from lrkit.parameterizations import DoRA

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def formula(adapter):
    """Return m ∘ (W + ΔW) / ‖W + ΔW‖ of one map in float64, and its pieces that train."""
    weight = adapter.kind.weight(adapter.base).detach().double()
    b = adapter.B if adapter.core is None else adapter.B * adapter.core
    whole = weight + adapter.scaling * (b.double() @ adapter.A.double())
    return adapter.magnitude.double()[:, None] * whole / whole.norm(dim=1, keepdim=True).detach()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_has_pefts_numbers(dropout):
    """Outputs and gradients are those of PEFT's ``use_dora`` with the same tensors and the same entries dropped."""
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["query", "value"], lora_dropout=dropout)
    theirs = peft.get_peft_model(models.make("bert"), config)
    model = models.make("bert")
    method = lrkit.methods.dora(rank=4, alpha=8.0, dropout=dropout)
    adapted = lrkit.attach(model, method, targets=["query", "value"], train_also=[])
    pairs = []
    for name, adapter in adapted.adapters.items():
        other = theirs.base_model.model.get_submodule(name)
        pairs += [(adapter.A, other.lora_A["default"].weight), (adapter.B, other.lora_B["default"].weight)]
        pairs.append((adapter.magnitude, other.lora_magnitude_vector["default"].weight))
        assert torch.allclose(adapter.magnitude, pairs[-1][1], atol=1e-6)
    nudged(adapted)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    assert torch.allclose(logits(model), logits(theirs), atol=1e-6)
    losses = []
    for m in (model, theirs):
        m.train()
        for each in m.modules():
            if isinstance(each, nn.Dropout):
                each.train(any(each is d for name, d in m.named_modules() if "lora_dropout" in name))
        torch.manual_seed(3)
        losses.append(m(**models.batch(seed=2)).loss)
        losses[-1].backward()
    assert torch.allclose(*losses, atol=1e-6)
    for mine, other in pairs:
        assert torch.allclose(mine.grad, other.grad, atol=1e-6)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 2, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(7, (3, 2))),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), lambda: torch.randn(2, 4, 7, 7)),
}


@pytest.mark.parametrize("form", ["lora", "svd"])
@pytest.mark.parametrize("kind", LAYERS)
def test_formula_on_layers(kind, form):
    """On every kind of layer the output is that of Eq. 5's weight, at the start the layer's own, and a merge keeps it."""
    torch.manual_seed(0)
    make, draw = LAYERS[kind]
    model = nn.Sequential(make()).double()
    x = draw()
    x = x.double() if x.is_floating_point() else x
    before = model(x)
    adapted = lrkit.attach(model, lrkit.Method(parameterization=DoRA(rank=2, form=form)), targets=["0"], train_also=[])
    assert torch.equal(model(x), before)
    nudged(adapted)
    adapter, twin = adapted.adapters["0"], make().double()
    weight = formula(adapter)
    if kind == "embedding":
        expected = torch.nn.functional.embedding(x, weight.t())
    else:
        named = {"weight": weight.view(twin.weight.shape), "bias": adapter.bias}
        expected = torch.func.functional_call(twin, named, (x,))
    torch.testing.assert_close(model(x), expected)
    trained = list(adapted.parameters())
    mine = torch.autograd.grad(model(x).square().sum(), trained)
    for one, other in zip(mine, torch.autograd.grad(expected.square().sum(), trained), strict=True):
        torch.testing.assert_close(one, other)
    adapted.merge()
    torch.testing.assert_close(model(x), expected)


def test_experts_have_their_own():
    """Every expert's rows have norms and magnitudes of their own."""
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=12, num_local_experts=3,
    )  # fmt: skip
    config._experts_implementation = "eager"  # torch's product of sorted rows has no float64
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).double().eval()
    twin = copy.deepcopy(model)
    ids = torch.randint(64, (2, 9))
    adapted = lrkit.attach(model, lrkit.methods.dora(rank=2), targets=["experts.down_proj"], train_also=[])
    torch.testing.assert_close(model(ids).logits, twin(ids).logits)
    (adapter,) = nudged(adapted).adapters.values()
    weight = twin.model.layers[0].mlp.experts.down_proj
    a, b, m = adapter.A.view(3, 2, -1), adapter.B.view(-1, 3, 2), adapter.magnitude.view(3, -1)
    with torch.no_grad():
        for expert in range(3):
            whole = weight[expert] + adapter.scaling * b[:, expert] @ a[expert]
            weight[expert] = m[expert, :, None] * whole / whole.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits)
    adapted.merge()
    torch.testing.assert_close(model(ids).logits, twin(ids).logits)


def test_tied_embedding_is_refused():
    """An output head that is tied to the embedding would need the magnitude at its input: one line says so."""
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(lrkit.LrkitError, match=r"lm_head is tied to transformer.wte, and Magnitude cannot serve both"):
        lrkit.attach(model, lrkit.methods.dora(), targets=["wte"], train_also=[])


def test_quantized_base_is_refused():
    """A base whose weight cannot be read at every call is refused by name."""
    model = nn.Sequential(nn.Linear(6, 5))
    model[0].weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(lrkit.LrkitError, match="0: DoRA reads the base's weight, which is quantized here: use LoRA"):
        lrkit.attach(model, lrkit.methods.dora(), targets=["0"], train_also=[])


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [
        ("bert", METHODS["dora"], {"targets": ["query", "word_embeddings"]}),
        ("gpt2", lrkit.methods.dora(rank=3, scale="sqrt-rank"), {}),
        ("gpt2", lrkit.methods.dora(rank=2), {"targets": ["c_attn.v", "c_fc"]}),
    ],
)
def test_export_has_magnitudes(name, method, settings, tmp_path):
    """PEFT alone has the logits, pruned to rank 0, for embeddings, Conv1D and slices; lrkit reads what it wrote."""
    model = models.make(name)
    adapted = lrkit.attach(model, method, **settings)
    fit(model, adapted, steps=8, total=8)
    (first, *_) = adapted.adapters.values()
    if first.core is not None:
        first.core.data.zero_()
    expected = logits(model)
    lrkit.export(adapted, tmp_path / "it")
    torch.testing.assert_close(logits(read(tmp_path / "it", "peft-lora", name)), expected, rtol=0, atol=1e-5)
    again = base(name)
    lrkit.from_peft(again, tmp_path / "it")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    for to in ("peft-adalora", "vllm-lora"):
        with pytest.raises(
            lrkit.LrkitError, match=rf'{to} holds .* magnitude \(DoRA\): export to "peft-lora" or "merged"'
        ):
            lrkit.export(adapted, tmp_path / to, to=to)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", {"rank_pattern": {FIRST: 2}, "lora_dropout": 0.1, "target_modules": [*ALL, "word_embeddings"]}),
        ("gpt2", {"use_rslora": True, "target_modules": ["c_attn", "c_fc"]}),
    ],
)
def test_pefts_dora_comes_in(name, settings, tmp_path):
    """A DoRA that PEFT trained has PEFT's logits, trains on, and goes out again."""
    theirs = from_elsewhere(name, peft_lora(use_dora=True, **settings), tmp_path / "theirs")
    model = base(name)
    adapted = lrkit.from_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    assert adapted.method.parameterization.dropout == settings.get("lora_dropout", 0.0)
    fit(model, adapted, steps=4)
    lrkit.export(adapted, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(base(name), str(tmp_path / "again"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    weights = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if key.endswith("magnitude_vector"))
    save_file(tensors | {name: tensors[name][1:].clone()}, weights)
    with pytest.raises(lrkit.LrkitError, match="has not one magnitude per output"):
        lrkit.from_peft(base("bert"), tmp_path / "theirs")


def test_lora_becomes_dora(tmp_path):
    """A LoRA of PEFT's goes on as a DoRA with the same outputs; a DoRA needs a method with magnitudes."""
    model = models.make("bert")
    adapted = nudged(lrkit.attach(model, lrkit.methods.lora(rank=3)))
    expected = logits(model)
    lrkit.export(adapted, tmp_path / "lora")
    for form in ("lora", "svd"):
        other = base("bert")
        dora = lrkit.from_peft(other, tmp_path / "lora", lrkit.Method(parameterization=DoRA(rank=4, form=form)))
        torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-5)
    lrkit.export(dora, tmp_path / "dora")
    with pytest.raises(lrkit.LrkitError, match=r"it has a magnitude \(use_dora\): give a method that has one"):
        lrkit.from_peft(base("bert"), tmp_path / "dora", lrkit.methods.lora(rank=4))


def test_dora_can_be_pruned():
    """In SVD form the budget is met, what is masked is cut away with the same outputs, and a merge keeps them."""
    model = models.make("bert")
    before = logits(model)
    adapted = lrkit.attach(model, METHODS["dora"])
    assert torch.equal(logits(model), before)
    fit(model, adapted)
    assert adapted.allocation().total == 24
    trained = logits(model)
    adapted.compact()
    assert torch.allclose(logits(model), trained, atol=1e-5)
    adapted.merge()
    assert torch.allclose(logits(model), trained, atol=1e-5)
