"""Faulty metrics, each found by the clause that is meant."""

from __future__ import annotations

import random

import attrs
import numpy as np
import pytest
import torch
from faulty import Peak, Specimens, broken_clauses, frozen, variant
from torch import Tensor

import lrkit
from lrkit import testing
from lrkit.process import global_state
from lrkit.testing import check

fault = Specimens("metric")

METRIC_RUNS = ("trains or is refused everywhere", "resumes exactly")
SHAPE = ("score is finite float32 for each entry", "each entry stands for itself", *METRIC_RUNS)
REDUCE = ("reduce gives each unit a score",)


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


@fault(
    "settings survive plain data",
    "settings refuse what cannot be meant",
    "reads and buffers are declared",
    "trains or is refused everywhere",
)
def metric_that_reads_something_else():
    return variant(Peak, reads="cores")


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


@pytest.mark.parametrize("name", fault.made)
def test_found_by_its_clause(name):
    """Each fault is found by the clauses that are meant, and by no other."""
    fault.check(name)


def test_every_clause_finds():
    """Each clause of a metric finds a fault."""
    assert fault.missing() == set()


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
def test_global_state_is_restored(change):
    """A change of global state is found, and put back."""

    def score(self, weight, state):
        change()
        return state["peak"].float()

    before = global_state()
    contract = type("Contract", (testing.MetricContract,), {"component": variant(Peak, score=score)})
    with pytest.raises(testing.Broken, match="has changed: what is global"):
        contract().test_leaves_global_state_alone()
    assert str(global_state()) == str(before)


def test_check_says_the_same():
    """`check` finds what the test methods of a subclass find, in the same words."""
    component = metric_whose_score_decays_its_state()
    said = broken_clauses(testing.MetricContract, component)
    assert {finding.clause: finding.message for finding in check(component)} == said


def test_gradients_not_asked_for():
    """A layer metric that uses gradients and does not say that it reads them is told what to say."""

    @frozen
    class Asks(lrkit.LayerMetric):
        """The squared norm of dL/dW. Source: this test."""

        def begin(self, layer):
            return {"gradient": torch.zeros(layer.d_out, layer.d_in)}

        def observe(self, seen, state):
            state["gradient"].add_(seen.g.t() @ seen.x)

        def score(self, layer, state):
            return state["gradient"].square().sum().expand(layer.units)

    findings = check(Asks())
    assert len(findings) >= 5
    assert all('let its class say reads = "gradient"' in f.message for f in findings)


def test_class_without_defaults():
    """A class that cannot be built breaks one clause, and the message says how."""
    (finding,) = check(type(metric_with_a_setting_without_default()))
    assert finding.clause == "settings have defaults"
    assert "Broken() raised TypeError" in finding.message


def test_errors_of_attrs():
    """If attrs refuses a value or misses a setting, the error is one line that names it."""

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
