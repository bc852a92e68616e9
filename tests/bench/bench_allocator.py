"""Observe and decide: lrkit's AdaLoRA beside PEFT's, 72 matrices of DeBERTa-base shapes, r = 12, a decision every step."""

import harness
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
    controller = adapted.controller
    controller.begin(100_000)

    def step():
        controller.before_step()
        controller.after_step(None)

    return step


def theirs(layers, shrink=1, rank=12):
    config = peft.AdaLoraConfig(
        init_r=rank, target_r=8, tinit=1, tfinal=1, deltaT=1, total_step=100_000, target_modules=list(SHAPES)
    )
    model = peft.get_peft_model(Model(layers, shrink), config)
    with_gradients(model)
    count = [2]

    def step():
        model.base_model.update_and_allocate(count[0])
        count[0] += 1

    return step


def main():
    arguments = harness.options()
    torch.manual_seed(0)
    # 720 matrices of a tenth the entries each: about the same total size as 72.
    steps = {
        "PEFT, 72": theirs(12),
        "lrkit, 72": ours(12),
        "PEFT, 720": theirs(120, shrink=10),
        "lrkit, 720": ours(120, shrink=10),
    }
    times = harness.interleaved(steps, round(30 * arguments.rounds), warmup=3)
    values = {"milliseconds": harness.milliseconds(times)}
    tenth = harness.ratio(times, "lrkit, 72", "PEFT, 72")
    flat = harness.ratio(times, "lrkit, 720", "lrkit, 72")
    rows = [
        harness.Row(
            what="observe + decide, 72 matrices of DeBERTa-base, r = 12: lrkit over PEFT",
            target="at most x0.10",
            measured=tenth.times(),
            reached=tenth.median <= 0.1,
            values=values,
        ),
        harness.Row(
            what="the same: 720 matrices over 72, of the same total size",
            target="flat: x1.0",
            measured=flat.times(),
            reached=flat.median <= 1.1,
        ),
        harness.Row(
            what="720 matrices: lrkit over PEFT",
            target="",
            measured=harness.ratio(times, "lrkit, 720", "PEFT, 720").times(),
            reached=None,
        ),
    ]
    harness.finish(rows, arguments)


if __name__ == "__main__":
    main()
