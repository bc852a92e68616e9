"""What DDP's reducer must still do once it was made anew: the user's communication hook, and a static graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rigs
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lrkit

STEPS = 8


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone: DDP's reducer and its hooks work as in any other."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def freezing() -> tuple[Any, Any]:
    method = lrkit.Method(
        parameterization=lrkit.parameterizations.LoRA(rank=2),
        metric=lrkit.metrics.GradientUncertainty(),
        scheduler=lrkit.schedulers.Linear(target=1 / 3, warmup=1, final=2),
        action=lrkit.actions.Freeze(),
    )
    return rigs.toy(method)


def loss_of(model: Any, step: int) -> Any:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return (model(x) - torch.sin(3 * x[:, :4])).square().mean()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("static_graph", [False, True], ids=["dynamic", "static graph"])
def test_a_communication_hook_works_on_after_a_freeze(static_graph: bool) -> None:
    """A hook that halves every gradient does so at each step, and on what still trains alone; ``static_graph`` stays set."""
    model, adapted = freezing()
    twin, alike = freezing()
    seen: list[int] = []

    def halve(state, bucket):  # type: ignore[no-untyped-def]  # DDP looks at annotations, and takes none for a promise
        state.append(bucket.buffer().numel())
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer() / 2)
        return future

    ddp = DistributedDataParallel(model, static_graph=static_graph)
    ddp.register_comm_hook(seen, halve)
    optimizer, other = (torch.optim.SGD(a.parameters(), lr=0.1) for a in (adapted, alike))
    adapted.bind(optimizer, total_steps=STEPS)
    alike.bind(other, total_steps=STEPS)
    for step in range(STEPS):
        loss_of(ddp, step).backward()
        (loss_of(twin, step) / 2).backward()
        for p, q in zip(adapted.parameters(), alike.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None and q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, msg=lambda m, step=step: f"step {step}: {m}")
        assert sum(seen) == sum(p.numel() for p in adapted.parameters() if p.grad is not None)
        seen.clear()
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    assert adapted.history == alike.history
    assert sum(len(decision.lost) for decision in adapted.history) == 4


@pytest.mark.usefixtures("alone")
def test_a_model_among_processes_can_be_copied() -> None:
    """`original`, and a copy of the adapted model (an average of weights, say), work beside other processes too."""
    torch.manual_seed(0)
    plain = rigs.Toy()
    x = torch.randn(3, 6)
    before = plain(x)
    adapted = lrkit.attach(plain, lrkit.methods.lora(), targets=rigs.TOY_TARGETS, train_also=())
    adapted.bind(torch.optim.SGD(adapted.parameters(), lr=0.1), total_steps=2)
    DistributedDataParallel(plain)(x)
    original, twin = adapted.original(), copy.deepcopy(plain)
    assert torch.equal(original(x), before)
    assert not original._forward_pre_hooks
    assert torch.equal(twin(x), plain(x))
