"""One of several gloo processes that shard a model by FSDP2; run by test_sharded.py with: RANK WORLD INIT FOLDER OUT."""

import sys
from pathlib import Path

import attrs
import models
import torch
import torch.distributed as dist

import lrkit
from lrkit.shards import like, whole

STEPS, HALF = 16, 9
METHODS = {
    "lora": lrkit.methods.lora(rank=4),
    "adalora": lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=5, interval=2),
    "aflora": lrkit.methods.aflora(rank=4, warmup=2, final=6),
    "quantile": attrs.evolve(
        lrkit.methods.aflora(rank=4, warmup=2, final=6), action=lrkit.actions.Freeze(rule="quantile")
    ),
    "zero": attrs.evolve(lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=5), action=lrkit.actions.Zero()),
    "chance": attrs.evolve(
        lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=5), metric=lrkit.metrics.Random()
    ),
}


def shard(model, **how):
    from torch.distributed.fsdp import fully_shard

    for layer in model.bert.encoder.layer:
        fully_shard(layer, **how)
    return fully_shard(model, **how)


def plain(seed=3):
    return models.make("bert", seed=seed).double().eval()  # no dropout: all processes see the network of one


def optimizer_of(adapted):
    return torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.05)


def train(model, adapted, optimizer, begin, end, rank=0, world=1):
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(begin, end):
        mine = {k: v[rank::world] for k, v in models.batch(seed=step, rows=12).items()}
        (model(**mine).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.unbind(quietly=True)


def gathered(optimizer):
    """An optimizer's state in whole tensors."""
    state = optimizer.state_dict()
    state["state"] = {
        i: {k: whole(v).clone() if isinstance(v, torch.Tensor) else v for k, v in each.items()}
        for i, each in state["state"].items()
    }
    return state


def scattered(optimizer, state):
    """Take `gathered` over."""
    ps = [p for group in optimizer.param_groups for p in group["params"]]
    each = {
        i: {k: like(v, ps[i]) if v.shape == ps[i].shape else v.clone() for k, v in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": each})


def end(adapted):
    state = adapted.state_dict()
    counts = adapted.summary().trainable if hasattr(adapted.summary(), "trainable") else None
    history = [(d.step, d.budget, d.kept, d.lost, d.returned) for d in adapted.history]
    return {"tensors": state["tensors"], "history": history, "counts": counts, "sums": state["meta"]["sums"]}


def one(method, folder=None, rank=0, world=1, cut=lambda model: None):
    """A whole run, saved on the way."""
    model = plain()
    adapted = lrkit.attach(model, method)
    adapted.controller.seed += rank  # a program may seed its processes unlike
    cut(model)
    optimizer = optimizer_of(adapted)
    train(model, adapted, optimizer, 0, HALF, rank, world)
    if folder is not None:
        adapted.save(folder)
        state = gathered(optimizer)
        if not rank:
            torch.save(state, folder / "optimizer.pt")
    train(model, adapted, optimizer, HALF, STEPS, rank, world)
    return end(adapted)


def resumed(folder, rank=0, world=1, cut=lambda model: None):
    """The second half of a run that another number of processes began."""
    model = plain()
    adapted = lrkit.load(model, folder)
    cut(model)
    optimizer = optimizer_of(adapted)
    scattered(optimizer, torch.load(folder / "optimizer.pt"))
    train(model, adapted, optimizer, HALF, STEPS, rank, world)
    return end(adapted)


def message(call):
    try:
        call()
    except lrkit.LrkitError as error:
        return str(error)
    return "nothing"


def refusals():
    said = {}
    model = plain()
    shard(model)
    said["before"] = message(lambda: lrkit.attach(model, METHODS["lora"]))
    model = plain()
    adapted = lrkit.attach(model, METHODS["lora"])
    shard(model, ignored_params=set(adapted.adapter_parameters()))
    said["whole"] = message(lambda: adapted.bind(optimizer_of(adapted), total_steps=STEPS))
    for name, method in {
        "cut": attrs.evolve(METHODS["adalora"], action=lrkit.actions.Prune(cut="end")),
        "shared": lrkit.methods.elora(rank=8, shared=True),
    }.items():
        model = plain()
        adapted = lrkit.attach(model, method)
        shard(model)
        said[name] = message(lambda a=adapted: a.bind(optimizer_of(a), total_steps=STEPS))
    model = plain()
    adapted = lrkit.attach(model, METHODS["adalora"])
    adapted.bind(optimizer_of(adapted), total_steps=STEPS)
    shard(model)
    said["late"] = message(lambda: list(adapted.parameters()))
    model = plain()
    adapted = lrkit.attach(model, METHODS["adalora"])
    shard(model)
    optimizer = optimizer_of(adapted)
    said["gradient"] = message(lambda: adapted.bind(optimizer, total_steps=STEPS, penalty="gradient"))
    said["merge"] = message(adapted.merge)
    return said


if __name__ == "__main__":
    rank, world, init, folder, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5]
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    result = {"run": {}, "resumed": {}}
    for name, method in METHODS.items():
        saved = folder / f"{name}-{world}"
        result["run"][name] = one(method, saved, rank, world, shard)
        for before in (1, 2):
            if (folder / f"{name}-{before}").exists() and before != world:
                result["resumed"][name, before] = resumed(folder / f"{name}-{before}", rank, world, shard)
    result["said"] = refusals()
    torch.save(result, out)
    dist.destroy_process_group()
