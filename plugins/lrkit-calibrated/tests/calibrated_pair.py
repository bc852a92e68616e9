"""One of two gloo processes, or one alone; run by test_processes.py with: RANK WORLD INIT_FILE OUT."""

import sys

import lrkit_calibrated
import models
import torch
from torch.nn.parallel import DistributedDataParallel

import lrkit
from lrkit.testing import only

METHODS = {
    "eva": lrkit_calibrated.eva(rank=3),
    "fim-lora": lrkit_calibrated.fim_lora(rank=3),
    "gora": lrkit_calibrated.gora(rank=3),
}
STEPS, BATCHES = 3, 2


def run(name, rank=0, world=1, wrap=False):
    """Calibrate and take some steps. Returns tensors, history, and the largest change of an output by the decision."""
    model = models.make("bert", seed=3).double().eval()
    torch.manual_seed(5 + rank)
    adapted = lrkit.attach(model, METHODS[name])
    outer = DistributedDataParallel(model) if wrap else model
    share = lambda batch: {key: value[rank::world] for key, value in batch.items()}  # noqa: E731
    adapted.calibrate([share(models.ragged(50 + i)) for i in range(BATCHES)])
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(STEPS):
        outer(**share(models.ragged(step))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    deltas = {layer: adapter.delta().detach() for layer, adapter in adapted.adapters.items()}
    return deltas, [(d.step, d.kept, d.lost, d.fresh) for d in adapted.history]


if __name__ == "__main__":
    rank, world, init, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    with only(lrkit_calibrated):
        torch.save({name: run(name, rank, world, wrap=True) for name in METHODS}, out)
    torch.distributed.destroy_process_group()
