"""The contract of `lrkit.testing`: everything registered keeps it, and it finds each fault by the clause that is meant."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import datasets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrkit
import lrkit.testing.base
from lrkit import testing
from lrkit.actions import Ballot, Verdict
from lrkit.schedulers import Timetable
from lrkit.testing import check

frozen = attrs.frozen(kw_only=True)


# ---- what is registered keeps it -------------------------------------------------------------------------------------

# Those of plug-ins are for `lrkit plugins doctor`, and for the plug-ins' own tests.
OURS = f"lrkit {lrkit.__version__}"
OFFERS = [o for o in lrkit.current().offers() if o.kind not in ("task", "executor", "study") and o.distribution == OURS]


@pytest.mark.parametrize("offer", OFFERS, ids=lambda offer: f"{offer.kind}-{offer.name}")
def test_what_is_registered_keeps_the_contract(offer):
    assert check(offer.value, kind=offer.kind) == []


def test_movies_keep_the_contract():
    assert check(lrkit.current().get("task", "movies"), kind="task") == []


class TestMetricsWithOtherSettings(testing.MetricContract):
    component = (
        lrkit.metrics.Magnitude(measure="before-step"),
        lrkit.metrics.Sensitivity(smoothed=True, measure="after-step"),
        lrkit.metrics.GradientUncertainty(window=3),
    )


class TestSchedulersWithOtherSettings(testing.SchedulerContract):
    component = (
        lrkit.schedulers.Cubic(target=3, start=6, warmup=40, final=20, interval=7),
        lrkit.schedulers.Linear(target=0.25, warmup=0.2, final=0.3, interval=0.1, first_step=0, ending="released"),
        lrkit.schedulers.Constant(target=0.0, final=0.5, ending="peft"),
        lrkit.schedulers.Cubic(target=1.0, ending="open"),
    )


class TestFreezeTogether(testing.ActionContract):
    component = lrkit.actions.Freeze(together=True)


class TestActionsThatKeepAnotherNumber(testing.ActionContract):
    component = (lrkit.actions.Freeze(rule="quantile"), lrkit.actions.Prune(ties="threshold"))
    exact = False


class TestParameterizationsWithOtherSettings(testing.ParameterizationContract):
    component = (
        lrkit.parameterizations.LoRA(rank=2, dropout=0.2),
        lrkit.parameterizations.SVD(rank=40, alpha=16.0, orthogonality_norm="mean"),
        lrkit.parameterizations.VectorScaled(rank=8, train="none", shared=True),
        lrkit.parameterizations.VectorScaled(rank=4, train="ffn"),
    )


class TestAMethodInPlace(testing.MethodContract):
    @property
    def component(self) -> lrkit.Method:
        both = lrkit.Policy(metric=METRIC, scheduler=lrkit.schedulers.Linear(), action=lrkit.actions.Prune())
        return attrs.evolve(lrkit.methods.aflora(rank=4), also=(both,))


METRIC = lrkit.metrics.SensitivityUncertainty()


# ---- faults, each found by the clause that is meant ------------------------------------------------------------------


@frozen
class Peak(lrkit.Metric):
    """The largest abs(gradient), forgotten at the rate `decay`; `measure` as everywhere. Source: this test."""

    buffers: ClassVar[tuple[str, ...]] = ("peak",)
    decay: float = 0.9

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        state["peak"].copy_(torch.maximum(state["peak"] * self.decay, grad.abs()))

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return state["peak"]


@frozen
class Cosine(lrkit.Scheduler):
    """A half cosine. Source: this test."""

    def decay(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


@frozen
class Shrink(lrkit.Action):
    """λ of a loser times `factor`. Source: this test."""

    fate: ClassVar[Any] = "dimmed"
    factor: float = 0.1

    @property
    def unit(self) -> Any:
        return "component"

    def refusal(self, parameterization: lrkit.Parameterization) -> str | None:
        return None if any(part.core for part in parameterization.parts) else "there is no core value to shrink"

    @torch.no_grad()
    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        for block, keep in zip(blocks, kept.split([b.count for b in blocks]), strict=True):
            block.core.mul_(torch.where(keep, 1.0, self.factor))


class Gated(nn.Module):
    """y = W x + B (core ∘ A x), written plainly."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = base
        d_out, d_in = base.weight.shape
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.A = nn.Parameter(torch.randn(rank, d_in, **like) * 0.1)
        self.B = nn.Parameter(torch.randn(d_out, rank, **like) * 0.1)
        self.core = nn.Parameter(torch.zeros(rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ((x @ self.A.t()) * self.core) @ self.B.t()

    @torch.no_grad()
    def merge(self) -> nn.Module:
        self.base.weight += (self.B * self.core) @ self.A
        return self.base


@frozen
class Gates(lrkit.Parameterization):
    """ΔW = B diag(core) A with r = `rank`. Source: this test."""

    learning_rate: ClassVar[float] = 1e-2
    module: ClassVar[type[nn.Module]] = Gated
    rank: int = 4

    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        core = lrkit.Part("core", axis=0, core=True)
        return (core, lrkit.Part("A", axis=0, matrix=True), lrkit.Part("B", axis=1, matrix=True))

    @property
    def components(self) -> int:
        return self.rank

    def build(self, target: Any) -> nn.Module:
        if not isinstance(target.layer, nn.Linear):
            raise lrkit.LrkitError(f"{target.name}: Gates takes an nn.Linear, not {type(target.layer).__name__}")
        return self.module(target.layer, self.rank)


def mine(*, rank: int = 4) -> lrkit.Method:
    """AdaLoRA with another name, of rank `rank`. Source: arXiv 2303.10512."""
    return lrkit.methods.adalora(rank=rank, target_rank=2)


def sums(rest: str | None) -> lrkit.tasks.Task:
    """Whether a sum is even. Source: this test."""
    if rest is not None:
        raise lrkit.LrkitError(f'sums has no part "{rest}"')
    return rows([{"text": f"{a} and {b}", "label": (a + b) % 2} for a in range(5) for b in range(5)])


def rows(table: list[dict[str, Any]]) -> lrkit.tasks.Task:
    data = datasets.Dataset.from_list(table)
    return lrkit.tasks.Task(name="t", train=data, validation=data, fields=("text",), labels=("odd", "even"))


@pytest.mark.parametrize(
    "good",
    [Peak(), Cosine(), Shrink(), Gates(), mine, mine()],
    ids=lambda good: getattr(good, "__name__", type(good).__name__),
)
def test_what_the_faults_are_made_from_keeps_it(good):
    assert check(good) == []


def test_the_task_that_faults_are_made_from_keeps_it():
    assert check(sums, kind="task") == []


def variant(base: type, doc: str | None = "Broken on purpose: its settings are decay, measure, rank and factor, Source: this test.", **changes: Any):  # fmt: skip  # noqa: E501
    """An instance of a class with something written otherwise."""
    made = frozen(type("Broken", (base,), {"__doc__": doc, "__module__": __name__, **changes}))
    return made()


FAULTS: dict[str, tuple[Callable[[], Any], set[str]]] = {}


def fault(*broken: str):
    """Registers what makes a broken component, and the clauses that it breaks; nothing else may be found."""

    def keep(make: Callable[[], Any]) -> Callable[[], Any]:
        FAULTS[make.__name__] = (make, set(broken))
        return make

    return keep


METRIC_RUNS = ("trains or is refused everywhere", "resumes exactly")


@fault("docstring names settings and source")
def metric_without_docstring():
    return variant(Peak, doc=None)


@fault("docstring names settings and source")
def metric_without_source():
    return variant(Peak, doc="The largest gradient, forgotten by decay; measure.")


@fault("docstring names settings and source")
def metric_with_a_setting_it_does_not_name():
    @frozen
    class Broken(lrkit.Metric):
        """The size of a weight. Source: arXiv 1506.02626."""

        powers: float = 1.0

        def score(self, weight, state):
            return weight.abs() ** self.powers

    return Broken()


@fault("settings are frozen and keyword only")
def metric_not_decorated():
    class Broken(Peak):
        """The largest gradient, with decay and measure. Source: this test."""

    return Broken()


@fault("settings are frozen and keyword only")
def metric_with_settings_by_position():
    @attrs.frozen
    class Broken(Peak):
        """The largest gradient, with decay, measure and more. Source: this test."""

        more: float = 1.0

    return Broken()


@fault("settings have defaults")
def metric_with_a_setting_without_default():
    @frozen
    class Broken(Peak):
        """The largest gradient, with decay, measure and more. Source: this test."""

        more: float

    return Broken(more=1.0)


@fault("equal by value")
def metric_with_a_list():
    @frozen
    class Broken(Peak):
        """The largest gradient, with decay, measure and more. Source: this test."""

        more: list[int] = attrs.field(factory=list)

    return Broken()


@fault("equal by value", "settings survive plain data")
def metric_equal_by_identity():
    @attrs.frozen(kw_only=True, eq=False)
    class Broken(Peak):
        """The largest gradient, with decay and measure. Source: this test."""

        __eq__ = object.__eq__
        __hash__ = object.__hash__

    return Broken()


@fault("settings survive plain data")
def metric_with_a_setting_that_is_no_plain_data():
    @frozen
    class Broken(Peak):
        """The largest gradient, with decay, measure and more. Source: this test."""

        more: torch.dtype = torch.float32

    return Broken()


@fault("settings refuse what cannot be meant")
def metric_whose_check_raises_something_else():
    def known(instance, attribute, value):
        {0.5: "half", 0.9: "most"}[value]

    @frozen
    class Broken(Peak):
        """The largest gradient, with decay, measure and more. Source: this test."""

        more: float = attrs.field(default=0.5, validator=known)

    return Broken()


@fault("settings refuse what cannot be meant", "settings survive plain data")
def metric_whose_annotation_cannot_be_resolved():
    @frozen
    class Broken(Peak):
        """The largest gradient, with decay, measure and more. Source: this test."""

        more: Nowhere = 0.5  # noqa: F821

    return Broken()


COUNT: list[float] = []


@fault("score changes nothing", "remembers in its buffers alone", "each entry stands for itself", "resumes exactly")
def metric_whose_score_counts():
    def score(self, weight, state):
        COUNT.append(1.0)
        return state["peak"] + len(COUNT)

    return variant(Peak, score=score)


@fault("score changes nothing", "remembers in its buffers alone")
def metric_whose_score_decays_its_state():
    def score(self, weight, state):
        return state["peak"].mul_(0.5).clone()

    return variant(Peak, score=score)


@fault("score changes nothing")
def metric_whose_score_writes_to_the_weights():
    return variant(Peak, score=lambda self, weight, state: state["peak"] + weight.zero_())


@fault("observe writes to its state alone")
def metric_that_writes_to_gradients():
    def observe(self, weight, grad, state, step):
        state["peak"].copy_(grad.abs_())

    return variant(Peak, observe=observe)


@fault("reads and buffers are declared", *METRIC_RUNS)
def metric_with_a_forgotten_buffer():
    return variant(Peak, buffers=("peek",))


@fault("reads and buffers are declared")
def metric_with_a_buffer_too_many():
    return variant(Peak, buffers=("peak", "never"))


@fault("reads and buffers are declared", *METRIC_RUNS)
def metric_that_forgot_all_buffers():
    return variant(Peak, buffers=())


@fault("reads and buffers are declared", "observe writes to its state alone")
def metric_that_puts_new_tensors_into_its_state():
    def observe(self, weight, grad, state, step):
        state["peak"] = torch.maximum(state["peak"] * self.decay, grad.abs())

    return variant(Peak, observe=observe)


@fault("reads and buffers are declared", "trains or is refused everywhere")
def metric_that_reads_something_else():
    return variant(Peak, reads="cores")


SHAPE = ("score is finite float32 for each entry", "each entry stands for itself", *METRIC_RUNS)


@fault(*SHAPE)
def metric_with_one_score_for_all():
    return variant(Peak, score=lambda self, weight, state: state["peak"].sum())


@fault("score is finite float32 for each entry")
def metric_in_float64():
    return variant(Peak, score=lambda self, weight, state: state["peak"].double())


@fault("score is finite float32 for each entry")
def metric_that_divides_by_a_weight():
    return variant(Peak, score=lambda self, weight, state: state["peak"] / weight)


@fault("score is finite float32 for each entry")
def metric_that_remembers_what_is_not_finite():
    def observe(self, weight, grad, state, step):
        state["peak"].copy_(grad.abs().log())

    return variant(Peak, observe=observe, score=lambda self, weight, state: state["peak"].exp())


@fault("each entry stands for itself", "score is finite float32 for each entry")
def metric_that_compares_with_the_largest():
    return variant(Peak, score=lambda self, weight, state: state["peak"] / (state["peak"].max() + 1e-8))


@fault("each entry stands for itself")
def metric_that_normalises_gradients():
    def observe(self, weight, grad, state, step):
        state["peak"].copy_(grad.abs() / (grad.norm() + 1e-8))

    return variant(Peak, observe=observe)


@fault("each entry stands for itself")
def metric_that_goes_by_position():
    return variant(Peak, score=lambda self, weight, state: state["peak"] + torch.arange(len(weight)) * 1e-3)


@fault("leaves global state alone")
def metric_that_draws_and_forgets():
    def observe(self, weight, grad, state, step):
        torch.rand(1)
        state["peak"].copy_(grad.abs())

    return variant(Peak, observe=observe)


@fault(
    "leaves global state alone",
    "score changes nothing",
    "remembers in its buffers alone",
    "each entry stands for itself",
    "resumes exactly",
)
def metric_that_is_random():
    return variant(Peak, score=lambda self, weight, state: torch.rand_like(weight))


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        lambda: torch.set_grad_enabled(False),
        random.random,
        np.random.random,
        lambda: torch.use_deterministic_algorithms(True),
    ],
    ids=["dtype", "threads", "grad", "random", "numpy", "deterministic"],
)
def test_global_state_that_is_changed_is_found_and_put_back(change):
    def score(self, weight, state):
        change()
        return state["peak"].float()

    before = testing.base.global_state()
    contract = type("Contract", (testing.MetricContract,), {"component": variant(Peak, score=score)})
    with pytest.raises(testing.Broken, match="has changed: what is global"):
        contract().test_leaves_global_state_alone()
    assert str(testing.base.global_state()) == str(before)


