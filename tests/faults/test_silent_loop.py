"""Faults that three readings had passed over: what a decision brought back, and what trained or ended without a word."""

import gc
import io
import os
import pickle
import warnings

import attrs
import models
import pytest
import torch
import transformers
from torch import nn

import lrkit
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.loop import native, rules
from lrkit.loop.resizing import Ranks, outgrown
from lrkit.models import fetching
from lrkit.study import executors
from lrkit.tasks.forms import form_of
from lrkit.trainer import AdaptCallback

ADALORA = lrkit.methods.adalora(rank=4, target_rank=2, warmup=1, final=2, interval=1)


def fit(adapted, optimizer, steps):
    for step in range(steps):
        loss = adapted.model(**models.batch(seed=step)).loss
        (loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


def switching(unit="matrix", **settings):
    """A method that keeps half of its units, by chance, at each second step."""
    schedule = lrkit.schedulers.Constant(target=0.5, interval=2, ending="open", **settings)
    return lrkit.Method(
        parameterization=lrkit.parameterizations.LoRA(rank=2),
        metric=lrkit.metrics.Random(),
        scheduler=schedule,
        action=lrkit.actions.Switch(unit=unit),
    )


# ---- tensors that somebody froze ----


@pytest.mark.parametrize("unit", ["matrix", "layer"])
def test_switch_leaves_hands_alone(unit):
    """What was frozen by hand before bind never trains, though its unit stops and comes back; what was let go, does."""
    adapted = lrkit.attach(models.make("bert", seed=2), switching(unit))
    tensors = {name: p for name, p in adapted.named_parameters() if name.endswith((".A", ".B"))}
    mine = [p for name, p in tensors.items() if ".value." in name and name.endswith(".A")]
    for p in mine:
        p.requires_grad_(False)
    first = {name: p.detach().clone() for name, p in tensors.items()}
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrkitWarning)  # of gradients that are missing
        adapted.bind(optimizer, total_steps=30)
        fit(adapted, optimizer, 16)
        moved = {name for name, p in tensors.items() if not torch.equal(p, first[name])}
        assert {d.step for d in adapted.history if d.returned} and not any(p.requires_grad for p in mine)
        assert moved.isdisjoint(name for name, p in tensors.items() if any(p is each for each in mine))
        assert len(moved) > len(tensors) / 2
        for p in mine:
            p.requires_grad_(True)
        fit(adapted, optimizer, 14)
    assert any(not torch.equal(p, first[name]) for name, p in tensors.items() if any(p is each for each in mine))


def test_hands_survive_a_load():
    """Frozen by hand, then by the method as well: a load of an earlier step leaves it frozen."""
    adapted = lrkit.attach(models.make("bert", seed=2), switching())
    mine = next(p for name, p in adapted.named_parameters() if name.endswith(".A"))
    mine.requires_grad_(False)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrkitWarning)
        adapted.bind(optimizer, total_steps=20)
        early = adapted.state_dict()
        while id(mine) not in adapted.controller.components.frozen():
            fit(adapted, optimizer, 1)
        adapted.load_state_dict(early)
    assert not mine.requires_grad
    assert all(p.requires_grad for p in adapted.parameters() if p is not mine)


def test_calibration_leaves_hands_alone():
    """Ranks that are given by batches come into tensors that somebody froze, and these stay frozen (LoRA-FA's A)."""
    gora = lrkit.current().get("method", "gora") if "gora" in lrkit.current().names("method") else None
    if gora is None:
        pytest.skip("lrkit-calibrated is not installed")
    adapted = lrkit.attach(models.make("bert", seed=2), gora(rank=2))
    for name, p in adapted.named_parameters():
        p.requires_grad_(not name.endswith(".A"))
    adapted.calibrate([models.batch(seed=each) for each in range(2)])
    flags = {(name[-1], p.requires_grad) for name, p in adapted.named_parameters() if name.endswith((".A", ".B"))}
    assert flags == {("A", False), ("B", True)}


# ---- optimizers ----


class Coded(torch.optim.Optimizer):
    """SGD with a momentum of 8 bits, whose codes are looked up in a table, as bitsandbytes lays it out."""

    def __init__(self, parameters, *, table=True):
        super().__init__(parameters, {})
        self.table = table

    def step(self, closure=None):
        codes = torch.arange(-127, 128) / 127
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state.setdefault("state1", torch.full(p.shape, 254, dtype=torch.uint8))  # each is 1.0
                    if self.table:
                        state["qmap1"] = codes


def zeroed(table):
    method = lrkit.Method(
        parameterization=lrkit.parameterizations.LoRA(rank=4),
        metric=lrkit.metrics.Sensitivity(),
        scheduler=lrkit.schedulers.Constant(target=0.5),
        action=lrkit.actions.Zero(),
    )
    adapted = lrkit.attach(models.make("bert", seed=2), method)
    optimizer = Coded(adapted.parameters(), table=table)
    adapted.bind(optimizer, total_steps=4)
    fit(adapted, optimizer, 1)
    return adapted, optimizer


