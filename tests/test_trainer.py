"""transformers' Trainer with nothing but the callback: it binds, adds the penalty while training, saves and resumes."""

from pathlib import Path

import attrs
import models
import pytest
import torch
from test_attach import METHODS
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import lrkit


class Rows(Dataset):
    def __init__(self, rows=48):
        data = models.batch(seed=7, rows=rows)
        self.rows = [{k: v[i] for k, v in data.items()} for i in range(rows)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def trainer(name, method, folder, callback=None, rows=None, **kwargs):
    model = models.make(name)
    adapted = lrkit.attach(model, method)
    arguments = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
        "dataloader_pin_memory": False,
        **kwargs,
    }
    callback = callback(adapted) if callback else lrkit.trainer.AdaptCallback(adapted)
    t = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=Rows(),
        eval_dataset=rows,
        callbacks=[callback],
    )
    return t, adapted


@pytest.mark.parametrize("method", ["adalora", "aflora", "hybrid", "lora", "full"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "deberta"])
def test_the_callback_is_all_there_is_to_it(name, method, tmp_path):
    t, adapted = trainer(name, METHODS[method], tmp_path)
    t.train()
    assert adapted.step == 20
    ends = [d for d in adapted.history if d.step == (15 if method == "adalora" else 14)]
    assert bool(ends) == (method in ("adalora", "aflora", "hybrid"))
    if method == "adalora":
        assert sum(int((m.core != 0).sum()) for m in adapted.adapters.values()) == 2 * len(adapted.adapters)


