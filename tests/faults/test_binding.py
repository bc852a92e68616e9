"""Loops that bind in other ways: closures, several optimizers, runs that go on, begin again, or are told too late."""

import copy

import attrs
import models
import pytest
import torch
from test_attach import METHODS
from torch import nn
from transformers import Trainer, TrainingArguments

import lrkit

ADALORA = lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=5)


class Small(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def small(method=ADALORA, layers=2):
    torch.manual_seed(0)
    model = Small(layers)
    return model, lrkit.attach(model, method, train_also=[])


def loss_of(model, adapted, step):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    return (model(x) - 1).square().mean() + adapted.penalty()


def end_of(adapted):
    return {name: p.detach().clone() for name, p in adapted.named_parameters()}, adapted.history


def equal(one, two):
    assert one[1] == two[1]
    assert all(torch.equal(value, two[0][name]) for name, value in one[0].items())


# ---- closures ----


@pytest.mark.parametrize("keyword", [False, True])
def test_closure_is_the_plain_run(keyword):
    """``optimizer.step(closure)`` (Lightning's way) is bit for bit the run without one, and gives the closure's loss."""

    def run(closed):
        model, adapted = small()
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=20)
        for step in range(20):

            def closure(step=step):
                optimizer.zero_grad()
                loss = loss_of(model, adapted, step)
                loss.backward()
                return loss

            if not closed:
                closure()
                optimizer.step()
            else:
                loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
                assert loss.requires_grad
        return end_of(adapted)

    equal(run(False), run(True))


