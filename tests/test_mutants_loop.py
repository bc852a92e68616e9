"""What the loop does with numbers that are none, on a device that nobody waits for, and when it draws."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, ClassVar

import attrs
import oracles
import pytest
import rigs
import torch
from torch import Tensor, nn

import lrkit
from lrkit.actions import Ballot, Fate, Verdict
from lrkit.errors import LrkitWarning
from lrkit.loop import layout, native
from lrkit.loop.resizing import Resize, Resized
from lrkit.loop.statistics import Statistics
from lrkit.metrics import GradientUncertainty, Magnitude, SensitivityUncertainty
from lrkit.parameterizations import SVD, LoRA
from lrkit.schedulers import Constant, Cubic, Linear, Timetable


def prune(metric: Any, scheduler: Any, rank: int = 3) -> lrkit.Method:
    return lrkit.Method(
        parameterization=SVD(rank=rank, orthogonality=0.0),
        metric=metric,
        scheduler=scheduler,
        action=lrkit.actions.Prune(),
    )


def give(adapted: Any, size: Any = None, seed: int = 0) -> None:
    """Gradients for every adapter's tensors, drawn from a seed; `size` is a factor for layer m."""
    generator = torch.Generator().manual_seed(seed)
    for m, adapter in enumerate(adapted.adapters.values()):
        for p in (adapter.A, adapter.B, adapter.core):
            if p is not None and p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator) * (1.0 if size is None else size(m))


# ---------------------------------------------------------------- scores that are not numbers


def test_a_component_whose_score_is_not_a_number_loses_first() -> None:
    """λ that has become NaN is worth less than the smallest λ that is a number."""
    _, adapted = rigs.toy(prune(Magnitude(), Constant(target=2)))
    for adapter in adapted.adapters.values():
        with torch.no_grad():
            adapter.core.copy_(torch.tensor([1e-6, torch.nan, 3.0]))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=2)
    give(adapted)
    optimizer.step()
    (decision,) = adapted.history
    assert set(decision.lost) == {f"{name}[1]" for name in rigs.TOY_TARGETS}
    assert decision.threshold == pytest.approx(1e-6)


def test_a_matrix_whose_score_is_not_a_number_freezes_first() -> None:
    """A weight that has diverged to NaN is worth less than the smallest weight that is a number."""

    @attrs.frozen(kw_only=True)
    class Size(lrkit.Metric):
        def score(self, weight: Tensor, state: Any) -> Tensor:
            return weight.abs()

    method = lrkit.Method(
        parameterization=LoRA(rank=2), metric=Size(), scheduler=Constant(target=0.5), action=lrkit.actions.Freeze()
    )
    _, adapted = rigs.toy(method)
    with torch.no_grad():
        for m, adapter in enumerate(adapted.adapters.values()):
            adapter.A.fill_(torch.nan if m == 1 else 1e-6)
            adapter.B.fill_(torch.nan if m != 2 else 1e-6)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=2)
    give(adapted)
    optimizer.step()
    assert set(adapted.history[0].lost) == {"first.B", "second.A", "second.B"}


# ---------------------------------------------------------------- layers of one shape


