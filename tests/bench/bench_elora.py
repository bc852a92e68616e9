"""AFLoRA r = 4 against ELoRA r = 1024 (PEFT's VeRA): a whole run on a 768-wide encoder, and FLOPs in the adapted layers."""

import harness
import peft
import subjects
import torch
from torch.utils.flop_counter import FlopCounterMode

import lrkit

STEPS = 20


def main():
    arguments = harness.options()
    torch.manual_seed(0)
    base, data = subjects.bert(width=768, layers=3), subjects.batch(16, 64)
    vera = peft.VeraConfig(r=1024, target_modules=subjects.TARGETS, task_type="SEQ_CLS")
    # Frozen by schedule as the run goes on: one tick of its clock a step.
    warm = {"AFLoRA": lrkit.methods.aflora(rank=4)}
    steps = {
        "AFLoRA": subjects.ours(base, data, warm["AFLoRA"], total_steps=STEPS + 1),
        "VeRA": subjects.theirs(base, data, vera),
    }
    times = harness.interleaved(steps, STEPS, warmup=1)
    whole = sum(times["VeRA"]) / sum(times["AFLoRA"])
    work = {name: forward_flops(step.model) for name, step in steps.items()}
    counted = work["VeRA"] / work["AFLoRA"]
    rows = [
        harness.Row(
            what="PEFT VeRA r = 1024 over AFLoRA r = 4, whole run of 20 steps, 768 wide, 3 layers, 16x64",
            target="at least x2.4",
            measured=f"x{whole:.2f}",
            reached=whole >= 2.4,
            values={"milliseconds": harness.milliseconds(times)},
        ),
        harness.Row(
            what="the same in forward FLOPs of the adapted layers, one token",
            target="at least x2.96",
            measured=f"x{counted:.2f}",
            reached=counted >= 2.96,
        ),
    ]
    harness.finish(rows, arguments)


def forward_flops(model):
    """Of every linear map inside the encoder's blocks, its adapter included."""
    kinds = (lrkit.parameterizations.LowRank, peft.tuners.vera.layer.Linear)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for module in model.modules():
            if isinstance(module, kinds):
                width = module.d_in if hasattr(module, "d_in") else module.in_features
                module(torch.zeros(1, width))
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
