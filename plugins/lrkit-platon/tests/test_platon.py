"""PLATON against a loop over single numbers, LoSparse against W = U V + S, and what is pruned, cut, merged and resumed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import folders
import lrkit_platon
import models
import numpy as np
import pytest
import torch
from command_line import ask
from hypothesis import given, settings
from hypothesis import strategies as st
from lrkit_platon import LoSparse, LowRankPlusRows, Platon, ZeroBelow
from torch import nn

import lrkit
from lrkit.actions import Ballot
from lrkit.loop.native import kernel_of
from lrkit.registry import Registry
from lrkit.testing import ActionContract, MethodContract, MetricContract, ParameterizationContract, only, resumes


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    with only(lrkit_platon, distribution="lrkit-platon 0.2.0") as made:
        yield made


# In the second the rows of FFN's output are wider than all others.
WIDTHS = {
    "one width": r".*(query|key|value|attention\.output\.dense|intermediate\.dense)",
    "several widths": "all-linear",
}


class TestPlaton(MetricContract):
    component = (Platon(), Platon(window=1), Platon(window=3))


class TestZeroBelow(ActionContract):
    component = ZeroBelow()
    parameterizations = (LoSparse(),)
    exact = False  # ties are kept


class TestLoSparse(ParameterizationContract):
    component = (LoSparse(), LoSparse(ratio=0.4))


class TestMethod(MethodContract):
    component = (lrkit_platon.losparse, lrkit_platon.losparse(variant="released"))


def by_hand(values: list[tuple[float, float]], window: int, beta1: float, beta2: float) -> float:
    """The algorithm on one number, step by step from 0, as it is written: at local step 0 the last window is taken in."""
    mean = spread = local = 0.0
    for t, (w, g) in enumerate(values):
        place = t % window
        if place == 0:
            mean = beta1 * mean + (1 - beta1) * local
            spread = beta2 * spread + (1 - beta2) * abs(local - mean)
            local = abs(w * g)
        else:
            local = (local * place + abs(w * g)) / (place + 1)
    return mean if beta2 == 1 else mean * spread


@given(
    st.lists(st.tuples(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32)), min_size=1, max_size=40),
    st.integers(2, 11),
    st.floats(0, 0.99),
    st.floats(0, 0.99) | st.just(1.0),
)
@settings(max_examples=60)
def test_the_score_of_one_entry(values: list[tuple[float, float]], window: int, beta1: float, beta2: float) -> None:
    metric = Platon(window=window, beta1=beta1, beta2=beta2)
    state = {name: torch.zeros(1) for name in metric.buffers}
    for step, (w, g) in enumerate(values, start=1):
        metric.observe(torch.tensor([w]), torch.tensor([g]), state, step)
    wanted = by_hand(values, window, beta1, beta2)
    assert metric.score(torch.zeros(1), state).item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_defaults_are_platon_s() -> None:
    assert attrs.asdict(Platon()) == {"measure": "before-step", "beta1": 0.85, "beta2": 0.95, "window": 10}
    assert kernel_of(Platon()) is None and kernel_of(Platon(window=1)) is None, "compiled for lrkit's own alone"


def kept(scores: list[float], share: float, sizes: list[int] | None = None) -> list[bool]:
    each = torch.tensor(scores)
    ones = torch.ones(len(scores), dtype=torch.bool)
    told = None if sizes is None else torch.tensor(sizes)
    ballot = Ballot(each, ones, int(len(scores) * share), share, each, ones.long(), ones.long() * 0, told)
    found: list[bool] = ZeroBelow().decide(ballot).kept.tolist()
    return found


def test_strictly_below() -> None:
    assert kept([3, 1, 2, 4], 0.5) == [True, False, True, True], "the 2nd smallest is the threshold, and stays"
    assert kept([3, 1, 2, 4], 0.55) == [True, False, True, True], "1.8 of 4: the 2nd smallest again"
    assert kept([1, 1, 1, 4], 0.25) == [True] * 4, "all of a tie stay"
    assert kept([3, 1, 2, 4], 1.0) == [True] * 4


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=30),
    st.integers(0, 100),
    st.booleans(),
)
def test_threshold_over_entries(rows: list[tuple[int, int]], percent: int, even: bool) -> None:
    """As the released code: every entry of a row carries its score, and the k-th smallest of all entries decides."""
    sizes, scores = [3 if even else size for size, _ in rows], [score for _, score in rows]
    share = percent / 100
    entries = sorted(score for size, score in zip(sizes, scores, strict=True) for _ in range(size))
    k = int(len(entries) * (1 - share))
    wanted = [score >= entries[k - 1] for score in scores] if k else [True] * len(rows)
    assert kept(scores, share, sizes) == wanted
    if even and len(entries) * (1 - share) == k:
        assert kept(scores, share) == wanted, "of one width the rows alone say it"


class ReleasedPruner:
    """LoSparse's pruner in numpy, from what its released scripts do (β2 = 1): rows of S by Ī of windows."""

    def __init__(self, total: int, first: int, last: int, window: int, target: float) -> None:
        self.total, self.first, self.last, self.window, self.target = total, first, last, window, target
        self.local: dict[str, np.ndarray] = {}
        self.mean: dict[str, np.ndarray] = {}

    def after_step(
        self, step: int, weights: dict[str, np.ndarray], grads: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Rows that become zero at a step (0, 1, ...), by layer; nothing where no mask is due."""
        for name, w in weights.items():
            now = np.abs(w * grads[name])
            if step % self.window == 0:
                taken = self.local.get(name, np.zeros_like(w))
                self.mean[name] = 0.85 * self.mean.get(name, 0.0) + 0.15 * taken
                self.local[name] = now
            else:
                place = step % self.window
                self.local[name] = (self.local[name] * place + now) / (place + 1)
        if step <= self.first:
            return {}
        if step > self.total - self.last:
            share = self.target
        elif step % self.window == 0:
            left = 1 - (step - self.first) / (self.total - self.first - self.last)
            share = self.target + (1 - self.target) * left**3
        else:
            return {}
        rows = {name: self.mean[name].mean(axis=1) for name in weights}
        entries = np.sort(np.concatenate([np.repeat(rows[name], weights[name].shape[1]) for name in weights]))
        threshold = entries[int(len(entries) * (1 - share)) - 1]
        return {name: score < threshold for name, score in rows.items()}


@pytest.mark.parametrize("target", [0.15, 0.33])
@pytest.mark.parametrize("targets", WIDTHS)
def test_released_masks_are_its_pruner_s(targets: str, target: float) -> None:
    """At every step the rows that are zero are the released code's, its last phase included."""
    total, first, last, window = 40, 4, 17, 3
    method = lrkit_platon.losparse(
        ratio=0.2, target=target, warmup=first, final=last, window=window, variant="released"
    )
    model = models.make("bert").eval()
    torch.manual_seed(1)
    adapted = lrkit.attach(model, method, targets=WIDTHS[targets])
    assert (len({a.S.shape[1] for a in adapted.adapters.values()}) > 1) == (targets == "several widths")
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=3e-3)
    pruner, wanted = ReleasedPruner(total, first, last, window, target), {}

    def watch(*_: Any) -> None:
        tensors = {name: a.S for name, a in adapted.adapters.items()}
        weights = {name: s.detach().double().numpy() for name, s in tensors.items()}
        grads = {name: s.grad.double().numpy() for name, s in tensors.items()}
        wanted[step] = pruner.after_step(step, weights, grads)

    optimizer.register_step_post_hook(watch)  # before the method's own
    adapted.bind(optimizer, total_steps=total)
    for step in range(total):
        model(**models.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, adapter in adapted.adapters.items():
            zero = ~(adapter.S.detach() != 0).any(dim=1).numpy()
            assert (zero == wanted[step].get(name, np.zeros(len(zero), bool))).all(), (step, name)
    masked = [step for step in wanted if wanted[step]]
    assert masked == [*range(6, total - last + 1, window), *range(total - last + 1, total)]
    assert len({tuple(np.concatenate(list(wanted[s].values()))) for s in masked[-last:]}) > 1, (
        "rows still change places"
    )


def test_momentum_of_a_pruned_row_is_kept() -> None:
    """The released code zeroes weights alone; the paper's action zeroes the optimizer's state with them."""
    for action, left in ((ZeroBelow(), True), (ZeroBelow(keep_momentum=False), False), (lrkit.actions.Zero(), False)):
        method = attrs.evolve(SHORT, action=action)
        _, adapted, optimizer = run(method, 10, 20)
        lost = [(a.S, ~(a.S != 0).any(dim=1)) for a in adapted.adapters.values()]
        moments = torch.cat([optimizer.state[s]["exp_avg"][rows].flatten() for s, rows in lost])
        assert len(moments) and bool(moments.any()) == left


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_w_is_u_v_plus_s(name: str) -> None:
    model = models.make(name).eval()
    ids = models.batch()
    plain, state = model(**ids).logits.detach(), {n: t.clone() for n, t in model.state_dict().items()}
    adapted = lrkit.attach(model, lrkit.Method(parameterization=LoSparse(ratio=0.3)))
    torch.testing.assert_close(model(**ids).logits, plain, rtol=1e-5, atol=1e-6)
    for adapter in adapted.adapters.values():
        w = adapter.base.weight.detach().double()
        w = w.t() if name == "gpt2" else w
        u, v, s = (p.detach().double() for p in (adapter.U, adapter.V, adapter.S))
        rank = math.ceil(0.3 * w.numel() / sum(w.shape))
        assert u.shape == (w.shape[0], rank) and v.shape == (rank, w.shape[1])
        torch.testing.assert_close(u @ v + s, w, rtol=0, atol=1e-7)
        sigma = torch.linalg.svdvals(w)
        assert (w - u @ v).norm().item() == pytest.approx(sigma[rank:].norm().item(), rel=1e-5), "the best of its rank"
    adapted.detach()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in state.items())


