"""The eight newer methods by their defaults, whose plug-ins are installed here: each decides in a run of 20 steps."""

from __future__ import annotations

import models
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import lrkit

STEPS = 20
NEWER = ("eva", "fim-lora", "gora", "lisa", "adagradselect", "l1ra", "dylora", "lora-drop")


@pytest.mark.parametrize("name", NEWER)
def test_newer_methods_decide_by_default(name: str) -> None:
    """What they decide stands in the history; what is kept of it is what trains or acts."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 20}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).eval()
    method = lrkit.current().get("method", name)()
    adapted = lrkit.attach(model, method)
    if asked := max(policy.scheduler.calibration for policy in method.policies):
        adapted.calibrate([models.batch(seed=i, rows=4) for i in range(asked)])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(STEPS):
        (model(**models.batch(seed=step, rows=4)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    history = adapted.history
    assert history and all(0 <= decision.step <= STEPS for decision in history)
    begins = {"eva": 0, "fim-lora": 0, "gora": 0, "lisa": 0, "dylora": 0}
    assert history[0].step == begins.get(name, history[0].step)
    if name == "dylora":  # one rank for all layers, drawn at each step; all components act in the end
        layers = len(adapted.adapters)
        drawn = [decision.kept / layers for decision in history]
        assert all(rank in range(1, 9) for rank in drawn) and len(set(drawn)) > 3 and drawn[-1] == 8
    if name in ("eva", "fim-lora", "gora"):
        ranks = [layer.rank for layer in adapted.summary().layers]
        assert len(set(ranks)) > 1 and sum(ranks) == history[0].kept
    if name in ("lisa", "adagradselect"):
        (state,) = adapted.controller.policies
        assert all(decision.kept == 2 for decision in history)
        assert [any(p.requires_grad for p in block.tensors) for block in state.blocks] == state.kept.tolist()
