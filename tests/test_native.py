"""The compiled statistics: a float64 oracle, the tensor operations, and runs that decide alike with and without."""

from __future__ import annotations

import os
import subprocess
import sys

import attrs
import models
import oracles
import pytest
import rigs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrkit
from lrkit.loop import native
from lrkit.loop.layout import Layout
from lrkit.metrics import GradientUncertainty, RatioUncertainty, SensitivityUncertainty, UncertaintyMetric
from lrkit.units import Block, Part

METRICS = [SensitivityUncertainty(), GradientUncertainty(), RatioUncertainty(beta1=0.5, epsilon=1e-3)]
KINDS = ["sensitivity-uncertainty", "gradient-uncertainty", "ratio-uncertainty"]

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(native, "SMALLEST", 0)
    monkeypatch.setattr(native, "_SHARE", 1)


def one_block(shapes, kind, seed):
    g = torch.Generator().manual_seed(seed)
    module = nn.Module()
    parts = []
    for index, (shape, axis) in enumerate(shapes):
        p = nn.Parameter(torch.randn(shape, generator=g))
        p.grad = torch.randn(shape, generator=g)
        module.register_parameter(f"p{index}", p)
        parts.append(Part(f"p{index}", axis=axis, matrix=True))
    count = shapes[0][0][shapes[0][1]] if kind == "component" else 1
    return Block("block", module, tuple(parts), count, kind)


@needs_compiler
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("index", range(3), ids=KINDS)
@pytest.mark.parametrize("threads", [1, 3])
@settings(max_examples=25)
@given(
    r=st.integers(1, 5),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    kind=st.sampled_from(["component", "layer"]),
    seed=st.integers(0, 999),
)
def test_formulas(index, threads, r, d_in, d_out, kind, seed):
    """Statistics and scores of the library are those of the formulas, whatever the shapes and threads."""
    metric = METRICS[index]
    blocks = [one_block([((r,), 0), ((d_out, r), 1), ((r, d_in), 0)], kind, seed + i) for i in range(3)]
    layout = Layout(blocks, [True, True, True], "all")
    mean, deviation = torch.zeros(layout.size), torch.zeros(layout.size)
    truth = [
        [oracles.Statistics(KINDS[index], p.shape, metric.beta1, metric.beta2, 1e-3) for p in b.tensors] for b in blocks
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            done = layout.native.observe(native.kernel_of(metric), layout.grads(), mean, deviation, scoring=True)
            assert done is not None and done[0]
            for block, statistics in zip(blocks, truth, strict=True):
                for p, one in zip(block.tensors, statistics, strict=True):
                    one.observe(p.detach().double().numpy(), p.grad.double().numpy())
                    p.grad = p.grad.flip(-1).contiguous()
    finally:
        torch.set_num_threads(before)
    for means in (done[1], layout.native.score(mean, deviation)):
        got = layout.reduce_means(means)
        want = []
        for statistics in truth:
            scores = [s.score() for s in statistics]
            if kind == "component":
                by_unit = [scores[0], scores[1].T, scores[2]]
                want += oracles.triplet_scores(by_unit)
            else:
                want.append(sum(oracles.matrix_score(s) for s in scores))
        torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=2e-5, atol=1e-12)
    where = layout.spans
    for block, statistics in zip(blocks, truth, strict=True):
        for p, one in zip(block.tensors, statistics, strict=True):
            got = where[id(p)].of(mean, mean[:0]).double()
            torch.testing.assert_close(got, torch.from_numpy(one.mean), rtol=1e-5, atol=1e-9)


@needs_compiler
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("rows", [1, 700, 3000])
def test_long_sums(rows):
    """Sums stay exact with more rows than lanes, and more entries than one float sum takes."""
    block = one_block([((rows, 12), 1), ((12, rows), 0)], "component", 0)
    layout = Layout([block], [True], "all")
    g = torch.Generator().manual_seed(1)
    mean, deviation = torch.rand(layout.size, generator=g), torch.rand(layout.size, generator=g)
    got = layout.reduce_means(layout.native.score(mean, deviation))
    product = mean.double() * deviation.double()
    want = product[: rows * 12].view(rows, 12).mean(0) + product[rows * 12 :].view(12, rows).mean(1)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@needs_compiler
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_gradient_not_finite(value, place):
    """A gradient that is not finite changes no statistics."""
    blocks = [one_block([((3,), 0), ((3, 37), 0)], "component", i) for i in range(2)]
    layout = Layout(blocks, [True, True], "all")
    layout.live[place].grad.view(-1)[-1] = value
    mean, deviation = torch.ones(layout.size), torch.ones(layout.size)
    kernel = native.kernel_of(SensitivityUncertainty())
    done = layout.native.observe(kernel, layout.grads(), mean, deviation, scoring=True)
    assert done is not None and not done[0]
    assert bool((mean == 1).all()) and bool((deviation == 1).all())


@needs_compiler
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("odd", ["strided gradient", "float64", "strided weight", "resized"])
def test_falls_back_to_tensors(odd):
    """Layouts that the library cannot take are left to tensor operations."""
    block = one_block([((4,), 0), ((4, 6), 0)], "component", 0)
    layout = Layout([block], [True], "all")
    p = layout.live[-1]
    if odd == "strided gradient":
        p.grad = torch.randn(6, 4).t()
    elif odd == "float64":
        p.grad = None
        p.data = p.data.double()
        p.grad = torch.randn(4, 6, dtype=torch.float64)
    elif odd == "strided weight":
        p.data = torch.randn(6, 4).t()
    else:
        p.grad = None
        p.data = torch.randn(2, 6)
        p.grad = torch.randn(2, 6)
    kernel = native.kernel_of(SensitivityUncertainty())
    buffers = torch.zeros(layout.size), torch.zeros(layout.size)
    assert layout.native.observe(kernel, layout.grads(), *buffers, scoring=False) is None


