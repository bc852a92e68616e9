"""DyLoRA: whole runs against a plain loop in float64, draws, and the model of any rank."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import lrkit_dylora
import models
import pytest
import rigs
import torch
from command_line import ask
from lrkit_dylora import AtEachStep, Draw, NestedLoRA, Position, truncate
from torch import nn
from torch.nn import functional as F

import lrkit
from lrkit.actions import Ballot
from lrkit.peft import export
from lrkit.registry import Registry
from lrkit.testing import (
    ActionContract,
    MethodContract,
    MetricContract,
    ParameterizationContract,
    SchedulerContract,
    only,
    resumes,
)


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    with only(lrkit_dylora, distribution="lrkit-dylora 0.2.0") as made:
        yield made


class TestNestedLoRA(ParameterizationContract):
    component = NestedLoRA(rank=3, dropout=0.1)


class TestPosition(MetricContract):
    component = Position()


class TestAtEachStep(SchedulerContract):
    component = AtEachStep()


class TestDraw(ActionContract):
    component = Draw()
    parameterizations = (NestedLoRA(rank=4, updates="row"),)


class TestDyLoRA(MethodContract):
    component = staticmethod(lrkit_dylora.dylora)


# ---- whole runs ----

RANK, ALPHA = 4, 6.0


class Plain(nn.Module):
    """One map with DyLoRA beside it, written from Algorithm 1: no gates, slices."""

    def __init__(self, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, row: bool) -> None:
        super().__init__()
        self.w, self.bias = base.weight.detach().double(), base.bias.detach().double()
        self.a, self.b = nn.Parameter(a.detach().double()), nn.Parameter(b.detach().double())
        self.rank, self.row = RANK, row

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.rank
        a, b = self.a[:n], self.b[:, :n]
        if self.row:
            a, b = torch.cat([a[:-1].detach(), a[-1:]]), torch.cat([b[:, :-1].detach(), b[:, -1:]], dim=1)
        return F.linear(x, self.w, self.bias) + ALPHA / n * F.linear(F.linear(x, a), b)


def run(updates: Any, steps: int, **settings: Any) -> tuple[nn.Module, Any, list[int]]:
    """A toy run, and the rank that acted in each step, read off the gates."""
    model, adapted = rigs.toy(lrkit_dylora.dylora(rank=RANK, alpha=ALPHA, updates=updates, **settings))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.02, weight_decay=0.1)
    adapted.bind(optimizer, total_steps=steps)
    acted = []
    for step in range(steps):
        (gates,) = {tuple(m.core.tolist()) for m in adapted.adapters.values()}
        acted.append(int(sum(gates)))
        assert gates == tuple(float(i < acted[-1]) for i in range(RANK)), "the first b, of every layer"
        rigs.loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, adapted, acted


@pytest.mark.parametrize("updates", ["all", "row"])
def test_a_run_against_a_plain_one(updates: Any) -> None:
    """Slices, the scale α/b, and who trains: the same A and B after twenty steps of AdamW in float64."""
    _, adapted = rigs.toy(lrkit_dylora.dylora(rank=RANK, alpha=ALPHA))
    plain = rigs.Toy()
    for name, adapter in adapted.adapters.items():
        setattr(plain, name, Plain(adapter.base, adapter.A, adapter.B, updates == "row"))
    _, trained, acted = run(updates, 20)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.1)
    for step, rank in enumerate(acted):
        for name in adapted.adapters:
            getattr(plain, name).rank = rank
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(8, 6, generator=generator)
        (plain(x.double()) - torch.sin(3 * x[:, :4])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, adapter in trained.adapters.items():
        torch.testing.assert_close(adapter.A.double(), getattr(plain, name).a, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(adapter.B.double(), getattr(plain, name).b, rtol=1e-3, atol=1e-4)


def test_counted_before_a_run() -> None:
    """How much acts is drawn: the range that is counted beforehand has what a run comes to."""
    _, adapted, _ = run("all", 20)
    counted = lrkit.accounting.count(adapted.method, rigs.Toy(), total_steps=20, targets=[*adapted.adapters])
    low, high = counted.average_range
    assert low < adapted.summary().average < counted.average == high


def test_history_shows_the_draws() -> None:
    """A record at step 0, and after each step; the last one has all components again."""
    _, adapted, acted = run("all", 20)
    layers = len(adapted.adapters)
    assert [d.step for d in adapted.history] == list(range(21))
    assert [d.kept // layers for d in adapted.history] == [*acted, RANK]
    assert all(d.budget == d.kept for d in adapted.history)
    assert set(acted) == {1, 2, 3, 4}, "twenty draws of four"


def test_draws_are_uniform() -> None:
    """From r_min to r_max alike, and another rank for an interval."""
    counts: Counter[int] = Counter()
    where = torch.tensor([0, 0, 0, 0, 1, 1])
    for seed in range(900):
        ballot = Ballot(-torch.arange(6.0), torch.ones(6).bool(), 6, 1.0, None, None, where, layers=2, seed=seed)
        kept = Draw(least=2).decide(ballot).kept.tolist()
        rank = sum(kept[:4])
        assert kept == [i < rank for i in range(4)] + [True, True], "a layer of two has all of two or more"
        counts[rank] += 1
    assert set(counts) == {2, 3, 4} and all(250 < n < 350 for n in counts.values())
    _, _, acted = run("all", 20, interval=5)
    assert all(len(set(acted[i : i + 5])) == 1 for i in range(0, 20, 5)) and len(set(acted)) > 1


@pytest.mark.parametrize("updates", ["all", "row"])
def test_a_resumed_run_is_the_run(updates: Any) -> None:
    """Bit for bit, its draws too."""
    resumes(lrkit_dylora.dylora(rank=4, updates=updates), 10, (0, 1, 7))


# ---- the model of any rank ----


def test_any_rank_after_training(tmp_path: Path) -> None:
    """Each rank's outputs are those of the slices; it goes back and forth; cut, merged, saved and loaded it stays."""
    model, adapted, _ = run("all", 20)
    x = torch.randn(5, 6)
    plain = rigs.Toy()
    for name, adapter in adapted.adapters.items():
        setattr(plain, name, Plain(adapter.base, adapter.A, adapter.B, False))

    def wanted(rank: int) -> torch.Tensor:
        for name in adapted.adapters:
            getattr(plain, name).rank = rank
        return plain(x.double()).float()  # type: ignore[no-any-return]

    torch.testing.assert_close(model(x), wanted(RANK))
    for rank in (1, 3, 2, RANK, 2):
        truncate(adapted, rank)
        torch.testing.assert_close(model(x), wanted(rank))
        assert {layer.rank for layer in adapted.summary().layers} == {rank}
    adapted.save(tmp_path / "masked")
    _, other = rigs.toy(adapted.method, seed=0)
    torch.testing.assert_close(lrkit.load(other.detach(), tmp_path / "masked").model(x), wanted(2))
    assert set(adapted.compact().values()) == {2}
    torch.testing.assert_close(model(x), wanted(2))
    adapted.save(tmp_path / "cut")
    _, other = rigs.toy(adapted.method, seed=0)
    loaded = lrkit.load(other.detach(), tmp_path / "cut")
    torch.testing.assert_close(loaded.model(x), wanted(2))
    truncate(loaded, 1)
    torch.testing.assert_close(loaded.model(x), wanted(1))
    torch.testing.assert_close(adapted.merge()(x), wanted(2), rtol=1e-4, atol=1e-5)


