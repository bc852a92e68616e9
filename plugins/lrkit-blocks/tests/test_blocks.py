"""LISA and AdaGradSelect: who trains and when against the papers' algorithms, draws against their probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import attrs
import lrkit_blocks
import models
import numpy as np
import pytest
import torch
from lrkit_blocks import Coins, EpsilonGreedy, GradientNorm, Periodic

import lrkit
from lrkit.actions import Ballot
from lrkit.parameterizations import LoRA
from lrkit.registry import Registry
from lrkit.testing import ActionContract, MethodContract, MetricContract, SchedulerContract, only, resumes

BLOCKS = "bert.encoder.layer"


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    """Know this plug-in alone."""
    with only(lrkit_blocks, distribution="lrkit-blocks 0.2.0") as made:
        yield made


class TestGradientNorm(MetricContract):
    """Norms of gradients keep the contract of metrics."""

    component = GradientNorm()


class TestPeriodic(SchedulerContract):
    """A period keeps the contract of schedulers."""

    component = (Periodic(), Periodic(target=0.25, interval=3))


class TestCoins(ActionContract):
    """Coins keep the contract of actions."""

    component = Coins()


class TestEpsilonGreedy(ActionContract):
    """So does the choice of AdaGradSelect."""

    component = EpsilonGreedy(epsilon=0.5, state="kept")


class TestMethods(MethodContract):
    """Both methods keep the contract of methods."""

    component = (lrkit_blocks.lisa, lrkit_blocks.adagradselect)


def model_of(layers: int) -> Any:
    """Make a BERT of so many blocks, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    config = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 64}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, num_labels=2, **config)).eval()


