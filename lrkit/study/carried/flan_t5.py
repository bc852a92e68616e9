"""Flan-T5-small, of which the package `traceforge-title-model` carries a copy in 8 bits (ONNX), fine-tuned for titles.

Chung et al., "Scaling Instruction-Finetuned Language Models", 2022. The package's authors fine-tuned it to
give short titles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrkit.study.carried.writing import write_json, write_model, write_tokenizer

CONFIG: Mapping[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dtype": "float32",
}


def convert(files: Sequence[Path], folder: Path) -> None:
    """Write the model's folder from the graphs of its encoder and its decoder, and its tokenizer."""
    from lrkit.study.carried.onnx import read_weights

    encoder, decoder, tokenizer = files
    # The encoder's embeddings are the shared ones.
    weights = {
        f"encoder.{name.removeprefix('enc.')}": weight
        for name, weight in read_weights(encoder).items()
        if name != "enc.embed_tokens.weight"
    }
    weights |= {name.removeprefix("m."): weight for name, weight in read_weights(decoder).items()}
    write_model(folder, CONFIG, weights)
    write_json(folder / "generation_config.json", {key: CONFIG[key] for key in CONFIG if key.endswith("_token_id")})
    settings: dict[str, Any] = {
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": 512,
    }
    write_tokenizer(folder, json.loads(tokenizer.read_text(encoding="utf-8")), settings)
