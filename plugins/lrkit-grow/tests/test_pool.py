"""ElaLoRA's released rule: the pool, what new components begin with, b over time, and a whole run, by plain oracles."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import lrkit_grow
import numpy as np
import pytest
import rigs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lrkit_grow import LateCubic, PoolExchange, ProjectedSVD
from torch import nn

import lrkit
from lrkit.actions import Ballot
from lrkit.registry import Registry
from lrkit.testing import ActionContract, MethodContract, ParameterizationContract, only, resumes


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    with only(lrkit_grow, distribution="lrkit-grow 0.1.0") as made:
        yield made


class TestProjectedSVD(ParameterizationContract):
    component = ProjectedSVD(rank=3)


class TestPoolExchange(ActionContract):
    component = PoolExchange(count=2)
    exact = False


class TestReleased(MethodContract):
    component = lrkit_grow.elalora(variant="released", taper=True)


def ballot_of(scores: list[list[float]], share: float = 1.0) -> Ballot:
    flat = torch.tensor([s for layer in scores for s in layer])
    where = torch.tensor([i for i, layer in enumerate(scores) for _ in layer])
    everyone = torch.ones(len(flat), dtype=torch.bool)
    return Ballot(flat, everyone, len(flat), share, None, None, where, layers=len(scores))


def oracle(scores: list[list[float]], b: int, k: int) -> tuple[list[list[int]], list[int]]:
    """The text: min(k, n - 1) lowest of each matrix; the b lowest of these go, the matrices of the b highest gain."""
    pool = []
    for i, layer in enumerate(scores):
        lowest = sorted((s, j) for j, s in enumerate(layer))[: min(k, len(layer) - 1)]
        pool += [(s, i, j) for s, j in lowest]
    pool.sort()
    b = min(b, len(pool))
    gone = {(i, j) for _, i, j in pool[:b]}
    fresh = [0] * len(scores)
    for _, i, _ in pool[::-1][:b]:
        fresh[i] += 1
    return [[j for j in range(len(layer)) if (i, j) not in gone] for i, layer in enumerate(scores)], fresh


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    b=st.integers(1, 6),
    k=st.integers(1, 4),
)
def test_who_goes_and_who_gains(sizes: list[int], seed: int, b: int, k: int) -> None:
    """Against the text, in plain Python; a matrix's last component stays, and as many come as go."""
    draws = np.random.default_rng(seed).random(sum(sizes)).astype(np.float32).tolist()
    scores = [[draws.pop() for _ in range(n)] for n in sizes]
    verdict = PoolExchange(count=b, pool=k).decide(ballot_of(scores))
    stays, fresh = oracle(scores, b, k)
    got = [piece.nonzero().flatten().tolist() for piece in torch.split(verdict.kept, sizes)]
    assert (got, list(verdict.fresh)) == (stays, fresh)
    assert all(got) and sum(verdict.fresh) == int((~verdict.kept).sum())


def test_the_same_pool_gains() -> None:
    """The matrix with the best components overall gains nothing: its lowest two are what counts."""
    verdict = PoolExchange(count=1).decide(ballot_of([[0.1, 0.2, 9.0], [0.3, 0.4, 0.5]]))
    assert verdict.kept.tolist() == [False, True, True, True, True, True] and verdict.fresh == (0, 1)
    verdict = PoolExchange(count=2).decide(ballot_of([[0.1, 0.2, 9.0], [0.3, 0.4, 0.5]]))
    assert verdict.fresh == (0, 2), "up to k"


def test_b_over_time() -> None:
    """round(b0 (1 - u³)): the released scheduler's numbers for b = 4."""
    times = LateCubic(target=0.0).over(100, units=40, layers=4)
    scores = [[float(10 * i + j) for j in range(10)] for i in range(4)]
    for u, b in ((0, 4), (25, 4), (50, 4), (60, 3), (70, 3), (80, 2), (90, 1), (95, 1), (100, 0)):
        verdict = PoolExchange(count=4, taper=True).decide(ballot_of(scores, times.share(u)))
        assert int((~verdict.kept).sum()) == b == round(4 + (0 - 4) * (u / 100) ** 3) == sum(verdict.fresh)


