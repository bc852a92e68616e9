"""The fused low-rank path against the formula in float64, and against the readable path: values and all gradients."""

import itertools

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lrkit
from lrkit.layers.grouped import grouped_mm, grouped_outer
from lrkit.parameterizations import LowRank, low_rank_linear

TENSORS = ("x", "w", "bias", "a", "b", "core", "out_scale")


def draw(n, d_in, d_out, r, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (n, d_in), "w": (d_out, d_in), "bias": (d_out,), "a": (r, d_in), "b": (d_out, r)}
    shapes |= {"core": (r,), "out_scale": (d_out,)}
    return {k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for k, s in shapes.items()}


def formula(x, w, bias, a, b, core, out_scale, scaling):
    y = x @ w.T if bias is None else x @ w.T + bias
    h = x @ a.T if core is None else (x @ a.T) * core
    z = h @ b.T if out_scale is None else (h @ b.T) * out_scale
    return y + scaling * z


def gradients(function, tensors, needs, scaling, weight):
    leaves = {k: None if t is None else t.clone().requires_grad_(k in needs) for k, t in tensors.items()}
    y = function(*(leaves[k] for k in TENSORS), scaling)
    if y.requires_grad:
        (y * weight).sum().backward()
    return y.detach(), {k: leaves[k].grad for k in needs if leaves[k] is not None}


@settings(max_examples=60)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 4),
    absent=st.sets(st.sampled_from(["bias", "core", "out_scale"])),
    needs=st.sets(st.sampled_from(TENSORS), min_size=1),
    scaling=st.sampled_from([1.0, 2.0, 0.37]),
    seed=st.integers(0, 999),
)
def test_fused_equals_the_formula_in_values_and_all_gradients(sizes, absent, needs, scaling, seed):
    n, d_in, d_out, r = sizes
    tensors = {k: None if k in absent else t for k, t in draw(n, d_in, d_out, r, seed).items()}
    weight = torch.randn(n, d_out, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    y1, g1 = gradients(low_rank_linear, tensors, needs, scaling, weight)
    y2, g2 = gradients(formula, tensors, needs, scaling, weight)
    torch.testing.assert_close(y1, y2, rtol=1e-12, atol=1e-12)
    assert g1.keys() == g2.keys()
    for key in g1:
        torch.testing.assert_close(g1[key], g2[key], rtol=1e-10, atol=1e-10)


def layers(kind, bias=True):
    if kind == "conv1d":
        return Conv1D(7, 5)
    return nn.Linear(5, 7, bias=bias)


def adapter(base, parts, r=3, dropout=0.0):
    g = torch.Generator().manual_seed(0)
    new = lambda *s: nn.Parameter(torch.randn(*s, generator=g))  # noqa: E731
    return LowRank(
        base,
        new(r, 5),
        new(7, r),
        core=new(r) if "core" in parts else None,
        out_scale=new(7) if "out_scale" in parts else None,
        scaling=1.5,
        dropout=dropout,
    )


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("parts", [(), ("core",), ("core", "out_scale")], ids=str)
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), "strided", "twice"], ids=str)
def test_module_paths_agree(kind, parts, shape, monkeypatch):
    net = adapter(layers(kind, bias=kind != "no bias"), parts)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, 5, generator=g).transpose(0, 1) if shape == "strided" else None
    x = torch.randn(3, 5, generator=g) if shape == "twice" else torch.randn(*shape, generator=g) if x is None else x
    results = []
    for fused in (True, False):
        monkeypatch.setattr(LowRank, "fused", fused)
        net.zero_grad()
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        if shape == "strided" and kind == "conv1d" and not fused:
            leaf = x.contiguous().requires_grad_()  # transformers' Conv1D itself takes no other
        y = net(leaf)
        if shape == "twice":
            y = net(F.pad(y.tanh(), (0, -2)))
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in net.parameters())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_agrees_within_its_precision(autocast, monkeypatch):
    base = nn.Linear(64, 48) if autocast else nn.Linear(64, 48).to(torch.bfloat16)
    torch.manual_seed(0)
    net = LowRank(base, nn.Parameter(torch.randn(4, 64) / 8), nn.Parameter(torch.randn(48, 4) / 8))
    x = torch.randn(10, 64, dtype=torch.float32 if autocast else torch.bfloat16)
    outs, grads = [], []
    for fused in (True, False):
        monkeypatch.setattr(LowRank, "fused", fused)
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = net(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        outs.append(y.float())
        grads.append((net.A.grad, net.B.grad))
        assert net.A.grad.dtype == net.A.dtype == torch.float32
    torch.testing.assert_close(outs[0], outs[1], rtol=2e-2, atol=5e-2)
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=5e-2, atol=5e-2 * float(two.abs().max()))


