"""Tokenizers and causal models of a few thousand weights, as folders or as they are; nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

from folders import WORDS


def word_pieces(*pieces):
    """A BERT tokenizer of the five special tokens and some pieces."""
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab={word: n for n, word in enumerate((*WORDS[:5], *pieces))})


def bytes_of_text(merges=()):
    """A GPT-2 tokenizer of single bytes and some merges; it pads with its end token, as smollm2's and GPT-2's do."""
    from transformers import GPT2TokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = [*bytes_to_unicode().values(), *("".join(pair) for pair in merges), "<|endoftext|>"]
    return GPT2TokenizerFast(
        vocab={word: n for n, word in enumerate(words)}, merges=list(merges), pad_token="<|endoftext|>"
    )


def merges_of(*words):
    """The merges that make a token of each word and the blank before it."""
    return list(dict.fromkeys((f"Ġ{word}"[:n], f"Ġ{word}"[n]) for word in words for n in range(1, len(word) + 1)))


def llama(tokenizer, seed=0):
    """A random Llama of one block for a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes, **special))


def write_llama(folder: Path) -> Path:
    """A folder with a random Llama and a tokenizer of bytes and eight words."""
    from lrkit.models import quiet_transformers

    tokenizer = bytes_of_text(merges_of("the", "film", "plot", "was", "bad", "good", "dull", "fine"))
    with quiet_transformers():
        llama(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def write_lines(folder: Path, **splits) -> Path:
    """A folder with a file of JSON lines for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
