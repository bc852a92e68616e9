"""Texts that a model writes: greedy or by beams, in batches, and read back as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lrkit.models import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORED = -100
"""Fills labels that are not learnt, and outputs up to the longest: torch's index that no loss reads."""


def generate(
    model: nn.Module, batch: Mapping[str, Any], *, max_new_tokens: int, num_beams: int = 1, **how: Any
) -> Tensor:
    """Let a model go on from prompts, or answer texts, without chance: the same every time.

    Args:
        model: a causal language model or an encoder-decoder, or what a Trainer has wrapped it in.
        batch: `input_ids` and `attention_mask` [rows, tokens]; a causal model's are padded on the left.
        max_new_tokens: the most that it writes.
        num_beams: beams of the search; 1 for greedy.
        **how: more of it, as `generate` of transformers takes it: `length_penalty`, `no_repeat_ngram_size`.

    Returns:
        The new tokens alone [rows, at most max_new_tokens (and one more in an encoder-decoder, its start)].
    """
    plain: Any = getattr(model, "module", model)  # DistributedDataParallel has no `generate`
    # A model's generation config may ask for chance, for a limit in seconds, or for another form of the answer.
    as_it_comes: dict[str, Any] = {
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "max_time": None,
        "stop_strings": None,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "prompt_lookup_num_tokens": None,
    }
    with quiet_transformers():
        written: Tensor = plain.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            use_cache=True,  # a Trainer switches it off in the model's config
            **as_it_comes,
            **how,
        )
    return written if plain.config.is_encoder_decoder else written[:, batch["input_ids"].shape[1] :]


def read(tokens: Any, tokenizer: Any) -> list[str]:
    """Read generated tokens [rows, ...] as texts, without special tokens and white space around; -100 is nothing."""
    import numpy as np

    array = np.asarray(tokens)
    filled = np.where(array == IGNORED, tokenizer.pad_token_id, array)
    texts: list[str] = tokenizer.batch_decode(filled, skip_special_tokens=True)
    return [text.strip() for text in texts]


def padding_on(side: str, tokenizer: Any) -> Any:
    """Return a tokenizer that pads on a side, "left" or "right"; the one that is given stays as it is."""
    import copy

    if tokenizer.padding_side == side:
        return tokenizer
    other = copy.copy(tokenizer)
    other.padding_side = side
    return other