@fault("remembers in its buffers alone", "each entry stands for itself", "resumes exactly")
def metric_that_remembers_elsewhere():
    seen: dict[int, Tensor] = {}

    def observe(self, weight, grad, state, step):
        before = seen.get(len(grad), torch.zeros_like(grad))
        seen[len(grad)] = grad.abs() + 0.9 * before
        state["peak"].copy_(seen[len(grad)])

    def score(self, weight, state):
        return state["peak"]

    return variant(Peak, observe=observe, score=score)


REDUCE = ("reduce gives each unit a score",)


@fault(*REDUCE, *METRIC_RUNS)
def metric_that_reduces_to_one_score_a_block():
    return variant(Peak, reduce=lambda self, parts: torch.stack([p.mean(dim=(1, 2)) for p in parts]).sum(0))


@fault(*REDUCE)
def metric_that_ranks_blocks_against_each_other():
    def reduce(self, parts):
        scores = torch.stack([p.mean(dim=-1) for p in parts]).sum(0)
        return scores / (scores.sum() + 1e-8)

    return variant(Peak, reduce=reduce)


@fault(*REDUCE)
def metric_that_reduces_in_place():
    return variant(Peak, reduce=lambda self, parts: torch.stack([p.mul_(2).mean(dim=-1) for p in parts]).sum(0))