def test_second_call_of_a_closure_is_refused():
    """An optimizer that computes several gradients in one step is refused in one line."""

    class Twice(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            closure()
            return super().step(closure)

    model, adapted = small()
    optimizer = Twice(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=20)
    with pytest.raises(lrkit.LrkitError, match=r"Twice\.step calls its closure more than once"):
        optimizer.step(lambda: loss_of(model, adapted, 0).backward())


def test_closure_of_a_plain_method_is_its_own_matter():
    """LoRA needs no gradient before the step: LBFGS trains it as ever."""
    model, adapted = small(lrkit.methods.lora(rank=2))
    optimizer = torch.optim.LBFGS(adapted.parameters(), lr=0.1, max_iter=3)
    adapted.bind(optimizer, total_steps=2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, adapted, 0)
        loss.backward()
        return loss

    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < before


# ---- several optimizers ----


def split(adapted, **more):
    matrices = [p for p in adapted.parameters() if p.ndim == 2]
    others = [p for p in adapted.parameters() if p.ndim != 2]
    return torch.optim.SGD(matrices, lr=1e-2, momentum=0.9, **more), torch.optim.SGD(others, lr=1e-2, momentum=0.9)


@pytest.mark.parametrize("method", ["adalora", "aflora", "cut", "hybrid"])
@pytest.mark.parametrize("turned", [False, True])
def test_two_optimizers_are_one(method, turned):
    """Split over two optimizers, in either order, a run is bit for bit the one with a single optimizer."""
    methods = METHODS | {"cut": attrs.evolve(ADALORA, action=lrkit.actions.Prune(cut="always"))}

    def run(two):
        model = models.make("bert", seed=1).eval()
        torch.manual_seed(2)
        adapted = lrkit.attach(model, methods[method])
        optimizers = list(split(adapted)) if two else [torch.optim.SGD(adapted.parameters(), lr=1e-2, momentum=0.9)]
        adapted.bind(optimizers if two else optimizers[0], total_steps=20)
        for step in range(20):
            (model(**models.batch(seed=step)).loss + adapted.penalty()).backward()
            for each in reversed(optimizers) if turned else optimizers:
                each.step()
            for each in optimizers:
                each.zero_grad()
        state = {
            name: [v.clone() for v in each.state[p].values() if isinstance(v, torch.Tensor)]
            for name, p in adapted.named_parameters()
            for each in optimizers
            if p in each.state
        }
        return end_of(adapted), state

    (one, states), (two, other) = run(False), run(True)
    equal(one, two)
    assert states.keys() == other.keys()
    assert all(torch.equal(a, b) for name, values in states.items() for a, b in zip(values, other[name], strict=True))


@pytest.mark.parametrize("action", [lrkit.actions.Prune(cut="always"), lrkit.actions.Zero()], ids=["cut", "zero"])
def test_states_are_loaded_after_bind(action):
    """Two optimizers whose states are loaded after `bind`, as documented: the run that goes on is bitwise the run."""
    form = lrkit.parameterizations.SVD(rank=4)
    method = lrkit.Method(
        parameterization=form,
        metric=lrkit.metrics.SensitivityUncertainty(),
        scheduler=lrkit.schedulers.Linear(target=1, interval=3),
        action=action,
    )

    def begin():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        adapted = lrkit.attach(model, method, targets=["0"])
        tensors = list(adapted.parameters())
        both = [torch.optim.AdamW(half, lr=1e-2) for half in (tensors[::2], tensors[1::2])]
        adapted.bind(both, total_steps=12)
        return model, adapted, both

    def run(model, adapted, both, steps):
        for step in steps:
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            (model(x).square().sum() + adapted.penalty()).backward()
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()

    model, adapted, both = begin()
    run(model, adapted, both, range(4))
    state, theirs = copy.deepcopy((adapted.state_dict(), [each.state_dict() for each in both]))
    run(model, adapted, both, range(4, 12))
    other, again, both = begin()
    again.load_state_dict(state)
    for optimizer, own in zip(both, theirs, strict=True):
        optimizer.load_state_dict(own)
    run(other, again, both, range(4, 12))
    assert again.history == adapted.history
    one, two = (each.state_dict()["tensors"] for each in (adapted, again))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_muon_beside_adamw():
    """torch's Muon takes matrices alone; AdamW takes the rest."""
    model, adapted = small()
    muon = torch.optim.Muon([p for p in adapted.parameters() if p.ndim == 2], lr=1e-2)
    adamw = torch.optim.AdamW([p for p in adapted.parameters() if p.ndim != 2], lr=1e-2)
    adapted.bind([muon, adamw], total_steps=20)
    for step in range(20):
        loss_of(model, adapted, step).backward()
        muon.step()
        adamw.step()
        muon.zero_grad()
        adamw.zero_grad()
    assert adapted.step == 20
    assert adapted.history[-1].kept == 4


def test_one_that_does_not_step_is_told():
    """If one of two optimizers leaves a step out, the step counts all the same, once, and it is said."""
    model, adapted = small()
    first, second = split(adapted)
    adapted.bind([first, second], total_steps=20)
    for step in range(3):
        loss_of(model, adapted, step).backward()
        first.step()
        if step == 1:
            with pytest.warns(lrkit.LrkitWarning, match="SGD did not step"):
                pass_on(model, adapted, first)
        second.step()
        first.zero_grad()
        second.zero_grad()
    assert adapted.step == 4


def pass_on(model, adapted, optimizer):
    loss_of(model, adapted, 9).backward()
    optimizer.step()


def test_optimizers_must_hold_all_once():
    """Together they hold everything, and no tensor twice; an empty list is refused."""
    _, adapted = small()
    first, second = split(adapted)
    with pytest.raises(lrkit.LrkitError, match="does not hold"):
        adapted.bind([first], total_steps=20)
    with pytest.raises(lrkit.LrkitError, match="hold the same tensor"):
        adapted.bind([first, second, torch.optim.SGD([next(adapted.parameters())])], total_steps=20)
    with pytest.raises(lrkit.LrkitError, match="empty"):
        adapted.bind([], total_steps=20)
    with pytest.raises(lrkit.LrkitError, match="not str"):
        adapted.bind("adamw", total_steps=20)


# ---- runs that go on ----


def go(model, adapted, optimizer, steps):
    for _ in range(steps):
        loss_of(model, adapted, adapted.step).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", ["adalora", "aflora", "cut"])
def test_longer_run_after_the_schedule(method):
    """Once every schedule has ended a larger total is taken: ranks and frozen units stay, and weights train on."""
    methods = METHODS | {"cut": attrs.evolve(ADALORA, action=lrkit.actions.Prune(cut="end"))}
    model = models.make("bert", seed=1)
    adapted = lrkit.attach(model, methods[method])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=20)

    def train(steps):
        for _ in range(steps):
            (model(**models.batch(seed=adapted.step)).loss + adapted.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(20)
    adapted.unbind()
    before, history = adapted.summary(), list(adapted.history)
    adapted.bind(optimizer, total_steps=30)
    train(10)
    after = adapted.summary()
    assert (adapted.step, adapted.total_steps, adapted.history) == (30, 30, history)
    assert [(x.rank, x.frozen, x.now) for x in after.layers] == [(x.rank, x.frozen, x.now) for x in before.layers]
    adapted.unbind()
    again = adapted.state_dict()
    other = models.make("bert", seed=1)
    loaded = lrkit.attach(other, methods[method])
    loaded.load_state_dict(again)
    assert loaded.summary() == after


def test_other_totals_amid_a_schedule():
    """While a schedule runs another total is refused, and the line says what it would change."""
    model, adapted = small()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=20)
    go(model, adapted, optimizer, 7)
    adapted.unbind(quietly=True)
    scheduler, at = ADALORA.scheduler, {"units": 8, "layers": 2}
    now, then = (scheduler.budget(7, total_steps=total, **at) for total in (20, 40))
    words = rf"begun with 20.*step 35 instead of 15, budget at step 7 {then} instead of {now} of 8 units.*attach anew"
    with pytest.raises(lrkit.LrkitError, match=words):
        adapted.bind(optimizer, total_steps=40)
    with pytest.raises(lrkit.LrkitError, match="7 steps have been taken"):
        adapted.bind(optimizer, total_steps=5)
    adapted.bind(optimizer, total_steps=20)


