"""What a step costs once nothing is left to decide: all frozen, over the floor; and compacted, beside LoRA at that rank."""

import harness
import subjects
import torch

import lrkit
from lrkit import accounting


def main():
    arguments = harness.options()
    torch.manual_seed(0)
    base, data = subjects.minilm(), subjects.batch(16, 64)
    rounds = round(24 * arguments.rounds)

    rows = []
    for what, model in (("MiniLM", base), ("768 wide, 4 layers", subjects.bert())):
        frozen = subjects.ours(model, data, lrkit.methods.aflora(rank=4, warmup=1, final=1), total_steps=4)
        for _ in range(4):
            frozen()
        steps = {"floor": subjects.floor(model, data), "frozen": frozen}
        times = harness.interleaved(steps, rounds)
        over = harness.ratio(times, "frozen", "floor")
        rows.append(
            harness.Row(
                what=f"AFLoRA r = 4 once every matrix is frozen (vectors train), over the floor, {what} 16x64",
                target="at most +5%",
                measured=over.percent(),
                reached=over.median <= 1.05,
                values={"milliseconds": harness.milliseconds(times)},
            )
        )

    cut = subjects.ours(base, data, _cutting(subjects.adalora(orthogonality=0.0)), total_steps=5)
    penalised = subjects.ours(base, data, _cutting(subjects.adalora()), total_steps=5)
    for _ in range(5):
        cut()
        penalised()
    steps = {
        "LoRA r = 8": subjects.ours(base, data, lrkit.methods.lora(rank=8)),
        "cut": cut,
        "cut, with the penalty": penalised,
    }
    times = harness.interleaved(steps, rounds)
    ranks = [adapter.rank for adapter in cut.adapted.adapters.values()]
    for name, target in (("cut", "within 3%"), ("cut, with the penalty", "")):
        over = harness.ratio(times, name, "LoRA r = 8")
        rows.append(
            harness.Row(
                what=f"AdaLoRA 12 to 8, {name}, over LoRA r = 8",
                target=target,
                measured=over.percent(),
                reached=over.median <= 1.03 if target else None,
                values={"milliseconds": harness.milliseconds(times), "mean rank": sum(ranks) / len(ranks)},
            )
        )

    lora = steps["LoRA r = 8"]
    needed = sum(p.numel() for p in cut.adapted.parameters() if p.requires_grad)
    held = accounting.memory(cut.adapted, cut.optimizer).optimizer / (8 * needed)
    now = cut.adapted.summary()
    work = accounting.flops(cut.model, data).total / accounting.flops(lora.model, data).total
    rows.append(
        harness.Row(
            what="the same: parameters stored over those in effect; AdamW's bytes over 8 for each; FLOPs over LoRA r = 8",
            target="1, 1, 1 (+-1%)",
            measured=f"x{needed / (now.now + now.head):.4f}, x{held:.4f}, x{work:.4f}",
            reached=needed == now.now + now.head and abs(held - 1) < 0.01 and abs(work - 1) < 0.01,
        )
    )
    harness.finish(rows, arguments)


def _cutting(method):
    import attrs

    return attrs.evolve(method, action=lrkit.actions.Prune(cut="end"))


if __name__ == "__main__":
    main()