def test_final_rank_is_a_setting() -> None:
    """`final_rank` ends the run with that rank, as `truncate` would."""
    model, adapted, _ = run("all", 10, final_rank=3)
    other, whole, _ = run("all", 10)
    truncate(whole, 3)
    x = torch.randn(5, 6)
    assert torch.equal(model(x), other(x))
    assert adapted.history[-1].kept == 3 * len(adapted.adapters)


def test_exported_at_its_rank(tmp_path: Path) -> None:
    """What is exported has the rank that was chosen, and PEFT computes the same outputs."""
    peft = pytest.importorskip("peft")
    model = models.make("bert").eval()
    plain = copy.deepcopy(model)
    adapted = lrkit.attach(model, lrkit_dylora.dylora(rank=4))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=4)
    for step in range(4):
        model(**models.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    truncate(adapted, 2)
    export(adapted, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(theirs(**models.batch()).logits, model(**models.batch()).logits, rtol=1e-4, atol=1e-5)
    ranks = {p.shape[0] for n, p in theirs.named_parameters() if "lora_A" in n}
    assert ranks == {2}


# ---- the rest ----


def test_command_line_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Counted on DeBERTaV3-base by arithmetic: at most all components train, in every step."""
    told = ask(capsys, "params", "dylora", "--model", "deberta-v3-base")["methods"]["dylora"]
    assert told["start"] == told["end"] == 8 * 165_888


def test_counts_what_acts() -> None:
    """On average so many parameters count as trained as the draws have on average."""
    _, adapted, acted = run("all", 20)
    sizes = sum(m.d_in + m.d_out for m in adapted.adapters.values())
    assert adapted.summary().now == RANK * sizes
    assert adapted.summary().average == pytest.approx(sizes * sum(acted) / 20)


def test_wrong_uses_are_refused() -> None:
    """No gates, a run that has not ended, a rank of 0, and a model of another method."""
    with pytest.raises(lrkit.LrkitError, match=r"Draw\(.*does not fit .*SVD.*gates"):
        attrs.evolve(lrkit_dylora.dylora(), parameterization=lrkit.parameterizations.SVD())
    _, adapted = rigs.toy(lrkit_dylora.dylora(rank=2))
    with pytest.raises(lrkit.LrkitError, match="step 0"):
        truncate(adapted, 1)
    with pytest.raises(lrkit.LrkitError, match="from 1 on"):
        truncate(adapted, 0)
    _, ended, _ = run("all", 3)
    with pytest.raises(lrkit.LrkitError, match=f"rank {RANK + 1} was not trained: the highest is {RANK}"):
        truncate(ended, RANK + 1)
    for name in ("least", "final_rank"):
        with pytest.raises(lrkit.LrkitError, match=f"{name} 5 is above the highest rank, 2"):
            lrkit_dylora.dylora(rank=2, **{name: 5})
    _, other = rigs.toy(lrkit.methods.adalora())
    with pytest.raises(lrkit.LrkitError, match="by dylora"):
        truncate(other, 1)


def test_what_peft_trained_goes_on(tmp_path: Path) -> None:
    """After `from_peft` outputs are PEFT's: all gates are open."""
    again, batch, want = rigs.from_peft(lrkit_dylora.dylora(rank=4), tmp_path)
    torch.testing.assert_close(again.model(**batch).logits, want, atol=1e-5, rtol=0.0)
