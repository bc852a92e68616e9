"""Observe and decide: lrkit's AdaLoRA beside PEFT's, 72 matrices of DeBERTa-base shapes, r = 12, interleaved.

Ratios within one process, medians over rounds; a benchmark, no test. Run by `make bench`.
"""

import argparse
import json
import statistics
import time

import peft
import torch
from torch import nn

import lrkit

SHAPES = {
    "query": (768, 768),
    "key": (768, 768),
    "value": (768, 768),
    "out": (768, 768),
    "up": (768, 3072),
    "down": (3072, 768),
}


class Layer(nn.Module):
    def __init__(self, shrink):
        super().__init__()
        for name, (d_in, d_out) in SHAPES.items():
            setattr(self, name, nn.Linear(d_in // shrink, d_out // shrink))


class Model(nn.Module):
    def __init__(self, layers, shrink=1):
        super().__init__()
        self.layers = nn.ModuleList(Layer(shrink) for _ in range(layers))


def with_gradients(model):
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p) * 1e-3


def ours(layers, shrink=1, rank=12):
    model = Model(layers, shrink)
    adapted = lrkit.attach(model, lrkit.methods.adalora(rank=rank, target_rank=8, warmup=1, final=1, interval=1))
    with_gradients(model)
    controller = adapted._controller
    controller.begin(100_000)

    def step():
        controller.before_step()
        controller.after_step(None)

    return step


def theirs(layers, rank=12):
    config = peft.AdaLoraConfig(
        init_r=rank, target_r=8, tinit=1, tfinal=1, deltaT=1, total_step=100_000, target_modules=list(SHAPES)
    )
    model = peft.get_peft_model(Model(layers), config)
    with_gradients(model)
    count = [2]

    def step():
        model.base_model.update_and_allocate(count[0])
        count[0] += 1

    return step


def compare(steps, rounds):
    for step in steps.values():
        for _ in range(3):
            step()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) * 1000 for name, values in times.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # 720 matrices of a tenth the entries each: about the same total size as 72.
    milliseconds = compare(
        {
            "PEFT, 72 matrices": theirs(12),
            "lrkit, 72 matrices": ours(12),
            "lrkit, 720 small matrices": ours(120, shrink=10),
        },
        arguments.rounds,
    )
    for name, value in milliseconds.items():
        print(f"{name:28s} {value:8.2f} ms   x{value / milliseconds['PEFT, 72 matrices']:.2f} of PEFT's")
    print(json.dumps({"threads": torch.get_num_threads(), "milliseconds": milliseconds}))
