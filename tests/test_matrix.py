"""Every parameterization x metric x scheduler x action of lrkit is refused with both sides named, or its pairs train.

Components of plug-ins that are installed join by themselves: each is swapped into AdaLoRA and AFLoRA.
"""

import copy
import itertools
import warnings

import attrs
import models
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lrkit

STEPS = 10
REGISTRY = lrkit.current()
KINDS = ("parameterization", "metric", "scheduler", "action")
OURS = {(o.kind, o.name) for o in REGISTRY.offers() if o.distribution == f"lrkit {lrkit.__version__}"}
NAMES = {kind: [name for name in REGISTRY.names(kind) if (kind, name) in OURS] for kind in KINDS}
OTHERS = [(o.kind, o.name) for o in REGISTRY.offers() if o.kind in KINDS and (o.kind, o.name) not in OURS]


def component(kind, name):
    cls = REGISTRY.get(kind, name)
    fields = {field.name for field in attrs.fields(cls) if not field.metadata.get("own")}
    wanted = {"rank": 4, "warmup": 2, "final": 3, "interval": 1}
    return cls(**{key: value for key, value in wanted.items() if key in fields})


def start(method):
    model = models.make("bert", seed=2).eval()
    torch.manual_seed(5)
    adapted = lrkit.attach(model, method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=3e-3)
    if any(policy.scheduler.calibration for policy in method.policies):
        adapted.calibrate([models.batch(seed=1, rows=16, length=6)] * 2)
    adapted.bind(optimizer, total_steps=STEPS)
    return model, adapted, optimizer


def steps(model, adapted, optimizer, begin, end):
    losses = []
    for _ in range(begin, end):
        loss = model(**models.batch(seed=1, rows=16, length=6)).loss
        losses.append(loss.item())
        (loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def trained_and_resumed(method, model, adapted, optimizer):
    """All steps' losses. A run that goes on from what was saved after four of them is the run, bit for bit."""
    losses = steps(model, adapted, optimizer, 0, 4)
    saved, saved_optimizer = adapted.state_dict(), copy.deepcopy(optimizer.state_dict())
    losses += steps(model, adapted, optimizer, 4, STEPS)
    again, other, optimizer2 = start(method)
    other.load_state_dict(saved)
    optimizer2.load_state_dict(saved_optimizer)
    steps(again, other, optimizer2, 4, STEPS)
    for (name, one), (_, two) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert adapted.history == other.history
    return losses


def trains(method):
    begun = start(method)
    losses = trained_and_resumed(method, *begun)
    _, adapted, _ = begun
    assert min(losses[-3:]) < losses[0]
    for index, policy in enumerate(method.policies):
        decisions = [d for d in adapted.history if d.policy == index]
        assert [d.step for d in decisions] == ([0] if policy.scheduler.at_start else [3, 4, 5, 6, 7])
        layers = len(adapted.adapters)
        for d in decisions:
            assert d.kept == d.budget
            budget = policy.scheduler.budget(d.step, total_steps=STEPS, units=d.units, layers=layers)
            assert d.budget == budget
        assert decisions[-1].kept == round(policy.scheduler.target * decisions[-1].units)


def built(names):
    parts = dict(zip(NAMES, (component(kind, name) for kind, name in zip(NAMES, names, strict=True)), strict=True))
    try:
        return lrkit.Method(**parts), parts
    except lrkit.LrkitError as error:
        text = str(error)
        named = [type(part).__name__ for part in parts.values() if type(part).__name__ in text]
        assert len(named) >= 2, text
        assert "\n" not in text
        return None, parts


def fitting():
    """All combinations of four that are not refused; a refusal names both sides, or ``built`` fails."""
    return [names for names in itertools.product(*NAMES.values()) if built(names)[0] is not None]


def pairs_of(names):
    """The six pairs of a combination, with their places."""
    return set(itertools.combinations(enumerate(names), 2))


def covering(combinations):
    """Few of the combinations, in which all pairs occur that occur in any: each time the one that has most of the rest."""
    left, chosen = set().union(*map(pairs_of, combinations)), []
    while left:
        chosen.append(max(combinations, key=lambda names: len(pairs_of(names) & left)))
        left -= pairs_of(chosen[-1])
    return chosen


@pytest.mark.parametrize("names", covering(fitting()), ids="-".join)
def test_every_pair_trains(names):
    """Whatever two components fit, there is a combination with both of them that trains and resumes."""
    method, _ = built(names)
    trains(method)


def test_what_fits_is_what_the_design_says():
    fits = set(fitting())
    prunable, freezable = {"svd", "vector-scaled"}, {"full", "lora", "svd", "vector-scaled", "dora"}
    for p, m, s, a in itertools.product(
        ("full", "lora", "svd", "vector-scaled", "dora"),
        ("magnitude", "sensitivity", "sensitivity-uncertainty", "gradient-uncertainty", "ratio-uncertainty"),
        ("constant", "linear", "quadratic", "cubic", "once"),
        ("prune", "freeze", "zero"),
    ):
        expected = {
            "prune": p in prunable,
            "freeze": p in freezable and m != "magnitude",
            "zero": p in prunable or (p in ("lora", "dora") and m != "magnitude"),
        }[a]
        assert ((p, m, s, a) in fits) == expected, (p, m, s, a)


POLICIES = st.tuples(*[st.sampled_from(NAMES[kind]) for kind in ("metric", "scheduler", "action")])


@settings(max_examples=12, suppress_health_check=[HealthCheck.filter_too_much])
@given(p=st.sampled_from(NAMES["parameterization"]), one=POLICIES, two=POLICIES)
def test_pairs_of_policies_train_or_are_refused(p, one, two):
    first, _ = built((p, *one))
    second, parts = built((p, *two))
    if first is None or second is None:
        return
    also = lrkit.Policy(**{kind: parts[kind] for kind in ("metric", "scheduler", "action")})
    with warnings.catch_warnings():
        # Two policies may freeze the same matrices: the second then sees tensors that no longer train.
        trains(attrs.evolve(first, also=(also,)))


@pytest.mark.filterwarnings("ignore::lrkit.errors.LrkitWarning")  # of an odd pair, such as growth to a budget of none
@pytest.mark.parametrize("base", ["adalora", "aflora"])
@pytest.mark.parametrize(("kind", "name"), OTHERS or [("action", "prune")], ids=lambda word: word)
def test_a_plug_ins_component_joins_or_is_refused(kind, name, base):
    """It may keep another number than the budget, and learn at another rate; it must train, and resume bit for bit."""
    settings = {"rank": 4, "warmup": 2, "final": 3, "interval": 1} | ({"target_rank": 2} if base == "adalora" else {})
    plain = lrkit.to_plain(REGISTRY.get("method", base)(**settings))
    try:
        method = lrkit.from_plain(lrkit.with_component(plain, kind, name))
        begun = start(method)
    except lrkit.LrkitError:
        return
    losses = trained_and_resumed(method, *begun)
    _, adapted, _ = begun
    assert all(loss == loss for loss in losses) and adapted.step == STEPS