class Alike(nn.Module):
    """Four linear maps of one shape, which lie together in the flat tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("measure", ["before-step", "after-step"])
def test_masks_are_the_oracle_s_while_matrices_of_layers_alike_freeze(measure: Any) -> None:
    """A matrix that froze keeps its last score; those of its shape that still train move on."""
    total, freeze = 24, Linear(target=0.25, warmup=3, final=4)
    method = lrkit.Method(
        parameterization=SVD(rank=3),
        metric=GradientUncertainty(),
        scheduler=freeze,
        action=lrkit.actions.Freeze(),
        also=(
            lrkit.Policy(
                metric=SensitivityUncertainty(measure=measure),
                scheduler=Cubic(target=1, warmup=5, final=2, interval=2),
                action=lrkit.actions.Prune(),
            ),
        ),
    )
    torch.manual_seed(0)
    model = Alike()
    adapted = lrkit.attach(model, method, targets=[f"layers.{i}" for i in range(4)], train_also=())
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.01)
    recorder = rigs.Recorder(adapted, optimizer)
    adapted.bind(optimizer, total_steps=total)
    oracle = oracles.AdaLoRARun([3] * 4, 1, total=total, warmup=5, final=2, interval=2)
    decisions = 0
    for step in range(total):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        ((model(x) - torch.sin(3 * x)).square().mean() + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        decision = oracle.step(recorder.before if measure == "before-step" else recorder.after_step())
        if step + 1 < total - 2:
            scores = torch.tensor(list(adapted.scores(1).values())).double()
            torch.testing.assert_close(scores, torch.tensor(oracle.scores()).double(), rtol=1e-4, atol=0)
        if decision is not None:
            decisions += 1
            kept = (rigs.cores(adapted) != 0).tolist()
            assert oracles.choices_agree(kept, decision[1], decision[0]), step
    frozen = [p for m in adapted.adapters.values() for p in (m.A, m.B) if not p.requires_grad]
    assert decisions > 5 and 0 < len(frozen) < 8


def block(shapes: list[tuple[tuple[int, ...], int]], seed: int, kind: Any = "component") -> lrkit.Block:
    generator = torch.Generator().manual_seed(seed)
    module, parts = nn.Module(), []
    for index, (shape, axis) in enumerate(shapes):
        module.register_parameter(f"p{index}", nn.Parameter(torch.randn(shape, generator=generator)))
        parts.append(lrkit.Part(f"p{index}", axis=axis, matrix=True))
    return lrkit.Block("block", module, tuple(parts), shapes[0][0][shapes[0][1]] if kind == "component" else 1, kind)


def test_units_that_are_out_for_good_score_below_every_other() -> None:
    """-∞ for the units of blocks that are not present, by either way to reduce; the others as if those were not there."""
    blocks = [block([((3, 4), 0), ((5, 3), 1)], seed) for seed in range(4)]
    there = [True, False, True, False]
    laid = layout.Layout(blocks, there, "all")
    entries = laid.weights().abs()
    scores = laid.reduce(entries, torch.zeros(0), Magnitude().reduce)
    want = torch.full((12,), -torch.inf)
    for i in (0, 2):
        rows, columns = (p.detach().abs() for p in blocks[i].tensors)
        want[3 * i : 3 * i + 3] = rows.mean(dim=1) + columns.mean(dim=0)
    torch.testing.assert_close(scores, want)
    means = [t.detach().abs().mean(dim=d) for i in (0, 2) for t, d in zip(blocks[i].tensors, (1, 0), strict=True)]
    # as the layout has them: the same part of both blocks side by side
    torch.testing.assert_close(laid.reduce_means(torch.cat([means[0], means[2], means[1], means[3]]).double()), want)


def test_statistics_that_move_to_another_order_stay_with_their_entries() -> None:
    """What was there keeps its values wherever it comes to lie, and what is new begins at zero."""
    blocks = [block([((3, 4), 0), ((5, 3), 1)], seed) for seed in range(3)]
    late = blocks[1].tensors[0]
    late.requires_grad_(False)
    old = layout.Layout(blocks, [True, True, True], "all")
    flat = torch.arange(1.0, old.size + 1)
    late.requires_grad_(True)
    blocks[2].tensors[1].requires_grad_(False)
    new = layout.Layout(blocks, [True, True, True], "all")
    metric = lrkit.metrics.Sensitivity(smoothed=True)
    moved = Statistics(metric, old, {"sensitivity": flat}).follow(new).buffers["sensitivity"]
    where = {key: span for key, span in new.spans.items() if not span.still}
    was = {key: span for key, span in old.spans.items() if not span.still}
    assert set(where) - set(was) == {id(late)}
    for each, span in where.items():
        had = was[each].of(flat, flat[:0]) if each in was else torch.zeros(late.shape)
        assert torch.equal(span.of(moved, moved[:0]), had)


def test_a_metric_of_whole_components_reads_every_part() -> None:
    """``reads = "component"`` is fed as ``"all"`` is, and ``"core"`` with the core values alone."""

    def scores_of(what: Any) -> list[float]:
        @attrs.frozen(kw_only=True)
        class Size(lrkit.Metric):
            reads: ClassVar[Any] = what

            def score(self, weight: Tensor, state: Any) -> Tensor:
                return weight.abs()

        _, adapted = rigs.toy(prune(Size(), Cubic(target=1)))
        with torch.no_grad():
            for adapter in adapted.adapters.values():
                adapter.core.copy_(torch.tensor([1.0, -2.0, 3.0]))
        scores = list(adapted.scores().values())
        want = []
        for m in adapted.adapters.values():
            rest = 0 if what == "core" else m.A.detach().abs().mean(dim=1) + m.B.detach().abs().mean(dim=0)
            want += (m.core.detach().abs() + rest).tolist()
        assert scores == pytest.approx(want)
        return scores

    assert scores_of("component") == scores_of("all") != scores_of("core")


# ---------------------------------------------------------------- statistics in C

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


@needs_compiler
@pytest.mark.parametrize("beta1", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("beta2", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["sensitivity-uncertainty", "gradient-uncertainty"])
def test_compiled_means_are_the_formulas_for_any_smoothing(
    kind: str, beta1: float, beta2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rates on both sides of a half, where the formula for a step from old to new is another one."""
    monkeypatch.setattr(native, "SMALLEST", 0)
    metric = {"sensitivity-uncertainty": SensitivityUncertainty, "gradient-uncertainty": GradientUncertainty}[kind]
    units = block([((4, 7), 0)], 0, "matrix")
    (p,) = units.tensors
    laid = layout.Layout([units], [True], "all")
    mean, deviation = torch.zeros(laid.size), torch.zeros(laid.size)
    oracle = oracles.Statistics(kind, (4, 7), beta1, beta2)
    kernel = native.kernel_of(metric(beta1=beta1, beta2=beta2))
    assert kernel is not None
    for step in range(4):
        p.grad = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        done = laid.native.observe(kernel, laid.grads(), mean, deviation, scoring=False)
        assert done is not None and done[0]
        oracle.observe(rigs.array(p), rigs.array(p.grad))
        torch.testing.assert_close(mean.double(), torch.from_numpy(oracle.mean).flatten(), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(
            deviation.double(), torch.from_numpy(oracle.uncertainty).flatten(), rtol=1e-4, atol=1e-7
        )


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_entry_that_is_not_finite_is_overlooked(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stands in a tensor: first, last, or in any lane of a loop between."""
    monkeypatch.setattr(native, "SMALLEST", 0)
    units = block([((5, 41), 0)], 0, "matrix")
    (p,) = units.tensors
    laid = layout.Layout([units], [True], "all")
    kernel = native.kernel_of(GradientUncertainty())
    assert kernel is not None
    for place in range(5 * 41):
        p.grad = torch.ones(5, 41)
        p.grad.view(-1)[place] = value
        mean, deviation = torch.ones(laid.size), torch.ones(laid.size)
        done = laid.native.observe(kernel, laid.grads(), mean, deviation, scoring=False)
        assert done is not None and not done[0], place
        assert bool((mean == 1).all()) and bool((deviation == 1).all())


# ---------------------------------------------------------------- gradients that are not finite


class Away(str):
    """A device that torch takes for the CPU, and lrkit for another: nothing may wait for its values."""

    type = "away"

    def __eq__(self, other: object) -> bool:
        return str(other) == "cpu"

    __hash__ = str.__hash__


@pytest.fixture(params=["cpu", "away"])
def place(request: Any) -> Any:
    """Puts the statistics of a run on the CPU, or on a device that is none."""

    def put(adapted: Any) -> None:
        for state in adapted.controller.policies:
            state.statistics.layout.device = torch.device("cpu") if request.param == "cpu" else Away("cpu")

    return put


def buffers(adapted: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in adapted.state_dict()["tensors"].items() if ".buffer." in k}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, -1], ids=["first tensor", "last tensor"])
def test_one_gradient_that_is_not_finite_leaves_all_statistics_alone(
    bad: float, where: int, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the step is cut into pieces, and though every other piece is finite; the next finite step moves them again."""
    monkeypatch.setattr(layout, "_PIECE", 1)
    monkeypatch.setattr(native, "SMALLEST", 1 << 60)
    _, adapted = rigs.toy(prune(SensitivityUncertainty(), Cubic(target=1, warmup=10)))
    place(adapted)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=20)
    oracle = oracles.AdaLoRARun([3, 3, 3], 1, total=20, warmup=10, final=0, interval=1)
    for step in range(4):
        give(adapted, seed=step)
        seen = [
            {"core": (rigs.array(m.core), rigs.array(m.core.grad)), "P": (rigs.array(m.B).T, rigs.array(m.B.grad).T)}
            | {"Q": (rigs.array(m.A), rigs.array(m.A.grad))}
            for m in adapted.adapters.values()
        ]
        before = buffers(adapted)
        if step == 2:
            live = adapted.controller.policies[0].statistics.layout.live
            assert len(live) == 9
            live[where].grad.view(-1)[-1] = bad
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", LrkitWarning)
                weights = [p.detach().clone() for p in adapted.parameters()]
                optimizer.step()
                for p, weight in zip(adapted.parameters(), weights, strict=True):
                    p.copy_(weight)  # a rate of 0 times infinity is no number
            assert all(torch.equal(v, before[k]) for k, v in buffers(adapted).items())
        else:
            optimizer.step()
            oracle.step(seen)
            assert not all(torch.equal(v, before[k]) for k, v in buffers(adapted).items())
        scores = torch.tensor(list(adapted.scores().values())).double()
        torch.testing.assert_close(scores, torch.tensor(oracle.scores(), dtype=torch.float64), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("bad_step", [None, 3, 4, 5], ids=str)
def test_a_device_that_is_not_waited_for_tells_at_the_decision(bad_step: int | None) -> None:
    """A gradient that was not finite at any step since the last decision is told of at the next one, and only then."""
    _, adapted = rigs.toy(prune(SensitivityUncertainty(), Cubic(target=1, interval=3)))
    adapted.controller.policies[0].statistics.layout.device = Away("cpu")
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=12)
    told: list[int] = []
    for step in range(1, 10):
        give(adapted, seed=step)
        if step == bad_step:
            next(iter(adapted.adapters.values())).A.grad[0, 0] = torch.nan
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", LrkitWarning)
            optimizer.step()
        told += [step for w in seen if "gradients are not finite before step" in str(w.message)]
        with torch.no_grad():
            for adapter in adapted.adapters.values():
                adapter.A.nan_to_num_()
    assert told == ([] if bad_step is None else [3 if bad_step == 3 else 6])


# ---------------------------------------------------------------- a proximal step


@attrs.frozen(kw_only=True)
class Out(lrkit.actions.Prune):
    """Components whose λ is above 10 are out at a decision, however they score."""

    def proximal(self, blocks: Any, share: float, optimizer: Any) -> Tensor:
        return torch.cat([block.core.detach() for block in blocks]) <= 10


def test_what_a_proximal_step_takes_out_is_not_kept() -> None:
    """Not though its score is the best and the budget has room for all."""
    _, adapted = rigs.toy(attrs.evolve(prune(Magnitude(), Constant(target=1.0)), action=Out()))
    for adapter in adapted.adapters.values():
        with torch.no_grad():
            adapter.core.copy_(torch.tensor([1.0, 20.0, 2.0]))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=2)
    give(adapted)
    optimizer.step()
    (decision,) = adapted.history
    assert set(decision.lost) == {f"{name}[1]" for name in rigs.TOY_TARGETS}
    assert (decision.budget, decision.kept, decision.threshold) == (9, 6, 1.0)


