"""Attach to Llama-shaped models of 1 B and 70 B parameters without storage, in time against PEFT's.

By hand, with 6 GB of free memory: ``--step lrkit`` (or ``peft``, ``floor``) trains the 1 B one for a step in bfloat16 on the
CPU, in a process of its own, and prints the peak of resident memory beyond the loaded model in megabytes.
"""

import gc
import sys
import time

import harness

SIZES = {"1 B": (2048, 8192, 16, 32, 112), "70 B": (8192, 28672, 80, 64, 560)}


def llama(size, device="meta"):
    """Build a Llama-shaped model: width, FFN width, blocks and heads; 8 heads of keys and values."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    width, inner, blocks, heads, _ = SIZES[size]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=size == "1 B",
        use_cache=False,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


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


def step(whose):
    """Train once on 128 tokens, and print the peak in megabytes beyond the loaded model."""
    import resource

    import psutil
    import torch

    torch.manual_seed(0)
    with torch.device("meta"):
        model = llama("1 B")
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    model.model.rotary_emb.__init__(model.config)
    before = psutil.Process().memory_info().rss
    adapted = None if whose == "floor" else put(whose, model)
    if whose == "floor":
        model.requires_grad_(False)
        trained = list(model.model.norm.parameters())
        trained[0].requires_grad_(True)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    if whose == "lrkit":
        adapted.bind(optimizer, total_steps=10)
    tokens = torch.arange(128).view(1, -1)
    loss = model(input_ids=tokens, labels=tokens).loss
    (loss + adapted.penalty() if whose == "lrkit" else loss).backward()
    optimizer.step()
    if whose == "peft":
        adapted.base_model.update_and_allocate(1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        f"{whose}: {(peak - before) / 2**20:.0f} MB beyond {before / 2**20:.0f}, {sum(p.numel() for p in trained):,} train"
    )


def main():
    arguments = harness.options()
    rows = []
    for size, (*_, layers) in SIZES.items():
        times = {"lrkit": [], "PEFT": []}
        for _ in range(max(3, round(5 * arguments.rounds))):
            for whose, seconds in times.items():
                model = llama(size)
                gc.collect()
                begin = time.perf_counter()
                adapted = put(whose, model)
                seconds.append(time.perf_counter() - begin)
                if whose == "lrkit":
                    assert len(adapted.adapters) == layers
        found = harness.ratio(times, "lrkit", "PEFT")
        rows.append(
            harness.Row(
                what=f"attach AdaLoRA r = 12 to a Llama of {size} on the meta device, {layers} layers: time over PEFT's",
                target="no more",
                measured=f"{found.times()}; {min(times['lrkit']):.2f} s, {min(times['PEFT']):.2f} s",
                reached=found.median <= 1,
                values={"seconds": times},
            )
        )
    harness.finish(rows, arguments)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        step(sys.argv[2])
    else:
        main()
