"""Gloo processes that shard a model by FSDP2; run by test_sharded.py with: FOLDER WORLD [WORLD ...]."""

import errno
import multiprocessing
import os
import sys
from pathlib import Path

import attrs
import models
import pytest
import torch
import torch.distributed as dist
import transformers
import zoo

import lrkit
from lrkit.adapt import checkpoint
from lrkit.shards import like, whole

STEPS, HALF = 12, 7
METHODS = {
    "adalora": lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=3, interval=2),
    "aflora": attrs.evolve(
        lrkit.methods.aflora(rank=4, warmup=2, final=3), action=lrkit.actions.Freeze(rule="quantile")
    ),
    "zero by chance": attrs.evolve(
        lrkit.methods.lora(rank=4),
        metric=lrkit.metrics.Random(),
        scheduler=lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=3).scheduler,
        action=lrkit.actions.Zero(),
    ),
}
METHODS["blocks by chance"] = attrs.evolve(
    lrkit.methods.full(),
    metric=lrkit.metrics.Random(),
    scheduler=lrkit.schedulers.Constant(target=1, interval=2, ending="open"),
    action=lrkit.actions.Switch(state="kept"),
)
METHODS["adalora by gradient"] = attrs.evolve(
    METHODS["adalora"], metric=attrs.evolve(METHODS["adalora"].metric, measure="before-clipping")
)


def shard(model, blocks=None, **how):
    from torch.distributed.fsdp import fully_shard

    for layer in model.bert.encoder.layer if blocks is None else blocks:
        fully_shard(layer, **how)
    return fully_shard(model, **how)


def shard_as_one(model):
    """Gather and reduce everything at once. FSDP2 leaves such parameters whole after an evaluation."""
    return shard(model, blocks=())


def shard_base(model):
    """Leave the adapters whole."""
    own = {
        p
        for name, p in model.named_parameters()
        if p.requires_grad and "classifier" not in name and "pooler" not in name
    }
    return shard(model, ignored_params=own)


CUTS = dict.fromkeys(METHODS, shard) | {"adalora by gradient": shard_as_one}


def plain(seed=3):
    return models.make("bert", seed=seed).double().eval()  # no dropout: all processes see the network of one


def optimizer_of(adapted):
    return torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.05)