# ---------------------------------------------------------------- what is drawn when a layer grows


@attrs.frozen(kw_only=True)
class OneMore(lrkit.Action):
    """Every layer gets one component more at each decision."""

    fate: ClassVar[Fate] = "removed"
    final: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    unit = "component"  # type: ignore[assignment]

    def decide(self, ballot: Ballot) -> Verdict:
        return Verdict(ballot.candidates, cut=True, fresh=(1,) * ballot.layers, core=0.25)

    def apply(self, blocks: Any, kept: Tensor, optimizer: Any) -> None:
        return

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int]:
        return 0, layers


def grown(seed: int, policies: int = 1) -> dict[str, Tensor]:
    """A's rows by component, each as it was drawn, after some decisions of a run whose seed is set."""
    policy = lrkit.Policy(
        metric=GradientUncertainty(),
        scheduler=Linear(start=1, target=1 + 3 * policies, interval=1, final=1),
        action=OneMore(),
    )
    method = lrkit.Method(
        parameterization=SVD(rank=1, orthogonality=0.0),
        metric=policy.metric,
        scheduler=policy.scheduler,
        action=policy.action,
        also=(policy,) * (policies - 1),
    )
    torch.manual_seed(seed)
    model = rigs.Toy()
    adapted = lrkit.attach(model, method, targets=rigs.TOY_TARGETS, train_also=())
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrkitWarning)
        adapted.bind(optimizer, total_steps=4)
    for step in range(4):
        give(adapted, seed=step)
        optimizer.step()
    return {f"{name}[{i}]": row for name, m in adapted.adapters.items() for i, row in enumerate(m.A.detach().clone())}