# Schedulers

BUDGET = "budget goes from start to target"
FALLS = "budget never grows"
SHARE = "share is the budget before it was cut"
DUE = "last decision is due"
TIMES = "times are steps or shares"
PURE = "is a function of the step"
RUN = "trains and resumes exactly"


@fault(FALLS, BUDGET, SHARE, RUN)
def scheduler_that_grows():
    return variant(Cosine, decay=lambda self, progress: (1 - progress) * (1 + 0.5 * math.sin(20 * progress)))


@fault(FALLS)
def scheduler_that_bounces():
    return variant(Cosine, decay=lambda self, progress: abs(math.cos(4.5 * math.pi * progress)))


def timed(**methods):
    """Make a scheduler whose timetables have other methods, which take the timetable first."""
    times = attrs.frozen(type("Times", (Timetable,), methods))

    def over(self, total_steps, *, units, layers):
        return times(self, total_steps, units, layers)

    return variant(Cosine, over=over)


@fault(FALLS, BUDGET, SHARE, DUE)
def scheduler_above_all_units():
    return timed(budget=lambda times, step: Timetable.budget(times, step) + 1)


@fault(FALLS, RUN)
def scheduler_with_half_units():
    return timed(budget=lambda times, step: float(Timetable.budget(times, step)))


@fault(BUDGET, SHARE)
def scheduler_that_forgets_the_warm_up():
    def budget(times, step):
        plain = attrs.evolve(times.scheduler, warmup=0)
        return Cosine.over(plain, times.total_steps, units=times.units, layers=times.layers).budget(step)

    return timed(budget=budget)


