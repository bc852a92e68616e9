"""What grows with what: layers, ranks, tokens. A stack of linear maps, AdaLoRA deciding at every step, over the floor.

Beside each time stand the two numbers of a roofline: what the adapters multiply and add, and what they read and write.
"""

import harness
import subjects
import torch

import lrkit

WIDTH = 256
START = {"layers": 24, "rank": 16, "tokens": 1024}
CURVES = {"layers": (6, 24, 96), "rank": (4, 16, 64, 256), "tokens": (128, 1024, 4096)}


def steps(layers, rank, tokens):
    torch.manual_seed(0)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    plain = subjects.Stack(layers, WIDTH).requires_grad_(False)
    model = subjects.Stack(layers, WIDTH)
    method = subjects.adalora(rank=rank, target_rank=rank // 2)
    adapted = lrkit.attach(model, method, targets=r"layers\.\d+")
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-4, fused=True)
    adapted.bind(optimizer, total_steps=subjects.LONG)
    controller = adapted.controller

    def floor():
        plain(x).sum().backward()

    def step():
        (model(x).mean() + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def allocator():
        controller.before_step()
        controller.after_step(optimizer)

    def prepare():
        (model(x).mean() + adapted.penalty()).backward()

    return floor, step, prepare, allocator


def roofline(layers, rank, tokens):
    """Multiply-adds (A, B forward and back, each way) and bytes (x and y in and out, statistics) of the adapters."""
    entries = 2 * rank * WIDTH * layers
    multiply_adds = 6 * tokens * rank * WIDTH * layers + 4 * rank * entries
    moved = 4 * (8 * tokens * WIDTH * layers + 6 * entries)
    return multiply_adds, moved


def main():
    arguments = harness.options()
    rows = []
    for what, values in CURVES.items():
        for value in values:
            size = START | {what: value}
            floor, step, prepare, allocator = steps(**size)
            rounds = round(8 * arguments.rounds)
            times = harness.interleaved({"floor": floor, "step": step}, rounds)
            prepare()
            decide = harness.interleaved({"observe + decide": allocator}, 2 * rounds)
            over, each = harness.ratio(times, "step", "floor"), harness.milliseconds(times | decide)
            multiply_adds, moved = roofline(**size)
            rows.append(
                harness.Row(
                    what=f"{what} = {value}",
                    target="",
                    measured=(
                        f"floor {each['floor']:.1f} ms, adapters {each['step'] - each['floor']:.1f} ms "
                        f"({over.percent()}), of it observe + decide {each['observe + decide']:.2f} ms; "
                        f"{multiply_adds / 1e6:.0f} M multiply-adds, {moved / 1e6:.0f} MB"
                    ),
                    reached=None,
                    values={"milliseconds": each, "multiply-adds": multiply_adds, "bytes": moved},
                )
            )
    harness.finish(rows, arguments)


if __name__ == "__main__":
    main()
