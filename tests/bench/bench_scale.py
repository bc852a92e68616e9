"""Attach to Llama-shaped models of 1 B and 70 B parameters without storage, and a step of the 1 B one, against PEFT's."""

import functools
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import families
import harness

KINDS = ("floor", "lrkit", "PEFT")
NEEDED = {"float32": 9, "bfloat16": 6}
"""Gigabytes of free memory that a step takes."""


def put(whose, model):
    """Put adapters of AdaLoRA r = 12 into every linear layer of the blocks."""
    import peft

    import lrkit

    if whose == "lrkit":
        return lrkit.attach(model, lrkit.methods.adalora())
    config = peft.AdaLoraConfig(
        init_r=12, target_r=8, total_step=1000, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def step(whose, dtype):
    """Train once on 128 tokens, and print the peak of resident memory beyond the loaded model in megabytes."""
    import resource

    import psutil
    import torch

    torch.manual_seed(0)
    model = families.llama("1 B", dtype=dtype).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    model.model.rotary_emb.__init__(model.config)
    before = psutil.Process().memory_info().rss
    if whose == "floor":
        model.requires_grad_(False)
        model.model.norm.requires_grad_(True)
    else:
        adapted = put(whose, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    if whose == "lrkit":
        adapted.bind(optimizer, total_steps=10)
    tokens = torch.arange(128).view(1, -1)
    loss = model(input_ids=tokens, labels=tokens).loss
    (loss + adapted.penalty() if whose == "lrkit" else loss).backward()
    optimizer.step()
    if whose == "PEFT":
        adapted.base_model.update_and_allocate(1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps([(peak - before) / 2**20, sum(p.numel() for p in model.parameters() if p.requires_grad)]))


def attaching(arguments):
    """Return a row per size: seconds of attach, in turns."""
    for size, (*_, blocks, _) in families.LLAMAS.items():
        times = {"lrkit": [], "PEFT": []}
        for _ in range(max(3, round(5 * arguments.rounds))):
            for whose, seconds in times.items():
                model = families.llama(size, dtype="bfloat16")
                gc.collect()
                begin = time.perf_counter()
                adapted = put(whose, model)
                seconds.append(time.perf_counter() - begin)
                if whose == "lrkit":
                    assert len(adapted.adapters) == 7 * blocks
        found = harness.ratio(times, "lrkit", "PEFT")
        yield harness.Row(
            what=f"attach AdaLoRA r = 12 to a Llama of {size} on the meta device, {7 * blocks} layers: time over PEFT's",
            target="no more",
            measured=f"{found.times()}; {min(times['lrkit']):.2f} s, {min(times['PEFT']):.2f} s",
            reached=found.median <= 1,
            values={"seconds": times},
        )


def memory(dtype):
    """Return a row: megabytes of a step of the 1 B model, each in a process of its own."""
    import psutil

    row = functools.partial(
        harness.Row,
        what=f"peak memory beyond a loaded Llama of 1 B in {dtype}, attach and a step on 128 tokens, AdaLoRA r = 12: "
        "lrkit over PEFT",
        target="no more",
    )
    if psutil.virtual_memory().available < NEEDED[dtype] * 2**30:
        return row(measured=f"not measured: less than {NEEDED[dtype]} GB free", reached=None)
    held = {}
    for whose in KINDS:
        command = [sys.executable, str(Path(__file__)), "--step", whose, dtype]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        held[whose], _ = json.loads(done.stdout.splitlines()[-1])
    ratio = held["lrkit"] / held["PEFT"]
    figures = ", ".join(f"{whose} {megabytes:.0f} MB" for whose, megabytes in held.items())
    return row(measured=f"x{ratio:.2f} ({figures})", reached=ratio <= 1, values={"megabytes": held})


def main():
    arguments = harness.options()
    rows = [*attaching(arguments), *(memory(dtype) for dtype in NEEDED)]
    harness.finish(rows, arguments)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        step(*sys.argv[2:4])
    else:
        main()