@fault(BUDGET, SHARE, DUE, TIMES)
def scheduler_that_never_arrives():
    def budget(times, step):
        usual, scheduler = Timetable.budget(times, step), times.scheduler
        early = scheduler.target == 0.5 and scheduler.start == 1.0
        return max(usual, math.ceil(0.7 * times.units)) if early else usual

    return timed(budget=budget)


@fault(FALLS, BUDGET, SHARE, DUE, PURE)
def scheduler_that_cannot_have_phases_of_no_length():
    def budget(times, step):
        begin, end = times.bounds
        progress = min(max((times.number(step) - begin) / (end - begin), 0), 1)
        return int(times.units * (1 - progress / 2))

    return timed(budget=budget)


@fault(SHARE)
def scheduler_whose_share_is_of_something_else():
    return timed(share=lambda times, step: 0.5)


@fault(DUE, RUN)
def scheduler_whose_last_decision_is_never_due():
    return timed(due=lambda times, step: Timetable.due(times, step) and step != times.last)


@fault(DUE)
def scheduler_that_never_observes():
    return timed(observes=lambda times, step: False)


@fault(TIMES)
def scheduler_that_takes_every_time_for_steps():
    def due(times, step):
        (begin, end), number = times.bounds, times.number(step)
        every = max(1, int(times.scheduler.interval))
        return number == end or (begin < number <= end and number % every == 0)

    def last(times):
        return times.bounds[1] + 1 - times.scheduler.first_step

    return timed(due=due, last=property(last))


@fault(PURE, FALLS, SHARE, TIMES, RUN)
def scheduler_that_counts_calls():
    calls: list[int] = []

    def decay(self, progress):
        calls.append(1)
        return (1 - progress) ** (1 + len(calls) % 2)

    return variant(Cosine, decay=decay)


@fault("leaves global state alone")
def scheduler_that_draws():
    def due(times, step):
        random.random()
        return Timetable.due(times, step)

    return timed(due=due)


# Actions

SELECT = "decide keeps the best of the budget"
LOST = "losers stay lost where that is final"
ALONE = "acts on what loses alone"
STAY = "parameters stay what they are"
RESTORE = "a load makes again what tensors do not hold"
REFUSAL = "refusal names both sides"
TAKES = "trains with all it takes"
RESUME = "resumes exactly"


def applies(more: Callable[..., None]) -> Any:
    @torch.no_grad()
    def apply(self, blocks, kept, optimizer):
        Shrink.apply(self, blocks, kept, optimizer)
        more(blocks, kept, optimizer)

    return apply


@fault("says what it acts on", ALONE, STAY, RESTORE, TAKES, RESUME)
def action_on_what_there_is_not():
    return variant(Shrink, unit=property(lambda self: "components"))


