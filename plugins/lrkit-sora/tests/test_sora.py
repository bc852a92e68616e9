"""SoRA: its operator against the minimisation that defines it, its runs against a plain loop, its counts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import folders
import lrkit_sora
import models
import numpy as np
import paper_settings
import pytest
import torch
from command_line import ask
from hypothesis import given
from hypothesis import strategies as st
from lrkit_sora import GatedLoRA, SoftThreshold, Staged
from lrkit_sora.gates import soft_threshold
from torch import nn

import lrkit
from lrkit.registry import Registry
from lrkit.study.execute import check
from lrkit.study.plan import lay_out, read_study
from lrkit.testing import ActionContract, MethodContract, ParameterizationContract, SchedulerContract, only, resumes


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    with only(lrkit_sora, distribution="lrkit-sora 0.2.0") as made:
        yield made


class TestGatedLoRA(ParameterizationContract):
    component = (GatedLoRA(rank=4), GatedLoRA(rank=2, dropout=0.1))


class TestStaged(SchedulerContract):
    component = (Staged(), Staged(stages=1), Staged(stages=3, target=2))


class TestSoftThreshold(ActionContract):
    component = (SoftThreshold(strength=20.0), SoftThreshold(strength=0.05, variant="released"))
    exact = False  # whoever the threshold leaves is kept


class TestSora(MethodContract):
    component = (lrkit_sora.sora, lrkit_sora.sora(rank=6, strength=30.0, stages=2, warmup=0.1))


numbers = st.floats(-5, 5, allow_nan=False, width=32)


@given(numbers, st.floats(0, 3, width=32))
def test_the_operator_minimises_what_it_is_the_proximal_operator_of(v: float, xi: float) -> None:
    """argmin over x of (x - v)² / 2 + ξ abs(x): no point of a fine grid, nor any near by, is better."""

    def objective(x: Any) -> Any:
        return (np.asarray(x) - v) ** 2 / 2 + xi * np.abs(x)

    found = float(soft_threshold(torch.tensor([v], dtype=torch.float64), torch.tensor([xi], dtype=torch.float64)))
    around = found + np.concatenate([np.linspace(-6, 6, 2001), [-1e-4, 1e-4]])
    assert objective(found) <= objective(around).min() + 1e-12
    assert found == 0.0 if abs(v) <= xi else found == pytest.approx(v - np.sign(v) * xi, abs=1e-12)


def released(p: float, xi: float) -> float:
    """The code's three in-place lines, on one number."""
    if p > xi:
        p -= xi
    if p < -xi:
        p += xi
    return 0.0 if abs(p) < xi else p