@pytest.mark.parametrize("policies", [1, 2])
def test_no_component_is_drawn_as_another_was(policies: int) -> None:
    """Not at another step, in another layer, or by another policy: each fresh row of A is its own."""
    rows = grown(0, policies)
    assert len(rows) == 3 * (1 + 3 * policies)
    for (one, a), (two, b) in itertools.combinations(rows.items(), 2):
        n = min(len(a), len(b))
        assert not torch.allclose(a[:n], b[:n], rtol=1e-3), (one, two)


def test_what_is_drawn_follows_from_the_seed() -> None:
    """The same seed draws the same components, another one others."""
    one, again, other = grown(1), grown(1), grown(2)
    assert all(torch.equal(row, again[name]) for name, row in one.items())
    assert not any(torch.allclose(row, other[name], rtol=1e-3) for name, row in one.items())


def test_what_is_fresh_begins_as_it_should_and_what_was_there_stays() -> None:
    """λ is the action's, statistics are zero, and a new component is kept and counted; the others keep value and score."""
    method = lrkit.Method(
        parameterization=SVD(rank=2, orthogonality=0.0),
        metric=GradientUncertainty(),
        scheduler=Linear(start=2, target=5, interval=1, final=1),
        action=OneMore(),
    )
    _, adapted = rigs.toy(method)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrkitWarning)
        adapted.bind(optimizer, total_steps=4)
    with torch.no_grad():
        for adapter in adapted.adapters.values():
            adapter.core.copy_(torch.tensor([3.0, 4.0]))
    give(adapted, seed=0)
    optimizer.step()
    (decision,) = adapted.history
    assert set(decision.fresh) == {f"{name}[2]" for name in rigs.TOY_TARGETS}
    assert (decision.before, decision.kept, decision.budget, decision.units) == (6, 9, 9, 15)
    scores = adapted.scores()
    for name, adapter in adapted.adapters.items():
        assert adapter.core.tolist() == [3.0, 4.0, 0.25]
        assert scores[f"{name}[2]"] == 0 < min(scores[f"{name}[0]"], scores[f"{name}[1]"])
    assert bool(adapted.controller.policies[0].kept.all())
    known = sum(2 * (1 + m.d_out + m.d_in) for m in adapted.adapters.values())
    assert {int(flat.count_nonzero()) for flat in adapted.controller.policies[0].statistics.buffers.values()} == {known}
    give(adapted, seed=1)
    optimizer.step()
    assert adapted.history[-1].before == 9
    assert set(adapted.history[-1].fresh) == {f"{name}[3]" for name in rigs.TOY_TARGETS}


# ---------------------------------------------------------------- when it is over


@attrs.frozen
class EveryStep(Timetable):
    """A decision is due at every step, after its own end as well."""

    def due(self, step: int) -> bool:
        return True


@attrs.frozen(kw_only=True)
class Always(Cubic):
    """Says that a decision is due at every step, after its own end as well."""

    def over(self, total_steps: int, *, units: int, layers: int) -> Timetable:  # type: ignore[override]
        return EveryStep(self, total_steps, units, layers)