def test_new_vectors_are_orthogonal() -> None:
    """x - Vᵀ V x over its norm, for each in turn; to orthonormal vectors exactly orthogonal, and of length 1."""
    method = lrkit_grow.elalora(rank=3, variant="released")
    _, adapted = rigs.toy(method)
    module = adapted.adapters["second"]  # 5 x 7
    parameterization = method.parameterization
    with torch.no_grad():
        module.A.copy_(torch.linalg.qr(torch.randn(5, 3))[0].t())
        module.B.normal_()
    drawn = parameterization.fresh(module, 2, torch.Generator().manual_seed(3), {})
    generator = torch.Generator().manual_seed(3)
    for name, axis in (("B", 1), ("A", 0)):
        new, there = drawn[name].double(), module.get_parameter(name).detach().double()
        if axis:
            new, there = new.t(), there.t()
        for row in new:
            x = torch.randn(there.shape[1], generator=generator).double()
            x = x - there.t() @ (there @ x)
            x = x / (x.norm() + 1e-6)
            torch.testing.assert_close(row, x, rtol=1e-5, atol=1e-6)
            there = torch.cat([there, x[None]])
        assert torch.allclose(new.norm(dim=1), torch.ones(2, dtype=torch.float64), atol=1e-5)
        if name == "A":
            torch.testing.assert_close(there @ there.t(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-5)


def run(method: lrkit.Method, steps: int, watch: Any = None) -> tuple[Any, torch.optim.Optimizer]:
    _, adapted = rigs.toy(method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01)
    if watch is not None:
        optimizer.register_step_post_hook(lambda *_: watch(adapted, optimizer))  # before lrkit's own
    adapted.bind(optimizer, total_steps=steps)
    for step in range(steps):
        (rigs.loss_of(adapted.model, step) + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted, optimizer


@pytest.mark.parametrize("taper", [False, True])
def test_a_run_by_hand(taper: bool) -> None:
    """Decisions at steps numbered from 0, b of each, what each matrix keeps and gains, and how new components begin."""
    method = lrkit_grow.elalora(rank=3, count=2, warmup=4, final=8, interval=4, variant="released", taper=taper)
    left: list[dict[str, dict[str, torch.Tensor]]] = []

    def watch(adapted: Any, _: Any) -> None:
        left.append(
            {
                n: {k: p.detach().clone() for k, p in m.named_parameters(recurse=False)}
                for n, m in adapted.adapters.items()
            }
        )

    adapted, optimizer = run(method, 26, watch)
    moves = [d for d in adapted.history if d.fresh]
    assert [d.step - 1 for d in adapted.history] == [8, 12, 16, 18], "after t_i = 4, by fours, and at T - t_f"
    assert [len(d.fresh) for d in adapted.history] == ([2, 2, 1, 0] if taper else [2, 2, 2, 2])
    # The state was dropped with the last exchange: AdamW has counted from there.
    assert {int(s["step"]) for p in adapted.adapter_parameters() if (s := optimizer.state[p])} == {26 - moves[-1].step}
    total = 9
    for move in moves:
        now, before = left[move.step], left[move.step - 1]  # what the next step has left, and what this one had
        assert sum(len(m["core"]) for m in now.values()) == total
        for name in before:
            lost = sum(unit.startswith(f"{name}[") for unit in move.lost)
            came = sum(unit.startswith(f"{name}[") for unit in move.fresh)
            assert len(now[name]["core"]) == len(before[name]["core"]) - lost + came
            # One step of AdamW moves an entry by its rate at most: new λ began at 1e-13, new rows with length 1.
            if came:
                assert (now[name]["core"][-came:].abs() <= 0.0101).all()
                norms = now[name]["A"][-came:].norm(dim=1)
                assert ((norms - 1).abs() < 0.05).all()


def test_counted_before_a_run() -> None:
    """Components may move to larger matrices: the range that is counted beforehand has the run that does so."""
    method = lrkit_grow.elalora(rank=3, count=2, warmup=0, final=2, interval=1, variant="released")
    model = rigs.Toy()
    adapted, _ = run(method, 20)
    counted = lrkit.accounting.count(method, model, total_steps=20, targets=[*adapted.adapters])
    sizes = {name: sum(layer.weight.shape) + 1 for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    largest = max(sizes.values())
    assert counted.end_range == (0, 3 * len(sizes) * largest)
    assert counted.average_range[0] <= adapted.summary().average <= counted.average_range[1]


def test_new_ones_see_what_stays() -> None:
    """At the decision itself λ is 1e-13, and new vectors are drawn beside what stays, not beside what is cut."""
    method = lrkit_grow.elalora(rank=3, count=3, warmup=0, final=2, interval=4, variant="released", orthogonality=0.0)
    _, adapted = rigs.toy(method)
    with torch.no_grad():
        for module in adapted.adapters.values():  # orthonormal, and kept so by a rate of nearly nothing
            module.A.copy_(torch.linalg.qr(torch.randn(module.d_in, 3))[0].t())
            module.B.copy_(torch.linalg.qr(torch.randn(module.d_out, 3))[0])
            module.core.normal_()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-7)
    adapted.bind(optimizer, total_steps=7)
    both = 0
    for step in range(5):
        old = {n: m.A.detach().clone() for n, m in adapted.adapters.items()}
        rigs.loss_of(adapted.model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    (decision,) = adapted.history
    for name, module in adapted.adapters.items():
        came = sum(unit.startswith(f"{name}[") for unit in decision.fresh)
        assert module.core[len(module.core) - came :].tolist() == [np.float32(1e-13)] * came
        for rows in (module.A.detach(), module.B.detach().t()):
            if len(rows) <= rows.shape[1]:  # five vectors of four entries are not orthogonal
                torch.testing.assert_close(rows @ rows.t(), torch.eye(len(rows)), rtol=0, atol=1e-4)
        for unit in decision.lost if came else ():
            layer, _, number = unit.removesuffix("]").rpartition("[")
            if layer == name:
                both += 1
                assert (module.A[-came:] @ old[name][int(number)]).abs().max() > 1e-3, "what is cut does not count"
    assert both


def test_resumes_and_keeps_its_settings() -> None:
    """A resumed run is the run; wrong words and settings of the other variant are refused."""
    resumes(lrkit_grow.elalora(rank=3, count=2, warmup=2, final=2, interval=3, variant="released"), 12, (3, 4, 7))
    with pytest.raises(lrkit.LrkitError, match="variant must be"):
        lrkit_grow.elalora(variant="paper")  # type: ignore[arg-type]
    with pytest.raises(lrkit.LrkitError, match="pool and taper are settings"):
        lrkit_grow.elalora(taper=True)
    with pytest.raises(lrkit.LrkitError, match="nothing to exchange at rank 1"):
        lrkit_grow.elalora(rank=1, variant="released")
    assert copy.deepcopy(lrkit_grow.elalora()) == lrkit_grow.elalora(core=1e-5)
