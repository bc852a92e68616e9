"""Calibration in several processes: DDP and FSDP2; run by parallel_worker.py, and alone as the run to compare with."""

import os
from collections.abc import Mapping
from typing import ClassVar

import attrs
import models
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import lrkit
from lrkit.actions import Verdict
from lrkit.schedulers import Once
from lrkit.shards import whole

STEPS = 3
COUNT = 2
"""Batches by which all calibrate, though the first process has one more."""


@attrs.frozen(kw_only=True)
class SquaredGradient(lrkit.Metric):
    """The sum of squared gradients. Source: none."""

    buffers: ClassVar[tuple[str, ...]] = ("sum",)

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """Add."""
        state["sum"].add_(grad.square())

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The sum, and a little of the weights, which all processes must have alike."""
        return state["sum"] * (1 + weight.abs())


@attrs.frozen(kw_only=True)
class OneMore(lrkit.Action):
    """Every layer gets one component more at each decision. Source: none."""

    fate: ClassVar[str] = "removed"
    final: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    unit = "component"

    def decide(self, ballot):
        """Keep all, and add one."""
        return Verdict(ballot.candidates, cut=True, fresh=(1,) * ballot.layers, core=0.25)

    def apply(self, blocks, kept, optimizer):
        """Do nothing."""

    def turnover(self, units, budget, layers):
        """One more per layer."""
        return 0, layers


def svd(action, scheduler, rank=4):
    """SVD without a penalty, by the squared gradient."""
    return lrkit.Method(
        parameterization=lrkit.parameterizations.SVD(rank=rank, orthogonality=0.0),
        metric=SquaredGradient(),
        scheduler=scheduler,
        action=action,
    )


FREEZING = lrkit.Method(
    parameterization=lrkit.parameterizations.LoRA(rank=4),
    metric=SquaredGradient(),
    scheduler=Once(target=0.5),
    action=lrkit.actions.Freeze(),
)
METHODS = {
    "cut": svd(lrkit.actions.Prune(cut="always"), Once(target=2)),
    "masked": svd(lrkit.actions.Prune(), Once(target=2)),
    "frozen": FREEZING,
    "frozen in bind": attrs.evolve(FREEZING, metric=lrkit.metrics.Random(), scheduler=Once(target=0.5, calibration=0)),
    "grown": svd(OneMore(), lrkit.schedulers.Linear(start=1, target=3, interval=1, final=1), rank=1),
    "allocated": svd(OneMore(), Once(start=1, target=2), rank=1),
}
CASES = (
    ("cut", "before"),
    ("cut", "after"),
    ("cut", "static"),
    ("allocated", "after"),
    ("frozen", "after"),
    ("frozen in bind", "after"),
    ("grown", "after"),
    ("masked", "sharded"),
    ("frozen", "sharded"),
    ("cut", "sharded later"),
)
"""Which method, and when the model is wrapped, seen from calibration."""


def share(batch, rank, world):
    """This process's rows."""
    return {key: value[rank::world] for key, value in batch.items()}


def wrapped(model, kind):
    """Put a model into DDP, or shard it."""
    if "sharded" in kind:
        from torch.distributed.fsdp import fully_shard

        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        return fully_shard(model)
    return DistributedDataParallel(model, static_graph=kind == "static")


def run(name, kind="alone", rank=0, world=1):
    """Calibrate by rows of each batch, and take some steps. Returns what the run has come to."""
    model = models.make("bert", seed=3).double().eval()  # no dropout: all processes see the network of one
    torch.manual_seed(5 + rank)  # a program may seed its processes unlike
    adapted = lrkit.attach(model, METHODS[name], targets=["query", "output.dense"])
    late = kind in ("before", "sharded later", "alone")
    if kind == "sharded":
        with torch.no_grad():  # by then all processes must have the same start
            for p in adapted.parameters():
                torch.distributed.broadcast(p.data, 0)
    outer = model if late else wrapped(model, kind)
    if METHODS[name].scheduler.calibration:
        batches = [share(models.batch(seed=50 + i, rows=12), rank, world) for i in range(COUNT + (rank + 1 < world))]
        adapted.calibrate(iter(batches))
    if late and kind != "alone":
        outer = wrapped(model, kind)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.05)
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(STEPS):
        outer(**share(models.batch(seed=step, rows=12), rank, world)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = {n: whole(p.detach()).clone() for n, p in model.named_parameters() if id(p) in adapted._weights.trained}
    return tensors, [(d.step, d.kept, d.lost, d.fresh) for d in adapted.history]


def trained(name, folder, rank, world):
    """Train by the Trainer, which wraps the model before it tells a callback; go on from its checkpoint in a second one."""
    from test_trainer import trainer

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there already
    ends = []
    for resume in (None, str(folder / "checkpoint-2")):
        # The Trainer's own default would hide a reducer that waits for what is frozen.
        saving = {"ddp_find_unused_parameters": False, "save_strategy": "no" if resume else "steps", "save_steps": 2}
        t, adapted = trainer("bert", METHODS[name], folder, max_steps=4, use_cpu=True, **saving)
        t.train(resume_from_checkpoint=resume)
        assert isinstance(t.model_wrapped, DistributedDataParallel)
        history = [(d.step, d.kept, d.lost, d.fresh) for d in adapted.history]
        ends.append(({n: p.detach().clone() for n, p in adapted.named_parameters()}, history))
    return ends


def clauses(rank, world, folder):
    """All cases in one process of so many, and a calibration for which one process has nothing."""
    import warnings

    results = {}
    with lrkit.current().lend("metric", "squared", SquaredGradient), lrkit.current().lend("action", "one", OneMore):
        for name, kind in CASES:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", lrkit.LrkitWarning)
                results[name, kind] = (*run(name, kind, rank, world), [str(each.message) for each in said])
        for name in ("cut", "frozen"):
            results["trainer", name] = trained(name, folder / name, rank, world)
        adapted = lrkit.attach(models.make("bert"), METHODS["cut"])
        try:
            adapted.calibrate([models.batch()] if rank else [])
        except lrkit.LrkitError as error:
            results["none"] = str(error)
        model = models.make("bert")
        adapted = lrkit.attach(model, METHODS["cut"])
        wrapped(model, "sharded")
        try:
            adapted.calibrate([models.batch()])
        except lrkit.LrkitError as error:
            results["sharded cut"] = str(error)
    return results
