"""Starts from the base's weight: PEFT's A and B, the base left as it is, and ΔW counted from the start."""

import copy
import types

import attrs
import models
import peft
import pytest
import torch
import transformers
from increments import nudged
from peft.tuners.lora.layer import LoraLayer
from test_attach import fit, logits
from test_export import base, read
from test_quantized import AWQ, GPTQ, HQQ
from torch import nn

import lrkit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

FROM_BASE = ("pissa", "pissa-fast", "olora")


def lora(init, **settings):
    return lrkit.methods.lora(**{"rank": 4, "alpha": 8.0, "init": init} | settings)


@pytest.mark.parametrize(("name", "init"), [("bert", "pissa"), ("bert", "olora"), ("gpt2", "pissa")])
def test_pefts_start_and_step(name, init):
    """Components, outputs and those after a training step are PEFT's, whose base has moved and whose signs may differ."""
    targets = {"bert": ["query", "intermediate.dense"], "gpt2": ["c_attn", "c_fc"]}[name]
    plain = models.make(name).eval()
    with torch.no_grad():  # weights so small that a step changes nothing would show nothing
        for p in plain.parameters():
            p.mul_(6 if p.ndim == 2 else 1)
    theirs = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.LoraConfig(
            r=4, lora_alpha=8, init_lora_weights=init, target_modules=targets, fan_in_fan_out=name == "gpt2"
        ),
    )
    model = copy.deepcopy(plain)
    adapted = lrkit.attach(model, lora(init), targets=targets, train_also=[])
    pairs = {}
    for layer, adapter in adapted.adapters.items():
        other = theirs.base_model.model.get_submodule(layer)
        pairs[layer] = (adapter, other.lora_A["default"].weight, other.lora_B["default"].weight)
        components = [torch.einsum("or,ri->roi", b, a) for a, b in ((adapter.A, adapter.B), pairs[layer][1:])]
        torch.testing.assert_close(*components, atol=1e-5, rtol=1e-5)
        size = (
            adapter.A.norm(dim=1) / adapter.B.norm(dim=0),
            pairs[layer][1].norm(dim=1) / pairs[layer][2].norm(dim=0),
        )
        torch.testing.assert_close(*size)
    assert torch.equal(logits(model), logits(plain))
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)
    for net, tensors in ((model, adapted.parameters()), (theirs, [p for p in theirs.parameters() if p.requires_grad])):
        optimizer = torch.optim.SGD(tensors, lr=0.5)
        net.eval()(**models.batch(seed=2)).loss.backward()
        optimizer.step()
    assert float((logits(model) - logits(plain)).abs().max()) > 1e-2, "it has learnt something"
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)
    adapted.detach()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_pefts_orthogonal_start():
    """With one seed A and B are those that PEFT's own function draws, and their product is zero."""
    layer = nn.Linear(12, 9)
    for seed in range(3):
        torch.manual_seed(seed)
        places = {key: {"it": types.SimpleNamespace()} for key in ("lora_A", "lora_B")}
        stub = types.SimpleNamespace(
            r={"it": 4}, in_features=12, out_features=9, get_base_layer=lambda: layer, **places
        )
        LoraLayer.orthogonal_init(stub, "it")
        torch.manual_seed(seed)
        adapted = lrkit.attach(nn.Sequential(layer), lora("orthogonal"), targets=["0"], train_also=[])
        adapter = adapted.adapters["0"]
        assert torch.equal(adapter.A, places["lora_A"]["it"].weight)
        assert torch.equal(adapter.B, places["lora_B"]["it"].weight)
        assert float(adapter.delta().detach().abs().max()) < 1e-7 < float(adapter.B.detach().abs().min())
        adapted.detach()


def test_fast_svd_is_near():
    """Of a weight whose singular values fall, the randomized SVD finds the same components."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 20, bias=False)
    with torch.no_grad():
        u, _, v = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.weight.copy_(u * 0.5 ** torch.arange(20) @ v)
    products = []
    for init in ("pissa", "pissa-fast"):
        adapted = lrkit.attach(nn.Sequential(layer), lora(init), targets=["0"], train_also=[])
        products.append(adapted.adapters["0"].B @ adapted.adapters["0"].A)
        adapted.detach()
    torch.testing.assert_close(*products, atol=1e-5, rtol=0)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 2, 6)),
    "half": (lambda: nn.Linear(6, 5).bfloat16(), lambda: torch.randn(3, 6).bfloat16()),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(7, (3, 2))),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), lambda: torch.randn(2, 4, 7, 7)),
    "GPTQ": (lambda: GPTQ(32, 16), lambda: torch.randn(3, 32)),
    "AWQ": (lambda: AWQ(32, 16), lambda: torch.randn(3, 32)),
    "HQQ": (lambda: HQQ(32, 16), lambda: torch.randn(3, 32)),
}


@pytest.mark.parametrize("init", FROM_BASE)
@pytest.mark.parametrize("kind", LAYERS)
def test_increment_counts_from_start(kind, init):
    """On every kind of layer the output begins bit for bit as the layer's own, and then has s (B A - B₀ A₀) more."""
    torch.manual_seed(0)
    make, draw = LAYERS[kind]
    model, x = nn.Sequential(make()), draw()
    before = model(x)
    adapted = lrkit.attach(model, lora(init, rank=2), targets=["0"], train_also=[])
    assert torch.equal(model(x), before)
    adapter = adapted.adapters["0"]
    a, b = adapter.A.detach().double(), adapter.B.detach().double()
    nudged(adapted)
    delta = 4 * (adapter.B.double() @ adapter.A.double() - b @ a)
    torch.testing.assert_close(adapter.delta().double(), delta, atol=1e-6, rtol=1e-5)
    if kind in ("GPTQ", "AWQ", "HQQ"):
        truth = model[0].base.truth().double()
        if init == "pissa":
            u, s, v = torch.linalg.svd(truth, full_matrices=False)
            torch.testing.assert_close(4 * b @ a, u[:, :2] * s[:2] @ v[:2], atol=1e-3, rtol=0)
        torch.testing.assert_close(model(x).double(), before.double() + x.double() @ delta.t(), atol=1e-4, rtol=1e-4)
        return
    after = model(x)
    adapted.merge()
    torch.testing.assert_close(model(x), after, **({"atol": 0.05, "rtol": 0.05} if kind == "half" else {}))


