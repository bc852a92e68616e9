"""One of several gloo processes; run by test_parallel.py with: MODES (comma-separated) RANK WORLD INIT_FILE OUT."""

import sys
from pathlib import Path

import attrs
import calibration_worker
import models
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lrkit

STEPS = 16
CUTTING = {
    f"cut {cut}": attrs.evolve(
        lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=5, interval=3),
        action=lrkit.actions.Prune(cut=cut),
    )
    for cut in ("end", "always")
}


CHANCE = attrs.evolve(lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=5), metric=lrkit.metrics.Random())


@attrs.frozen(kw_only=True)
class FromTheStart(lrkit.schedulers.Constant):
    """Decides before the first step as well. Source: this file."""

    at_start = True


# With the penalty's gradient, and half of the blocks frozen when DDP has wrapped the model already.
SWITCH = attrs.evolve(
    lrkit.methods.svd_lora(rank=4),
    metric=lrkit.metrics.Random(),
    scheduler=FromTheStart(target=1, start=1, interval=3, ending="open"),
    action=lrkit.actions.Switch(),
)
# Blocks of the base's own weights; the optimizer's state of one that stops waits for it.
BLOCKS = lrkit.Method(
    parameterization=lrkit.parameterizations.Full(),
    metric=lrkit.metrics.Random(),
    scheduler=lrkit.schedulers.Constant(target=1, interval=3, ending="open"),
    action=lrkit.actions.Switch(state="kept"),
)
CHOSEN = {"chance": CHANCE, "switch": SWITCH, "blocks": BLOCKS}


def start(method, seed=3):
    model = models.make("bert", seed=seed).eval()  # no dropout: ranks and the single process see the same network
    adapted = lrkit.attach(model, method)
    return model, adapted, torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.05)


def ddp(rank, world, method, accumulate=1):
    """Each rank takes its share of the rows; the end must be that of one process with all of them."""
    model, adapted, optimizer = start(method)
    adapted.controller.seed += rank  # a program may seed its processes unlike: chance is the first one's on all
    wrapped = DistributedDataParallel(model)
    adapted.bind(optimizer, total_steps=STEPS)
    sent = []
    for step in range(STEPS):
        for micro in range(accumulate):
            data = models.batch(seed=step * accumulate + micro, rows=12)
            mine = {k: v[rank::world] for k, v in data.items()}
            ((wrapped(**mine).loss + adapted.penalty()) / accumulate).backward()
        sent.append([p.grad is not None for p in adapted.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    return model, adapted, sent


def one(method, accumulate=1):
    model, adapted, optimizer = start(method)
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(STEPS):
        for micro in range(accumulate):
            data = models.batch(seed=step * accumulate + micro, rows=12)
            ((model(**data).loss + adapted.penalty()) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, adapted


if __name__ == "__main__":
    from test_attach import METHODS

    METHODS = METHODS | CUTTING | CHOSEN
    mode, rank, world, init, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    if mode == "calibration":
        torch.save(calibration_worker.clauses(rank, world, Path(out).parent), out)
        dist.destroy_process_group()
        sys.exit()
    results = {}
    for each in mode.split(","):
        kind, _, name = each.partition(":")
        model, adapted, sent = ddp(rank, world, METHODS[name], accumulate=2 if kind == "accumulate" else 1)
        results[each] = {
            "weights": {k: v.clone() for k, v in model.state_dict().items()},
            "history": [(d.step, d.budget, d.kept, d.lost, d.returned) for d in adapted.history],
            "sent": sent,
        }
    torch.save(results, out)
    dist.destroy_process_group()
