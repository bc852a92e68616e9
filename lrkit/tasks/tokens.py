"""Check that a tokenizer is the model's own, and that it knows the text.

A run on unknown tokens trains as any other does, and its score means nothing. Everything here is found from the tokenizer's
results, not from its class or its files.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lrkit.errors import LrkitError, LrkitWarning, cut
from lrkit.foreign import line_of
from lrkit.models import quiet_transformers
from lrkit.tasks.hub import new_fingerprint

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

    from lrkit.tasks.base import Task

MOST, SOME = 0.5, 0.1
"""The share of a text's tokens that may be unknown: above the first it is refused, above the second warned of."""

_LOOKED_AT = 500


def knows_words(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Say whether it has any word but special tokens. If there are no files, transformers makes one up that has none."""
    added = tokenizer.added_tokens_decoder.values()
    # Beside special tokens, the two marks of a blank are no words.
    special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special), "\u2581", "\u0120"}
    return any(token not in special for token in tokenizer.get_vocab())


def check_tokenizer(spec: str, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Check a tokenizer against its model, and let the model pad with the tokenizer's token.

    Args:
        spec: the model's name, as the user gave it.
        tokenizer: with a pad token.
        model: the model.

    Raises:
        LrkitError: no vocabulary, settings that no text can be encoded with, or a vocabulary that is another model's.
    """
    told = f'model "{spec}": '
    if not knows_words(tokenizer):
        raise LrkitError(
            f"{told}there is no tokenizer with it: transformers makes one up that knows no word, so that every text would "
            "be unknown tokens; put the tokenizer's files beside the weights"
        )
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise LrkitError(
            f"{told}model_max_length in tokenizer_config.json must be a number of tokens, not {cut(repr(limit), 200)}"
        )
    try:
        encoded = tokenizer(["a", "a longer text"], truncation=True, max_length=4, padding=True, return_tensors="pt")
        width = encoded["input_ids"].shape
    except Exception as error:  # whatever a setting of the tokenizer's leads to
        raise LrkitError(f"{told}its tokenizer cannot encode a text: {line_of(error)}") from error
    if len(width) != 2 or width[0] != 2:
        raise LrkitError(f"{told}its tokenizer gives token ids of shape {list(width)} for two texts, not two rows")
    rows = embeddings_of(model)
    pad = tokenizer.pad_token_id
    if rows is None or not isinstance(pad, int):
        return
    if pad >= rows:
        raise LrkitError(
            f"{told}its tokenizer pads with token {pad}, and the model has {rows:,} tokens (0 to {rows - 1})"
        )
    if len(tokenizer) < rows / 2:
        raise LrkitError(
            f"{told}its tokenizer has {len(tokenizer):,} tokens and the model {rows:,}: it is another model's tokenizer"
        )
    if abs(len(tokenizer) - rows) > rows / 10:
        warnings.warn(
            f"{told}its tokenizer has {len(tokenizer):,} tokens and the model {rows:,}: is it this model's own?",
            LrkitWarning,
            stacklevel=2,
        )
    _check_special(told, tokenizer, model)


def _check_special(told: str, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Check the special tokens by which the model reads: the pad token, and the end token of an encoder-decoder."""
    config = model.config
    ours, pad = config.pad_token_id, tokenizer.pad_token_id
    if ours is None:
        config.pad_token_id = pad  # a decoder reads the last position that is not padding
    elif ours != pad:
        config.pad_token_id = pad  # enough for a decoder; others may have built it into their positions
        if _reads_padding(tokenizer, model):
            raise LrkitError(
                f"{told}its config pads with token {ours} and its tokenizer with token {pad} ({tokenizer.pad_token}), so "
                "that the model would read padding as text: pad_token_id in config.json must be the tokenizer's"
            )
        warnings.warn(
            f"{told}its config pads with token {ours} and its tokenizer with token {pad} ({tokenizer.pad_token}): the "
            "tokenizer's is taken",
            LrkitWarning,
            stacklevel=3,
        )
    _follow_end(tokenizer, model)
    end = config.eos_token_id
    if config.is_encoder_decoder and isinstance(end, int) and tokenizer.eos_token_id not in (None, end):
        raise LrkitError(
            f"{told}its config ends a text with token {end} and its tokenizer with token {tokenizer.eos_token_id} "
            f"({tokenizer.eos_token}), and the model reads its answer there: eos_token_id must be the tokenizer's"
        )


def _follow_end(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Let a model that writes stop at its tokenizer's end token as well, which it learns, and fill up with its pad token."""
    writing: Any = getattr(model, "generation_config", None)
    if writing is None:
        return
    writing.pad_token_id = tokenizer.pad_token_id
    end, ends = tokenizer.eos_token_id, writing.eos_token_id
    listed = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if end is not None and end not in listed:
        writing.eos_token_id = [*listed, end] if listed else end


def _reads_padding(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> bool:
    """Say whether a text's outputs change when it stands padded beside a longer one."""
    import torch

    texts = ["a text", "a text that is longer than the other one by some words"]
    was = model.training
    model.train(False)
    try:
        with torch.no_grad():
            alone = _first_outputs(model(**tokenizer(texts[:1], return_tensors="pt")))
            padded = _first_outputs(model(**tokenizer(texts, padding=True, return_tensors="pt")))
    finally:
        model.train(was)
    return not torch.allclose(alone, padded, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))


def _first_outputs(output: Any) -> Any:
    """Return the outputs of the first text: its logits, or its first token's hidden state in a model without a head."""
    return output.logits[0] if hasattr(output, "logits") else output.last_hidden_state[0, 0]


def embeddings_of(model: "PreTrainedModel") -> int | None:
    """Count the tokens that a model has an embedding for; None if it has no table of them."""
    try:
        table: Any = model.get_input_embeddings()
        return int(table.weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def check_texts(task: "Task", tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> None:
    """Check that a tokenizer knows a task's texts, on up to 500 rows of each split.

    Raises:
        LrkitError: more than half of the tokens are unknown, more than half of the texts come to no token at all, or the
            model does not have a token.
    """
    texts = [text for split in (task.train, task.validation) for text in task.texts(some(split))]
    texts = [text for text in texts if text.strip()]
    if not texts:
        return
    found = encoding(tokenizer, texts, add_special_tokens=False)["input_ids"]
    rows = embeddings_of(model)
    largest = max((max(ids) for ids in found if len(ids)), default=0)
    if rows is not None and largest >= rows:
        raise LrkitError(
            f"the tokenizer gives token {largest:,}, and the model has {rows:,} tokens (0 to {rows - 1:,}): it is another "
            "model's tokenizer"
        )
    check_known(found, tokenizer, "text")


def check_known(found: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase", kind: str) -> None:
    """Check that a tokenizer knows some texts, as it encoded them without special tokens.

    Args:
        found: the tokens of each text, [n]; at least one text.
        tokenizer: the one that encoded them.
        kind: what they are, in a warning or an error: "text" or "target".

    Raises:
        LrkitError: more than half of the tokens are unknown, or more than half of the texts come to no token at all.
    """
    empty = sum(not len(ids) for ids in found) / len(found)
    unknown, total = 0, sum(len(ids) for ids in found)
    if tokenizer.unk_token_id is not None:
        unknown = sum(sum(token == tokenizer.unk_token_id for token in ids) for ids in found)
    share = unknown / total if total else 1.0
    if max(share, empty) > MOST:
        what = (
            f"{share:.0%} of the {kind}'s tokens are unknown ({tokenizer.unk_token})"
            if share > MOST and total
            else f"{empty:.0%} of the {kind}s come to no token at all"
        )
        raise LrkitError(f"the model's tokenizer does not know this {kind}: {what}, so there is nothing to learn from")
    if max(share, empty) > SOME:
        warnings.warn(
            f"{share:.0%} of the {kind}'s tokens are unknown to the model's tokenizer ({tokenizer.unk_token})",
            LrkitWarning,
            stacklevel=3,
        )


def some(rows: Any) -> Any:
    """Pick rows of a data set to be looked at: 500 or a few more, spread evenly, or all of a small one."""
    step = max(1, len(rows) // _LOOKED_AT)
    return rows.select(range(0, len(rows), step), keep_in_memory=True, new_fingerprint=new_fingerprint())


def encoding(tokenizer: "PreTrainedTokenizerBase", *texts: Any, **how: Any) -> dict[str, Any]:
    """Encode texts as model inputs by column.

    Raises:
        LrkitError: the tokenizer cannot do it, in one line.
    """
    return dict(tokenized(tokenizer, *texts, **how))


def tokenized(tokenizer: "PreTrainedTokenizerBase", *texts: Any, **how: Any) -> "BatchEncoding":
    """Encode texts, and return all that the tokenizer says of them. Raises as `encoding`."""
    try:
        with quiet_transformers():  # it tells of texts that are longer than the model has positions for
            encoded: BatchEncoding = tokenizer(*texts, **how)
        encoded["input_ids"]
    except Exception as error:  # whatever a setting of the tokenizer's leads to
        raise LrkitError(f"the model's tokenizer cannot encode the texts: {line_of(error)}") from error
    return encoded
