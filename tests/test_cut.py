"""Components that cannot come back are cut: same outputs, smaller everything, and a resumed run is still the run."""

from __future__ import annotations

import copy

import attrs
import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attach import logits
from test_trainer import trainer

import lrkit
from lrkit import accounting
from lrkit.parameterizations import VectorScaled

STEPS = 12


def adalora(cut, gamma=0.1, interval=2):
    method = lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=4, interval=interval, orthogonality=gamma)
    return attrs.evolve(method, action=lrkit.actions.Prune(cut=cut))


FREEZE = lrkit.Policy(
    metric=lrkit.metrics.GradientUncertainty(),
    scheduler=lrkit.schedulers.Linear(target=0.25, warmup=1, final=2),
    action=lrkit.actions.Freeze(),
)
CUTTING = {
    "end": adalora("end"),
    "always": adalora("always", interval=1),
    "always, and freeze": attrs.evolve(adalora("always"), also=(FREEZE,)),
    "vectors": attrs.evolve(
        lrkit.methods.aflora(rank=4, warmup=2, final=4),
        also=(
            lrkit.Policy(
                metric=lrkit.metrics.SensitivityUncertainty(measure="after-step"),
                scheduler=lrkit.schedulers.Cubic(target=1, warmup=1, final=3, ending="peft"),
                action=lrkit.actions.Prune(cut="always"),
            ),
        ),
    ),
}


def start(method, kind=torch.optim.AdamW, **settings):
    model = models.make("bert", seed=3).eval()
    adapted = lrkit.attach(model, method)
    return model, adapted, kind(adapted.parameters(), **({"lr": 1e-2} | settings))


def step(model, adapted, optimizer, number):
    global loss  # held on to, as a loop does: its graph is alive while the next one is made
    loss = model(**models.batch(seed=number, rows=4, length=6)).loss + adapted.penalty()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def ranks(adapted):
    return {name: m.rank for name, m in adapted.adapters.items()}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_cut_at_end(kind):
    """Without a penalty and without clipping, a run that is cut at the end is the run that is not."""
    runs = []
    for cut in ("never", "end"):
        model, adapted, optimizer = start(adalora(cut, gamma=0.0), kind)
        adapted.bind(optimizer, total_steps=STEPS)
        seen = []
        for number in range(STEPS):
            step(model, adapted, optimizer, number)
            seen.append(logits(model))
        runs.append((adapted, seen))
    (never, before), (end, after) = runs
    assert [attrs.evolve(d, threshold=0) for d in never.history] == [attrs.evolve(d, threshold=0) for d in end.history]
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert sum(ranks(end).values()) == 2 * 12 < sum(ranks(never).values())
    assert never.summary().now == end.summary().now
    assert never.summary().average == end.summary().average
    for name, m in end.adapters.items():
        kept = never.adapters[name].core.detach() != 0
        torch.testing.assert_close(m.A, never.adapters[name].A[kept], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", CUTTING)
def test_cut_changes_nothing_left(method, monkeypatch):
    """A cut changes no output, and no score of the components that are left."""
    from lrkit.loop.components import Components

    model, adapted, optimizer = start(CUTTING[method])
    adapted.bind(optimizer, total_steps=STEPS)
    resize, cuts = Components.resize, []

    def watched(self, resizes, optimizer, *more):
        def seen():
            waiting = [s.index for s in self.policies if not s.ended]
            return logits(model), [adapted.scores(i) for i in waiting]

        before, scores = seen()
        done = resize(self, resizes, optimizer, *more)
        after, left = seen()
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)
        for one, two in zip(scores, left, strict=True):
            assert set(two) <= set(one)
            if all("[" in name for name in one):
                assert {n: pytest.approx(s, rel=1e-6) for n, s in one.items() if n in two} == two
        cuts.append(done)
        return done

    monkeypatch.setattr(Components, "resize", watched)
    for number in range(STEPS):
        step(model, adapted, optimizer, number)
    assert any(cuts)


