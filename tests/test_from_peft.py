"""Adapters as PEFT saves them: embeddings, tied heads and convolutions, each with PEFT's own outputs, or refused."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lrkit

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
TIED = {"tie_word_embeddings": True}
APART = {"tie_word_embeddings": False}


def llama(**settings: Any) -> nn.Module:
    """A small Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, **settings)).eval()


def trained(plain: nn.Module, folder: Path, **settings: Any) -> Tensor:
    """Train an adapter by PEFT, by a draw, save it as PEFT does by default, and return its outputs."""
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=4, **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(str(folder))
        out: Tensor = model(IDS).logits
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tied", "settings", "refused"),
    [
        (APART, {"target_modules": ["embed_tokens", "q_proj"]}, ""),
        (APART, {"target_modules": ["embed_tokens", "lm_head"]}, ""),
        (TIED, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, ""),
        (TIED, {"target_modules": ["embed_tokens", "q_proj"]}, "PEFT adapted model.embed_tokens and not lm_head"),
        (APART, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, ""),
        (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, ""),
        (
            TIED,
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            "trained a copy of .*tie_word_embeddings=False",
        ),
        (
            TIED,
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "trained a copy of .*tie_word_embeddings=False",
        ),
    ],
)
def test_embeddings_come_as_they_are_saved(tied: Any, settings: Any, refused: str, tmp_path: Path) -> None:
    """What PEFT saves of embeddings and heads by default is read with its outputs, or refused in one line."""
    plain = llama(**tied)
    wanted = trained(plain, tmp_path, **settings)
    model = copy.deepcopy(plain)
    if refused:
        with pytest.raises(lrkit.LrkitError, match=refused):
            lrkit.from_peft(model, tmp_path)
    else:
        lrkit.from_peft(model, tmp_path)
    with torch.no_grad():
        got, before = model.eval()(IDS).logits, plain(IDS).logits
    assert torch.allclose(got, before if refused else wanted, atol=1e-5)
    assert not torch.allclose(wanted, before, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_copies_of_tied_weights_are_told_apart(tmp_path: Path) -> None:
    """Two copies that PEFT trained of one weight are refused, and both names of one are read."""
    plain = llama(**TIED)
    trained(plain, tmp_path / "two", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(lrkit.LrkitError, match=r"trained a copy of .*tie_word_embeddings=False"):
        lrkit.from_peft(copy.deepcopy(plain), tmp_path / "two")
    model = copy.deepcopy(plain)
    adapted = lrkit.attach(model, lrkit.methods.lora(rank=2), targets=["q_proj"], train_also=["lm_head"])
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    wanted = model(IDS).logits
    for to in ("peft-lora", "vllm-lora"):
        lrkit.export(adapted, tmp_path / to, to=to)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "peft-lora"))
    assert torch.allclose(theirs(IDS).logits, wanted, atol=1e-5)
    ours = lrkit.from_peft(copy.deepcopy(plain), tmp_path / "peft-lora").model
    assert torch.allclose(ours(IDS).logits, wanted, atol=1e-5) and ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore")
def test_bases_are_told_apart(tmp_path: Path) -> None:
    """An embedding that PEFT saved with its adapter must be the model's own: with more tokens it is refused."""
    plain = llama(**APART)
    more = copy.deepcopy(plain)
    more.resize_token_embeddings(60)
    trained(more, tmp_path, target_modules=["embed_tokens"])
    with pytest.raises(lrkit.LrkitError, match=r"saved the base's model.embed_tokens.weight too, \[60, 16\]"):
        lrkit.from_peft(plain, tmp_path)


class Picture(nn.Module):
    """One convolution."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, **settings)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


@pytest.mark.parametrize(
    ("settings", "exact"),
    [({}, True), ({"stride": 2}, True), ({"padding_mode": "circular"}, False), ({"dilation": 2}, False)],
)
def test_convolutions_are_pefts(settings: Any, exact: bool, tmp_path: Path) -> None:
    """A convolution has PEFT's outputs; one whose padding or dilation PEFT forgets is refused."""
    torch.manual_seed(0)
    plain, x = Picture(**settings), torch.randn(2, 3, 8, 8)
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["conv"]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1 * p.requires_grad)
    model.save_pretrained(str(tmp_path))
    if not exact:
        with pytest.raises(lrkit.LrkitError, match="conv is a convolution with padding_mode="):
            lrkit.from_peft(plain, tmp_path)
        return
    lrkit.from_peft(plain, tmp_path)
    assert torch.allclose(plain(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "odd"),
    [
        ({}, ""),
        ({"use_rslora": True}, ""),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, ""),
        ({"use_rslora": True, "alpha_pattern": {"v_proj": 32}}, "model.layers.0.self_attn.v_proj"),
    ],
)
def test_other_scales_are_told(settings: Any, odd: str, tmp_path: Path) -> None:
    """A scale that the method cannot give a layer is named: outputs are PEFT's, and training is not."""
    plain = llama(**APART)
    wanted = trained(plain, tmp_path, target_modules=["q_proj", "v_proj"], **settings)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", lrkit.LrkitWarning)
        lrkit.from_peft(plain, tmp_path)
    lines = [str(each.message) for each in told if issubclass(each.category, lrkit.LrkitWarning)]
    assert [line.startswith(f"PEFT trained {odd} with other scales") for line in lines] == ([True] if odd else [])
    assert torch.allclose(plain(IDS).logits, wanted, atol=1e-5)