@fault("says what it acts on")
def action_that_does_not_say_whether_it_is_final():
    return variant(Shrink, final=1)


@fault(SELECT, TAKES)
def action_that_keeps_one_too_many():
    def decide(self, ballot: Ballot):
        return Shrink.decide(self, attrs.evolve(ballot, budget=ballot.budget + 1))

    return variant(Shrink, decide=decide)


@fault(SELECT)
def action_that_keeps_the_worst():
    def decide(self, ballot: Ballot):
        return Shrink.decide(self, attrs.evolve(ballot, scores=-ballot.scores))

    return variant(Shrink, decide=decide)


@fault(SELECT)
def action_that_counts_ties_twice():
    def decide(self, ballot: Ballot):
        if ballot.budget == 0:
            return Verdict(torch.zeros_like(ballot.candidates))
        return Verdict(ballot.scores >= ballot.scores.sort(descending=True).values[ballot.budget - 1])

    return variant(Shrink, decide=decide)


@fault(SELECT)
def action_that_writes_to_the_ballot():
    def decide(self, ballot: Ballot):
        verdict = Shrink.decide(self, ballot)
        ballot.scores[~verdict.kept] = -torch.inf
        return verdict

    return variant(Shrink, decide=decide)


@fault(SELECT, TAKES, RESUME)
def action_that_gives_indices():
    def decide(self, ballot: Ballot):
        return Verdict(Shrink.decide(self, ballot).kept.nonzero().flatten())

    return variant(Shrink, decide=decide)


@fault(LOST, SELECT, TAKES)
def action_that_is_final_and_takes_back():
    def decide(self, ballot: Ballot):
        everybody = attrs.evolve(ballot, candidates=torch.ones_like(ballot.candidates))
        return Verdict(Shrink.decide(self, everybody).kept.roll(1))

    return variant(Shrink, final=True, decide=decide)


@fault(ALONE)
def action_that_scales_what_is_kept():
    def more(blocks, kept, optimizer):
        for block in blocks:
            block.core.mul_(1.01)

    return variant(Shrink, apply=applies(more))


@fault(ALONE)
def action_that_holds_what_is_kept():
    def more(blocks, kept, optimizer):
        for block in blocks if optimizer is None else ():
            block.tensors[-1].clamp_(-1e-3, 1e-3)

    return variant(Shrink, apply=applies(more))


@fault(ALONE, RESTORE)
def action_that_freezes_the_base_again():
    def more(blocks, kept, optimizer):
        for block in blocks:
            block.module.base.weight.requires_grad_(True)

    @frozen
    class Broken(Shrink):
        """λ of a loser times factor, on SVD alone. Source: this test."""

        def refusal(self, parameterization):
            return None if isinstance(parameterization, lrkit.parameterizations.SVD) else "it is no SVD"

        apply = applies(more)

    return Broken()


@fault(ALONE)
def action_that_clears_all_optimizer_state():
    def more(blocks, kept, optimizer):
        if optimizer is not None:
            optimizer.state.clear()

    return variant(Shrink, apply=applies(more))


@fault(STAY, RESUME)
def action_that_edits_groups():
    def more(blocks, kept, optimizer):
        if optimizer is not None:
            optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]

    return variant(Shrink, apply=applies(more))


@fault(STAY)
def action_that_edits_the_learning_rate():
    def more(blocks, kept, optimizer):
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] *= 0.5

    return variant(Shrink, apply=applies(more))


@fault(STAY)
def action_that_needs_an_optimizer():
    return variant(Shrink, apply=applies(lambda blocks, kept, optimizer: optimizer.state.keys()))


@fault(STAY, TAKES, RESUME)
def action_that_makes_new_parameters():
    def more(blocks, kept, optimizer):
        for block in blocks:
            block.module.core = nn.Parameter(block.core.clone())

    return variant(Shrink, apply=applies(more))