def run(method: lrkit.Method, steps: int, total: int, targets: str = "all-linear") -> tuple[Any, Any, Any]:
    model = models.make("bert").eval()
    torch.manual_seed(1)
    adapted = lrkit.attach(model, method, targets=targets)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
    adapted.bind(optimizer, total_steps=total)
    for step in range(steps):
        model(**models.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, adapted, optimizer


SHORT = lrkit_platon.losparse(ratio=0.2, target=0.3, warmup=4, final=6, window=3)


def zero_rows(adapted: Any) -> torch.Tensor:
    return torch.cat([~(a.S != 0).any(dim=1) for a in adapted.adapters.values()])


@pytest.mark.parametrize("released", [False, True])
def test_rows_are_pruned_and_grow_again_until_the_last_decision(released: bool) -> None:
    method = attrs.evolve(SHORT, action=ZeroBelow()) if released else SHORT
    targets = WIDTHS["one width" if released else "several widths"]
    _, adapted, _ = run(method, 10, 20, targets)  # numbered from 0: decisions after steps 7, 10, 13 and at the end, 15
    decision = adapted.history[-1]
    assert decision.step == 10 and int((~zero_rows(adapted)).sum()) == decision.kept
    assert released <= decision.kept - decision.budget <= 2 * released
    _, adapted, _ = run(method, 11, 20, targets)
    assert not zero_rows(adapted).any(), "a step later all of them have moved"
    _, adapted, _ = run(method, 20, 20, targets)
    assert adapted.history[-1].step == 15
    last = adapted.history[-1]
    assert int((~zero_rows(adapted)).sum()) == last.kept
    assert last.budget == round(0.3 * last.units)
    below = math.ceil(last.units * 0.7)  # of the released code; the k-th itself stays
    assert last.kept == (last.units - below + 1 if released else last.budget)


def test_rows_are_cut_saved_and_merged(tmp_path: Path) -> None:
    model, adapted, _ = run(SHORT, 20, 20)
    ids = models.batch(50)
    before = model(**ids).logits.detach()
    ranks = adapted.compact()
    assert sum(ranks.values()) == adapted.history[-1].kept
    torch.testing.assert_close(model(**ids).logits, before)
    assert all(len(a.S) == len(a.rows) == ranks[n] for n, a in adapted.adapters.items())
    adapted.save(tmp_path)
    loaded = lrkit.load(models.make("bert"), tmp_path)
    torch.testing.assert_close(loaded.model.eval()(**ids).logits, before)
    torch.testing.assert_close(adapted.merge()(**ids).logits, before, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_run() -> None:
    resumes(SHORT, 16, (1, 6, 11, 15))
    released = lrkit_platon.losparse(ratio=0.2, target=0.3, warmup=4, final=6, window=3, variant="released")
    resumes(released, 16, (6, 12, 15))


def test_other_precisions() -> None:
    model = models.make("bert").bfloat16()
    adapted = lrkit.attach(model, SHORT)
    assert {p.dtype for p in adapted.adapter_parameters()} == {torch.float32}
    model(**models.batch()).loss.backward()
    model = models.make("bert")
    adapted = lrkit.attach(model, SHORT)
    with torch.autocast("cpu", torch.bfloat16):
        model(**models.batch()).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters())


def test_the_command_line_counts_and_trains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, data = folders.write_model(tmp_path / "model"), folders.write_data(tmp_path / "data")
    short = ("--model", model, "--data", data, "--set", "run.steps=20", "--set", "run.batch_size=8")

    call = functools.partial(ask, capsys)
    counted = call("params", "losparse", "--model", "deberta-v3-base")["methods"]["losparse"]
    square, ffn = 768 * 768 + 20 * 2 * 768, 768 * 3072 + 31 * (768 + 3072)
    assert counted["start"] == 12 * (4 * square + 2 * ffn)
    rows = 12 * (5 * 768 + 3072)
    low = 12 * (4 * 20 * 2 * 768 + 2 * 31 * (768 + 3072))
    assert counted["end"] == pytest.approx(low + 84_934_656 * round(0.15 * rows) / rows)
    told = call("run", "losparse", "--set", "window=3", *short)
    assert told["steps"] == 20 and told["summary"]["now"] < told["summary"]["start"]
    swapped = call("run", "adalora", "--swap", "metric=platon", "--set", "metric.window=3", "--set", "rank=2",
                   "--set", "target_rank=1", *short)  # fmt: skip
    assert swapped["method"]["metric"]["name"] == "platon"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(lrkit.LrkitError, match=r"Prune.*does not fit.*LoSparse.*core value"):
        attrs.evolve(SHORT, action=lrkit.actions.Prune())
    with pytest.raises(lrkit.LrkitError, match='losparse variant must be "paper" or "released"'):
        lrkit_platon.losparse(variant="code")  # type: ignore[arg-type]
    assert issubclass(LowRankPlusRows, torch.nn.Module)


@pytest.mark.parametrize("layer", [nn.Embedding(5, 4), nn.Conv1d(4, 4, 1)])
def test_linear_maps_alone_are_taken_apart(layer: nn.Module) -> None:
    """Another layer's weight is refused in one line, before anything computes with it."""
    with pytest.raises(lrkit.LrkitError, match=f"0: LoSparse takes linear maps apart, not a {type(layer).__name__}"):
        lrkit.attach(nn.Sequential(layer), lrkit_platon.losparse(), targets=["0"], train_also=())