def test_nothing_is_decided_after_a_schedule_s_end() -> None:
    """What was kept by the last decision stays kept, though a scheduler says that a further one is due."""
    _, adapted = rigs.toy(prune(SensitivityUncertainty(), Always(target=1, final=3)))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=8)
    for step in range(8):
        give(adapted, size=lambda m, step=step: 10.0 ** (step if m == 2 else -step), seed=step)
        optimizer.step()
        if step == 4:
            kept = rigs.cores(adapted) != 0
    assert [d.step for d in adapted.history] == [1, 2, 3, 4, 5]
    assert torch.equal(rigs.cores(adapted) != 0, kept)


@pytest.mark.parametrize("ending", ["fixed", "peft", "released", "open"])
@pytest.mark.parametrize("first_step", [0, 1])
@pytest.mark.parametrize("final", [0, 1, 2])
def test_a_last_decision_that_no_step_reaches_is_said(ending: Any, first_step: Any, final: int) -> None:
    """A run of T steps has those numbered 0 to T - 1, or 1 to T; warned of exactly where the end is not among them."""
    total = 6
    scheduler = Cubic(target=1, ending=ending, first_step=first_step, final=final)
    _, adapted = rigs.toy(prune(SensitivityUncertainty(), scheduler))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", LrkitWarning)
        adapted.bind(optimizer, total_steps=total)
    numbers = range(first_step, first_step + total)
    last = {"fixed": total - final, "peft": total - final, "released": total - final + 1, "open": numbers[-1]}[ending]
    assert any("will not be reached" in str(w.message) for w in seen) is (last not in numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrkitWarning)
        for step in range(total):
            give(adapted, seed=step)
            optimizer.step()
    assert (adapted.history[-1].step - 1 + first_step == last) is (last in numbers)


def test_a_step_too_many_is_said_once_and_at_that_step() -> None:
    """Not at the last step of the run, but at the one after it."""
    _, adapted = rigs.toy(prune(SensitivityUncertainty(), Cubic(target=1, final=2)))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=4)
    for step in range(4):  # a warning is an error
        give(adapted, seed=step)
        optimizer.step()
    with pytest.warns(LrkitWarning, match="step 5 of a run that was bound for total_steps=4"):
        optimizer.step()
    optimizer.step()


def test_a_run_that_ends_early_names_the_later_of_two_schedules() -> None:
    """Of two policies that have not ended, the one that ends last says until when to train."""
    _, adapted = rigs.toy(
        lrkit.Method(
            parameterization=SVD(rank=3, orthogonality=0.0),
            metric=SensitivityUncertainty(),
            scheduler=Cubic(target=1, final=6),
            action=lrkit.actions.Prune(),
            also=(
                lrkit.Policy(
                    metric=GradientUncertainty(), scheduler=Cubic(target=0.5, final=1), action=lrkit.actions.Freeze()
                ),
            ),
        )
    )
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=10)
    for step in range(3):
        give(adapted, seed=step)
        optimizer.step()
    with pytest.warns(LrkitWarning, match="step 3 of 10.* at step 9"):
        adapted.merge()


def test_a_masked_component_that_adds_to_the_output_is_not_cut() -> None:
    """Its λ was set by hand after the last decision: `compact` changes no output, and cuts what is zero alone."""
    model, adapted = rigs.toy(prune(Magnitude(), Constant(target=1, final=2)))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    with torch.no_grad():
        for adapter in adapted.adapters.values():
            adapter.core.copy_(torch.tensor([1.0, 2.0, 3.0]))
    adapted.bind(optimizer, total_steps=4)
    for step in range(4):
        give(adapted, seed=step)
        optimizer.step()
    assert [adapter.core.tolist() for adapter in adapted.adapters.values()] == [[0.0, 0.0, 3.0]] * 3
    with torch.no_grad():
        adapted.adapters["second"].core[0] = 5.0
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    before = model(x)
    assert adapted.compact() == {"first": 1, "second": 2, "third": 1}
    torch.testing.assert_close(model(x), before)


# ---------------------------------------------------------------- statistics that follow


def two_of_three() -> tuple[list[lrkit.Block], Statistics]:
    """Three blocks, and statistics of which each entry has another value; all train."""
    blocks = [block([((3, 4), 0), ((5, 3), 1)], seed) for seed in range(3)]
    laid = layout.Layout(blocks, [True] * 3, "all")
    metric = lrkit.metrics.Sensitivity(smoothed=True)
    return blocks, Statistics(metric, laid, {"sensitivity": torch.arange(1.0, laid.size + 1)}, observations=7)


def test_thawed_tensors_begin_anew() -> None:
    """Last scores of a tensor that stood still are no statistics: once it trains again, it begins at zero."""
    blocks, statistics = two_of_three()
    p = blocks[1].tensors[0]
    p.requires_grad_(False)
    frozen = statistics.follow(layout.Layout(blocks, [True] * 3, "all"))
    assert bool((frozen.still > 0).all()) and frozen.still.numel() == 12
    p.requires_grad_(True)
    thawed = frozen.follow(layout.Layout(blocks, [True] * 3, "all"))
    flat = thawed.buffers["sensitivity"]
    assert thawed.still.numel() == 0 and thawed.observations == 7
    assert not thawed.layout.spans[id(p)].of(flat, flat).any()
    assert int(flat.count_nonzero()) == flat.numel() - 12


