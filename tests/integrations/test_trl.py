"""TRL's four trainers against bare loops: gradients with the penalty, references, checkpoints, and what they read past."""

import copy
import math

import pytest
import small_words
import torch
from datasets import Dataset
from small_words import WORDS, tokenizer
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import lrkit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

COMMON = small_words.COMMON | {"max_steps": 8}


def plain(kind="sft", **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, num_labels=1, **settings,
    )  # fmt: skip
    return (LlamaForSequenceClassification if kind == "reward" else LlamaForCausalLM)(config)


def made(kind="sft", target=2, moved=True, **settings):
    """Return an adapted model whose adapters are away from their start, so that every factor has a gradient."""
    torch.manual_seed(1)
    method = lrkit.methods.adalora(rank=4, target_rank=target, orthogonality=0.5)
    adapted = lrkit.attach(plain(kind, **settings), method)
    if moved:
        with torch.no_grad():
            for p in adapted.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return adapted


def reward(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


PAIRS = {
    "prompt": ["the film is", "a plot", "the plot was", "a film"] * 8,
    "chosen": [" good", " very good", " not bad", " a good film"] * 8,
    "rejected": [" bad", " not good", " very bad", " bad"] * 8,
}
TEXTS = {"text": ["a good film", "the plot was bad", "not a very good film", "the film is bad"] * 8}


def start(kind, adapted, folder, *callbacks, data=None, **settings):
    """Return a trainer of the kind for the adapted model."""
    common = COMMON | settings
    columns = {"sft": TEXTS, "grpo": {"prompt": PAIRS["prompt"]}}.get(kind, PAIRS)
    rest = {
        "train_dataset": Dataset.from_dict(columns),
        "processing_class": tokenizer(),
        "callbacks": [lrkit.trainer.AdaptCallback(adapted), *callbacks],
    }
    if common.get("eval_strategy"):
        rest["eval_dataset"] = Dataset.from_dict({name: column[:4] for name, column in columns.items()})
    if kind == "sft":
        return SFTTrainer(adapted.model, args=SFTConfig(str(folder), **common, max_length=16), **rest)
    if kind == "reward":
        return RewardTrainer(adapted.model, args=RewardConfig(str(folder), **common, max_length=16), **rest)
    if kind == "dpo":
        args = DPOConfig(str(folder), **common, max_length=16, beta=0.5)
        return DPOTrainer(adapted.model, ref_model=adapted.reference(), args=args, **rest)
    args = GRPOConfig(str(folder), **common, num_generations=4, max_completion_length=6)
    trainer = GRPOTrainer(adapted.model, reward_funcs=reward, args=args, **rest)
    trainer.beta, trainer.ref_model = 0.3, adapted.reference()
    return trainer


def log_probs(model, ids, attention, labels):
    """Return log p of each label (-100 is none), from the logits."""
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].double()
    labels = labels[:, 1:]
    found = functional.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return found * (labels != -100)


def loss_of(kind, model, base, batches):
    """Return the task's loss over the micro-batches of one step, from the formulas of the papers, in double precision."""
    total = 0.0
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches) if kind == "sft" else 0
    for b in batches:
        if kind == "sft":
            total += -log_probs(model, b["input_ids"], b["attention_mask"], b["labels"]).sum() / tokens
        elif kind == "reward":
            chosen, rejected = model(b["input_ids"], attention_mask=b["attention_mask"]).logits[:, 0].double().chunk(2)
            total += -torch.log(torch.sigmoid(chosen - rejected)).mean() / len(batches)
        elif kind == "dpo":
            labels = b["input_ids"].masked_fill(b["completion_mask"] == 0, -100)
            policy = log_probs(model, b["input_ids"], b["attention_mask"], labels).sum(1)
            with torch.no_grad():
                reference = log_probs(base, b["input_ids"], b["attention_mask"], labels).sum(1)
            chosen, rejected = (policy - reference).chunk(2)
            total += -torch.log(torch.sigmoid(0.5 * (chosen - rejected))).mean() / len(batches)
        else:
            ids = torch.cat([b["prompt_ids"], b["completion_ids"]], 1)
            attention = torch.cat([b["prompt_mask"], b["completion_mask"]], 1)
            labels = ids.masked_fill(attention == 0, -100)
            labels[:, : b["prompt_ids"].shape[1]] = -100
            policy = log_probs(model, ids, attention, labels)
            with torch.no_grad():
                reference = log_probs(base, ids, attention, labels)
            ratio = torch.exp(policy - policy.detach())
            kl = ratio * (torch.exp(reference - policy) - (reference - policy) - 1)  # with DeepSeek-V3.2's correction
            mask = labels[:, 1:] != -100
            each = (-ratio * b["advantages"].reshape(-1, 1) + 0.3 * kl) * mask
            total += each.sum() / sum(int(x["completion_mask"].sum()) for x in batches)
    return total