def run(
    method: lrkit.Method, steps: int, total: int, optimizer: Any = None, watch: Any = None
) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    model = models.make("bert").eval()
    torch.manual_seed(1)
    adapted = lrkit.attach(model, method)
    optimizer = (optimizer or (lambda a: torch.optim.AdamW(a.parameters(), lr=1e-2)))(adapted)
    if watch is not None:
        optimizer.register_step_post_hook(lambda *_: watch(adapted))  # before lrkit's own
    adapted.bind(optimizer, total_steps=total)
    for step in range(steps):
        model(**models.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, adapted, optimizer


def gates(adapted: Any) -> np.ndarray:
    return torch.cat([a.core.detach() for a in adapted.adapters.values()]).double().numpy()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_gates_are_shrunk_by_xi_after_each_step(variant: Any) -> None:
    """ξ = η λ k/n with the gates' own rate, and half of the gates at another one; stages of equal length."""
    strength = 8.0 if variant == "paper" else 0.05
    method = lrkit_sora.sora(rank=3, strength=strength, stages=3, warmup=2, variant=variant)
    seen: list[np.ndarray] = []

    def optimizer(adapted: Any) -> torch.optim.Optimizer:
        cores = [a.core for a in adapted.adapters.values()]
        slow = cores[: len(cores) // 2]
        ids = {id(p) for p in slow}
        rest = [p for p in adapted.parameters() if id(p) not in ids]
        return torch.optim.AdamW([{"params": rest, "lr": 2e-2}, {"params": slow, "lr": 5e-3}])

    after: list[np.ndarray] = []
    for steps in range(1, 12):  # each run once more, one step longer: what hooks see is then what a caller sees
        seen.clear()
        _, adapted, _ = run(method, steps, 11, optimizer, lambda a: seen.append(gates(a)))
        after.append(gates(adapted))
    count = len(adapted.adapters) // 2
    rates = np.repeat([5e-3] * count + [2e-2] * (len(adapted.adapters) - count), 3)
    for step, (before, now) in enumerate(zip(seen, after, strict=True), start=1):
        stage = 0 if step <= 2 else int(np.ceil((step - 2) / 3))
        xi = strength * stage / 3 * (rates if variant == "paper" else np.ones_like(rates))
        if variant == "paper":
            wanted = np.sign(before) * np.maximum(np.abs(before) - xi, 0)
        else:
            wanted = np.array([released(p, x) for p, x in zip(before, xi, strict=True)])
        np.testing.assert_allclose(now, wanted, atol=1e-6)
        if stage == 0:
            assert [d for d in adapted.history if d.step == step] == []
        else:
            (decision,) = [d for d in adapted.history if d.step == step]
            assert decision.kept == np.count_nonzero(now)
    assert 0 < np.count_nonzero(now) < len(now), "some are out, some are left"
    assert sum(layer.rank for layer in adapted.summary().layers) == np.count_nonzero(now)


def test_zero_strength_is_gated_lora_without_a_policy() -> None:
    model, adapted, _ = run(lrkit_sora.sora(strength=0.0, warmup=0), 6, 6)
    other, plain, _ = run(lrkit.Method(parameterization=GatedLoRA()), 6, 6)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())
    assert adapted.summary().now == plain.summary().now
    assert len(adapted.history) == 6


def test_a_gate_at_zero_can_come_back() -> None:
    method = lrkit_sora.sora(strength=0.5, stages=1, warmup=0)
    model = models.make("bert").eval()
    adapted = lrkit.attach(model, method)
    adapter = next(iter(adapted.adapters.values()))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
    adapted.bind(optimizer, total_steps=2)
    with torch.no_grad():
        adapter.core.zero_()
    for grad in (0.0, 1.0):
        for p in adapted.parameters():
            p.grad = torch.zeros_like(p)
        adapter.core.grad[1] = grad
        optimizer.step()
    assert adapter.core.tolist() == pytest.approx([0.0, -5e-4, 0.0, 0.0])
    assert [name.rpartition("[")[2] for name in adapted.history[-1].returned] == ["1]"]


def test_cut_at_the_end_and_taken_out() -> None:
    method = lrkit_sora.sora(strength=20.0, stages=2, warmup=0)
    model, adapted, _ = run(method, 10, 10)
    before = model(**models.batch()).logits
    left = {name: int((a.core != 0).sum()) for name, a in adapted.adapters.items()}
    assert 0 < sum(left.values()) < 4 * len(left)
    assert adapted.compact() == left
    torch.testing.assert_close(model(**models.batch()).logits, before)
    model = adapted.merge()
    torch.testing.assert_close(model(**models.batch()).logits, before, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_run() -> None:
    method = lrkit_sora.sora(rank=3, strength=30.0, stages=3, warmup=2)
    ended = resumes(method, 14, (1, 4, 9, 13))
    assert any(layer.rank < 3 for layer in ended.adapted.summary().layers)


def test_the_command_line_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = ask(capsys, "params", "sora", "--model", "deberta-v3-base")["methods"]["sora"]
    assert told["start"] == 663_552 + 72 * 4 and told["core"] == 72 * 4
    assert told["end"] == told["start"], "how many go is known only after a run"
    assert told["end_range"] == [0, told["start"]]


def test_the_command_line_trains_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, data = folders.write_model(tmp_path / "model"), folders.write_data(tmp_path / "data")
    short = ("--model", model, "--data", data, "--set", "run.steps=20", "--set", "run.batch_size=12")
    told = ask(capsys, "run", "sora", "--set", "strength=10.0", "--set", "run.lr=0.01", *short)
    assert told["steps"] == 20 and told["summary"]["now"] < told["summary"]["start"]


def test_it_learns(tmp_path: Path) -> None:
    """The loss falls by a clear margin on the tiny model while gates go."""
    method = lrkit_sora.sora(strength=5.0)
    torch.manual_seed(0)
    model = models.make("bert").eval()
    adapted = lrkit.attach(model, method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=40)
    losses = []
    for _ in range(40):
        loss = model(**models.batch()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(lrkit.LrkitError, match=r"SoftThreshold.* does not fit .*LoRA.*core value"):
        attrs.evolve(
            lrkit_sora.sora(), parameterization=lrkit.parameterizations.LoRA(), metric=lrkit.metrics.Sensitivity()
        )
    strengths = [lrkit_sora.sora(variant=each).action.strength for each in ("paper", "released")]  # type: ignore[union-attr]
    assert strengths == [0.6, 7e-4], "λ and ξ: at a rate of 1.2e-3 nearly the same threshold"
    with pytest.raises(lrkit.LrkitError, match='sora variant must be "paper" or "released"'):
        lrkit_sora.sora(variant="code")  # type: ignore[arg-type]
    assert copy.deepcopy(lrkit_sora.sora()) == lrkit_sora.sora()


@pytest.mark.parametrize("profile", ["minilm", "paper"])
def test_aflora_s_table_one(profile: str) -> None:
    """The table's methods at its ranks; on each task AFLoRA trains by the paper's settings, and the others by their own."""
    plan = lay_out(read_study("aflora-table-1", profile=profile))
    ranks = {row.label: getattr(row.method.parameterization, "rank", None) for row in plan.rows}
    assert ranks == {"AFLoRA": 4, "FFT": None, "LoRA, r = 8": 8, "AdaLoRA": 12, "SoRA, r = 4": 4, "ELoRA": 1024}
    if profile == "minilm":
        paper_settings.check_minilm(plan)
        check(plan)
        return
    paper_settings.check_aflora(plan, ["cola", "sst2", "mrpc", "qnli", "stsb", "rte", "mnli", "qqp"])
    for task in plan.tasks:
        schedules = {row.label: plan.method(row, task).scheduler for row in plan.rows if row.method.scheduler}
        ada, sora = schedules["AdaLoRA"], schedules["SoRA, r = 4"]
        assert (ada.warmup, ada.final, ada.target) == (0.15, 0.5, 8), "AFLoRA's phases are not AdaLoRA's"
        assert sora == lrkit_sora.sora().scheduler
