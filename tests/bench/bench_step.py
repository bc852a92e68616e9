"""A whole training step over the frozen-base floor: forward, backward, penalty, optimizer, decisions. MiniLM, two sizes."""

import harness
import subjects
import torch

import lrkit

TARGETS = {(16, 64): 1.12, (32, 128): 1.10}
ROUNDS = {(16, 64): 24, (32, 128): 7}


def main():
    arguments = harness.options()
    torch.manual_seed(0)
    base = subjects.minilm()
    rows = []
    for (count, tokens), target in TARGETS.items():
        data = subjects.batch(count, tokens)
        steps = {
            "floor": subjects.floor(base, data),
            "lrkit AdaLoRA": subjects.ours(base, data, subjects.adalora()),
            "lrkit LoRA": subjects.ours(base, data, lrkit.methods.lora(rank=12)),
            "PEFT LoRA": subjects.theirs(base, data, subjects.peft_lora()),
            "PEFT AdaLoRA": subjects.theirs(base, data, subjects.peft_adalora()),
        }
        times = harness.interleaved(steps, round(ROUNDS[count, tokens] * arguments.rounds))
        where = f"MiniLM {count}x{tokens}"
        values = {"milliseconds": harness.milliseconds(times)}
        for name in list(steps)[1:]:
            over = harness.ratio(times, name, "floor")
            wanted = name == "lrkit AdaLoRA"
            rows.append(
                harness.Row(
                    what=f"{name} r = 12, whole step over the floor, {where}",
                    target=f"at most {target - 1:+.0%}" if wanted else "",
                    measured=over.percent(),
                    reached=over.median <= target if wanted else None,
                    values=values if wanted else {},
                )
            )
        cheaper = harness.ratio(times, "lrkit AdaLoRA", "PEFT LoRA")
        rows.append(
            harness.Row(
                what=f"lrkit AdaLoRA over PEFT LoRA, whole step, {where}",
                target="cheaper",
                measured=cheaper.times(),
                reached=cheaper.median < 1,
            )
        )
    harness.finish(rows, arguments)


if __name__ == "__main__":
    main()