@pytest.mark.parametrize("init", [*FROM_BASE, "orthogonal"])
def test_experts_begin_apart(init):
    """Every expert begins with components of its own weight, and the whole as it was."""
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=12, num_local_experts=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(64, (2, 9))
    before = model(ids).logits.detach()
    adapted = lrkit.attach(model, lora(init), targets=["experts.down_proj"], train_also=[])
    torch.testing.assert_close(model(ids).logits, before, atol=1e-6, rtol=0)
    (adapter,) = adapted.adapters.values()
    weight = model.model.layers[0].mlp.experts.base.down_proj
    for expert in range(3):
        a, b = adapter.A.detach().view(3, 4, -1), adapter.B.detach().view(-1, 3, 4)
        product = adapter.scaling * b[:, expert] @ a[expert]
        if init == "pissa":
            u, s, v = torch.linalg.svd(weight[expert])
            torch.testing.assert_close(product, u[:, :4] * s[:4] @ v[:4], atol=1e-6, rtol=1e-5)
        assert (float(product.norm()) < 1e-6) == (init == "orthogonal")
    nudged(adapted)
    after = model(ids).logits.detach()
    assert float((after - before).abs().max()) > 1e-3
    adapted.merge()
    torch.testing.assert_close(model(ids).logits, after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_export_is_pefts_conversion(init, tmp_path):
    """A file of twice the rank has the logits on the plain base, as PEFT's own conversion has; a state loads there too."""
    model = models.make("bert")
    adapted = lrkit.attach(model, lora(init), targets=["query", "value"])
    fit(model, adapted, steps=4)
    expected = logits(model)
    done = lrkit.export(adapted, tmp_path / "it")
    assert set(done.ranks.values()) == {8}
    torch.testing.assert_close(logits(read(tmp_path / "it", "peft-lora", "bert")), expected, rtol=0, atol=1e-6)
    again = base("bert")
    lrkit.from_peft(again, tmp_path / "it")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)
    other = base("bert")
    lrkit.from_peft(other, tmp_path / "it", lora(init, rank=8))  # its start is no longer what ΔW is counted from
    torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-6)
    adapted.save(tmp_path / "state")
    loaded = base("bert")
    lrkit.load(loaded, tmp_path / "state")
    assert torch.equal(logits(loaded), expected)


def test_zeroed_components_leave_the_model():
    """A component that `Zero` takes out takes what the start took from the base, as where the base has moved; cut, too."""
    method = attrs.evolve(
        lora("pissa"),
        metric=lrkit.metrics.SensitivityUncertainty(),
        scheduler=lrkit.schedulers.Cubic(target=2, warmup=2, final=5),
        action=lrkit.actions.Zero(once=True),
    )
    model = models.make("bert")
    plain = copy.deepcopy(model)
    adapted = lrkit.attach(model, method, targets=["query"], train_also=[])
    starts = {name: (a.start_A.clone(), a.start_B.clone()) for name, a in adapted.adapters.items()}
    with pytest.warns(lrkit.LrkitWarning, match="takes that piece of the base's weight with it"):
        fit(model, adapted, steps=20)
    trained = logits(model)
    adapted.compact()
    assert {a.rank for a in adapted.adapters.values()} <= {0, 1, 2, 3, 4} and adapted.allocation().total == 4
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=0)
    for name, adapter in adapted.adapters.items():
        a0, b0 = starts[name]
        expected = plain.get_submodule(name).weight + 2 * (adapter.B @ adapter.A - b0 @ a0)
        torch.testing.assert_close(adapter.base.weight + adapter.delta(), expected, atol=1e-6, rtol=1e-5)


def test_unfit_starts_are_refused():
    """Too high a rank, an odd one, and an unknown word: one line each, and the model as it was."""
    model = nn.Sequential(nn.Linear(6, 5))
    for method, message in (
        (lora("pissa", rank=6), r'0: init="pissa" takes 6 components of a weight that has 5'),
        (lora("orthogonal", rank=3), r'0: init="orthogonal" halves the rank: it must be even, not 3'),
    ):
        with pytest.raises(lrkit.LrkitError, match=message):
            lrkit.attach(model, method, targets=["0"], train_also=[])
    with pytest.raises(lrkit.LrkitError, match=r"init must be .*pissa.*, not .*eva"):
        lora("eva")
    assert type(model[0]) is nn.Linear
