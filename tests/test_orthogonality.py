"""The orthogonality penalty: AdaLoRA's Eq. 4, and the released code's mean of un-squared norms."""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrkit.parameterizations.orthogonality import orthogonality

QUICK = settings(max_examples=60)
ORACLES = {"squared": oracles.orthogonality_squared, "mean": oracles.orthogonality_mean}
GRADIENTS = {
    "squared": oracles.orthogonality_squared_gradient,
    "mean": oracles.orthogonality_mean_gradient,
}


@st.composite
def shapes(draw: st.DrawFn, wide: bool = False) -> list[tuple[int, int]]:
    """A few [r, d], some of them repeated, in any order."""
    few = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=3))
    many = draw(st.lists(st.sampled_from(few), min_size=1, max_size=6))
    return [(r, max(r, d) if wide else d) for r, d in many]


def random_factors(seed: int, sizes: list[tuple[int, int]], scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(r, d, generator=generator, dtype=torch.float64) for r, d in sizes]


def orthonormal(factors: list[Tensor]) -> list[Tensor]:
    return [torch.linalg.qr(f.T)[0].T.contiguous() for f in factors]


@pytest.mark.parametrize("norm", ORACLES)
@given(st.integers(0, 10_000), shapes(), st.sampled_from([0.02, 0.5, 3.0]))
@QUICK
def test_equals_its_formula(norm: str, seed: int, sizes: list[tuple[int, int]], scale: float) -> None:
    factors = random_factors(seed, sizes, scale)
    got = orthogonality(factors, norm)
    assert got.shape == () and got.dtype == torch.float64
    want = ORACLES[norm]([f.numpy() for f in factors])
    assert float(got) == pytest.approx(want, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("norm", ORACLES)
@given(st.integers(0, 10_000), shapes())
@QUICK
def test_gradient_is_the_analytic_one(norm: str, seed: int, sizes: list[tuple[int, int]]) -> None:
    factors = [f.requires_grad_() for f in random_factors(seed, sizes)]
    orthogonality(factors, norm).backward()
    want = GRADIENTS[norm]([f.detach().numpy() for f in factors])
    for factor, gradient in zip(factors, want, strict=True):
        assert factor.grad is not None
        np.testing.assert_allclose(factor.grad.numpy(), gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("norm", ORACLES)
def test_gradcheck(norm: str) -> None:
    factors = [f.requires_grad_() for f in random_factors(1, [(2, 5), (3, 4), (2, 5), (1, 3)])]
    assert torch.autograd.gradcheck(lambda *fs: orthogonality(fs, norm), factors)


@given(st.integers(0, 10_000), shapes(wide=True))
@QUICK
def test_zero_for_orthonormal_rows(seed: int, sizes: list[tuple[int, int]]) -> None:
    factors = orthonormal(random_factors(seed, sizes))
    assert float(orthogonality(factors, "squared")) < 1e-25
    assert float(orthogonality(factors, "mean")) < 1e-13


@pytest.mark.parametrize("norm", ORACLES)
@given(st.integers(0, 10_000), shapes(wide=True))
@QUICK
def test_exactly_zero_for_signed_permutations_and_its_gradient_is_finite(
    norm: str, seed: int, sizes: list[tuple[int, int]]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for r, d in sizes:
        rows = torch.eye(d, dtype=torch.float64)[torch.randperm(d, generator=generator)[:r]]
        signs = 1 - 2 * torch.randint(0, 2, (r, 1), generator=generator, dtype=torch.float64)
        factors.append((rows * signs).requires_grad_())
    value = orthogonality(factors, norm)
    value.backward()
    assert float(value.detach()) == 0
    for factor in factors:
        assert factor.grad is not None and torch.equal(factor.grad, torch.zeros_like(factor))


@given(st.integers(0, 10_000), shapes(wide=True))
@settings(max_examples=8)
def test_descending_it_makes_the_rows_orthonormal(seed: int, sizes: list[tuple[int, int]]) -> None:
    factors = [
        (f / max(1.0, float(torch.linalg.matrix_norm(f, 2)))).requires_grad_() for f in random_factors(seed, sizes)
    ]
    optimizer = torch.optim.SGD(factors, lr=0.1)
    values = []
    for _ in range(200):
        optimizer.zero_grad()
        value = orthogonality(factors, "squared")
        values.append(float(value.detach()))
        value.backward()
        optimizer.step()
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values))
    for factor in factors:
        gram = (factor @ factor.T).detach()
        assert torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-6), gram


@pytest.mark.parametrize("norm", ORACLES)
def test_order_and_grouping_do_not_matter(norm: str) -> None:
    factors = random_factors(5, [(2, 3), (4, 6), (2, 3), (3, 3), (4, 6)])
    whole = float(orthogonality(factors, norm))
    assert float(orthogonality(factors[::-1], norm)) == pytest.approx(whole, rel=1e-13)
    each = [float(orthogonality([f], norm)) for f in factors]
    assert whole == pytest.approx(sum(each) / (len(each) if norm == "mean" else 1), rel=1e-13)


@pytest.mark.parametrize("norm", ORACLES)
def test_transposed_views_and_single_precision(norm: str) -> None:
    """P comes as P.T, a view: the same value, and the gradient reaches P."""
    p = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = orthogonality([p.T], norm)
    value.backward()
    want = ORACLES[norm]([p.detach().double().numpy().T])
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(want, rel=1e-5)
    assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", ["squared", "mean"])
def test_under_autocast_it_is_what_it_is_without(norm):
    factors = [torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)]
    plain = orthogonality(factors, norm)
    grads = torch.autograd.grad(plain, factors)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = orthogonality(factors, norm)
    assert torch.equal(penalty, plain)
    assert all(map(torch.equal, torch.autograd.grad(penalty, factors), grads))


@pytest.mark.parametrize("norm", ["squared", "mean"])
@pytest.mark.parametrize("turned", [False, True])
def test_second_derivatives(norm, turned):
    torch.manual_seed(0)
    factors = [torch.randn(3, 5, dtype=torch.float64) for _ in range(2)]
    factors = [(f.t().contiguous().t() if turned else f).requires_grad_() for f in factors]

    def plain():
        deviations = [f @ f.t() - torch.eye(3, dtype=torch.float64) for f in factors]
        if norm == "squared":
            return sum(d.square().sum() for d in deviations)
        return sum(d.square().sum().sqrt() for d in deviations) / 2

    found = []
    for value in (orthogonality(factors, norm), plain()):
        first = torch.autograd.grad(value, factors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), factors)
        found.append([*first, *second])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_autocast_around_backward_alone_changes_nothing():
    factor = torch.randn(4, 6, requires_grad=True)
    (want,) = torch.autograd.grad(orthogonality([factor]), [factor])
    value = orthogonality([factor])
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(value, [factor])
    assert torch.equal(found, want)