def test_cut_never_returns():
    """Components that were cut leave tensors and optimizer state, and never come back."""
    model, adapted, optimizer = start(CUTTING["always"])
    adapted.bind(optimizer, total_steps=STEPS)
    first, gone = None, set()
    for number in range(STEPS):
        step(model, adapted, optimizer, number)
        first = first or accounting.memory(adapted, optimizer)
        kept = sum(ranks(adapted).values())
        decided = [d for d in adapted.history if d.step == number + 1]
        for d in decided:
            assert not d.returned and not gone & set(d.lost)
            gone |= set(d.lost)
            assert kept == d.kept == d.budget and d.units == 48
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        live = sum(p.requires_grad for p in adapted.parameters())
        assert accounting.memory(adapted, optimizer).optimizer == 8 * trained + 4 * live
        for p, state in optimizer.state.items():
            assert all(v.shape == p.shape for k, v in state.items() if k != "step")
        policy = adapted.controller.policies[0]
        if not policy.ended:
            adapters = sum(p.numel() for m in adapted.adapters.values() for p in (m.A, m.B, m.core))
            assert policy.statistics.buffers["importance"].numel() == adapters
            assert set(adapted.scores()).isdisjoint(gone)
    assert len(gone) == 24
    assert accounting.memory(adapted, optimizer).adaptive < first.adaptive / 100


_whole: dict[str, list] = {}


def whole(name):
    if name not in _whole:
        model, adapted, optimizer = start(CUTTING[name])
        adapted.bind(optimizer, total_steps=STEPS)
        _whole[name] = []
        for number in range(STEPS + 1):
            _whole[name].append((adapted.state_dict(), copy.deepcopy(optimizer.state_dict())))
            if number < STEPS:
                step(model, adapted, optimizer, number)
    return _whole[name]


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(CUTTING)),
    at=st.integers(0, STEPS),
    order=st.sampled_from(["load", "bind", "optimizer"]),
)
def test_resume_is_exact(name, at, order):
    """A run with cuts, resumed at any step and in any order of loading, is bitwise the run."""
    states = whole(name)
    model, adapted, optimizer = start(CUTTING[name])
    state, optimizer_state = copy.deepcopy(states[at])
    if order == "optimizer":
        optimizer.load_state_dict(optimizer_state)
    if order != "load":
        adapted.bind(optimizer, total_steps=STEPS)
    if order == "bind":
        step(model, adapted, optimizer, 99)  # something to be forgotten
    adapted.load_state_dict(state)
    if order == "load":
        adapted.bind(optimizer, total_steps=STEPS)
    if order != "optimizer":
        optimizer.load_state_dict(optimizer_state)
    for number in range(at, STEPS):
        step(model, adapted, optimizer, number)
    end, optimizer_end = states[-1]
    now = adapted.state_dict()
    assert now["meta"] == end["meta"]
    assert now["tensors"].keys() == end["tensors"].keys()
    assert all(torch.equal(t, now["tensors"][k]) for k, t in end["tensors"].items())
    for one, two in zip(optimizer_end["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_back_before_the_cut():
    """A run that was cut can load a state from before the cut."""
    states = whole("always")
    model, adapted, optimizer = start(CUTTING["always"])
    adapted.load_state_dict(states[-1][0])
    adapted.load_state_dict(states[1][0])
    adapted.bind(optimizer, total_steps=STEPS)
    optimizer.load_state_dict(copy.deepcopy(states[1][1]))
    for number in range(1, STEPS):
        step(model, adapted, optimizer, number)
    assert adapted.state_dict()["meta"] == states[-1][0]["meta"]


@pytest.mark.parametrize("numbers", [[0, 0], [1, 0], [0, 9], [0], "01", None])
def test_impossible_numbers_refused(numbers):
    """Component numbers that cannot be right are refused when a state is loaded."""
    state = copy.deepcopy(whole("end")[-1][0])
    name = next(n for n, left in state["meta"]["components"].items() if len(left) == 2)
    state["meta"]["components"][name] = numbers
    _, adapted, _ = start(CUTTING["end"])
    with pytest.raises(lrkit.LrkitError, match="does not fit: components"):
        adapted.load_state_dict(state)


@pytest.mark.parametrize("method", ["end", "always", "vectors"])
def test_trainer_resumes_cut(method, tmp_path):
    """transformers' Trainer resumes a run that was cut."""
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 5}
    t, adapted = trainer("bert", CUTTING[method], tmp_path, **settings)
    t.train()
    for at in (5, 10):
        again, other = trainer("bert", CUTTING[method], tmp_path, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert other.history == adapted.history
        for key, value in t.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[key])


def test_shared_matrices_refused():
    """A method that cuts is refused if layers share their matrices."""
    method = lrkit.Method(
        parameterization=VectorScaled(rank=4, train="none", shared=True),
        metric=lrkit.metrics.Magnitude(),
        scheduler=lrkit.schedulers.Cubic(target=2),
        action=lrkit.actions.Prune(cut="end"),
    )
    model = models.make("bert")
    names = list(model.state_dict())
    with pytest.raises(lrkit.LrkitError, match="layers share their matrices"):
        lrkit.attach(model, method)
    assert list(model.state_dict()) == names
