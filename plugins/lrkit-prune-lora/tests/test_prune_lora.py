"""Prune-LoRA and LoRA_regu against float64 loops; what is lost stays lost."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import folders
import lrkit_prune_lora
import models
import numpy as np
import oracles
import paper_settings
import pytest
import torch
from command_line import ask
from hypothesis import given
from hypothesis import strategies as st
from lrkit_prune_lora import RegularisedLoRA, mean_cosine

import lrkit
from lrkit.registry import Registry
from lrkit.study.execute import check
from lrkit.study.plan import lay_out, read_study
from lrkit.testing import MethodContract, ParameterizationContract, only, resumes


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    with only(lrkit_prune_lora, distribution="lrkit-prune-lora 0.2.0") as made:
        yield made


SHORT = lrkit_prune_lora.prune_lora(rank=4, target_rank=2, warmup=2, final=4, interval=1)


class TestRegularisedLoRA(ParameterizationContract):
    component = (RegularisedLoRA(rank=4), RegularisedLoRA(rank=4, orthogonality_norm="cosine"))


class TestMethods(MethodContract):
    component = (
        lrkit_prune_lora.prune_lora,
        lrkit_prune_lora.lora_regu,
        lrkit_prune_lora.lora_regu(variant="released"),
    )


def run(method: lrkit.Method, total: int, watch: Any = None) -> tuple[Any, Any]:
    model = models.make("bert").eval()
    torch.manual_seed(1)
    adapted = lrkit.attach(model, method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    if watch is not None:
        optimizer.register_step_pre_hook(lambda *_: watch(adapted))
    adapted.bind(optimizer, total_steps=total)
    for step in range(total):
        (model(**models.batch(step)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, adapted


def test_doublets_are_the_oracle_s() -> None:
    """Scores, budget and the doublets that go, from weights and gradients as the optimizer finds them."""
    statistics: dict[tuple[str, str], oracles.Statistics] = {}
    alive: dict[str, np.ndarray] = {}
    seen = 0

    def watch(adapted: Any) -> None:
        nonlocal seen
        if seen:  # what the decision after the step before has done
            check(adapted, seen)
        seen += 1
        for name, adapter in adapted.adapters.items():
            for part, p, g in (("A", adapter.A, adapter.A.grad), ("B", adapter.B.t(), adapter.B.grad.t())):
                w, grad = p.detach().double().numpy(), g.double().numpy()
                key = (name, part)
                statistics.setdefault(key, oracles.Statistics("sensitivity-uncertainty", w.shape, 0.85, 0.85))
                statistics[key].observe(w, grad)

    def check(adapted: Any, step: int) -> None:
        names = list(adapted.adapters)
        scores, rows = [], []
        for name in names:
            a, b = (statistics[name, part].score().mean(axis=1) for part in "AB")
            scores += list(a + b)
            adapter = adapted.adapters[name]
            rows += list(((adapter.A != 0).any(dim=1) | (adapter.B != 0).any(dim=0)).numpy())
        units, now = len(scores), np.array(rows)
        before = alive.get("all", np.ones(units, bool))
        budget = oracles.budget(step, total=12, warmup=2, final=4, b0=units, bT=2 * len(names))
        if 2 < step <= 8:
            assert int(now.sum()) == budget
            assert not (now & ~before).any(), "nothing comes back"
            ranked = [s if was else -1.0 for s, was in zip(scores, before, strict=True)]
            assert oracles.choices_agree(list(now), ranked, budget)
        else:
            assert (now == before).all()
        alive["all"] = now

    _, adapted = run(SHORT, 12, watch)
    assert seen == 12
    assert int(alive["all"].sum()) == 2 * len(adapted.adapters)
    assert adapted.history[-1].kept == 2 * len(adapted.adapters)


def test_lost_doublets_are_zero_to_the_end_and_can_be_cut() -> None:
    model, adapted = run(SHORT, 14)
    lost = {name for decision in adapted.history for name in decision.lost}
    assert len(lost) == 2 * len(adapted.adapters) and not any(decision.returned for decision in adapted.history)
    for name in lost:
        layer, _, index = name.rstrip("]").rpartition("[")
        adapter = adapted.adapters[layer]
        assert not adapter.A[int(index)].any() and not adapter.B[:, int(index)].any()
    before = model(**models.batch()).logits
    assert sum(adapted.compact().values()) == 2 * len(adapted.adapters)
    torch.testing.assert_close(model(**models.batch()).logits, before)


def cosines(factor: np.ndarray) -> float:
    values = []
    for i, one in enumerate(factor):
        for j, two in enumerate(factor):
            if i != j:
                length = np.linalg.norm(one) * np.linalg.norm(two)
                values.append(abs(float(one @ two)) / length if length else 0.0)
    return sum(values) / len(values) if values else 0.0


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_the_mean_cosine(seed: int, rank: int, size: int, zero: bool) -> None:
    rng = np.random.default_rng(seed)
    factors = [rng.standard_normal((rank, size)), rng.standard_normal((rank, size + 1))]
    if zero:
        factors[0][0] = 0
    tensors = [torch.tensor(f, requires_grad=True) for f in factors]
    value = mean_cosine(tensors)
    assert value.item() == pytest.approx(np.mean([cosines(f) for f in factors]), abs=1e-12)
    value.backward()
    assert all(torch.isfinite(t.grad).all() for t in tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_penalty_of_a_model(variant: Any) -> None:
    method = lrkit_prune_lora.lora_regu(rank=3, orthogonality=0.3, variant=variant)
    model = models.make("bert").double()
    adapted = lrkit.attach(model, method)
    for adapter in adapted.adapters.values():
        torch.nn.init.normal_(adapter.B)
    a = [m.A.detach().double().numpy() for m in adapted.adapters.values()]
    b = [m.B.detach().double().numpy().T for m in adapted.adapters.values()]
    wanted = oracles.orthogonality_squared(a + b) if variant == "paper" else np.mean([cosines(f) for f in a + b])
    assert adapted.penalty().item() == pytest.approx(0.3 * wanted)


def test_no_penalty_is_lora() -> None:
    model, _ = run(lrkit_prune_lora.lora_regu(orthogonality=0.0), 4)
    other, _ = run(lrkit.methods.lora(), 4)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_resumed_run_is_the_run() -> None:
    resumes(SHORT, 12, (1, 4, 7, 11))
    penalised = RegularisedLoRA(rank=4, orthogonality_norm="cosine")
    resumes(attrs.evolve(SHORT, parameterization=penalised), 10, (3, 8))


def test_the_command_line_counts_and_trains_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, data = folders.write_model(tmp_path / "model"), folders.write_data(tmp_path / "data")
    short = ("--model", model, "--data", data, "--set", "run.steps=12", "--set", "run.batch_size=8", "--set", "rank=4")

    call = functools.partial(ask, capsys)
    counted = call("params", "prune-lora", "lora-regu", "--model", "deberta-v3-base")["methods"]
    assert counted["prune-lora"]["start"] == 12 * 165_888
    assert counted["prune-lora"]["end"] == pytest.approx(8 * 165_888)
    assert counted["lora-regu"]["start"] == counted["lora-regu"]["end"] == 8 * 165_888
    told = call("run", "prune-lora", "--set", "target_rank=2", *short)
    assert sum(layer["rank"] for layer in told["summary"]["layers"]) == 2 * len(told["summary"]["layers"])
    assert call("run", "lora-regu", *short)["steps"] == 12


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(lrkit.LrkitError, match='lora_regu variant must be "paper" or "released"'):
        lrkit_prune_lora.lora_regu(variant="code")  # type: ignore[arg-type]
    with pytest.raises(lrkit.LrkitError, match=r'orthogonality_norm must be one of .*did you mean "cosine"'):
        RegularisedLoRA(orthogonality_norm="cosin")


# ---- the papers' tables ----------------------------------------------------------------------------------------------


def plan_of(name: str, profile: str) -> Any:
    plan = lay_out(read_study(name, profile=profile))
    if profile == "minilm":
        paper_settings.check_minilm(plan)
        check(plan)
    return plan


def place_of(row: Any) -> tuple[str, str]:
    kind, budget = row.label.split(", ")
    assert budget in paper_settings.BUDGETS
    return kind, budget


@pytest.mark.parametrize("profile", ["minilm", "paper"])
def test_adalora_s_table_four(profile: str) -> None:
    """Three metrics and Prune-LoRA at each budget, from the paper's ranks."""
    plan = plan_of("adalora-table-4", profile)
    if profile == "paper":
        paper_settings.check_adalora(plan, ["sst2", "rte", "cola"])
    kinds = {
        "AdaLoRA": (lrkit.metrics.SensitivityUncertainty, lrkit.parameterizations.SVD),
        "s = I": (lrkit.metrics.Sensitivity, lrkit.parameterizations.SVD),
        "abs(λ)": (lrkit.metrics.Magnitude, lrkit.parameterizations.SVD),
        "Prune-LoRA": (lrkit.metrics.SensitivityUncertainty, lrkit.parameterizations.LoRA),
    }
    budgets = ["0.65 %"] if profile == "minilm" else ["0.08 %", "0.16 %", "0.65 %"]
    found = {place_of(row): row.method for row in plan.rows}
    assert found.keys() == {(kind, budget) for kind in kinds for budget in budgets}
    for (kind, budget), method in found.items():
        assert (type(method.metric), type(method.parameterization)) == kinds[kind]
        assert (method.scheduler.target, method.parameterization.rank) == paper_settings.BUDGETS[budget]
        assert getattr(method.metric, "smoothed", False) is False, "the paper writes the raw I"
        zero = method.action == lrkit.actions.Zero(once=True)
        assert zero == (kind == "Prune-LoRA")


