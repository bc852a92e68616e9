"""A model folder and a data folder, small enough for a run of a few steps in a second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "was", "good", "bad", "a", "fine", "dull", "plot")
TRAIN_ROWS, VALIDATION_ROWS = 24, 8


def write_model(folder: Path, layers: int = 1) -> Path:
    """A random BERT of `layers` blocks and a tokenizer of fourteen words, as `save_pretrained` writes them."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    from lrkit.models import quiet_transformers

    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=2,
    )
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with quiet_transformers():
        BertForSequenceClassification(config).save_pretrained(folder)
        BertTokenizerFast(vocab={word: n for n, word in enumerate(WORDS)}).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder


def rows(count: int) -> list[dict[str, object]]:
    """Sentences that one word decides."""
    words = (("good", 1), ("bad", 0), ("fine", 1), ("dull", 0))
    return [
        {"sentence": f"the {('film', 'plot')[n % 3 == 0]} was {word}", "label": label}
        for n in range(count)
        for word, label in [words[n % 4]]
    ]


def write_data(folder: Path, lines: Mapping[str, list[str]] | None = None) -> Path:
    """`train.jsonl` and `validation.jsonl`; `lines` replaces the lines of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", TRAIN_ROWS), ("validation", VALIDATION_ROWS)):
        text = (lines or {}).get(split) or [json.dumps(row) for row in rows(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder


def write_place(folder: Path, layers: int = 1) -> Path:
    """A folder with both: `model` and `data`."""
    write_model(folder / "model", layers)
    write_data(folder / "data")
    return folder