def train(model, adapted, optimizer, begin, end, rank=0, world=1):
    if adapted.method == METHODS["adalora by gradient"]:
        by_gradient(model, adapted, optimizer, begin, end, rank, world)
        return
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(begin, end):
        mine = {k: v[rank::world] for k, v in models.batch(seed=step, rows=12).items()}
        (model(**mine).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.unbind(quietly=True)


def by_gradient(model, adapted, optimizer, begin, end, rank, world):
    """Train as the Trainer does: the loss is the task's, of two batches whose gradients are summed, and clipped."""
    adapted.bind(optimizer, total_steps=STEPS, penalty="gradient")
    for step in range(begin, end):
        batch = models.batch(seed=step, rows=24)  # halves of it in equal parts for 2, 3 and 4 processes
        with torch.no_grad():
            model(**batch)
        adapted.begin_step()
        for half in range(2):
            if step % 2 and world > 1:  # reduced once, or twice
                model.set_requires_gradient_sync(half == 1)
            mine = {k: v[half::2][rank::world] for k, v in batch.items()}
            (model(**mine).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 0.5)
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
    history = [(d.step, d.budget, d.kept, d.lost, d.returned) for d in adapted.history]
    return {"tensors": state["tensors"], "history": history, "sums": state["meta"]["sums"]}


def one(method, folder=None, rank=0, world=1, cut=lambda model: None):
    """A whole run, saved on the way."""
    model = plain()
    adapted = lrkit.attach(model, method, targets=["query", "output.dense"])
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


def message(call, kind=lrkit.LrkitError):
    try:
        call()
    except kind as error:
        return str(error)
    return "nothing"


def of_kind(name, rank=0, world=1):
    """A short run on layers of one kind: what trains at its end, and the decisions."""
    make, attach, sharding = KINDS[name]
    torch.manual_seed(3)
    model = make()
    adapted = attach(model)
    if world > 1:
        sharding(model)
        for p in adapted.adapter_parameters() if name == "left whole" and rank else ():
            p.data += 1  # a program may seed its processes unlike
    optimizer = optimizer_of(adapted)
    adapted.bind(optimizer, total_steps=4)
    for step in range(4):
        batch = models.batch(seed=step, rows=12)
        if "mixtral" in type(model).__name__.lower():
            batch["labels"] = batch["input_ids"]
        (model(**{k: v[rank::world] for k, v in batch.items()}).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = {n: whole(p.detach()).clone() for n, p in model.named_parameters() if p.requires_grad}
    return tensors, [(d.step, d.kept, d.lost) for d in adapted.history]


def shard_halves(model):
    """Let the head, which is kept in float32, be sharded by itself, and all else computed in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    fully_shard(model.classifier)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


PRUNED = lrkit.methods.adalora(rank=3, target_rank=1, warmup=1, final=1, interval=1)
KINDS = {
    "experts": (
        lambda: zoo.ZOO["mixtral"]().double().eval(),
        lambda model: lrkit.attach(model, PRUNED),
        lambda model: shard(model, model.model.layers),
    ),
    "embedding and slices": (
        lambda: models.make("gpt2", seed=3).double().eval(),
        lambda model: lrkit.attach(model, PRUNED, targets=["wte", "c_attn.q", "c_attn.v"]),
        lambda model: shard(model, model.transformer.h),
    ),
    "magnitudes": (
        plain,
        lambda model: lrkit.attach(
            model,
            attrs.evolve(PRUNED, parameterization=lrkit.parameterizations.DoRA(rank=3, form="svd")),
            targets=["query"],
        ),
        shard,
    ),
    "left whole": (
        plain,
        lambda model: lrkit.attach(
            model, attrs.evolve(PRUNED, action=lrkit.actions.Prune(cut="end")), targets=["query", "output.dense"]
        ),
        shard_base,
    ),
    "half precision": (
        lambda: models.make("bert", seed=3).bfloat16().eval(),
        lambda model: lrkit.attach(model, PRUNED, targets=["query"]),
        shard_halves,
    ),
}


def tensor_parallel(folder, rank, world):
    """A model of transformers that is tensor parallel when it comes, and layers that are after attach."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "llama", tp_plan="auto", device_mesh=mesh
    )
    said = {"tp_plan": message(lambda: lrkit.attach(model, lrkit.methods.lora()))}
    model = plain()
    adapted = lrkit.attach(model, lrkit.methods.lora(), targets=["query"])
    parallelize_module(model.bert.encoder.layer[0], mesh, {"intermediate.dense": ColwiseParallel()})
    said["parallelize"] = message(lambda: adapted.bind(optimizer_of(adapted), total_steps=STEPS))
    return said


def saves(folder, rank):
    """Saves that fail on the process that writes, and at last one that another process does not live to see."""
    model = plain()
    adapted = lrkit.attach(model, METHODS["adalora"])
    shard(model)
    adapted.save(folder / "saved")
    file = folder / "saved" / checkpoint.FILE
    before, said = file.read_bytes(), {}
    (folder / "occupied").touch()
    said["occupied"] = message(lambda: adapted.save(folder / "occupied"), OSError)

    def full(tensors, draft, metadata):
        draft.write_bytes(before[: len(before) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        said["full"] = message(lambda: adapted.save(folder / "saved"), OSError)
    said["kept"] = file.read_bytes() == before
    torch.save(said, folder / f"saves-{rank}.pt")
    dist.barrier()
    if rank:
        os._exit(0)
    said["alone"] = message(lambda: adapted.save(folder / "saved"), RuntimeError)
    said["kept"] &= file.read_bytes() == before
    torch.save(said, folder / f"saves-{rank}.pt")
    os._exit(0)


def refusals():
    said = {}
    model = plain()
    shard(model)
    said["before"] = message(lambda: lrkit.attach(model, METHODS["zero by chance"]))
    model = plain()
    adapted = lrkit.attach(model, METHODS["zero by chance"])
    shard_base(model)
    optimizer = optimizer_of(adapted)
    model(**models.batch()).loss.backward()
    said["whole"] = message(optimizer.step)
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
    stale = optimizer_of(adapted)
    shard(model)
    said["stale"] = message(lambda: adapted.bind(stale, total_steps=STEPS))
    model = plain()
    adapted = lrkit.attach(model, METHODS["adalora"])
    shard(model)
    said["merge"] = message(adapted.merge)
    return said


def work(rank, world, folder):
    """All clauses in one process of so many."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init-{world}", rank=rank, world_size=world)
    result = {"run": {}, "resumed": {}}
    for name, method in METHODS.items():
        result["run"][name] = one(method, folder / f"{name}-{world}", rank, world, CUTS[name])
        result["resumed"][name] = resumed(folder / f"{name}-{world - 1}", rank, world, CUTS[name])
    if world == 2:
        result["kinds"] = {name: of_kind(name, rank, world) for name in KINDS}
        result["said"] = refusals() | tensor_parallel(folder, rank, world)
    torch.save(result, folder / f"{world}-{rank}.pt")
    if world == 2:
        saves(folder, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked before anything is computed: torch and transformers are imported once.
    fork = multiprocessing.get_context("fork")
    for world in map(int, sys.argv[2:]):
        running = [fork.Process(target=work, args=(rank, world, Path(sys.argv[1]))) for rank in range(world)]
        for process in running:
            process.start()
        for process in running:
            process.join()
        if any(process.exitcode for process in running):
            sys.exit(1)
