"""Counts against the papers' tables and against arithmetic: parameters, FLOPs, bytes."""

import math

import attrs
import models
import pytest
import torch
from test_attach import METHODS, fit

import lrkit
from lrkit import accounting
from lrkit.study.models import empty_model


@pytest.fixture(scope="module")
def deberta():
    return empty_model("deberta-v3-base")


# (method, trainable at the start, at the end) on DeBERTaV3-base: AdaLoRA's and AFLoRA's tables, exactly.
PAPERS = {
    "full": (lrkit.methods.full(), 183_831_552, 183_831_552),
    "LoRA r=8": (lrkit.methods.lora(rank=8), 1_327_104, 1_327_104),
    "LoRA r=4": (lrkit.methods.lora(rank=4), 663_552, 663_552),
    "LoRA r=2": (lrkit.methods.lora(rank=2), 331_776, 331_776),
    "AFLoRA r=4, FFN": (lrkit.methods.aflora(rank=4), 451_872, 83_232),
    "ELoRA r=1024": (lrkit.methods.elora(rank=1024), 156_672, 156_672),
    "AdaLoRA 12 to 8": (lrkit.methods.adalora(rank=12, target_rank=8), 12 * 165_888, 8 * 165_888),
    "AdaLoRA 4 to 2": (lrkit.methods.adalora(rank=4, target_rank=2), 4 * 165_888, 2 * 165_888),
}


@pytest.mark.parametrize("row", PAPERS)
def test_papers_rows(row, deberta):
    """Trainable parameters at start and end are those of the papers' tables."""
    method, start, end = PAPERS[row]
    counted = accounting.count(method, deberta, total_steps=1000)
    # AdaLoRA's paper leaves the λ out of its count.
    lambdas = (method.parameterization.rank, method.scheduler.target) if row.startswith("AdaLoRA") else (0, 0)
    assert counted.start == start + 72 * lambdas[0]
    assert counted.end == end + 72 * lambdas[1]
    assert counted.model == 183_831_552
    assert counted.layers == 72
    assert all(p.device.type == "meta" for p in deberta.parameters())


@pytest.mark.parametrize("epochs", [10, 20])
def test_aflora_average(epochs, deberta):
    """The average is the schedule's, summed step by step."""
    steps = 1230
    method = lrkit.methods.aflora(rank=4, warmup=1 / epochs)
    warmup, end = round(steps / epochs), steps - round(0.7 * steps)
    trained = []
    for step in range(1, steps + 1):
        before = step - 1  # what trains during a step is what the decision after the step before has left
        if before <= warmup:
            share = 1.0
        elif before >= end:
            share = 0.0
        else:
            share = int(48 * (1 - (before - warmup) / (end - warmup)) ** 3) / 48
        trained.append(83_232 + 368_640 * share)
    counted = accounting.count(method, deberta, total_steps=steps)
    assert counted.average == pytest.approx(math.fsum(trained) / steps, rel=1e-12)
    continuous = 83_232 + 368_640 * (1 / epochs + (0.3 - 1 / epochs) / 4)
    assert counted.average == pytest.approx(continuous, rel=0.02)
    low, high = counted.average_range
    assert low < counted.average < high


def test_adalora_average(deberta):
    """The average is the schedule's, summed step by step."""
    method = lrkit.methods.adalora(rank=6, target_rank=4, warmup=100, final=300, interval=10)
    kept, total = 6 * 72, 0
    for step in range(1, 1001):
        total += kept
        if (100 < step < 700 and step % 10 == 0) or step == 700:
            kept = int(288 + (432 - 288) * (1 - (step - 100) / 600) ** 3)
    counted = accounting.count(method, deberta, total_steps=1000)
    per_component = 165_888 / 72 + 1
    assert counted.average == pytest.approx(total / 1000 * per_component, rel=1e-12)


@pytest.mark.parametrize("method", ["adalora", "aflora", "hybrid", "lora"])
def test_run_within_count(method):
    """A real run's parameters lie in the ranges counted beforehand."""
    counted = accounting.count(METHODS[method], models.make("bert"), total_steps=20)
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS[method])
    fit(model, adapted)
    summary = adapted.summary()
    assert summary.start == counted.start
    assert counted.end_range[0] <= summary.now <= counted.end_range[1]
    assert counted.average_range[0] - 1e-9 <= summary.average <= counted.average_range[1] + 1e-9


def test_counting_changes_nothing():
    """The model has the same names and weights as before."""
    model = models.make("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    accounting.count(lrkit.methods.adalora(), model, total_steps=10)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


def mlp_flops(n, layers, frozen_a=False, frozen_b=False):
    """Forward and backward of low-rank adapted layers with a frozen base, by arithmetic: two for a multiply-add."""
    forward = backward = 0
    for index, (i, o, r) in enumerate(layers):
        forward += 2 * n * (i * o + i * r + r * o)
        if not (frozen_a and index == 0):
            backward += 2 * n * r * o  # through B
        if index > 0:
            backward += 2 * n * (i * o + i * r)  # to the input, through W and A
        backward += 0 if frozen_a else 2 * n * i * r
        backward += 0 if frozen_b else 2 * n * r * o
    return forward, backward


def test_flops_fall():
    """Forward and backward are those of arithmetic, before and after a matrix freezes."""
    net = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 5))
    adapted = lrkit.attach(net, lrkit.methods.lora(rank=3), targets=["0", "1"], train_also=[])

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

    model, data = Wrapped(), {"x": torch.randn(7, 10)}
    layers = [(10, 20, 3), (20, 5, 3)]
    counted = accounting.flops(model, data)
    assert (counted.forward, counted.backward) == mlp_flops(7, layers)
    for adapter in adapted.adapters.values():
        adapter.B.requires_grad_(False)
    assert accounting.flops(model, data).backward == mlp_flops(7, layers, frozen_b=True)[1]


