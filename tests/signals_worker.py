"""One of several gloo processes whose layer metrics see a share of the rows; run by test_signals.py: RANK WORLD FOLDER."""

import contextlib
import sys
from pathlib import Path

import attrs
import models
import torch
import torch.distributed as dist
from signals import ByUnit, GradientNorm, InputNorm, freezing
from torch.nn.parallel import DistributedDataParallel

import lrkit

STEPS = 10
METRICS = {"inputs": InputNorm(), "gradient": GradientNorm(), "units": ByUnit()}
CALIBRATED = attrs.evolve(freezing(GradientNorm()), scheduler=lrkit.schedulers.Once(target=0.5, calibration=2))


def wrapped(model, how):
    """Wrap a model by DDP, or shard it by FSDP2."""
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    return model


def trained(metric, how, rank=0, world=1, until=7, state=None):
    """Train for 7 of 10 steps, the last of them before the last decision; return history, and statistics."""
    model = models.make("bert", seed=3).double().eval()
    adapted = lrkit.attach(model, freezing(metric), targets=["query", "output.dense"])
    outer = wrapped(model, how)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=STEPS)
    if state is not None:
        adapted.load_state_dict(state[0])
    for step in range(adapted.step, until):
        for micro in range(2):
            data = models.batch(seed=2 * step + micro, rows=4)
            data["attention_mask"][0, 9:] = 0
            data["attention_mask"][3, 4:] = 0
            outer(**{k: v[rank::world] for k, v in data.items()}).loss.div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
    history = [(d.step, d.kept, d.lost, d.returned) for d in adapted.history]
    return {"history": history, "state": (adapted.state_dict(), None)}


def calibrated(rank=0, world=1):
    """Calibrate, before anything is wrapped."""
    model = models.make("bert", seed=3).double().eval()
    adapted = lrkit.attach(model, CALIBRATED)
    batches = [models.batch(seed=seed, rows=4) for seed in range(2)]
    adapted.calibrate([{k: v[rank::world] for k, v in data.items()} for data in batches])
    return [(d.step, d.kept, sorted(d.lost), round(d.threshold, 9)) for d in adapted.history]


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=world)
    with contextlib.ExitStack() as stack:
        for name, metric in METRICS.items():
            stack.enter_context(lrkit.current().lend("metric", name, type(metric)))
        ends = {
            f"{how} {name}": trained(metric, how, rank, world)
            for how in ("ddp", "fsdp")
            for name, metric in METRICS.items()
        }
        half = trained(METRICS["gradient"], "ddp", rank, world, until=4)
        ends["resumed"] = trained(METRICS["gradient"], "ddp", rank, world, state=half["state"])
        ends["calibrated"] = calibrated(rank, world)
    torch.save(ends, folder / f"{rank}.pt")
    dist.destroy_process_group()
