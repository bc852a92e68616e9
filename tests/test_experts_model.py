"""Whole mixtures of experts under every parameterization: training, pruning, resuming, merging, generating, exporting."""

import copy

import pytest
import torch
import zoo

import lrkit
from lrkit.methods import adalora, aflora, elora, lora
from lrkit.units import evened

METHODS = {
    "lora": lambda: lora(rank=2),
    "adalora": lambda: adalora(rank=3, target_rank=1, warmup=1, final=2, interval=1),
    "aflora": aflora,
    "elora": lambda: elora(rank=4),
}
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
STEPS = 6


def model(kind="mixtral"):
    torch.manual_seed(0)
    return zoo.ZOO[kind]()


def tokens(seed=0):
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(seed))


def bound(adapted):
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=STEPS)
    return optimizer


def train(net, adapted, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        (net(tokens(step), labels=tokens(step)).loss + adapted.penalty()).backward()
        optimizer.step()


def trained(kind="mixtral", method="adalora"):
    net = model(kind)
    adapted = lrkit.attach(net, METHODS[method]())
    train(net, adapted, bound(adapted), range(STEPS))
    return net.eval(), adapted


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:left out. .*Llama4Router")
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "llama4"])
def test_resume_and_merge(kind, method, tmp_path):
    """A run that was saved half way ends as the run that went on, bit for bit, and merging keeps its outputs."""
    net = model(kind)
    twin, plain = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    adapted = lrkit.attach(net, METHODS[method]())
    optimizer = bound(adapted)
    train(net, adapted, optimizer, range(3))
    adapted.save(tmp_path)
    moments = copy.deepcopy(optimizer.state_dict())
    train(net, adapted, optimizer, range(3, STEPS))
    again = lrkit.load(twin, tmp_path)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(moments)
    again.bind(optimizer, total_steps=STEPS)
    train(twin, again, optimizer, range(3, STEPS))
    states = net.state_dict(), twin.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(states[0][name], tensor) for name, tensor in plain.items())
    expected = net.eval()(tokens(9)).logits
    torch.testing.assert_close(adapted.merge()(tokens(9)).logits, expected, rtol=1e-5, atol=1e-6)
    again.detach()
    assert twin.state_dict().keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in twin.state_dict().items())


def test_counts_and_units():
    """Every expert has r components of its own: in the counts, in the names of units, and in the budget."""
    net = model()
    adapted = lrkit.attach(net, METHODS["adalora"]())
    layer = adapted.adapters[GATE_UP]
    assert (layer.A.shape, layer.B.shape, layer.core.shape) == ((12, 32), (96, 12), (12,))
    block = next(block for block in adapted.controller.policies[0].blocks if block.name == GATE_UP)
    assert block.unit_names() == [f"{GATE_UP}[{i}]" for i in range(12)]
    # Four projections of attention, and two stacks of four experts, in each of two layers.
    assert adapted.controller.policies[0].over(STEPS).budget(STEPS) == 2 * (4 + 2 * 4)
    summary = {each.name: each for each in adapted.summary().layers}[GATE_UP]
    assert (summary.start, summary.maps) == (12 * (32 + 96 + 1), 4)


def test_allocation_of_experts():
    """An allocation counts one expert's components, so that it gives the same model when it is given back."""
    net = model()
    adapted = lrkit.attach(net, lora(rank=2))
    allocation, count = adapted.allocation(), sum(p.numel() for p in adapted.parameters())
    assert allocation.layers()[GATE_UP] == 2
    assert allocation.parameters == count
    adapted.detach()
    assert sum(p.numel() for p in lrkit.attach(net, lora(rank=allocation)).parameters()) == count


def test_generate_and_compact():
    """Text is the same with and without a cache, and after masked components are gone."""
    net, adapted = trained()
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected, logits = net.generate(tokens(), **settings), net(tokens()).logits
    assert torch.equal(net.generate(tokens(), use_cache=False, **settings), expected)
    before = sum(p.numel() for p in adapted.parameters())
    ranks = adapted.compact()
    assert ranks[GATE_UP] % 4 == 0
    assert sum(p.numel() for p in adapted.parameters()) < before
    torch.testing.assert_close(net(tokens()).logits, logits)
    assert torch.equal(net.generate(tokens(), **settings), expected)


def test_every_map_keeps_as_many():
    """Maps that would keep fewer components keep their first others besides."""
    stays = torch.tensor([1, 0, 0, 0, 1, 1]).bool()
    assert evened(stays, 2).tolist() == [True, True, False, False, True, True]
    assert evened(stays, 1).equal(stays)
    assert not evened(torch.zeros(6, dtype=torch.bool), 3).any()


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_merged_export(kind, tmp_path):
    """The exported model has the increments in its 3-D weights."""
    net, adapted = trained(kind, "lora")
    lrkit.export(adapted, tmp_path / "merged", to="merged")
    read = type(net).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(read(tokens()).logits, net(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:targets=")
def test_quantized_experts_are_left_out():
    """Experts in 8-bit floats are left out by all-linear, which says so."""
    net = model()
    for layer in net.model.layers:
        experts = layer.mlp.experts
        experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.warns(lrkit.LrkitWarning, match="its experts are quantized") as told:
        adapted = lrkit.attach(net, lora(rank=2))
    assert len([each for each in told if "quantized" in str(each.message)]) == 1
    assert GATE_UP in adapted.adapters
    assert GATE_UP.replace("gate_up", "down") not in adapted.adapters