def test_plain_method_takes_any_longer_total():
    """LoRA has no schedule: nothing depends on the total."""
    model, adapted = small(lrkit.methods.lora(rank=2))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=3)
    go(model, adapted, optimizer, 2)
    adapted.unbind()
    adapted.bind(optimizer, total_steps=50)
    assert adapted.total_steps == 50


# ---- the Trainer ----


def rows(count=64):
    data = models.batch(seed=7, rows=count)
    return [{k: v[i] for k, v in data.items()} for i in range(count)]


def trainer(adapted, folder, cls=Trainer, **more):
    settings = {
        "output_dir": str(folder),
        "max_steps": 12,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | more
    callbacks = [lrkit.trainer.AdaptCallback(adapted)]
    return cls(model=adapted.model, args=TrainingArguments(**settings), train_dataset=rows(), callbacks=callbacks)


@pytest.mark.parametrize("method", ["cut", "hybrid"])  # the hybrid prunes and freezes
def test_smaller_batch_begins_again(method, tmp_path):
    """After out-of-memory the Trainer begins at step 0: so does everything adaptive; the weights stay."""
    methods = METHODS | {"cut": attrs.evolve(ADALORA, action=lrkit.actions.Prune(cut="always"))}
    adapted = lrkit.attach(models.make("bert", seed=1), methods[method])
    seen = {}

    class Fails(Trainer):
        def training_step(self, *args, **kwargs):
            seen["calls"] = seen.get("calls", 0) + 1
            if seen["calls"] == 9:
                seen["layers"], seen["weights"] = adapted.summary().layers, end_of(adapted)[0]
                raise RuntimeError("CUDA out of memory.")
            if seen["calls"] == 10:
                seen["again"], seen["back"], seen["step"] = adapted.summary().layers, end_of(adapted)[0], adapted.step
            return super().training_step(*args, **kwargs)

    fails = trainer(adapted, tmp_path, Fails, auto_find_batch_size=True)
    with pytest.warns(lrkit.LrkitWarning, match="begins again at step 0") as said:
        fails.train()
    assert len([w for w in said if "begins again" in str(w.message)]) == 1
    assert seen["step"] == 0
    for policy in range(len(adapted.method.policies)):
        decided = [d.step for d in adapted.history if d.policy == policy]
        assert decided == sorted(set(decided)) != []
    assert adapted.step == fails.state.global_step == 12
    for layer in seen["again"]:  # everything is back
        assert layer.rank == layer.initial_rank
        assert layer.frozen == ()
        assert layer.now == layer.start
    for name, value in seen["weights"].items():
        if value.shape == seen["back"][name].shape:
            assert torch.equal(value, seen["back"][name]), name


def test_second_training_goes_on(tmp_path):
    """A second ``train()`` adds its steps once the schedule has ended; while it runs, it is refused."""
    adapted = lrkit.attach(models.make("bert", seed=1), METHODS["adalora"])
    t = trainer(adapted, tmp_path, max_steps=20)
    t.train()
    decided = len(adapted.history)
    t.train()
    assert (adapted.step, adapted.total_steps, len(adapted.history)) == (40, 40, decided)
    early = lrkit.attach(models.make("bert", seed=1), METHODS["adalora"])

    class Stops(Trainer):
        def training_step(self, *args, **kwargs):
            if early.step == 5:
                self.control.should_training_stop = True
            return super().training_step(*args, **kwargs)

    t = trainer(early, tmp_path, Stops, max_steps=20)
    with pytest.warns(lrkit.LrkitWarning, match="training ends at step"):
        t.train()
    with pytest.raises(lrkit.LrkitError, match="begun with 20, and its schedule has not ended"):
        t.train()


def test_second_training_resumes(tmp_path):
    """A checkpoint of the second ``train()`` is resumed bit for bit, though the Trainer counts from 0 again."""

    def run(name, resume=None):
        adapted = lrkit.attach(models.make("bert", seed=1), METHODS["adalora"])
        trainer(adapted, tmp_path / "first", max_steps=20, seed=3).train()
        t = trainer(adapted, tmp_path / name, max_steps=8, save_strategy="steps", save_steps=4, seed=3)
        t.train(resume_from_checkpoint=resume)
        return end_of(adapted)

    equal(run("a"), run("a", str(tmp_path / "a" / "checkpoint-4")))


def test_resume_for_more_steps(tmp_path):
    """``resume_from_checkpoint`` with a larger ``max_steps`` goes on after the schedule."""
    adapted = lrkit.attach(models.make("bert", seed=1), METHODS["adalora"])
    trainer(adapted, tmp_path, max_steps=20, save_strategy="steps", save_steps=20).train()
    again = lrkit.attach(models.make("bert", seed=1), METHODS["adalora"])
    trainer(again, tmp_path, max_steps=30).train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert (again.step, again.history) == (30, adapted.history)


# ---- what else an optimizer trains ----


@pytest.mark.parametrize("held", [True, False])
def test_others_in_the_optimizer_are_told(held):
    """A parameter of the model that somebody unfroze trains and is not saved, which is said if the optimizer has it."""
    model, adapted = small()
    bias = model.layers[0].bias.requires_grad_(True)
    optimizer = torch.optim.AdamW([*adapted.parameters(), *([bias] if held else [])], lr=1e-2)
    if held:
        with pytest.warns(lrkit.LrkitWarning, match=r"the optimizer trains layers.0.*bias too"):
            adapted.bind(optimizer, total_steps=20)
    else:
        adapted.bind(optimizer, total_steps=20)