@pytest.mark.parametrize("profile", ["minilm", "paper"])
def test_adalora_s_table_five(profile: str) -> None:
    """The penalty and the allocation, each left out, at each budget that the paper has."""
    plan = plan_of("adalora-table-5", profile)
    if profile == "paper":
        paper_settings.check_adalora(plan, ["sst2", "mnli"])
    absent = {("LoRA_regu", "0.08 %"), ("LoRA", "0.32 %")}
    budgets = ["0.65 %"] if profile == "minilm" else list(paper_settings.BUDGETS)
    kinds = ("AdaLoRA", "γ = 0", "SVD-LoRA", "LoRA_regu", "LoRA")
    found = {place_of(row): row.method for row in plan.rows}
    assert found.keys() == {(kind, budget) for kind in kinds for budget in budgets} - absent
    for (kind, budget), method in found.items():
        target, rank = paper_settings.BUDGETS[budget]
        adaptive = kind in ("AdaLoRA", "γ = 0")
        assert (method.scheduler is not None) == adaptive
        assert method.parameterization.rank == (rank if adaptive else target)
        assert getattr(method.scheduler, "target", target) == target
        forms = {"LoRA": lrkit.parameterizations.LoRA, "LoRA_regu": RegularisedLoRA}
        assert type(method.parameterization) is forms.get(kind, lrkit.parameterizations.SVD)
        assert (getattr(method.parameterization, "orthogonality", 0) > 0) == (kind not in ("γ = 0", "LoRA"))
