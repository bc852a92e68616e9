"""The penalty's gradient reaches the factors whoever computes the loss, once per optimizer step."""

import warnings

import attrs
import models
import pytest
import torch
from ranks import run_two
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import lrkit
import lrkit.accounting
from lrkit.study.pretrained import load_pretrained
from lrkit.tasks import Head, load_task

ROWS = models.batch(seed=7, rows=48)
GAMMA = 3.0


def method(gamma=GAMMA):
    return lrkit.methods.svd_lora(rank=4, orthogonality=gamma, variant="paper")


def quiet(model):
    """Switch dropout off, so that two runs see the same network."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model


def started(name="bert", gamma=GAMMA):
    """An adapted model in which λ is not zero, so that the task pulls at P and Q as well."""
    model = quiet(models.make(name, seed=1))
    torch.manual_seed(2)
    adapted = lrkit.attach(model, method(gamma))
    with torch.no_grad():
        for adapter in adapted.adapters.values():
            adapter.core.normal_(std=0.3)
    return model, adapted


class Loss(Trainer):
    """Computes the loss from the logits, as TRL's trainers do, and never reads ``outputs.loss``."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def own_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels)


def rows():
    return [{k: v[i] for k, v in ROWS.items()} for i in range(48)]


def train(kind, folder, steps=3, gamma=GAMMA, name="bert", divides=True, **arguments):
    """Train with one of the ways to compute a loss; returns the weights, and the batches of each optimizer step."""
    model, adapted = started(name, gamma)
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    extra = {"compute_loss_func": own_loss} if kind == "loss function" else {}
    if kind == "label smoothing":
        settings["label_smoothing_factor"] = 1e-9
    cls = Loss if kind == "own loss" else Trainer
    trainer = cls(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows(),
        callbacks=[lrkit.trainer.AdaptCallback(adapted)],
        **extra,
    )
    trainer.model_accepts_loss_kwargs = not divides
    seen = []
    step = trainer.training_step

    def watch(model, inputs, *args, **kwargs):
        seen.append({k: v.clone() for k, v in inputs.items()})
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = watch
    trainer.train()
    return model, adapted, seen, trainer