def test_trainer_and_a_bare_loop_are_the_same_run(tmp_path):
    method = METHODS["adalora"]
    t, adapted = trainer("bert", method, tmp_path, max_grad_norm=0.5, lr_scheduler_type="constant", optim="sgd")
    t.model.config.hidden_dropout_prob = 0.0
    for module in t.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    start = {k: v.clone() for k, v in t.model.state_dict().items()}
    batches = []
    original = t.compute_loss

    def watch(model, inputs, *args, **kwargs):
        batches.append({k: v.clone() for k, v in inputs.items()})
        return original(model, inputs, *args, **kwargs)

    t.compute_loss = watch
    t.train()
    ended = {k: v.clone() for k, v in t.model.state_dict().items()}

    model = models.make("bert")
    again = lrkit.attach(model, method)
    model.load_state_dict(start)
    model.eval()
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-2)
    again.bind(optimizer, total_steps=20)
    for inputs in batches:
        (model(**inputs).loss + again.penalty()).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert [attrs.evolve(d, threshold=0) for d in again.history] == [
        attrs.evolve(d, threshold=0) for d in adapted.history
    ]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, ended[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_penalty_weighs_the_same_under_gradient_accumulation(accumulation, tmp_path):
    """Whichever way the Trainer scales the loss over the accumulated batches, the penalty's gradient is γ ∇R."""
    method = lrkit.methods.svd_lora(rank=4, orthogonality=1.0, variant="paper")
    for name in ("bert", "llama"):
        t, adapted = trainer(
            name,
            method,
            tmp_path / name,
            max_steps=1,
            learning_rate=0.0,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4,
            max_grad_norm=0.0,
        )
        seen = {}
        adapter = next(iter(adapted.adapters.values()))

        def keep(optimizer, *_, seen=seen, adapter=adapter):
            seen["grad"] = adapter.B.grad.clone()

        torch.optim.Optimizer.register_step_pre_hook  # the Trainer's own optimizer does not exist yet
        t.create_optimizer()
        t.optimizer.register_step_pre_hook(keep)
        t.train()
        p = adapter.B.detach().double()
        gradient = 4 * p @ (p.T @ p - torch.eye(4, dtype=torch.float64))  # Λ = 0: the loss itself has none for P
        torch.testing.assert_close(seen["grad"].double(), gradient, rtol=1e-4, atol=1e-5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_resume_from_checkpoint_is_bitwise_the_run(method, tmp_path):
    kwargs = {"save_strategy": "steps", "save_steps": 9, "save_total_limit": 3}
    t, adapted = trainer("bert", METHODS[method], tmp_path / "a", **kwargs)
    t.train()
    again, other = trainer("bert", METHODS[method], tmp_path / "a", **kwargs)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-9"))
    for (name, one), (_, two) in zip(t.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert adapted.history == other.history
    assert adapted.summary() == other.summary()


@pytest.mark.parametrize("as_given", [str, Path])
def test_resume_from_elsewhere_takes_all_of_it(as_given, tmp_path):
    """A checkpoint of another run is resumed as a whole, although a folder of this run has one of the same step."""
    kwargs = {"save_strategy": "steps", "save_steps": 9, "save_total_limit": 3}
    t, adapted = trainer("bert", METHODS["adalora"], tmp_path / "a", **kwargs)
    t.train()
    trainer("bert", METHODS["adalora"], tmp_path / "b", learning_rate=1e-3, **kwargs)[0].train()
    again, other = trainer("bert", METHODS["adalora"], tmp_path / "b", **kwargs)
    again.train(resume_from_checkpoint=as_given(tmp_path / "a" / "checkpoint-9"))
    for (name, one), (_, two) in zip(t.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert adapted.history == other.history


def test_resume_without_the_adaptive_state_is_refused(tmp_path):
    kwargs = {"save_strategy": "steps", "save_steps": 9}
    t, _ = trainer("bert", METHODS["adalora"], tmp_path, **kwargs)
    t.train()
    (tmp_path / "checkpoint-9" / "lrkit.safetensors").unlink()
    again, _ = trainer("bert", METHODS["adalora"], tmp_path, **kwargs)
    with pytest.raises(lrkit.LrkitError, match=r"resumes at step 9.*resume_from"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_plain_checkpoint_loads_strictly():
    """If the adaptive state is loaded later, a plain state fits an adapted model, whose adapters stay as they are."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(6, 4)]))
    other = {name: torch.randn_like(value) for name, value in plain.state_dict().items()}
    adapted = lrkit.attach(plain, lrkit.methods.adalora(rank=2, target_rank=1))
    own = [p.detach().clone() for p in adapted.parameters()]
    with pytest.raises(RuntimeError, match="Missing key"):
        plain.load_state_dict(other)
    adapted.take_ranks()
    plain.load_state_dict(other)
    assert all(torch.equal(a, b) for a, b in zip(own, adapted.parameters(), strict=True))
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in other.items())
    with pytest.raises(RuntimeError, match="Missing key"):  # a part of an adapter is none
        plain.load_state_dict(other | {"0.0.A": own[0]})


def test_callback_of_another_model_is_refused(tmp_path):
    """A handle of another model, and what is no handle, are named when the Trainer is made."""
    other = lrkit.attach(models.make("bert"), METHODS["adalora"])
    with pytest.raises(lrkit.LrkitError, match="the handle of another model"):
        trainer("bert", METHODS["adalora"], tmp_path, callback=lambda adapted: lrkit.trainer.AdaptCallback(other))
    with pytest.raises(lrkit.LrkitError, match=r"takes the handle that lrkit\.attach returned, not BertForSeq"):
        trainer(
            "bert", METHODS["adalora"], tmp_path, callback=lambda adapted: lrkit.trainer.AdaptCallback(adapted.model)
        )


def test_weights_of_other_ranks_are_not_saved(tmp_path):
    """After weights of an earlier step were loaded into the model alone, a save is refused; with its state it is not."""
    method = attrs.evolve(METHODS["adalora"], action=lrkit.actions.Prune(cut="always"))
    t, adapted = trainer("bert", method, tmp_path, save_strategy="steps", save_steps=9)
    t.train()
    weights, state = adapted.model.state_dict(), adapted.state_dict()
    again, other = trainer("bert", method, tmp_path / "other", max_steps=20)
    again.train()
    first = lrkit.attach(models.make("bert"), method).model.state_dict()
    other.model.load_state_dict(first)
    with pytest.raises(lrkit.LrkitError, match=r"at the run's ranks: weights of another step were loaded"):
        other.save(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    other.load_state_dict(state)
    other.save(tmp_path / "kept")
    assert all(
        torch.equal(value, weights[name])
        for name, value in other.model.state_dict().items()
        if "classifier" not in name
    )