def test_subclass_is_not_compiled():
    """A subclass of a compiled metric is not taken for its parent."""

    @attrs.frozen(kw_only=True)
    class Squared(SensitivityUncertainty):
        def importance(self, weight, grad):
            return (weight * grad).square_()

    @attrs.frozen(kw_only=True)
    class Plain(UncertaintyMetric):
        def importance(self, weight, grad):
            return grad.abs()

    assert native.kernel_of(Squared()) is None
    assert native.kernel_of(GradientUncertainty(window=10)) is None
    assert native.kernel_of(Plain()) is None


@needs_compiler
@pytest.mark.parametrize("method", ["adalora", "released", "aflora", "hybrid"])
def test_decides_alike(method, monkeypatch):
    """Runs decide alike with and without the library."""
    prune = lrkit.Policy(
        metric=SensitivityUncertainty(),
        scheduler=lrkit.schedulers.Cubic(target=2, warmup=2, final=4, interval=2),
        action=lrkit.actions.Prune(),
    )
    made = {
        "adalora": lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=4, interval=1),
        "released": lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=4, interval=2, variant="released"),
        "aflora": lrkit.methods.aflora(rank=4, warmup=2, final=4),
        "hybrid": attrs.evolve(lrkit.methods.aflora(rank=4, warmup=2, final=4), also=(prune,)),
    }[method]
    histories, scores = [], []
    for smallest in (0, 1 << 60):
        monkeypatch.setattr(native, "SMALLEST", smallest)
        model = models.make("bert")
        adapted = lrkit.attach(model, made)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=0.05)
        adapted.bind(optimizer, total_steps=14)
        for step in range(14):
            (model(**models.batch(step)).loss + adapted.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 7:
                scores.append(torch.tensor(list(adapted.scores().values())))
        histories.append([attrs.evolve(d, threshold=None) for d in adapted.history])
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-12)
    assert histories[0] == histories[1]


def test_without_compiler(tmp_path):
    """Without a compiler tensor operations run instead."""
    code = "from lrkit.loop import native; print(native.library())"
    for setting in (
        {"LRKIT_NATIVE": "0"},
        {"CC": "no-such-compiler"},
        {"CC": "false", "XDG_CACHE_HOME": str(tmp_path)},
    ):
        environment = os.environ | setting
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert out.stdout == "None\n"


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_does_not_wait():
    """A forked process does not wait for threads that stayed in its parent."""
    code = """
import os, signal, torch, lrkit
from lrkit.loop import native
native._SHARE = 1
torch.set_num_threads(4)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
method = lrkit.methods.adalora(rank=32, target_rank=2, warmup=1, final=1, interval=1)
adapted = lrkit.attach(model, method, targets=["0", "1"])
for p in adapted.parameters():
    if p.requires_grad: p.grad = torch.ones_like(p)
controller = adapted.controller
controller.begin(100)
def step():
    controller.before_step()
    controller.after_step(None)
step()
child = os.fork()
if child == 0:
    signal.alarm(20)
    step()
    os._exit(0)
print(os.waitpid(child, 0)[1], native.SMALLEST < 2 * 32 * 128)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "0 True\n"


@needs_compiler
def compiler_without_openmp(tmp_path):
    """A compiler without OpenMP still compiles the library. See tests/integrations/test_more_studies.py."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nfor a; do [ "$a" = -fopenmp ] && exit 1; done\nexec cc "$@"\n')
    compiler.chmod(0o755)
    test = f"{__file__}::test_long_sums[700]"
    environment = os.environ | {"CC": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "1 passed" in out.stdout, out.stdout
    assert len(list((tmp_path / "cache" / "lrkit").glob("*.so"))) == 1


@pytest.mark.parametrize("pieces", [1, 7, 1 << 16])
def test_pieces_change_nothing(pieces, monkeypatch):
    """Statistics do not depend on the pieces that entries are observed in."""
    from lrkit.loop import layout

    monkeypatch.setattr(layout, "_PIECE", pieces)
    _, adapted = rigs.toy(lrkit.methods.adalora(rank=3, target_rank=2, warmup=1, final=2, interval=1))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.05)
    adapted.bind(optimizer, total_steps=8)
    recorder = oracles.AdaLoRARun([3, 3, 3], 2, total=8, warmup=1, final=2, interval=1)
    for step in range(6):
        (rigs.loss_of(adapted.model, step) + adapted.penalty()).backward()
        seen = [
            {"core": (rigs.array(m.core), rigs.array(m.core.grad)), "P": (rigs.array(m.B).T, rigs.array(m.B.grad).T)}
            | {"Q": (rigs.array(m.A), rigs.array(m.A.grad))}
            for m in adapted.adapters.values()
        ]
        recorder.step(seen)
        if step < 5:
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(
                torch.tensor(list(adapted.scores().values())).double(),
                torch.tensor(recorder.scores(), dtype=torch.float64),
                rtol=1e-4,
                atol=1e-12,
            )