def test_zero_means_zero():
    """A momentum of whole numbers is set to the code that stands for 0, not to the code 0, which is the lowest number."""
    adapted, optimizer = zeroed(table=True)
    lost = 0
    for adapter in adapted.adapters.values():
        state = optimizer.state[adapter.A]
        gone = (adapter.A == 0).all(1)
        lost += int(gone.sum())
        assert (state["qmap1"][state["state1"][gone].long()] == 0).all()
        assert (state["state1"][~gone] == 254).all()
    assert lost


def test_codes_without_a_table():
    """Whole numbers of which nobody says what they mean are refused."""
    with pytest.raises(LrkitError, match='cannot zero the optimizer\'s state "state1"'):
        zeroed(table=False)


class Averaging(torch.optim.SGD):
    """One that trains an average, as schedule-free ones do: its eval puts the average in."""

    def train(self):
        """Take the average out."""

    def eval(self):
        """Put the average in."""


@pytest.mark.parametrize(
    "method", [ADALORA, lrkit.methods.lora(rank=2), lrkit.methods.aflora(rank=2)], ids=lambda m: ""
)
def test_averages_know_no_mask(method):
    """An optimizer that swaps weights for an average is refused under masks, and taken where nothing is masked."""
    adapted = lrkit.attach(models.make("bert", seed=2), method)
    optimizer = Averaging(adapted.parameters(), lr=0.1)
    if method is ADALORA:
        with pytest.raises(LrkitError, match=r"^Averaging keeps a second copy of the weights"):
            adapted.bind(optimizer, total_steps=20)
    else:
        adapted.bind(optimizer, total_steps=20)


class Outer(torch.optim.Optimizer):
    """Wraps another. With a state of its own it may move the weights once more; accelerate's shows the inner one's."""

    def __init__(self, optimizer, own):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state = {} if own else optimizer.state

    def step(self, closure=None):
        return self.optimizer.step(closure)


@pytest.mark.parametrize("own", [True, False])
def test_wrappers_are_told(own):
    """A wrapper with a state of its own (Lookahead) may move the weights after the decision; one without may not."""
    adapted = lrkit.attach(models.make("bert", seed=2), ADALORA)
    optimizer = Outer(torch.optim.SGD(adapted.parameters(), lr=0.1), own)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted.bind(optimizer, total_steps=20)
    assert [str(w.message)[:36] for w in said] == ["Outer has a state of its own around "] * own


def test_adafactor_of_rank_one():
    """State that fits the present rank is not called outgrown, though a vector of it looks like a tensor of rank 1."""
    method = lrkit.Method(parameterization=lrkit.parameterizations.SVD(rank=1))
    adapted = lrkit.attach(models.make("bert", seed=2), method, train_also=())
    run = adapted.controller.run
    ranks = Ranks(dict.fromkeys(adapted.adapters, 1), dict.fromkeys(adapted.adapters, (0, 1, 2)))
    optimizer = transformers.Adafactor(adapted.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    for adapter in adapted.adapters.values():  # as it is after a growth from 1 to 3
        for part in run.parts:
            p = part.of(adapter)
            p.data = p.data.repeat_interleave(3, part.axis)
            p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrkitWarning)  # of a method that is not bound, and of layers without gradients
        optimizer.step()
    assert outgrown([optimizer], run.modules, run.parts, ranks) is None
    sgd = torch.optim.Adagrad([p for adapter in adapted.adapters.values() for p in adapter.parameters()])
    for adapter in adapted.adapters.values():
        for part in run.parts:
            p = part.of(adapter)
            shape = list(p.shape)
            shape[part.axis] = 1
            sgd.state[p]["sum"] = torch.zeros(shape)
    assert outgrown([sgd], run.modules, run.parts, ranks) is not None


@pytest.mark.parametrize("kept", [True, False])
def test_dropped_handle_is_told(kept):
    """If nobody keeps the handle, nothing can be bound: an optimizer that trains the adapters is told of it, once."""
    model = models.make("bert", seed=2)
    adapted = lrkit.attach(model, ADALORA)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pickle.loads(pickle.dumps(model))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if not kept:
            del adapted
            gc.collect()
        for step in range(2):
            model(**models.batch(seed=step)).loss.backward()
            optimizer.step()
    found = [str(w.message).partition(":")[0] for w in said if "nothing is adaptive" in str(w.message)]
    gone, unbound = "an optimizer steps adapters whose handle is gone", "an optimizer steps the adapters' parameters"
    assert [each.split(", but")[0] for each in found] == [unbound if kept else gone]


# ---- runs that go on ----