def test_stopping_while_resized() -> None:
    """A tensor that is resized and stops at once has no last scores; another one that stops then has its own."""
    blocks, statistics = two_of_three()
    one, other = blocks[0].tensors[0], blocks[1].tensors[1]
    want = statistics.layout.spans[id(other)].of(statistics.entries(), statistics.still).clone()
    how = Resized(Resize(torch.tensor([0, 2]), 1), 0)
    for p in (one, other):
        p.requires_grad_(False)
    after = statistics.follow(layout.Layout(blocks, [True] * 3, "all"), {id(one): how})
    assert not after.layout.spans[id(one)].of(after.still, after.still).any()
    assert torch.equal(after.layout.spans[id(other)].of(after.still, after.still), want)


def test_moving_changes_no_number() -> None:
    """Buffers, last scores, the count of steps and what was not finite go along to another device."""
    blocks, statistics = two_of_three()
    blocks[1].tensors[0].requires_grad_(False)
    frozen = statistics.follow(layout.Layout(blocks, [True] * 3, "all"))
    frozen.layout.device = Away("cpu")  # type: ignore[assignment]
    for p in frozen.layout.live:
        p.grad = torch.full_like(p, torch.nan)
    frozen.observe(None)
    moved = frozen.moved(layout.Layout(blocks, [True] * 3, "all"))
    assert torch.equal(moved.still, frozen.still) and bool(moved.still.any())
    assert torch.equal(moved.buffers["sensitivity"], frozen.buffers["sensitivity"])
    assert moved.observations == 8
    assert moved.skipped() and not moved.skipped()


@needs_compiler
def test_scores_made_once_serve_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C library's scores are of one decision; the next goes by its own, though C does not observe its step."""
    monkeypatch.setattr(native, "SMALLEST", 0)
    runs = []
    for smallest in (0, 1 << 60):
        monkeypatch.setattr(native, "SMALLEST", smallest)
        _, adapted = rigs.toy(prune(SensitivityUncertainty(), Constant(target=1, interval=1)))
        optimizer = torch.optim.SGD(adapted.parameters(), lr=0.01)
        adapted.bind(optimizer, total_steps=4)
        for step in range(3):
            give(adapted, size=lambda m, step=step: 10.0 ** (m if step else -m), seed=step)
            if step:
                adapted.adapters["first"].A.grad = None  # left to tensor operations
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LrkitWarning)
                optimizer.step()
        runs.append(adapted.history)
    assert [d.threshold for d in runs[0]] == [pytest.approx(d.threshold) for d in runs[1]]
    assert [d.lost for d in runs[0]] == [d.lost for d in runs[1]]


# ---------------------------------------------------------------- who loses for good, and who comes back


@attrs.frozen(kw_only=True)
class Rest(lrkit.actions.Freeze):
    """A matrix that loses rests until it wins again."""

    final: ClassVar[bool] = False

    def apply(self, blocks: Any, kept: Tensor, optimizer: Any) -> None:
        for b, keep in zip(blocks, kept.tolist(), strict=True):
            for p in b.tensors:
                p.requires_grad_(keep)
                p.grad = None


def test_matrices_that_take_turns() -> None:
    """Each that trains again begins with zero statistics and moves on; each is counted while it trains."""
    turns = [[True, False] * 3, [False, True] * 3, [True, True] * 3, [False, True] * 3]

    @attrs.frozen(kw_only=True)
    class Turns(Rest):
        def decide(self, ballot: Ballot) -> Verdict:
            return Verdict(torch.tensor(turns[adapted.step - 1]))

    method = lrkit.Method(
        parameterization=LoRA(rank=2),
        metric=lrkit.metrics.Sensitivity(smoothed=True),
        scheduler=Constant(target=0.5),
        action=Turns(),
    )
    _, adapted = rigs.toy(method)
    with torch.no_grad():
        for adapter in adapted.adapters.values():
            adapter.B.fill_(1.0)
    state = adapted.controller.policies[0]
    matrices = [block.tensors[0] for block in state.blocks]
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=6)
    before = [True] * 6
    for step, train in enumerate(turns):
        give(adapted, seed=step)
        optimizer.step()
        assert [p.requires_grad for p in matrices] == train
        laid, flat = state.statistics.layout, state.statistics.buffers["sensitivity"]
        assert {id(p) for p in laid.live} == {id(p) for p, on in zip(matrices, train, strict=True) if on}
        assert {id(p) for p in laid.still} == {id(p) for p, on in zip(matrices, train, strict=True) if not on}
        went_on = [p.numel() for p, was, on in zip(matrices, before, train, strict=True) if was and on]
        assert int(flat.count_nonzero()) == sum(went_on)
        assert adapted.summary().now == sum(p.numel() for p in matrices if p.requires_grad)
        before = train
    assert [(len(d.lost), len(d.returned)) for d in adapted.history] == [(3, 0), (3, 3), (0, 3), (3, 0)]