def bare(batches, groups=None, clip=None, gamma=GAMMA, name="bert", divides=True):
    """The same run as ``loss + penalty`` in a loop: the oracle. `groups` has the micro-batches of each optimizer step."""
    model, adapted = started(name, gamma)
    model.train()
    groups = groups or [1] * len(batches)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=len(groups))
    left = iter(batches)
    for count in groups:
        for _ in range(count):
            loss = model(**next(left)).loss / (count if divides else 1)
            (loss + adapted.penalty() / count).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(adapted.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def same(one, two):
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", ["model's loss", "own loss", "label smoothing", "loss function"])
def test_any_loss_feels_it(kind, tmp_path):
    """Whoever computes the loss, the Trainer's run is the loop's with ``loss + adapted.penalty()``."""
    model, _, seen, _ = train(kind, tmp_path, max_grad_norm=0.0)
    same(model, bare(seen))


CHECKPOINTING = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"


@pytest.mark.parametrize(
    ("accumulate", "clip", "name", "checkpointing", "divides"),
    [
        (1, 0.5, "bert", None, True),
        (4, 0.0, "llama", None, False),
        (4, 0.5, "bert", False, True),
        (2, 0.5, "bert", True, True),
    ],
)
def test_accumulation_clipping_checkpointing(accumulate, clip, name, checkpointing, divides, tmp_path):
    """One penalty per optimizer step, before clipping; ``checkpointing`` is ``use_reentrant``, None for none."""
    more = {}
    if checkpointing is not None:
        more = {
            f"{CHECKPOINTING}_checkpointing": True,
            f"{CHECKPOINTING}_checkpointing_kwargs": {"use_reentrant": checkpointing},
        }
    model, _, seen, _ = train(
        "model's loss",
        tmp_path,
        name=name,
        divides=divides,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
        **more,
    )
    same(model, bare(seen, [accumulate] * 3, clip or None, name=name, divides=divides))


def test_shorter_last_accumulation(tmp_path):
    """The last group of an epoch has fewer micro-batches, and one whole penalty all the same."""
    more = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    model, _, seen, _ = train("model's loss", tmp_path, steps=2, **more)
    same(model, bare(seen, [2, 1]))


def test_gradient_scaler_multiplies_it():
    """The penalty carries the scaler's factor, and a step that the scaler skips leaves none behind."""
    model, adapted = started()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    adapted.bind(optimizer, total_steps=4, penalty="gradient", scaler=scaler)
    batches = [models.batch(seed=s) for s in range(4)]
    for index, inputs in enumerate(batches):
        adapted.begin_step()
        scaler.scale(model(**inputs).loss).backward()
        if index == 1:
            next(adapted.parameters()).grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert adapted.step == 3
    other, plain = started()
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2)
    plain.bind(optimizer, total_steps=4)
    for inputs in [batches[0], *batches[2:]]:
        (other(**inputs).loss + plain.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    same(model, other)


def test_shared_factor_gets_it_once():
    """A layer that is called twice in a forward pass has one penalty, not one per call."""

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.layers[0], self.layers[0](x), use_reentrant=True)

    grads = []
    for way in ("loss", "gradient"):
        torch.manual_seed(0)
        model = Twice()
        adapted = lrkit.attach(model, method(), train_also=[])
        with torch.no_grad():
            adapted.adapters["layers.0"].core.normal_()
        optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=2, penalty=way)
        adapted.begin_step()
        loss = model(torch.ones(2, 8, requires_grad=True)).square().sum()
        (loss + adapted.penalty() if way == "loss" else loss).backward()
        grads.append([p.grad.clone() for p in adapted.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_a_backward_pass_beside_takes_none_away():
    """A backward pass whose gradients are thrown away, such as a count of FLOPs, leaves the penalty to the step's own."""
    grads = []
    for counts in (False, True):
        model, adapted = started()
        optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=2, penalty="gradient")
        adapted.begin_step()
        if counts:
            lrkit.accounting.flops(model, models.batch(rows=1))
        for part in range(2):
            (model.eval()(**models.batch(seed=part)).loss / 2).backward()
        grads.append([p.grad.clone() for p in adapted.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_unreached_factor_stays():
    """A factor that the loss does not reach gets no penalty: it stays as it is."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
    adapted = lrkit.attach(model, method(), train_also=[])
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=2, penalty="gradient")
    adapted.begin_step()
    model.layers[0](torch.ones(2, 8)).sum().backward()
    assert adapted.adapters["layers.0"].A.grad is not None
    assert adapted.adapters["layers.1"].A.grad is None


def test_trainer_logs_it_apart(tmp_path):
    """The logged loss is the task's, and the penalty stands beside it."""
    _, adapted, _, trainer = train("model's loss", tmp_path, steps=2, learning_rate=0.0)
    first = trainer.state.log_history[0]
    assert first["loss"] < 2 < 10 < first["penalty"] == pytest.approx(adapted.penalty().item())
    assert "penalty" not in trainer.evaluate(rows())


def test_bare_loop_without_it_is_told():
    """What counts is that the gradient arrived, not that ``penalty()`` was called."""
    model, adapted = started()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=2)
    (model(**models.batch()).loss + adapted.penalty().detach()).backward()
    with pytest.warns(lrkit.LrkitWarning, match=r"in none of the gradients.*adapted\.penalty\(\)"):
        optimizer.step()


def test_looking_at_it_is_fine():
    """A call whose value nobody trains on is no fault beside one that arrives."""
    model, adapted = started(gamma=1e-4)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=2)
    adapted.penalty().item()
    (model(**models.batch()).loss + adapted.penalty()).backward()
    optimizer.step()


def test_twice_is_told(tmp_path):
    """Who adds the penalty to the loss under the callback is told that it counts twice."""
    model, adapted = started()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=2, penalty="gradient")
    adapted.begin_step()
    with pytest.warns(lrkit.LrkitWarning, match="counts twice"):
        (model(**models.batch()).loss + adapted.penalty()).backward()


def seven_steps(model, adapted, optimizer, inputs, way):
    for _ in range(7):  # of 20: the last five are looked at
        adapted.begin_step()
        loss = model(**inputs).loss * 4  # a multiple, as a scaler makes it, is not the task's doing
        (loss + 4 * adapted.penalty() if way == "loss" else loss).backward()
        torch.nn.utils.clip_grad_norm_([p for p in adapted.parameters() if p.requires_grad], 0.01)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", ["loss", "gradient"])
