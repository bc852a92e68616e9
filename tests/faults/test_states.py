"""A state is looked at whole before anything of it is taken: what is refused leaves the run bitwise as it was."""

import copy
import json
import resource
import sys
from pathlib import Path

import attrs
import pytest
import schedules
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import models

import lrkit
from lrkit.adapt import checkpoint
from lrkit.loop.course import course
from lrkit.loop.state import read
from lrkit.schedulers import Cubic

TOTAL = 14
METHODS = {
    "adalora": lambda: lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=4, interval=1),
    "aflora": lambda: lrkit.methods.aflora(rank=4, warmup=2, final=4),
    "lora": lambda: lrkit.methods.lora(rank=4),
}


def begun(name, steps, total=TOTAL):
    model = models.make("bert", seed=3).eval()
    adapted = lrkit.attach(model, METHODS[name]())
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=total)
    for step in range(steps):
        (model(**models.batch(seed=step, rows=4, length=6)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, adapted, optimizer


def look(model, adapted, optimizer):
    state = adapted.state_dict()
    moments = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    return state, moments, [p.requires_grad for p in model.parameters()], adapted.total_steps


def equal(one, two):
    assert one[0]["meta"] == two[0]["meta"] and one[2:] == two[2:]
    assert all(torch.equal(t, two[0]["tensors"][n]) for n, t in one[0]["tensors"].items())
    assert all(torch.equal(v, b[k]) for a, b in zip(one[1], two[1], strict=True) for k, v in a.items())


LAYER = "bert.encoder.layer.0.attention.self.query"
DECISION = {"policy": 0, "budget": 1, "kept": 1, "units": 1, "threshold": None, "lost": [], "returned": [], "fresh": []}


def change(key, value):
    return lambda m: m | {key: value}


def entry(key, value):
    return lambda m: m | {key: m[key] | {LAYER: value}}


CHANGES = {
    "sums of 2^63": entry("sums", 2**63),
    "sums of more than there was": entry("sums", 10**9),
    "a step beyond the run": change("step", 10**6),
    "a step beyond the last decision": change("step", 12),
    "a step just beyond the last decision": change("step", 11),
    "sums of one parameter too many": entry("sums", 8 * 4 * (32 + 32 + 1) + 1),
    "a step of 2^70": change("step", 2**70),
    "a run of 10^15 steps": change("total_steps", 10**15),
    "no run at all": change("total_steps", None),
    "a head of another": change("head", ["../../etc"]),
    "no head": change("head", []),
    "a rank of another": entry("ranks", 65536),
    "numbers never given": entry("numbered", 65536),
    "components never given": entry("components", [0, 1, 2, 99]),
    "components in another order": entry("components", [3, 2, 1, 0]),
    "a history from the future": lambda m: m | {"history": [*m["history"], {"step": 99, **DECISION}]},
    "a history told twice": lambda m: m | {"history": m["history"] * 2},
    "a history of other units": lambda m: m | {"history": [{"step": 3, **DECISION, "lost": ["x[0]"]}]},
    "a history of another policy": lambda m: m | {"history": [{"step": 3, **DECISION, "policy": 5}]},
    "a policy that ended unseen": lambda m: m | {"history": [], "policies": [{"observations": 5, "ended": True}]},
    "a seed of 2^63": change("seed", 2**63),
    "a format that is true": change("format", True),
    "a method that is a number": change("method", 5),
    "layers told twice": lambda m: m | {"targets": m["targets"] * 2},
}


@pytest.fixture(scope="module")
def states():
    return {8: begun("adalora", 8)[1].state_dict(), TOTAL: begun("adalora", TOTAL)[1].state_dict()}


@pytest.mark.parametrize("case", CHANGES)
def test_what_disagrees_changes_nothing(case, states):
    """Weights, masks, history, counters, optimizer and flags of a running method are bitwise as before."""
    run = begun("adalora", 3)
    before = look(*run)
    state = copy.deepcopy(states[8])
    state["meta"] = CHANGES[case](state["meta"])
    with pytest.raises(lrkit.LrkitError) as error:
        run[1].load_state_dict(state)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    equal(before, look(*run))


def test_a_finished_run_has_no_further_steps(states):
    """A step beyond the run is believed only if the sums are of so many steps: here they are not."""
    state = copy.deepcopy(states[TOTAL])
    state["meta"]["step"] = 10**6
    with pytest.raises(lrkit.LrkitError, match="beyond the run of 14 steps"):
        begun("adalora", 3)[1].load_state_dict(state)


@pytest.mark.filterwarnings("ignore:step 15 of a run:lrkit.LrkitWarning")
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_went_on_loads(name):
    """Who has trained longer than was said (and was warned) gets the state back, bit for bit."""
    state = begun(name, TOTAL + 6)[1].state_dict()
    fresh = begun(name, 0)
    fresh[1].load_state_dict(state)
    again = fresh[1].state_dict()
    assert again["meta"] == state["meta"]
    assert all(torch.equal(t, again["tensors"][n]) for n, t in state["tensors"].items())


def layer(key, value):
    return lambda s: attrs.evolve(s, **{key: getattr(s, key) | {LAYER: value}})


def decided(**changes):
    return lambda s: attrs.evolve(s, history=(*s.history[:-1], attrs.evolve(s.history[-1], **changes)))


SAYS = {
    "a layer twice": (lambda s: attrs.evolve(s, targets=(*s.targets, LAYER)), "names a layer twice"),
    "another layer dead": (lambda s: attrs.evolve(s, dead=("elsewhere",)), "dead must name"),
    "a layer dead twice": (lambda s: attrs.evolve(s, dead=(LAYER, LAYER)), "dead must name"),
    "a run of no steps": (lambda s: attrs.evolve(s, total_steps=0), "total_steps is 0"),
    "steps of no run": (lambda s: attrs.evolve(s, total_steps=None), "total_steps is missing"),
    "a number not given": (layer("components", (0, 1, 2, 4)), "components"),
    "a number twice": (layer("components", (0, 1, 1, 3)), "components"),
    "a number too few": (layer("components", (0, 1, 3)), "components"),
    "components untold": (layer("numbered", 5), "do not say which are left"),
    "a policy that is none": (decided(policy=1), "there are 1"),
    "two decisions of one step": (lambda s: attrs.evolve(s, history=(*s.history, s.history[-1])), "cannot be there"),
    "a decision to come": (decided(step=9), "cannot be there"),
    "too many kept": (decided(kept=10**6), "more units than there are"),
    "too large a budget": (decided(budget=10**6), "more units than there are"),
}


@pytest.mark.parametrize("case", SAYS)
def test_records_that_disagree(case, states):
    """A record that agrees with itself passes; with one change it is refused, for that reason."""
    record = read(states[8])
    record.check()
    assert record.step == record.history[-1].step == 8
    wrong, reason = SAYS[case]
    with pytest.raises(lrkit.LrkitError, match=reason):
        wrong(record).check()


def test_records_that_agree(states):
    """A run that is not bound, dead layers, and the last number that was given are no faults."""
    record = read(states[8])
    attrs.evolve(record, dead=(LAYER,)).check()
    attrs.evolve(record, step=0, total_steps=None, history=()).check()
    layer("numbered", 5)(layer("components", (0, 1, 2, 4))(record)).check()


def test_ranks_that_cannot_be(states):
    """A layer has been given more numbers only in a run that grows, and then says which are left."""
    record = read(states[8])
    initial = dict.fromkeys(record.targets, 4)
    record.check_ranks(initial, grows=False)
    grown = layer("numbered", 5)(layer("components", (0, 1, 2, 4))(record))
    grown.check_ranks(initial, grows=True)
    for wrong, grows in ((grown, False), (layer("numbered", 5)(record), True)):
        with pytest.raises(lrkit.LrkitError, match="began with rank 4 by its method, and with 5"):
            wrong.check_ranks(initial, grows)


def test_a_finished_run_in_a_longer_one(states):
    """Once every schedule has ended its state is taken over by a run that is bound for more steps."""
    run = begun("adalora", 3, total=TOTAL + 6)
    run[1].load_state_dict(states[TOTAL])
    assert (run[1].step, run[1].total_steps) == (TOTAL, TOTAL + 6)
    with pytest.raises(lrkit.LrkitError, match="run of 14 steps, this one is bound for 20"):
        begun("adalora", 3, total=TOTAL + 6)[1].load_state_dict(states[8])


@pytest.mark.parametrize("tensor", [torch.zeros(4, 32, device="meta"), torch.zeros(4, 32).to_sparse()])
def test_tensors_without_values_are_refused(tensor, states):
    """A tensor of the meta device or a sparse one cannot be copied: told before the first one is."""
    run = begun("adalora", 3)
    before = look(*run)
    state = copy.deepcopy(states[8])
    state["tensors"][f"weight.{LAYER}.A"] = tensor
    with pytest.raises(lrkit.LrkitError, match="no plain tensor"):
        run[1].load_state_dict(state)
    equal(before, look(*run))


def test_a_schedule_that_does_not_fit_is_told_first(states):
    """A run that is not bound takes its length from the state; one too short for the schedule is refused at once."""
    model = models.make("bert", seed=3).eval()
    adapted = lrkit.attach(model, METHODS["adalora"]())
    before = adapted.state_dict()
    state = copy.deepcopy(states[8])
    state["meta"] |= {"total_steps": 3}
    with pytest.raises(lrkit.LrkitError):
        adapted.load_state_dict(state)
    after = adapted.state_dict()
    assert before["meta"] == after["meta"]
    assert all(torch.equal(t, after["tensors"][n]) for n, t in before["tensors"].items())


def bomb(meta, layers, how):
    meta["method"]["parameterization"]["rank"] = 65536
    if how != "rank alone":
        meta["numbered"] = dict.fromkeys(layers, 65536)
    if how == "all at one":
        meta["components"] = {layer: [0, 1, 2, 3] for layer in layers}
    return meta


@pytest.mark.parametrize("how", ["rank alone", "numbers too", "all at one"])
def test_no_rank_is_allocated_before_the_file_is_seen(how, tmp_path):
    """A small file that names rank 65,536 is refused by its own tensors' shapes, and takes no memory before."""
    model = models.make("bert", seed=3)
    adapted = lrkit.attach(model, METHODS["lora"]())
    state = adapted.state_dict()
    adapted.detach()
    meta = bomb(state["meta"], list(state["meta"]["ranks"]), how)
    save_file(state["tensors"], tmp_path / checkpoint.FILE, metadata={"lrkit": json.dumps(meta)})
    names = [name for name, _ in model.named_modules()]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(lrkit.LrkitError, match=r"rank"):
        lrkit.load(model, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes; all of it would be 500 MB
    assert [name for name, _ in model.named_modules()] == names


def test_load_draws_what_it_drew(tmp_path):
    """Looking ahead at a file leaves torch's generator where it would be without it."""
    lrkit.attach(models.make("bert", seed=3), METHODS["lora"]()).save(tmp_path)
    model = models.make("bert", seed=3)
    torch.manual_seed(1)
    lrkit.attach(model, METHODS["lora"](), train_also=["bert.pooler", "classifier"]).detach()
    expected = torch.get_rng_state()
    torch.manual_seed(1)
    lrkit.load(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), expected)


def walked(state, total):
    """The course of a run, step by step, by the rule itself."""
    scheduler, there, cut, added = state.policy.scheduler, state.units, 0, 0
    course = [(there, cut, added)]
    for step in range(total):
        number = step + scheduler.first_step
        if number <= schedules.end(scheduler, total) and schedules.due(scheduler, number, total_steps=total):
            budget = scheduler.budget(number, total_steps=total, units=state.capacity, layers=state.layers)
            goes, comes = state.policy.action.turnover(there, budget, state.layers)
            there, cut, added = there - goes + comes, cut + goes, added + comes
        course.append((there, cut, added))
    return course


@pytest.mark.parametrize("ending", ["fixed", "peft", "released", "open"])
@pytest.mark.parametrize("interval", [1, 3, 50, 0.1])
@pytest.mark.parametrize("first_step", [0, 1])
def test_a_course_is_what_walking_gives(ending, interval, first_step):
    """The spans of a run, counted from its decisions alone, are those of a walk through all steps."""
    method = METHODS["adalora"]()
    scheduler = Cubic(target=1, warmup=3, final=2, interval=interval, ending=ending, first_step=first_step)
    adapted = lrkit.attach(models.make("bert"), attrs.evolve(method, scheduler=scheduler))
    state = adapted.controller.policies[0]
    for total in (5, 6, 40, 131):
        times = scheduler.over(total, units=state.capacity, layers=state.layers)
        found = course(times, state.policy.action, state.units)
        spans = [tuple(rest) for steps, *rest in found for _ in range(steps)]
        assert spans == walked(state, total)


def test_a_run_of_two_billion_steps_is_counted():
    """From its decisions alone, in a moment; more steps than that are refused."""
    from lrkit import accounting

    method = METHODS["adalora"]()
    counted = accounting.count(method, models.make("bert"), total_steps=2**31 - 1)
    assert counted.end < counted.average < counted.start
    with pytest.raises(lrkit.LrkitError, match="at most 2,147,483,647"):
        accounting.count(method, models.make("bert"), total_steps=2**31)