@fault("proximal moves its units alone")
def action_whose_proximal_step_moves_everything():
    @torch.no_grad()
    def proximal(self, blocks, share, optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.mul_(0.99)

    return variant(Shrink, proximal=proximal)


@fault("what has lost is out")
def action_that_does_not_hold():
    def apply(self, blocks, kept, optimizer):
        if optimizer is not None:
            lrkit.actions.Prune.apply(self, blocks, kept, optimizer)

    return variant(lrkit.actions.Prune, doc="cut, ties. Source: this test.", apply=apply)


@fault("what has lost is out")
def action_that_counts_what_it_halves_as_gone():
    return variant(Shrink, fate="masked")


@fault(RESTORE, RESUME)
def action_that_masks_again_on_load():
    # As if it froze: its values are then applied a second time.
    return variant(Shrink, fate="frozen")


@fault(RESTORE, RESUME)
def action_that_does_not_freeze_again_on_load():
    return variant(lrkit.actions.Freeze, doc="together, rule. Source: this test.", fate="dimmed")


@fault(REFUSAL)
def action_that_refuses_without_a_reason():
    def refusal(self, parameterization):
        return None if any(part.core for part in parameterization.parts) else ""

    return variant(Shrink, refusal=refusal)


@fault(ALONE, STAY, RESTORE, TAKES, RESUME)
def action_that_takes_what_it_cannot_do():
    # LoRA has components without a core.
    return variant(Shrink, refusal=lambda self, parameterization: None)


@fault(TAKES, RESUME)
def action_that_cannot_do_all_that_it_takes():
    def apply(self, blocks, kept, optimizer):
        if hasattr(blocks[0].module, "out_scale") and len(blocks) > 5 and blocks[0].module.out_scale is not None:
            raise RuntimeError("not on vectors")
        Shrink.apply(self, blocks, kept, optimizer)

    return variant(Shrink, apply=apply)


@fault("leaves global state alone")
def action_that_draws():
    def decide(self, ballot: Ballot):
        torch.rand(1)
        return Shrink.decide(self, ballot)

    return variant(Shrink, decide=decide)


@fault("leaves global state alone", RESUME, ALONE)
def action_that_adds_noise():
    def more(blocks, kept, optimizer):
        for block in blocks:
            block.core.add_(torch.randn_like(block.core))

    return variant(Shrink, apply=applies(more))


@fault(STAY, ALONE, RESTORE, TAKES, RESUME)
def action_that_forgets_no_grad():
    def apply(self, blocks, kept, optimizer):
        for block, keep in zip(blocks, kept.split([b.count for b in blocks]), strict=True):
            block.core.mul_(keep)

    return variant(Shrink, apply=apply)


# Parameterizations

PARTS = "parts are what is there"
START = "starts at the model"
LEFT = "layers are left as they are"
LEARNS = "every trained parameter learns"
DOWN = "loss goes down"
SEED = "same seed same start"
SHAPES = "any leading shape"
PENALTY = "penalty is a scalar"
DTYPES = "other dtypes or refused"
CONV = "conv1d or refused"
MERGE = "merge gives the same outputs"
DETACH = "detach gives the model back"
SAVED = "saved and loaded"
MASKED = "masked components contribute nothing"
CUT = "can be cut"
EVERYWHERE = "trains or is refused everywhere"


def gates(module: type[nn.Module] | None = None, **changes: Any) -> Any:
    return variant(Gates, **({} if module is None else {"module": module}), **changes)


def with_parts(*parts: lrkit.Part) -> property:
    return property(lambda self: parts)


CORE, A, B = Gates().parts


@fault(PARTS, EVERYWHERE, CUT, RESUME, MASKED, SAVED)
def parameterization_with_a_part_that_is_not_there():
    return gates(parts=with_parts(CORE, A, lrkit.Part("C", axis=1)))


@fault(PARTS, CUT, MASKED, EVERYWHERE, RESUME, SAVED)
def parameterization_with_the_wrong_axis():
    return gates(parts=with_parts(CORE, A, attrs.evolve(B, axis=0)))


@fault(PARTS)
def parameterization_that_forgot_its_components():
    return gates(components=property(lambda self: 0))


@fault(PARTS)
def parameterization_that_says_it_does_not_train():
    return gates(parts=with_parts(CORE, attrs.evolve(A, trains=False), B))


@fault(PARTS)
def parameterization_with_a_part_twice():
    return gates(parts=with_parts(CORE, A, B, attrs.evolve(B)))


@fault(START)
def parameterization_that_does_not_start_at_the_model():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            nn.init.constant_(self.core, 0.1)

    return gates(Module)


@fault(LEFT, START, DETACH)
def parameterization_that_takes_from_the_weight():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            with torch.no_grad():
                base.weight -= 0.01

    return gates(Module)


@fault(LEFT, MERGE)
def parameterization_that_hides_the_layer():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            del self.base
            self.__dict__["base"] = base

    return gates(Module)


@fault(LEARNS, DOWN)
def parameterization_that_is_dead():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            nn.init.zeros_(self.A)

    return gates(Module)


@fault(LEARNS)
def parameterization_with_an_idle_vector():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            self.idle = nn.Parameter(torch.zeros(3, dtype=base.weight.dtype))

    return gates(Module)


@fault(DOWN)
def parameterization_with_a_rate_below_zero():
    return gates(learning_rate=-0.01)


@fault(SEED, "leaves global state alone")
def parameterization_that_draws_from_numpy():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            with torch.no_grad():
                self.A.copy_(torch.from_numpy(np.random.randn(*self.A.shape) * 0.1))

    return gates(Module)


@fault(SAVED, RESUME, MASKED, CUT)
def parameterization_with_a_random_buffer():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            self.register_buffer("turn", torch.randn(rank, rank, dtype=base.weight.dtype) * 0.1, persistent=False)

        def forward(self, x):
            return self.base(x) + ((x @ self.A.t()) * self.core) @ (self.B + self.B @ self.turn).t()

        merge = property(doc="none")

    return gates(Module)


@fault(SEED, MERGE, SAVED, SHAPES, MASKED, CUT, "leaves global state alone")
def parameterization_that_is_random_in_evaluation():
    class Module(Gated):
        def forward(self, x):
            return self.base(x) + ((nn.functional.dropout(x, 0.5, True) @ self.A.t()) * self.core) @ self.B.t()

    return gates(Module)


@fault(SHAPES)
def parameterization_for_three_dimensions():
    class Module(Gated):
        def forward(self, x):
            return self.base(x) + torch.einsum("bni,ri,r,or->bno", x, self.A, self.core, self.B)

    return gates(Module)


@fault(SHAPES, DOWN)
def parameterization_that_looks_at_the_batch():
    class Module(Gated):
        def forward(self, x):
            return super().forward(x) + self.core.sum() * x.mean(dim=0).sum()

        merge = property(doc="none")

    return gates(Module)


@fault(PENALTY)
def parameterization_with_a_penalty_for_each_layer():
    return gates(penalty=lambda self, modules: torch.stack([m.A.square().mean() for m in modules]).sum().view(1))


@fault(DTYPES, START)
def parameterization_for_float32():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            for name in ("A", "B", "core"):
                setattr(self, name, nn.Parameter(getattr(self, name).detach().float()))

    return gates(Module)


@fault(DTYPES)
def parameterization_that_widens_outputs():
    class Module(Gated):
        def forward(self, x):
            y = super().forward(x)
            return y.float() if y.dtype == torch.bfloat16 else y

        def __init__(self, base, rank):
            super().__init__(base, rank)

    return gates(Module)


@fault(CONV)
def parameterization_that_takes_conv1d_for_a_linear():
    return gates(build=lambda self, target: self.module(target.layer, self.rank))


@fault(MERGE)
def parameterization_that_merges_half():
    class Module(Gated):
        @torch.no_grad()
        def merge(self):
            self.base.weight += 0.5 * (self.B * self.core) @ self.A
            return self.base

    return gates(Module)


@fault(DETACH)
def parameterization_that_leaves_a_hook():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            base.register_forward_hook(lambda module, args, y: y + ((args[0] @ self.A.t()) * self.core) @ self.B.t())

        def forward(self, x):
            return self.base(x)

        merge = property(doc="none")

    return gates(Module)


@fault(MASKED, CUT)
def parameterization_whose_core_is_no_gate():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            nn.init.zeros_(self.B)

        def forward(self, x):
            return self.base(x) + (x @ self.A.t() * (1 + self.core)) @ self.B.t()

        merge = property(doc="none")

    return gates(Module)


@fault(MASKED)
def parameterization_whose_core_cannot_come_back():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            nn.init.constant_(self.core, 0.1)
            nn.init.zeros_(self.B)

        def forward(self, x):
            return self.base(x) + ((x @ self.A.t()) * self.core.square()) @ self.B.t()

        merge = property(doc="none")

    return gates(Module)


@fault(CUT)
def parameterization_that_remembers_its_rank():
    class Module(Gated):
        def __init__(self, base, rank):
            super().__init__(base, rank)
            self.rank = rank

        def forward(self, x):
            return self.base(x) + ((x @ self.A.t()).view(*x.shape[:-1], self.rank) * self.core) @ self.B.t()

    return gates(Module)


@fault(CUT)
def parameterization_scaled_by_its_rank():
    class Module(Gated):
        def forward(self, x):
            return self.base(x) + ((x @ self.A.t()) * self.core) @ self.B.t() * (8 / len(self.core))

        merge = property(doc="none")

    return gates(Module)


# Methods


@fault("arguments are keywords with defaults")
def method_with_positions():
    def made(rank: int = 4) -> lrkit.Method:
        """LoRA of rank `rank`. Source: arXiv 2106.09685."""
        return lrkit.methods.lora(rank=rank)

    return made


@fault("docstring names settings and source")
def method_without_source():
    def made(*, rank: int = 4) -> lrkit.Method:
        """LoRA of rank `rank`."""
        return lrkit.methods.lora(rank=rank)

    return made


@fault("survives plain data", "saved and taken out", "resumes exactly")
def method_with_a_metric_that_is_not_registered():
    def made() -> lrkit.Method:
        """AdaLoRA by the largest gradient. Source: this test."""
        return attrs.evolve(lrkit.methods.adalora(), metric=Peak())

    return made


@fault("loss goes down", "survives plain data", "saved and taken out", "resumes exactly")
def method_that_never_ends():
    scheduler = scheduler_whose_last_decision_is_never_due()

    def made() -> lrkit.Method:
        """AdaLoRA without a last decision. Source: this test."""
        return attrs.evolve(lrkit.methods.adalora(), scheduler=scheduler)

    return made


@fault("parts can be swapped", "survives plain data", "saved and taken out", "resumes exactly")
def method_with_a_part_that_cannot_refuse():
    @frozen
    class Picky(Shrink):
        """factor. Source: this test."""

        def refusal(self, parameterization):
            return {lrkit.parameterizations.SVD: None}[type(parameterization)]

    def made() -> lrkit.Method:
        """AdaLoRA that shrinks. Source: this test."""
        return attrs.evolve(lrkit.methods.adalora(), action=Picky())

    return made


@fault("arguments are keywords with defaults")
def method_that_is_another_each_time():
    ranks = iter(range(1, 10_000))

    def made() -> lrkit.Method:
        """LoRA of some rank. Source: arXiv 2106.09685."""
        return lrkit.methods.lora(rank=next(ranks))

    return made


# These train for seconds: for a fault that is not meant for them they are left out.
LONG = {*METRIC_RUNS, RUN, TAKES, RESUME, EVERYWHERE}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_by_the_clause_that_is_meant(name):
    make, wanted = FAULTS[name]
    component = make()
    contract = type("Contract", (testing.CONTRACTS[name.split("_")[0]],), {"component": (component,)})
    findings = {}
    for test in testing.clauses(contract):
        clause = test.removeprefix("test_").replace("_", " ")
        if clause in wanted or clause not in LONG:
            try:
                getattr(contract(), test)()
            except testing.Broken as broken:
                findings[clause] = str(broken)
    assert set(findings) == wanted, findings
    assert not [message for message in findings.values() if "\n" in message]


def test_check_says_what_the_classes_say():
    component = metric_whose_score_decays_its_state()

    class Contract(testing.MetricContract):
        pass

    Contract.component = component
    said = {}
    for test in testing.clauses(Contract):
        try:
            getattr(Contract(), test)()
        except testing.Broken as broken:
            said[test.removeprefix("test_").replace("_", " ")] = str(broken)
    assert {finding.clause: finding.message for finding in check(component)} == said


def test_a_class_is_checked_with_its_defaults():
    assert check(Gates) == []
    (finding,) = check(type(metric_with_a_setting_without_default()))
    assert finding.clause == "settings have defaults"
    assert "Broken() raised TypeError" in finding.message


def test_what_has_no_contract_is_refused():
    with pytest.raises(lrkit.LrkitError, match="there is no contract for this: 3"):
        check(3)
    with pytest.raises(lrkit.LrkitError, match="there is no contract for executor"):
        check(mine, kind="executor")


def test_a_contract_without_a_component_says_so():
    with pytest.raises(testing.Broken, match="component is not set"):
        testing.MetricContract().test_equal_by_value()


def test_nothing_stays_registered():
    before = [(o.kind, o.name) for o in lrkit.current().offers()]
    check(Peak())
    assert [(o.kind, o.name) for o in lrkit.current().offers()] == before


def test_every_clause_says_what_must_hold():
    for contract in testing.CONTRACTS.values():
        for name, says in testing.clauses(contract).items():
            assert says.endswith("."), (contract, name)


def test_faults_cover_every_clause():
    # What a task's rows can be wrong in is tested below; runs alone are not broken by anything simpler.
    found = {(name.split("_")[0], clause) for name, (_, wanted) in FAULTS.items() for clause in wanted}
    for kind, contract in testing.CONTRACTS.items():
        for test in testing.clauses(contract) if kind != "task" else ():
            clause = test.removeprefix("test_").replace("_", " ")
            common = test in vars(testing.base.PartContract) or test in vars(testing.Contract)
            assert (kind, clause) in found or (common and ("metric", clause) in found), (kind, clause)


@pytest.mark.parametrize(
    ("table", "clause"),
    [
        ([{"text": "a", "label": 0}, {"text": None, "label": 1}], "rows have texts and labels"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 2}], "rows have texts and labels"),
        ([{"text": "a", "label": 0.0}, {"text": "b", "label": 1.0}], "rows have texts and labels"),
    ],
    ids=["no text", "label out of range", "label a float"],
)
def test_a_task_with_odd_rows(table, clause):
    def loader(rest: str | None) -> lrkit.tasks.Task:
        """Odd rows. Source: this test."""
        return rows(table)

    assert clause in {finding.clause for finding in check(loader, kind="task")}


