"""Models and training steps: the frozen-base floor, lrkit and PEFT, on the same data with the same optimizer."""

import copy
import warnings

import peft
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.utils import logging

import lrkit
from lrkit import models

warnings.simplefilter("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()

HEAD = ("classifier", "bert.pooler")
TARGETS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
LONG = 100_000


def minilm():
    return AutoModelForSequenceClassification.from_pretrained(str(models.minilm_folder()), num_labels=2)


def bert(width=768, layers=4):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    return BertForSequenceClassification(config)


def batch(rows, tokens, device="cpu"):
    ids = torch.randint(1000, 20_000, (rows, tokens), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def _adamw(parameters):
    # The fused one, which transformers' Trainer takes by default, for all sides.
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-4, fused=True)


def floor(base, data):
    """The base frozen, gradients flowing to the first adapted layer, no adapter."""
    model = copy.deepcopy(base).train()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(HEAD))
    model.bert.embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    optimizer = _adamw(model.parameters())

    def step():
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(base, data, method, total_steps=LONG):
    """lrkit: forward, backward, penalty, optimizer, and all that is adaptive."""
    model = copy.deepcopy(base).train()
    adapted = lrkit.attach(model, method)
    optimizer = _adamw(adapted.parameters())
    adapted.bind(optimizer, total_steps=total_steps)
    penalised = adapted.has_penalty

    def step():
        loss = model(**data).loss
        (loss + adapted.penalty() if penalised else loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    step.adapted, step.optimizer, step.model = adapted, optimizer, model
    return step


def theirs(base, data, config):
    """PEFT, with the call that its AdaLoRA needs."""
    model = peft.get_peft_model(copy.deepcopy(base).train(), config)
    optimizer = _adamw(model.parameters())
    count = [2]

    def step():
        model(**data).loss.backward()
        optimizer.step()
        if isinstance(config, peft.AdaLoraConfig):
            model.base_model.update_and_allocate(count[0])
            count[0] += 1
        optimizer.zero_grad()

    step.model = model
    return step


def adalora(rank=12, target_rank=8, **settings):
    """Deciding at every step, which is what costs most."""
    return lrkit.methods.adalora(
        rank=rank, target_rank=target_rank, **({"warmup": 1, "final": 1, "interval": 1} | settings)
    )


def peft_lora(rank=12):
    return peft.LoraConfig(r=rank, target_modules=TARGETS, task_type="SEQ_CLS")


def peft_adalora(rank=12, target_rank=8):
    return peft.AdaLoraConfig(
        init_r=rank,
        target_r=target_rank,
        tinit=1,
        tfinal=1,
        deltaT=1,
        total_step=LONG,
        target_modules=TARGETS,
        task_type="SEQ_CLS",
    )


class Stack(nn.Module):
    """A residual stack of linear maps, for curves."""

    def __init__(self, layers, width):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x