def test_only_needed_gradients_are_computed():
    """With A frozen, its matmul is not done: counted by torch's own flop counter."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(train_a, train_b, train_x=True, train_c=False, n=5):
        net = adapter(layers("linear"), ("core", "out_scale"))
        net.base.requires_grad_(False)
        net.A.requires_grad_(train_a)
        net.B.requires_grad_(train_b)
        net.core.requires_grad_(train_c)
        net.out_scale.requires_grad_(train_c)
        x = torch.randn(n, 5, requires_grad=train_x)
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        return counter.get_total_flops()

    n, i, o, r = 5, 5, 7, 3
    forward = 2 * n * (i * o + i * r + r * o)
    back_x = 2 * n * (o * r + o * i + r * i)
    assert flops(False, False) == forward + back_x
    assert flops(True, False) == forward + back_x + 2 * n * r * i
    assert flops(False, True) == forward + back_x + 2 * n * r * o
    assert flops(True, True, train_x=False) == forward + 2 * n * (o * r + r * i + r * o)
    # All three gradients of B's side are made of one product.
    assert flops(True, True, train_c=True) == flops(True, True)
    # With more tokens, and A frozen: twice a merged weight; c and s cost A x and one product more, and no gradient of A x.
    merged = 2 * (2 * 10 * i * o + 2 * o * r * i)
    assert flops(False, False, n=10) == merged
    assert flops(False, False, train_c=True, n=10) == merged + 2 * 10 * (i * r + r * o)


def test_dropout_falls_on_the_adapter_input_alone_and_only_while_training():
    net = adapter(nn.Linear(5, 7), (), dropout=0.5)
    x = torch.randn(2000, 5)
    assert torch.equal(net.eval()(x), net(x))
    net.train()
    torch.manual_seed(0)
    mean = torch.stack([net(x[:4]) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, net.eval()(x[:4]), rtol=0.1, atol=0.15)


def test_a_hook_on_the_base_is_still_called():
    net = adapter(nn.Linear(5, 7), ())
    seen = []
    net.base.register_forward_hook(lambda *_: seen.append(1))
    net(torch.randn(2, 5))
    assert seen == [1]


def test_rank_zero_is_the_base():
    base = nn.Linear(5, 7)
    net = LowRank(
        base, nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.zeros(7, 0)), core=nn.Parameter(torch.zeros(0))
    )
    x = torch.randn(3, 5)
    assert torch.equal(net(x), base(x))
    assert torch.equal(net.delta(), torch.zeros(7, 5))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_model_trains_alike_on_both_paths(checkpointing, monkeypatch):
    results = []
    for fused in (True, False):
        monkeypatch.setattr(LowRank, "fused", fused)
        model = models.make("gpt2")
        adapted = lrkit.attach(model, lrkit.methods.aflora(rank=4, train="both"))
        for m in adapted.adapters.values():
            nn.init.constant_(m.out_scale, 0.5)
        if checkpointing:
            models.checkpoint_activations(model)
        model.train()
        torch.manual_seed(0)
        loss = model(**models.batch()).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in adapted.parameters())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


# ---- what others do to a layer and its output ------------------------------------------------------------------------


def test_the_output_can_be_changed_in_place():
    for n in (2, 400):  # 400: the merged path
        net = nn.Sequential(adapter(nn.Linear(5, 7), ("core",)), nn.ReLU(inplace=True))
        x = torch.randn(3, n, 5, requires_grad=True)
        y = net(x)
        y.sum().backward()
        want = F.relu(net[0].reference(x.detach()))
        torch.testing.assert_close(y.detach(), want.detach())


@pytest.mark.parametrize("n", [1, 4, 40])  # 40: the merged path
@pytest.mark.parametrize("scales", [(), ("core",), ("core", "out_scale")])
@pytest.mark.parametrize("frozen", ["", "A", "AB"])
def test_second_derivatives(scales, n, frozen):
    """A gradient penalty, with an output gradient that needs no graph of its own (a sum's) and one that does."""
    heads = (torch.sum, lambda y: y.tanh().sum())
    if frozen == "AB" and not scales:
        heads = heads[1:]  # y is linear in what is left, x
    torch.manual_seed(0)
    net = adapter(nn.Linear(5, 7), scales).double()
    net.base.requires_grad_(not frozen)
    for name, p in net.named_parameters():
        nn.init.normal_(p)
        p.requires_grad_(p.requires_grad and name not in frozen)
    x = torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in net.parameters() if p.requires_grad)]
    for head in heads:
        found = []
        for forward in (net.forward, net.reference):
            first = torch.autograd.grad(head(forward(x)), leaves, create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            found.append([*first, *torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two)


def test_without_gradients_a_merged_layer_costs_two_products():
    from torch.utils.flop_counter import FlopCounterMode

    net = adapter(nn.Linear(5, 7), ("core", "out_scale"))
    for p in (net.A, net.B, net.base.weight):
        p.requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.randn(400, 5))
    assert counter.get_total_flops() == 2 * (400 * 5 * 7 + 7 * 3 * 5)


@pytest.mark.parametrize("n", [8, 400])  # 400: the merged path
@pytest.mark.parametrize("frozen", ["", "A", "AB"])
def test_the_input_is_kept_only_for_the_gradient_of_a(frozen, n):
    net = adapter(nn.Linear(5, 7), ("core", "out_scale"))
    net.base.requires_grad_(False)
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    x = torch.randn(2, n, 5, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = net(x)
    assert (x.data_ptr() in kept) == ("A" not in frozen)
    leaves = [x, *(p for p in net.parameters() if p.requires_grad)]
    for one, two in zip(
        torch.autograd.grad(y.sin().sum(), leaves),
        torch.autograd.grad(net.reference(x).sin().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [4, 400])
def test_autocast_around_backward_alone_changes_nothing(dtype, n):
    net = adapter(nn.Linear(5, 7), ("core", "out_scale"))
    x = torch.randn(n, 5, requires_grad=True)
    leaves = [x, *net.parameters()]
    want = torch.autograd.grad(net(x).sum(), leaves)
    y = net(x).sum()
    with torch.autocast("cpu", dtype):
        found = torch.autograd.grad(y, leaves)
    for one, two in zip(found, want, strict=True):
        torch.testing.assert_close(one, two)


def test_a_small_core_value_does_not_underflow_in_float16():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256))
    net = lrkit.attach(model, lrkit.methods.svd_lora(), targets=["0"]).adapters["0"]
    with torch.no_grad():
        for p in (net.A, net.B):
            p.normal_(0, 0.02)
        net.core.fill_(1e-5)
    x = torch.randn(8, 256)
    (want,) = torch.autograd.grad(net(x).sum(), [net.A])
    with torch.autocast("cpu", torch.float16):
        y = net(x).sum()
    (found,) = torch.autograd.grad(y, [net.A])
    assert float((found - want).norm() / want.norm()) < 0.02


def test_a_parametrized_core_is_read():
    net = adapter(nn.Linear(5, 7), ("core",))
    x = torch.randn(4, 5)

    class Double(nn.Module):
        def forward(self, core):
            return 2 * core

    nn.utils.parametrize.register_parametrization(net, "core", Double())
    torch.testing.assert_close(net(x), net.reference(x))


@pytest.mark.parametrize("how", ["another forward", "a hook before backward"])
def test_what_was_done_to_the_base_is_not_passed_by(how):
    net = adapter(nn.Linear(5, 7), ())
    if how == "another forward":  # as accelerate and bitsandbytes do, on the instance
        forward = net.base.forward
        net.base.forward = lambda x: forward(x) * 2
    else:
        net.base.register_full_backward_pre_hook(lambda module, grads: tuple(g * 2 for g in grads))
    x = torch.randn(4, 5, requires_grad=True)
    y = net(x)
    (got,) = torch.autograd.grad(y.sum(), [x])
    want = net.reference(x)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), [x])[0])