def test_drowned_task_is_told(way):
    """A penalty whose gradient is larger than the task's at the beginning is told, with both norms."""
    model, adapted = started()
    for head in adapted.head_parameters():
        head.requires_grad_(False)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    adapted.bind(optimizer, total_steps=20, penalty=way)
    penalty = adapted.method.parameterization.penalty(list(adapted.adapters.values()))
    pull = torch.autograd.grad(penalty, trained, allow_unused=True)
    pull_norm = sum(g.double().square().sum() for g in pull if g is not None).sqrt()
    inputs = models.batch()
    task = torch.autograd.grad(model.eval()(**inputs).loss, trained)
    task_norm = sum(g.double().square().sum() for g in task).sqrt()
    with pytest.warns(lrkit.LrkitWarning, match="larger than the task's") as said:
        seven_steps(model, adapted, optimizer, inputs, way)
    factor = 1 if way == "loss" else 4
    words = str(said[0].message)
    assert f"{pull_norm:.3g} beside {task_norm * factor:.3g}" in words
    assert "parameterization.orthogonality" in words


def test_default_penalty_is_quiet():
    """AdaLoRA as it ships does not drown a pretrained model's task; with the paper's norm it does."""
    said = {}
    rows = load_task("movies").train
    for variant in ("default", "paper"):
        pretrained = load_pretrained("minilm", Head(num_labels=2, problem_type="single_label_classification"))
        model = pretrained.restart(0)
        torch.manual_seed(0)
        adapted = lrkit.attach(model, lrkit.methods.adalora(rank=8, target_rank=4, variant=variant))
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
        adapted.bind(optimizer, total_steps=10)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(10):
                batch = rows[8 * step : 8 * step + 8]
                inputs = pretrained.tokenizer(list(batch["sentence"]), padding=True, return_tensors="pt")
                labels = torch.tensor(list(batch["label"]))
                (model(**inputs, labels=labels).loss + adapted.penalty()).backward()
                optimizer.step()
                optimizer.zero_grad()
        said[variant] = [str(w.message) for w in caught if issubclass(w.category, lrkit.LrkitWarning)]
        adapted.detach()
    assert said["default"] == []
    assert len(said["paper"]) == 1
    assert "larger than the task's" in said["paper"][0]


WORKER = """
import models, test_penalty as t
model, adapted = t.started()
wrapped = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
adapted.bind(optimizer, total_steps=3, penalty="gradient")
for step in range(3):
    adapted.begin_step()
    for micro in range(2):
        data = {k: v[rank::2] for k, v in models.batch(seed=step * 2 + micro).items()}
        if micro == 0:
            with wrapped.no_sync():
                (wrapped(**data).loss / 2).backward()
        else:
            (wrapped(**data).loss / 2).backward()
    optimizer.step(); optimizer.zero_grad()
if rank == 0:
    torch.save(model.state_dict(), f"{folder}/out.pt")
"""


def processes_average_it(tmp_path):
    """Under DDP with accumulation the run is that of one process with all rows.

    See tests/integrations/test_more_processes.py.
    """
    run_two(WORKER, tmp_path)
    model = bare([models.batch(seed=s) for s in range(6)], [2, 2, 2])
    for name, value in torch.load(tmp_path / "out.pt").items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=2e-5, atol=2e-6)


def test_method_without_penalty_is_untouched():
    """Nothing is hooked, nothing is said."""
    model = models.make("bert")
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=2, penalty="gradient")
    adapted.begin_step()
    model(**models.batch()).loss.backward()
    optimizer.step()
    assert adapted.penalty_added is None
    assert attrs.asdict(adapted.method.parameterization)["rank"] == 2


@pytest.mark.parametrize("way", ["loss", "gradient"])
def test_frozen_factors_have_none(way):
    """Once every factor is frozen there is no gradient to arrive, and nothing is said."""
    model, adapted = started()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=2, penalty=way)
    for adapter in adapted.adapters.values():
        adapter.A.requires_grad_(False)
        adapter.B.requires_grad_(False)
    adapted.begin_step()
    loss = model(**models.batch()).loss
    (loss + adapted.penalty() if way == "loss" else loss).backward()
    optimizer.step()
    assert adapted.step == 1
