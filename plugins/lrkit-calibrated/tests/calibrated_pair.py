"""One of two gloo processes, or one alone; run by test_processes.py with: RANK WORLD INIT_FILE OUT."""

import sys

import lrkit_calibrated
import models
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lrkit
from lrkit.shards import whole
from lrkit.testing import only

METHODS = {
    "eva": lrkit_calibrated.eva(rank=3),
    "fim-lora": lrkit_calibrated.fim_lora(rank=3),
    "gora": lrkit_calibrated.gora(rank=3),
}
STEPS, BATCHES, KINDS = 3, 2, ("ddp", "sharded")


def run(name, rank=0, world=1, wrap=""):
    """Calibrate and take some steps, in DDP or sharded after calibration. Returns each layer's ΔW, and the history."""
    model = models.make("bert", seed=3).double().eval()
    torch.manual_seed(5 + rank)
    adapted = lrkit.attach(model, METHODS[name])
    outer = DistributedDataParallel(model) if wrap == "ddp" else model
    share = lambda batch: {key: value[rank::world] for key, value in batch.items()}  # noqa: E731
    adapted.calibrate([share(models.ragged(50 + i)) for i in range(BATCHES)])
    if wrap == "sharded":
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        outer = fully_shard(model)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(STEPS):
        outer(**share(models.ragged(step))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    factors = {layer: [whole(t.detach()) for t in (a.B, a.A)] for layer, a in adapted.adapters.items()}
    deltas = {layer: b @ a * adapted.adapters[layer].scaling for layer, (b, a) in factors.items()}
    return deltas, [(d.step, d.kept, d.lost, d.fresh) for d in adapted.history]


if __name__ == "__main__":
    rank, world, init, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    with only(lrkit_calibrated):
        torch.save({(name, kind): run(name, rank, world, kind) for name in METHODS for kind in KINDS}, out)
    torch.distributed.destroy_process_group()
