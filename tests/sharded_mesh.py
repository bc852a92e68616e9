"""FSDP2 on a mesh of 2 x 2 processes (HSDP) against one process, for every method of sharded_worker.py; by hand:

python -P tests/sharded_mesh.py
"""

import multiprocessing
import sys
import tempfile
from pathlib import Path

import sharded_worker
import torch
import torch.distributed as dist


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=4)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for name, method in sharded_worker.METHODS.items():
        blocks = () if name == "adalora by gradient" else None
        found = sharded_worker.one(
            method, folder / name, rank, 4, lambda model, blocks=blocks: sharded_worker.shard(model, blocks, mesh=mesh)
        )
        torch.save(found, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def main():
    folder, wrong = Path(tempfile.mkdtemp()), False
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=work, args=(rank, folder)) for rank in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    for name, method in sharded_worker.METHODS.items():
        alone = sharded_worker.one(method)
        for rank in range(4):
            found = torch.load(folder / f"{name}-{rank}.pt")
            tensors = found["tensors"]
            gaps = [(tensors[key].double() - value.double()).abs() for key, value in alone["tensors"].items()]
            far = max(float(gap.max()) for gap in gaps if gap.numel())
            wrong |= found["history"] != alone["history"] or far > 1e-6
            print(f"{name}, process {rank}: {len(found['history'])} decisions, farthest entry {far:.1e}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