@pytest.mark.parametrize(("method", "told"), [(switching(), True), (ADALORA, False)], ids=["switch", "adalora"])
def test_second_run_is_told(method, told):
    """A run that goes on after an open schedule's end takes no further decision, and says so."""
    adapted = lrkit.attach(models.make("bert", seed=2), method)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for total in (6, 12):
            optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
            adapted.bind(optimizer, total_steps=total)
            fit(adapted, optimizer, 6)
            adapted.unbind()
    found = [str(w.message) for w in said if "its schedule ended with step 6 of the run" in str(w.message)]
    assert len(found) == told


@pytest.mark.parametrize(
    ("step", "total", "there", "skipping", "found"),
    [
        (10, 20, 10, False, 0),  # resumed
        (30, 40, 10, False, 20),  # resumed in a second training of 20
        (8, 20, 10, True, 0),  # two steps were skipped
        (28, 40, 10, True, 20),
        (8, 20, 10, False, None),  # and without a scaler it is another checkpoint
        (12, 20, 10, True, None),
        (15, 40, 10, True, None),  # before that training began
    ],
)
def test_skipped_steps_are_counted(step, total, there, skipping, found):
    """The steps before a training of 20, or None if the state is not of the trainer's step."""
    if found is None:
        with pytest.raises(LrkitError, match=f"resumes at step {there}, the lrkit state beside it is of step {step}"):
            rules.earlier(step, total, there, 20, skipping=skipping)
    else:
        assert rules.earlier(step, total, there, 20, skipping=skipping) == found


def trainer_of(folder, callbacks, model, **settings):
    rows = [
        {name: values[0] for name, values in models.batch(seed=each, rows=1, length=6).items()} for each in range(8)
    ]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)


def test_float16_resumes(tmp_path):
    """A Trainer whose scaler skipped two steps resumes at its own step, and the method at its own."""
    ends = []
    for resumes in (False, True):
        model = models.make("bert", seed=2)
        adapted = lrkit.attach(model, ADALORA)
        trainer = trainer_of(tmp_path, [AdaptCallback(adapted)], model, save_steps=4)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        if not resumes:
            left = iter([True, True])
            next(iter(adapted.parameters())).register_hook(
                lambda g, left=left: g * (torch.inf if next(left, False) else 1)
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resumes else None)
        ends.append((trainer.state.global_step, adapted.step, [attrs.asdict(d) for d in adapted.history]))
    assert ends[0] == ends[1] and ends[0][1] < ends[0][0] == 8


def test_a_state_for_no_resume(tmp_path):
    """A folder to resume from is refused if the Trainer begins at step 0, and would not read it."""
    model = models.make("bert", seed=2)
    adapted = lrkit.attach(model, ADALORA)
    trainer = trainer_of(tmp_path, [AdaptCallback(adapted, resume_from="no/such/folder")], model)
    with pytest.raises(LrkitError, match=r"^AdaptCallback\(resume_from='no/such/folder'\) says .* begins at step 0"):
        trainer.train()


# ---- surroundings ----


def test_pickles_with_its_ranks():
    """A model whose ranks may be taken from weights can be saved whole; the copy takes ranks as well."""
    model = nn.Sequential(nn.Linear(6, 4))
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=["0"], train_also=())
    adapted.take_ranks()
    other = lrkit.attach(nn.Sequential(nn.Linear(6, 4)), lrkit.methods.lora(rank=3), targets=["0"], train_also=())
    copy = pickle.loads(pickle.dumps(model))
    copy.load_state_dict(other.model.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(copy(x), other.model(x))
    saved = io.BytesIO()
    torch.save(model, saved)


def homeless(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "LRKIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))


def test_no_home(monkeypatch):
    """A user without a home folder, as in a container: no compiled library, and fetching says what to set."""
    homeless(monkeypatch)
    native.library.cache_clear()
    try:
        assert native.library() is None
    finally:
        native.library.cache_clear()
    with pytest.raises(LrkitError, match=r"^no home folder to keep what is fetched: set LRKIT_CACHE"):
        fetching.cache_folder()


def test_another_users_lock(tmp_path, monkeypatch):
    """A GPU's lock file that somebody else has made can be locked, though it cannot be written."""
    opened = open

    def guarded(path, mode="r", *rest, **more):
        if str(path).startswith(str(tmp_path)) and "a" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, *rest, **more)

    (tmp_path / "lrkit-gpu-0.lock").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("builtins.open", guarded)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    executors._lease(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    executors._leases.pop().close()


@pytest.mark.parametrize("name", ["labels", "Label", " label", "LABEL "])
def test_near_labels(name):
    """A field that is all but called label would be dropped, and the rows read as plain text: it is refused."""
    with pytest.raises(LrkitError, match=f'the field "{name}" is not read'):
        form_of({"text": "a film", name: 0})
