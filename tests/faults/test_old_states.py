"""States that lrkit 0.1.0 wrote, before its loop was rebuilt: they load bit for bit, and their runs go on."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from older import told
from safetensors import safe_open
from transformers import BertConfig, BertForSequenceClassification

import lrkit

STATES = Path(__file__).parent.parent / "specimens" / "states"
"""Each after 16 of 24 steps of a registered method on the model below, trained on random tokens."""
METHODS = sorted(path.stem for path in STATES.glob("*.safetensors") if path.stem != "model-of-adalora")


def plain() -> BertForSequenceClassification:
    """Make the model that the states are of."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return BertForSequenceClassification(
        BertConfig(**sizes, vocab_size=12, max_position_embeddings=8, num_labels=2)  # type: ignore[arg-type]
    )


def written(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what a file holds, without lrkit."""
    with safe_open(str(STATES / f"{name}.safetensors"), "pt") as file:
        return json.loads((file.metadata() or {}).get("lrkit", "{}")), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def test_there_are_all() -> None:
    """A state of every method that 0.1.0 had, but for prompts, which this model is too short for."""
    later = {"dora", "eva", "fim-lora", "gora", "lora-drop", "lisa", "adagradselect", "l1ra", "dylora"}
    assert set(METHODS) >= set(lrkit.current().names("method")) - later - {"peft-prefix-tuning", "peft-prompt-tuning"}


@pytest.mark.parametrize("name", METHODS)
def test_old_states_load(name: str) -> None:
    """Every tensor and every word of the file is in the state of the run that goes on from it."""
    meta, tensors = written(name)
    adapted = lrkit.load(plain(), STATES / f"{name}.safetensors")
    state = adapted.state_dict()
    assert state["tensors"].keys() == tensors.keys()
    assert all(torch.equal(state["tensors"][key], tensors[key]) for key in tensors)
    assert told(meta, json.loads(json.dumps(state["meta"]))) == meta


@pytest.mark.parametrize("name", METHODS)
def test_their_runs_go_on(name: str) -> None:
    """Eight more steps end the run: the last decision is taken, if the method takes any."""
    model = plain()
    adapted = lrkit.load(model, STATES / f"{name}.safetensors")
    before = len(adapted.history)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lrkit.LrkitWarning)  # a run of random tokens, whose schedule may be short
        adapted.bind(optimizer, total_steps=24)
        for _ in range(8):
            tokens, labels = torch.randint(0, 12, (4, 6)), torch.randint(0, 2, (4,))
            (model(input_ids=tokens, labels=labels).loss + adapted.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert adapted.step == 24
    assert all(state.ended for state in adapted.controller.policies)
    assert len(adapted.history) > before or not adapted.method.policies or before


def test_old_names_of_weights_load() -> None:
    """A state dict of an adapted model from before it kept the base's names (`...base.weight`) is taken whole."""
    _, tensors = written("model-of-adalora")
    assert any(".base.weight" in key for key in tensors)
    model = plain()
    lrkit.attach(model, lrkit.methods.adalora())
    model.load_state_dict(tensors)
    now = model.state_dict()
    assert set(plain().state_dict()) <= set(now)
    for key, tensor in tensors.items():
        assert torch.equal(now[key.replace(".base.", ".")], tensor)