def run(method: lrkit.Method, steps: int, layers: int = 4, seed: int = 0, total: int | None = None) -> Iterator[Any]:
    """Train, and yield after each step: the handle, names of blocks that moved in it, and of all else that did not."""
    model = model_of(layers)
    torch.manual_seed(seed)
    adapted = lrkit.attach(model, method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
    adapted.bind(optimizer, total_steps=total or steps)
    for step in range(steps):
        before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
        model(**models.batch(seed=step, rows=4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name: not torch.equal(p, before[name]) for name, p in adapted.named_parameters()}
        places = {name: ".".join(name.split(".")[:4]) for name in moved}
        blocks = {place for name, place in places.items() if place.startswith(BLOCKS) and moved[name]}
        still = {
            n
            for n, m in moved.items()
            if not m and not n.startswith(BLOCKS) and "position" not in n and "token_type" not in n
        }
        yield adapted, blocks, still


@pytest.mark.parametrize("form", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_lisa_trains_a_few_blocks(form: Any) -> None:
    """As in the released callback: γ blocks from the first step on, others every K steps; all else always trains."""
    method = lrkit_blocks.lisa(active=2, interval=3)
    method = method if form is None else attrs.evolve(method, parameterization=form)
    seen = [(blocks, still) for adapted, blocks, still in run(method, 12)]
    for begin in range(0, 12, 3):
        drawn = [blocks for blocks, _ in seen[begin : begin + 3]]
        assert len(drawn[0]) == 2 and drawn[1:] == drawn[:1] * 2
    assert len({frozenset(blocks) for blocks, _ in seen}) > 1
    assert not any(still for _, still in seen)


def test_lisa_decides_by_default() -> None:
    """In a run of 20 steps it decides before the first step and after the last; the history shows who trains."""
    *_, (adapted, _, _) = run(lrkit_blocks.lisa(), 20)
    assert [(d.step, d.kept, len(d.lost)) for d in adapted.history][:1] == [(0, 2, 2)]
    assert [d.step for d in adapted.history] == [0, 20]


def test_lots_are_uniform() -> None:
    """Each pair of four blocks is drawn as often as any other."""
    pairs: dict[frozenset[str], int] = {}
    adapted = lrkit.attach(model_of(4), lrkit_blocks.lisa())
    (state,) = adapted.controller.policies
    adapted.controller.schedule(100)
    for seed in range(1200):
        verdict = state.decide(0, None, seed).verdict
        key = frozenset(state.names(verdict.kept))
        pairs[key] = pairs.get(key, 0) + 1
    assert len(pairs) == 6 and sum((n - 200) ** 2 / 200 for n in pairs.values()) < 20.5  # χ² with 5: p = 0.001
    assert not state.statistics.layout.weights().numel()  # no tensor was gathered


def ballot(scores: list[float], budget: int, seed: int, **memory: list[float]) -> Ballot:
    """Make a ballot on blocks."""
    n, ones = len(scores), torch.ones(len(scores), dtype=torch.long)
    given = {name: torch.tensor(values) for name, values in memory.items()}
    return Ballot(
        torch.tensor(scores), ones.bool(), budget, budget / n, torch.zeros(0), ones, ones * 0, seed=seed, memory=given
    )


def test_coins_are_fair() -> None:
    """Each of 200 blocks trains with probability γ/N, whoever else does."""
    kept = [Coins().decide(ballot([0.0] * 200, 50, seed)).kept for seed in range(40)]
    share = torch.stack(kept).float().mean()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 8000)
    assert len({int(each.sum()) for each in kept}) > 1


def test_norms_are_of_whole_blocks() -> None:
    """A block's score is the norm of the last gradient of all of its tensors, in float64."""
    model = model_of(3)
    adapted = lrkit.attach(model, lrkit_blocks.adagradselect(active=1.0))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
    adapted.bind(optimizer, total_steps=4)
    for step in range(2):
        optimizer.zero_grad()
        model(**models.batch(seed=step, rows=4)).loss.backward()
        optimizer.step()
    for index in range(3):
        grads = [p.grad.double().square().sum() for p in model.bert.encoder.layer[index].parameters()]
        assert adapted.scores()[f"{BLOCKS}.{index}"] == pytest.approx(math.sqrt(sum(grads)), rel=1e-5)


def test_exploration_takes_the_largest() -> None:
    """With ε = 1 the blocks with the largest norms train; from the end of the first phase on counts alone decide."""
    greedy = EpsilonGreedy(exploration=10, epsilon=1.0, decay=0.0)
    for seed in range(20):
        chosen = greedy.decide(ballot([1.0, 4.0, 2.0, 3.0], 2, seed, chosen=[99.0, 0, 0, 0], decisions=[9.0] * 4)).kept
        assert chosen.tolist() == [False, True, False, True]
    late = [
        greedy.decide(ballot([1.0, 4, 2, 3], 1, s, chosen=[9e6, 0, 0, 0], decisions=[10.0] * 4)).kept for s in range(20)
    ]
    assert all(kept.tolist() == [True, False, False, False] for kept in late)


def test_exploration_fades() -> None:
    """The share of decisions that go by norms is ε exp(-decay · t)."""
    greedy = EpsilonGreedy(epsilon=0.8, decay=0.1)
    for t in (0, 5, 20):
        drawn = [
            bool(greedy.decide(ballot([0.0, 1.0], 1, seed, chosen=[1e9, 0.0], decisions=[float(t)] * 2)).kept[1])
            for seed in range(600)
        ]
        wanted = 0.8 * math.exp(-0.1 * t)
        assert abs(sum(drawn) / 600 - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 600)


def test_counts_give_the_dirichlet() -> None:
    """One block is drawn with the mean of the Dirichlet distribution, (count + δ) / Σ (count + δ)."""
    draws = 3000
    late, counts = EpsilonGreedy(exploration=0, delta=0.5), [4.0, 0.0, 1.0]
    kept = [late.decide(ballot([0.0] * 3, 1, seed, chosen=counts)).kept for seed in range(draws)]
    found = torch.stack(kept).double().mean(0)
    for share, count in zip(found.tolist(), counts, strict=True):
        wanted = (count + 0.5) / 6.5
        assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / draws)


def test_the_largest_shares_win() -> None:
    """Two of four blocks have the largest of a Dirichlet draw as often as in numpy's draws; by chance it is less often."""
    draws, counts = 2000, [6.0, 0.0, 2.0, 0.0]
    p = np.random.default_rng(0).dirichlet(np.array(counts) + 0.5, 200_000)
    wanted = (p >= np.sort(p)[:, -2:-1]).mean(0)
    for draw, equal in (("largest", True), ("chance", False)):
        late = EpsilonGreedy(exploration=0, delta=0.5, draw=draw)
        kept = [late.decide(ballot([0.0] * 4, 2, seed, chosen=counts)).kept for seed in range(draws)]
        assert all(int(each.sum()) == 2 for each in kept)
        found = torch.stack(kept).double().mean(0).numpy()
        near = np.abs(found - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / draws)
        assert bool(near.all()) == equal


def test_adagradselect_counts_choices() -> None:
    """By default it decides after every step; counts are how often each block was kept, and who is kept moves."""
    chosen: dict[str, int] = {}
    keeps: set[str] = {f"{BLOCKS}.{i}" for i in range(4)}
    for adapted, blocks, still in run(lrkit_blocks.adagradselect(), 12, total=20):
        (state,) = adapted.controller.policies
        assert blocks == keeps and not still
        keeps = set(state.names(state.kept))
        for name in keeps:
            chosen[name] = chosen.get(name, 0) + 1
        memory = dict(zip(state.unit_names, state.statistics.memory["chosen"].tolist(), strict=True))
        assert {name: n for name, n in memory.items() if n} == chosen
        assert len(keeps) == 2
    assert len(adapted.history) == 12 and any(d.returned for d in adapted.history)


@pytest.mark.parametrize(
    "method", [lrkit_blocks.lisa(active=1, interval=2), lrkit_blocks.adagradselect(active=1, exploration=4)]
)
def test_runs_resume_anywhere(method: lrkit.Method) -> None:
    """A run that is resumed between two decisions, or at one, is bitwise the run."""
    resumes(method, 8, (3, 6))


def test_wrong_settings_are_refused() -> None:
    """A word or a number that means nothing is one line."""
    for call, words in (
        (lambda: lrkit_blocks.lisa(draw="dice"), 'draw must be "number" or "probability"'),  # type: ignore[arg-type]
        (lambda: Periodic(start=3), "start is the target"),
        (lambda: lrkit.attach(model_of(2), lrkit_blocks.lisa(active=3)), None),
    ):
        if words is None:
            with pytest.raises(lrkit.LrkitError, match="there are 2"):
                call().check_schedule(20)
        else:
            with pytest.raises(lrkit.LrkitError, match=words):
                call()