def test_a_layer_without_any_is_ranked() -> None:
    """A layer whose components have all lost has scores, and comes back once they are the best."""
    _, adapted = rigs.toy(prune(lrkit.metrics.Sensitivity(), Constant(target=1 / 3)))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=6)
    for step in range(4):
        with torch.no_grad():
            for adapter in adapted.adapters.values():
                adapter.core.fill_(1.0)
        give(adapted, size=lambda m, step=step: 100.0 if m == step % 2 else 0.01, seed=step)
        optimizer.step()
        assert all(score > -torch.inf for score in adapted.scores().values())
    best = [set(d.returned) for d in adapted.history]
    assert best == [set(), *({f"{name}[{i}]" for i in range(3)} for name in ("second", "first", "second"))]


def test_what_is_left_of_a_layer_is_ranked() -> None:
    """If losing is for good, a layer that has lost some of its components still has scores for the others."""
    method = attrs.evolve(prune(Magnitude(), Constant(target=2)), action=lrkit.actions.Zero(once=True))
    _, adapted = rigs.toy(method)
    with torch.no_grad():
        for adapter in adapted.adapters.values():
            adapter.core.copy_(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=4)
    for step in range(2):
        give(adapted, seed=step)
        optimizer.step()
    state = adapted.controller.policies[0]
    assert state.statistics.layout.size > 0
    assert {name for name, score in adapted.scores().items() if score > 0} == {
        f"{name}[{i}]" for name in rigs.TOY_TARGETS for i in (1, 2)
    }