def test_autocast_leaves_float64_alone(monkeypatch):
    net = adapter(nn.Linear(5, 7), ("core",)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
        monkeypatch.setattr(LowRank, "fused", False)
        want = net(x)
    assert y.dtype == want.dtype == torch.float64
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d_in", "d_out"), [(96, 8), (8, 96), (96, 80)])
def test_groups_in_half_precision(dtype, d_in, d_out):
    """Products by group, thin ones and others, are those of float64 rounded once, with empty groups and rows of none."""
    g = torch.Generator().manual_seed(0)
    x, w, gy = (torch.randn(s, generator=g).to(dtype) for s in ((20, d_in), (4, d_out, d_in), (20, d_out)))
    ends = torch.tensor([7, 7, 18, 19], dtype=torch.int32)
    y, sums = grouped_mm(x, w, ends), grouped_outer(gy, x, ends)
    assert y.dtype == sums.dtype == dtype and not y[19:].any() and not sums[1].any()
    for group, (begin, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        wanted = x[begin:end].double() @ w[group].double().T
        torch.testing.assert_close(y[begin:end].double(), wanted, rtol=2**-7, atol=1e-3)
        wanted = gy[begin:end].double().T @ x[begin:end].double()
        torch.testing.assert_close(sums[group].double(), wanted, rtol=2**-7, atol=1e-3)
