"""The same on a CUDA device: events, bf16 autocast, a model of the device's size. Without one it says so and passes."""

import harness
import subjects
import torch

import lrkit


def timed(step):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def main():
    arguments = harness.options()
    if not torch.cuda.is_available():
        rows = [harness.Row(what="on a CUDA device", target="", measured="no device here: not measured", reached=None)]
        harness.finish(rows, arguments)
        return
    torch.manual_seed(0)
    base = subjects.bert(width=1024, layers=24).cuda()
    data = subjects.batch(32, 256, device="cuda")
    steps = {
        "floor": subjects.floor(base, data),
        "lrkit AdaLoRA": subjects.ours(base, data, subjects.adalora()),
        "lrkit LoRA": subjects.ours(base, data, lrkit.methods.lora(rank=12)),
        "PEFT LoRA": subjects.theirs(base, data, subjects.peft_lora()),
        "PEFT AdaLoRA": subjects.theirs(base, data, subjects.peft_adalora()),
    }
    times = {name: [] for name in steps}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for step in steps.values():
            for _ in range(3):
                step()
        for _ in range(round(20 * arguments.rounds)):
            for name, step in steps.items():
                times[name].append(timed(step))
    rows = [
        harness.Row(
            what=f"{name} r = 12, whole step over the floor, 1024 wide, 24 layers, 32x256, bf16",
            target="at most +10%" if name == "lrkit AdaLoRA" else "",
            measured=(over := harness.ratio(times, name, "floor")).percent(),
            reached=over.median <= 1.1 if name == "lrkit AdaLoRA" else None,
            values={"milliseconds": harness.milliseconds(times)},
        )
        for name in list(steps)[1:]
    ]
    harness.finish(rows, arguments)


if __name__ == "__main__":
    main()
