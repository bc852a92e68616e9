"""Experts, embeddings and convolutions with LoRA r = 8: a whole step against PEFT's, in time and peak memory."""

import contextlib
import copy
import itertools
import os

import harness
import peft
import subjects
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lrkit

RANK = 8


def mixtral():
    """Build two blocks like Mixtral's: 8 experts, 2 per token, each 3.5 times as wide as the model."""
    return MixtralForCausalLM(
        MixtralConfig(intermediate_size=1344, num_local_experts=8, num_experts_per_tok=2, **_SMALL)
    )


def qwen3_moe():
    """Build two blocks like Qwen3-MoE's: 64 experts, 8 per token, each less than half as wide as the model."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(moe_intermediate_size=144, num_experts=64, num_experts_per_tok=8, head_dim=64, **_SMALL)
    )


_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "use_cache": False,
}


class Embedded(nn.Module):
    """A large embedding under a mean, so that the step is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32_000, 768), nn.Linear(768, 2)

    def forward(self, x):
        return self.head(self.embed(x).mean(1))


class Convolved(nn.Module):
    """Four 3x3 convolutions of 64 channels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 64, 64, 3, padding=1) for i in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.mean((1, 2, 3))


# The model, a batch, lrkit's targets, and the same for PEFT.
SUBJECTS = {
    "experts like Mixtral's, 2x256 tokens": (
        mixtral,
        lambda: {"input_ids": torch.randint(512, (2, 256))},
        r".*experts\..*",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts like Qwen3-MoE's, 2x256 tokens": (
        qwen3_moe,
        lambda: {"input_ids": torch.randint(512, (2, 256))},
        r".*experts\..*",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "an embedding of 32,000 x 768, 16x128 tokens": (
        Embedded,
        lambda: {"x": torch.randint(32_000, (16, 128))},
        "embed",
        {"target_modules": ["embed"]},
    ),
    "four 3x3 convolutions of 64 channels, 8 images of 48x48": (
        Convolved,
        lambda: {"x": torch.randn(8, 3, 48, 48)},
        r"layers\.\d",
        {"target_modules": r"layers\.\d"},
    ),
}


def step_of(model, parameters, data, penalty=None):
    """Return a whole step, forward, backward and optimizer, and the optimizer."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step():
        out = model(**data())  # a fresh batch, so that tokens go to other experts than before
        loss = out.logits.square().mean() if hasattr(out, "logits") else out.square().mean()
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def ours(model, data, method, targets, total_steps=subjects.LONG):
    """Attach a method of lrkit's, and return its step."""
    adapted = lrkit.attach(model, method, targets=targets, train_also=[])
    step, optimizer = step_of(model, adapted.parameters(), data, adapted.penalty if adapted.has_penalty else None)
    adapted.bind(optimizer, total_steps=total_steps)
    step.adapted = adapted
    return step


def theirs(model, data, targets):
    """Attach PEFT's LoRA, and return its step."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, **targets))
    return step_of(model, [p for p in model.parameters() if p.requires_grad], data)[0]


def peak(step):
    """Return the most bytes that a step holds at a time beyond what there was before it, as torch's allocator counts."""
    with _no_errors_shown(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@contextlib.contextmanager
def _no_errors_shown():
    """Send what the profiler's C++ prints on standard error nowhere."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def main():
    arguments = harness.options()
    rows = []
    for (what, (build, batch, targets, same)), dtype in itertools.product(
        SUBJECTS.items(), (torch.float32, torch.bfloat16)
    ):
        torch.manual_seed(0)
        base = build().train().to(dtype)

        def data(batch=batch, dtype=dtype):
            return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch().items()}

        steps = {
            "lrkit LoRA": ours(copy.deepcopy(base), data, lrkit.methods.lora(rank=RANK), targets),
            "PEFT LoRA": theirs(copy.deepcopy(base), data, same),
            "lrkit AdaLoRA": ours(copy.deepcopy(base), data, subjects.adalora(RANK, RANK // 2), targets),
        }
        times = harness.interleaved(steps, round(10 * arguments.rounds))
        held = {name: peak(step) for name, step in steps.items()}
        over, more = harness.ratio(times, "lrkit LoRA", "PEFT LoRA"), held["lrkit LoRA"] / held["PEFT LoRA"]
        adaptive = harness.ratio(times, "lrkit AdaLoRA", "PEFT LoRA")
        rows.append(
            harness.Row(
                what=f"LoRA r = {RANK} over PEFT's, a whole step: {what}, {str(dtype).removeprefix('torch.')}",
                target="no more time or memory",
                measured=f"time {over.times()}, peak memory x{more:.2f} ({held['lrkit LoRA'] / 2**20:.0f} MB); "
                f"lrkit's AdaLoRA over PEFT's LoRA: time {adaptive.times()}",
                reached=over.median <= 1 and round(more, 2) <= 1,
                values={"milliseconds": harness.milliseconds(times), "bytes": held},
            )
        )
    harness.finish(rows, arguments)


if __name__ == "__main__":
    main()