def test_a_task_that_is_another_each_time():
    def loader(rest: str | None) -> lrkit.tasks.Task:
        """Rows in a random order. Source: this test."""
        if rest:
            {}[rest]
        order = np.random.permutation(25)
        return rows([{"text": f"{i}", "label": int(i) % 2} for i in order])

    wanted = {"is the same each time", "leaves global state alone", "unknown part is refused"}
    assert {finding.clause for finding in check(loader, kind="task")} == wanted


def test_a_check_of_attrs_own_and_a_missing_setting_are_one_line_by_name():
    @frozen
    class Checked(Peak):
        """The largest gradient, with decay, measure and more. Source: this test."""

        more: float = attrs.field(default=1.0, validator=attrs.validators.ge(0.5))

    assert check(Checked()) == []
    missing = type(metric_with_a_setting_without_default())
    plain = lrkit.to_plain(lrkit.methods.adalora())
    for cls, settings, words in ((Checked, {"more": 0.1}, r"metric: .*0\.5"), (missing, {}, "metric: .*'more'")):
        with lrkit.current().lend("metric", "checked", cls):
            with pytest.raises(lrkit.LrkitError, match=words) as raised:
                lrkit.from_plain({**plain, "metric": {"name": "checked", **settings}})
            assert "\n" not in str(raised.value)