@pytest.mark.parametrize("kind", ["never", "end", "always", "freeze"])
def test_changed_tensors_are_told(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step says that tensors have changed (DDP follows then) exactly when one has another size or stops training."""
    action = lrkit.actions.Freeze() if kind == "freeze" else lrkit.actions.Prune(cut=kind)
    method = attrs.evolve(prune(SensitivityUncertainty(), Linear(target=0.5, final=2, interval=2)), action=action)
    _, adapted = rigs.toy(method)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=8)
    told: list[bool] = []
    after_step = adapted.controller.after_step

    def watched(by: torch.optim.Optimizer) -> bool:
        told.append(after_step(by))
        return told[-1]

    monkeypatch.setattr(adapted.controller, "after_step", watched)

    def look() -> list[Any]:
        return [(p.shape, p.requires_grad) for p in adapted.parameters()]

    changes = []
    for step in range(8):
        give(adapted, seed=step)
        before = look()
        optimizer.step()
        changes.append(look() != before)
    assert told == changes
    assert any(told) is (kind != "never")


# ---------------------------------------------------------------- verdicts


@attrs.frozen(kw_only=True)
class Told(lrkit.Action):
    """Carries out a list of verdicts, in order, on components that it masks."""

    fate: ClassVar[Fate] = "removed"
    grows: ClassVar[bool] = True
    unit = "component"  # type: ignore[assignment]

    def decide(self, ballot: Ballot) -> Verdict:
        return _verdicts.pop(0)(ballot)

    def apply(self, blocks: Any, kept: Tensor, optimizer: Any) -> None:
        with torch.no_grad():
            for b, keep in zip(blocks, torch.split(kept, [b.count for b in blocks]), strict=True):
                b.core.mul_(keep)

    def turnover(self, units: int, budget: int, layers: int) -> None:  # type: ignore[override]
        return


_verdicts: list[Any] = []


def told(verdicts: list[Any], *also: lrkit.Policy, rank: int = 2) -> tuple[Any, Any]:
    """A run whose components go by a list of verdicts, one per step."""
    _verdicts[:] = verdicts
    method = lrkit.Method(
        parameterization=SVD(rank=rank, orthogonality=0.0),
        metric=GradientUncertainty(),
        scheduler=Linear(start=rank, target=12),
        action=Told(),
        also=also,
    )
    _, adapted = rigs.toy(method)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrkitWarning)
        adapted.bind(optimizer, total_steps=len(verdicts))
    return adapted, optimizer


def test_a_verdict_without_a_cut() -> None:
    """What loses stays stored, masked, though the layer grows; and history has the number that the verdict went by."""
    first = torch.tensor([False, True] * 3)
    adapted, optimizer = told([lambda _: Verdict(first, fresh=(1, 0, 2), budget=7), lambda b: Verdict(b.candidates)])
    rows = {name: m.A.detach().clone() for name, m in adapted.adapters.items()}
    give(adapted)
    optimizer.step()
    (decision,) = adapted.history
    assert decision.budget == 7 and decision.fresh == ("first[2]", "third[2]", "third[3]")
    assert set(decision.lost) == {f"{name}[0]" for name in rigs.TOY_TARGETS}
    assert [m.rank for m in adapted.adapters.values()] == [3, 2, 4]
    assert all(torch.equal(m.A[:2], rows[name]) for name, m in adapted.adapters.items())
    assert adapted.controller.policies[0].kept.tolist() == [False, True, True, False, True, False, True, True, True]
    sizes = {name: 1 + m.d_in + m.d_out for name, m in adapted.adapters.items()}
    assert adapted.summary().now == 2 * sizes["first"] + sizes["second"] + 3 * sizes["third"]


def test_a_verdict_that_only_cuts() -> None:
    """What loses leaves the tensors and the count, and nothing is fresh."""
    first = torch.tensor([False, True] * 3)
    adapted, optimizer = told([lambda _: Verdict(first, cut=True), lambda b: Verdict(b.candidates)])
    give(adapted)
    optimizer.step()
    assert adapted.history[0].fresh == ()
    stored = adapted.controller.components.kept()
    assert {name: mask.tolist() for name, mask in stored.items()} == {name: [True] for name in rigs.TOY_TARGETS}
    sizes = [1 + m.d_in + m.d_out for m in adapted.adapters.values()]
    assert adapted.summary().now == sum(sizes) == sum(p.numel() for p in adapted.parameters())


def test_frozen_matrices_that_grow_again() -> None:
    """A layer that was cut away whole trains again once it grows, but for its matrices that were frozen before."""
    freeze = lrkit.Policy(
        metric=GradientUncertainty(), scheduler=Constant(target=0.5, final=3), action=lrkit.actions.Freeze()
    )
    none = torch.zeros(6, dtype=torch.bool)
    adapted, optimizer = told(
        [
            lambda b: Verdict(b.candidates),
            lambda _: Verdict(none, cut=True),
            lambda b: Verdict(b.candidates, fresh=(2, 2, 2)),
            lambda b: Verdict(b.candidates),
        ],
        freeze,
    )
    give(adapted)
    optimizer.step()
    frozen = [[not p.requires_grad for p in (m.A, m.B)] for m in adapted.adapters.values()]
    assert sum(map(sum, frozen)) == 3
    for rank in (0, 2, 2):
        give(adapted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LrkitWarning)
            optimizer.step()
        assert [m.rank for m in adapted.adapters.values()] == [rank] * 3
        assert [[bool(p.numel()) and p.requires_grad for p in (m.A, m.B)] for m in adapted.adapters.values()] == [
            [bool(rank) and not stopped for stopped in each] for each in frozen
        ]


def test_growth_at_the_end_is_believed() -> None:
    """Sums of a run that was small but for its last steps are not too few; sums of none are."""
    adapted, optimizer = told(
        [*[lambda b: Verdict(b.candidates)] * 3, lambda b: Verdict(b.candidates, fresh=(10, 10, 10))]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrkitWarning)
        for step in range(5):
            give(adapted, seed=step)
            optimizer.step()
    controller = adapted.controller
    saved = controller.saved({}, (), None)
    sizes = {name: 1 + m.d_in + m.d_out for name, m in adapted.adapters.items()}
    assert saved.sums == {name: (4 * 2 + 12) * size for name, size in sizes.items()}
    controller.check(saved, controller.tensors())
    with pytest.raises(lrkit.LrkitError, match="sums are of fewer"):
        controller.check(attrs.evolve(saved, sums=dict.fromkeys(sizes, 0)), controller.tensors())


# ---------------------------------------------------------------- which steps are observed, and who may win


@pytest.mark.parametrize("measure", ["before-step", "after-step", "before-clipping"])
@pytest.mark.parametrize(("ending", "seen"), [("fixed", 6), ("peft", 5), ("released", 5)])
def test_steps_that_are_observed(measure: Any, ending: Any, seen: int) -> None:
    """Of 8 steps, the last two final: up to the sixth by the paper, and one less in released code; by any measure."""
    _, adapted = rigs.toy(prune(SensitivityUncertainty(measure=measure), Cubic(target=1, final=2, ending=ending)))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=8)
    for step in range(8):
        give(adapted, seed=step)
        optimizer.step()
    assert adapted.controller.policies[0].statistics.observations == seen


@attrs.frozen(kw_only=True)
class Open(lrkit.actions.Prune):
    """Nobody knows beforehand how many lose."""

    def turnover(self, units: int, budget: int, layers: int) -> None:  # type: ignore[override]
        return


@pytest.mark.parametrize("kind", [lrkit.actions.Prune, Open])
def test_who_may_win_beside_the_dead(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without gradients has no entries, and its units lose; they are candidates where no number is known."""
    ballots: list[Ballot] = []
    decide = lrkit.actions.Prune.decide
    monkeypatch.setattr(kind, "decide", lambda self, ballot: (ballots.append(ballot), decide(self, ballot))[1])
    _, adapted = rigs.toy(attrs.evolve(prune(SensitivityUncertainty(), Constant(target=2 / 3)), action=kind()))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=2)
    dead = list(adapted.adapters["second"].parameters())
    give(adapted)
    for p in dead:
        p.grad = None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", LrkitWarning)
        optimizer.step()
    assert [str(w.message)[:21] for w in seen] == ["no gradient reaches 1"]
    (ballot,) = ballots
    live = [True] * 3 + [False] * 3 + [True] * 3
    assert ballot.budget == 6
    assert ballot.candidates.tolist() == ([True] * 9 if kind is Open else live)
    assert torch.isfinite(ballot.scores).tolist() == live
    assert set(adapted.history[0].lost) == {f"second[{i}]" for i in range(3)}
    layout_ = adapted.controller.policies[0].statistics.layout
    assert {id(p) for p in dead}.isdisjoint(id(p) for p in (*layout_.live, *layout_.still))