class Gradients(TrainerCallback):
    """Keeps weights, gradients (clipped) and micro-batches of every step."""

    def __init__(self, adapted):
        self.adapted, self.steps, self.batches = adapted, [], []

    def watch(self, trainer):
        inner = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            self.batches.append(copy.deepcopy({k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}))
            return inner(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    def on_pre_optimizer_step(self, *_, **__):
        tensors = list(self.adapted.parameters())
        self.steps.append(([p.detach().clone() for p in tensors], [p.grad.clone() for p in tensors], self.batches))
        self.batches = []


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "reward"])
def test_gradient_is_the_formulas(kind, clip, checkpointing, tmp_path):
    """In each of three accumulated steps the gradient is that of loss + penalty, written down from the papers, clipped."""
    adapted = made(kind, target=4)
    seen = Gradients(adapted)
    trainer = start(
        kind, adapted, tmp_path, seen, max_steps=3, gradient_accumulation_steps=2, max_grad_norm=clip,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    seen.watch(trainer)
    trainer.train()
    assert len(seen.steps) == 3
    twin, base = made(kind, target=4), plain(kind)
    twin.model.train()
    tensors = list(twin.parameters())
    for weights, gradients, batches in seen.steps:
        assert len(batches) == 2
        with torch.no_grad():
            for p, w in zip(tensors, weights, strict=True):
                p.copy_(w)
        task = torch.autograd.grad(loss_of(kind, twin.model, base, batches), tensors, allow_unused=True)
        penalty = torch.autograd.grad(twin.penalty(), tensors, allow_unused=True)
        right = [sum((g for g in two if g is not None), torch.zeros(())) for two in zip(task, penalty, strict=True)]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in right))
        scale = min(1.0, clip / norm) if clip else 1.0
        assert scale < 1 or not clip
        assert any(float(g.abs().max()) > 1e-3 for g in penalty if g is not None)
        for p, g in zip(right, gradients, strict=True):
            torch.testing.assert_close(g, (p * scale).to(g), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "reward"])
def test_resumed_run_is_bitwise(kind, tmp_path):
    """Resumed at its half, before its budget is reached, the run ends with the same weights, history and log."""
    whole = made(kind, moved=False)
    start(kind, whole, tmp_path / "a", save_strategy="steps", save_steps=4).train()
    assert whole.history[-1].kept == whole.history[-1].budget == 2 * len(whole.adapters)
    torch.manual_seed(5)
    again = made(kind, moved=False)
    trainer = start(kind, again, tmp_path / "a", save_strategy="steps", save_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert again.step == 8 and again.history == whole.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_best_model_is_loaded(kind, tmp_path):
    """With ``load_best_model_at_end`` the adapters are those of the best checkpoint, whatever came later."""
    adapted = made(kind)
    trainer = start(
        kind, adapted, tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, learning_rate=0.3,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    torch.manual_seed(7)
    fresh = lrkit.load(plain(kind), best)
    for a, b in zip(adapted.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
