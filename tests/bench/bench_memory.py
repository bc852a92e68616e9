"""lrkit's own state in bytes for each adapter parameter; and peak memory of a run, in fresh processes, against PEFT's."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import harness

KINDS = ("floor", "lrkit LoRA", "PEFT LoRA", "lrkit AdaLoRA", "PEFT AdaLoRA")


def run(kind):
    """Train a few steps; megabytes of resident memory at the peak beyond what the loaded model took."""
    import resource

    import psutil
    import subjects
    import torch

    import lrkit

    torch.manual_seed(0)
    base, data = subjects.minilm(), subjects.batch(16, 64)
    step = {
        "floor": lambda: subjects.floor(base, data),
        "lrkit LoRA": lambda: subjects.ours(base, data, lrkit.methods.lora(rank=12)),
        "lrkit AdaLoRA": lambda: subjects.ours(base, data, subjects.adalora()),
        "PEFT LoRA": lambda: subjects.theirs(base, data, subjects.peft_lora()),
        "PEFT AdaLoRA": lambda: subjects.theirs(base, data, subjects.peft_adalora()),
    }[kind]()
    before = psutil.Process().memory_info().rss
    for _ in range(4):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps((peak - before) / 2**20))


def state():
    """Bytes of lrkit's own for each adapter parameter, step by step: of a BERT, of experts and of an embedding."""
    import bench_layers
    import subjects
    import torch

    import lrkit
    from lrkit import accounting

    torch.manual_seed(0)
    out = {}
    experts, batch, targets, _ = bench_layers.SUBJECTS["experts like Mixtral's, 2x256 tokens"]
    embedding, ids, embed, _ = bench_layers.SUBJECTS["an embedding of 32,000 x 768, 16x128 tokens"]
    for name, method in (
        ("AdaLoRA", subjects.adalora(final=4)),
        ("AFLoRA", lrkit.methods.aflora(rank=12, train="both", warmup=2, final=2)),
    ):
        base, data = subjects.bert(width=128, layers=4), subjects.batch(2, 8)
        steps = {
            name: subjects.ours(base, data, method, total_steps=12),
            f"{name}, experts": bench_layers.ours(experts(), batch, method, targets, total_steps=12),
            f"{name}, an embedding": bench_layers.ours(embedding(), ids, method, embed, total_steps=12),
        }
        for what, step in steps.items():
            parameters = sum(p.numel() for p in step.adapted.adapter_parameters())
            out[what] = []
            for _ in range(12):
                step()
                out[what].append(accounting.memory(step.adapted).adaptive / parameters)
    return out


def main():
    arguments = harness.options()
    bytes_each = state()
    rows = []
    for name, series in bytes_each.items():
        falling = all(b <= a for a, b in itertools.pairwise(series)) and series[-1] < 0.1
        rows.append(
            harness.Row(
                what=f"lrkit's own state, {name}, r = 12, bytes for each adapter parameter: first, middle, end",
                target="at most 8, given back",
                measured=f"{series[0]:.2f}, {series[5]:.2f}, {series[-1]:.2f}",
                # A mask of one byte for each component is beside the two float32 statistics.
                reached=round(max(series), 1) <= 8 and falling,
                values={"bytes": series},
            )
        )
    here = str(Path(__file__))
    peaks = {kind: [] for kind in KINDS}
    for _ in range(max(1, round(2 * arguments.rounds))):
        for kind in KINDS:
            done = subprocess.run([sys.executable, here, "--run", kind], check=True, capture_output=True, text=True)
            peaks[kind].append(json.loads(done.stdout.splitlines()[-1]))
    least = {kind: min(values) for kind, values in peaks.items()}
    for kind in ("LoRA", "AdaLoRA"):
        one, other = least[f"lrkit {kind}"], least[f"PEFT {kind}"]
        rows.append(
            harness.Row(
                what=f"peak memory of a run beyond the loaded model, {kind} r = 12, MiniLM 16x64: lrkit over PEFT",
                target="no more",
                measured=f"x{one / other:.2f} ({one:.0f} MB, {other:.0f} MB; floor {least['floor']:.0f} MB)",
                reached=one <= other,
                values={"megabytes": peaks},
            )
        )
    harness.finish(rows, arguments)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(sys.argv[2])
    else:
        main()