def test_aflora_against_elora(deberta):
    """Forward work in the adapted matrices: (84.9 + 169.9) / (84.9 + 0.66), printed 2.96x in AFLoRA's Figure 3."""
    from torch.utils.flop_counter import FlopCounterMode

    def work(method):
        adapted = lrkit.attach(deberta, method)
        with FlopCounterMode(display=False) as counter:
            for adapter in adapted.adapters.values():
                adapter(torch.zeros(1, adapter.d_in, device="meta"))
        adapted.detach()
        return counter.get_total_flops() / 2

    elora, aflora = work(lrkit.methods.elora(rank=1024)), work(lrkit.methods.aflora(rank=4))
    base = sum(m.weight.numel() for n, m in deberta.named_modules() if type(m) is torch.nn.Linear and "encoder" in n)
    assert base == 84_934_656
    assert elora - base == 1024 * 165_888
    assert aflora - base == 4 * 165_888
    assert elora / aflora == pytest.approx(2.98, abs=0.005)


def test_bytes_fall():
    """Frozen matrices give their optimizer state and statistics back."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["aflora"])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    fit(model, adapted, steps=1, optimizer=optimizer)
    first = accounting.memory(adapted, optimizer)
    ranked = sum(m.A.numel() + m.B.numel() for m in adapted.adapters.values() if m.A.requires_grad)
    assert first.adaptive <= 8 * ranked + 1024
    assert first.copies == 4 * sum(p.numel() for p in adapted.head_parameters()) > 0
    assert first.buffers == sum(b.numel() * b.element_size() for b in model.buffers()) > 0
    trained = sum(p.numel() for p in adapted.parameters())
    assert first.optimizer == 8 * trained + 4 * len(list(adapted.parameters()))
    fit(model, adapted, steps=19, optimizer=optimizer, bind=False)
    last = accounting.memory(adapted, optimizer)
    assert last.optimizer == first.optimizer - 8 * ranked - 4 * 8
    assert last.adaptive < 256
    assert last.parameters == first.parameters


def test_trainable_parameters_like_peft(capsys):
    """The first line is PEFT's own for the same LoRA, to the letter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    peft.get_peft_model(models.make("bert"), config).print_trainable_parameters()
    theirs = capsys.readouterr().out
    adapted = lrkit.attach(models.make("bert"), lrkit.methods.lora(rank=4), targets=["query", "value"], train_also=[])
    adapted.print_trainable_parameters()
    mine = capsys.readouterr().out
    assert mine.startswith(theirs) and len(mine.splitlines()) == 2
    size = sum(p.numel() for p in adapted.parameters())
    assert mine.splitlines()[1] == f"adapters: {size:,} now, {size:,} at start, {size:,} on average || head: 0"


def test_masked_components_are_not_now(capsys):
    """After a whole run the second line has the budget's parameters, and the head's beside them."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["adalora"])
    fit(model, adapted)
    adapted.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    summary = adapted.summary()
    assert summary.now < summary.average < summary.start
    assert f"adapters: {summary.now:,} now, {summary.start:,} at start" in second
    assert f"trainable params: {summary.start + summary.head:,} || " in first


def test_a_handle_in_one_line():
    """Model, parts, layers and step, short for any method; a handle that was detached has one, too."""
    model = models.make("bert")
    adapted = lrkit.attach(model, METHODS["hybrid"])
    layers = len(adapted.adapters)
    assert (
        repr(adapted) == f"<Adapted {type(model).__name__}: VectorScaled + Freeze + Prune in {layers} layers, step 0>"
    )
    fit(model, adapted, steps=1)
    assert ", step 1 of 20>" in repr(adapted)
    adapted.detach()
    assert ", step 1 of 20>" in repr(adapted)


def test_unknown_numbers_are_a_range():
    """An action that goes by no budget may freeze all from its first decision on, whatever the schedule's budget is."""
    scheduler = lrkit.schedulers.Constant(target=1.0, interval=5)
    method = attrs.evolve(
        lrkit.methods.aflora(rank=4), scheduler=scheduler, action=lrkit.actions.Freeze(rule="quantile")
    )
    counted = accounting.count(method, models.make("bert"), total_steps=20)
    fixed = counted.end_range[0]
    assert fixed < counted.start == counted.end_range[1]
    assert counted.average_range == pytest.approx(((5 * counted.start + 15 * fixed) / 20, counted.start))
