"""Prompts with completions, and conversations: as tokens, and which of them a model learns to write.

A text is tokenized as a whole, so that a model reads the same tokens as at any other time. A part of it that is learnt
begins where the tokens of the text before it and those of the whole text part ways, as in TRL's SFTTrainer. For example:
"2+2=" and "4" are the tokens of "2+2=4", of which the last is learnt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lrkit.errors import LrkitError, cut, shown
from lrkit.foreign import line_of
from lrkit.tasks.tokens import encoding

Message = Mapping[str, Any]
Messages = Sequence[Message]

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@attrs.frozen
class Row:
    """A row as tokens.

    Attributes:
        ids: all of them.
        learnt: for each, whether it is learnt.
        crossed: whether a token spans the end of the text before a part that is learnt: it is learnt, and what a model
            goes on from ends with other tokens.
    """

    ids: list[int]
    learnt: list[bool]
    crossed: bool = False


@attrs.frozen
class Written:
    """A row as text.

    Attributes:
        text: all of it.
        parts: of each part that is learnt, the text before it and the text up to its end; none for a part that ends the
            row.
    """

    text: str
    parts: tuple[tuple[str, str | None], ...]


def as_tokens(rows: Sequence[Written], tokenizer: Any, *, special: bool) -> list[Row]:
    """Tokenize rows.

    Args:
        rows: the rows as text.
        tokenizer: a transformers tokenizer.
        special: the tokenizer puts its own special tokens around a text (a chat template has written them already), and
            an end token follows each text.

    Raises:
        LrkitError: the tokenizer cannot do it, or has no end token.
    """
    texts: dict[str, list[int]] = {}
    for row in rows:
        texts[row.text] = []
        texts |= {text: [] for part in row.parts for text in part if text is not None}
    texts = dict(zip(texts, ids_of(list(texts), tokenizer, special=special), strict=True))
    return [_row(row, texts, end_of(tokenizer) if special else None) for row in rows]


def _row(row: Written, texts: Mapping[str, list[int]], end: int | None) -> Row:
    ids = list(texts[row.text])
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    learnt, crossed = [False] * len(ids), False
    for before, until in row.parts:
        first = _common(texts[before], ids)
        last = len(ids) if until is None else _common(texts[until], ids)
        learnt[first:last] = [True] * (last - first)
        crossed |= first < len(texts[before])
    return Row(ids, learnt, crossed)


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """Count the tokens that two texts begin with alike."""
    for n, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return n
    return min(len(one), len(two))


def ids_of(texts: Sequence[str], tokenizer: Any, *, special: bool) -> list[list[int]]:
    """Tokenize texts, without what the tokenizer puts behind a text. Raises LrkitError if the tokenizer cannot do it."""
    if not texts:
        return []
    found = encoding(tokenizer, list(texts), add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
    behind = _behind(tokenizer) if special else 0
    return [list(ids[: len(ids) - behind]) for ids in found]


def _behind(tokenizer: Any) -> int:
    """Count the special tokens that a tokenizer puts behind a text, such as an end token or BERT's ``[SEP]``."""
    alone, within = (encoding(tokenizer, ["a"], add_special_tokens=each)["input_ids"][0] for each in (False, True))
    rest = len(within) - len(alone)
    return next((rest - n for n in range(rest + 1) if list(within[n : n + len(alone)]) == list(alone)), 0)


def end_of(tokenizer: Any) -> int:
    """Return the end token. Raises LrkitError if there is none."""
    end = tokenizer.eos_token_id
    if end is None:
        raise LrkitError(
            "the model's tokenizer has no end token, so no text that the model writes would end: give it one"
        )
    return int(end)


def completions(prompts: Sequence[Any], answers: Sequence[Any], tokenizer: Any) -> list[Row]:
    """Tokenize prompts with completions, of which the completions are learnt, the end token included.

    Args:
        prompts: texts, or lists of messages that end with the user's.
        answers: texts, or lists of messages that go on from those.
        tokenizer: a transformers tokenizer, with a chat template if there are messages.

    Raises:
        LrkitError: the tokenizer or its template cannot write them, or they are neither texts nor messages.
    """
    special, pairs = not _are_messages(prompts), list(zip(prompts, answers, strict=True))
    for pair in pairs:
        if not all(isinstance(each, str if special else list) for each in pair):
            raise LrkitError(
                f"a row has the prompt {shown(pair[0])} and the completion {shown(pair[1])}: both must be texts, or both "
                "lists of messages"
            )
    written = (
        [Written(a + b, ((a, None),)) for a, b in pairs] if special else [_pair(a, b, tokenizer) for a, b in pairs]
    )
    return as_tokens(written, tokenizer, special=special)


def conversations(rows: Sequence[Messages], tokenizer: Any) -> list[Row]:
    """Tokenize conversations, of which the assistant's turns are learnt: all that the template writes of them.

    If the chat template marks what an assistant says, by ``{% generation %}``, that is learnt. If not, a turn is what the
    template adds to the conversation before it.

    Raises:
        LrkitError: there is no template, it cannot write a conversation, it writes a turn in another way once the
            conversation goes on, or there is no turn of an assistant's.
    """
    for row in rows:
        prompt_of(row)
    if tokenizer.is_fast and tokenizer.chat_template and _MARK.search(tokenizer.get_chat_template()):
        return [_marked(row, tokenizer) for row in rows]
    return as_tokens([_turns(row, tokenizer) for row in rows], tokenizer, special=False)


def prompt_of(messages: Messages) -> tuple[Messages, str]:
    """Split a conversation before the assistant's last turn: into what a model goes on from, and what it should say.

    Raises:
        LrkitError: there is no turn of an assistant's.
    """
    said = [n for n, message in enumerate(messages) if message.get("role") == "assistant"]
    if not said:
        raise LrkitError(f"{_begin(messages)} has no message of an assistant's, so there is nothing to learn from it")
    return messages[: said[-1]], str(messages[said[-1]]["content"])


def prompts_of(prompts: Sequence[Any], tokenizer: Any) -> list[list[int]]:
    """Tokenize what a model goes on from: texts, or conversations, behind which the template opens an answer.

    If a text comes to no token, a model goes on from the token that begins texts, or else from the one that ends them.

    Raises:
        LrkitError: the tokenizer or its template cannot write them.
    """
    talks = _are_messages(prompts)
    texts = [rendered(each, tokenizer, opened=True) for each in prompts] if talks else prompts
    begin = end_of(tokenizer) if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    return [ids or [begin] for ids in ids_of(texts, tokenizer, special=not talks)]


def as_text(prompt: Any) -> str:
    """Return a text, or what is said in messages, a line per message, as a person reads them."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message.get("content")) for message in prompt)


def rendered(messages: Messages, tokenizer: Any, *, opened: bool = False) -> str:
    """Write a conversation by the tokenizer's chat template; `opened`: and what an assistant's answer begins with.

    Raises:
        LrkitError: there is no template, or it cannot write it.
    """
    if not tokenizer.chat_template:
        raise LrkitError(
            "the rows are messages, and the model's tokenizer has no chat template to write them by: take a chat model, or "
            "rows with prompt and completion as texts"
        )
    try:
        return str(tokenizer.apply_chat_template(_plain(messages), tokenize=False, add_generation_prompt=opened))
    except Exception as error:  # whatever the template raises
        raise LrkitError(f"{_begin(messages)} cannot be written by the chat template: {line_of(error)}") from error


def _pair(prompt: Messages, answer: Messages, tokenizer: Any) -> Written:
    text, before = rendered([*prompt, *answer], tokenizer), rendered(prompt, tokenizer, opened=True)
    if not text.startswith(before):
        raise _otherwise(prompt)
    return Written(text, ((before, None),))


def _turns(messages: Messages, tokenizer: Any) -> Written:
    text, parts = rendered(messages, tokenizer), []
    for n, message in enumerate(messages):
        if message.get("role") == "assistant":
            before = rendered(messages[:n], tokenizer, opened=True)
            until = rendered(messages[: n + 1], tokenizer)
            if not (text.startswith(until) and until.startswith(before)):
                raise _otherwise(messages)
            parts.append((before, until if len(until) < len(text) else None))
    return Written(text, tuple(parts))


def _otherwise(messages: Messages) -> LrkitError:
    return LrkitError(
        f"{_begin(messages)}: the chat template writes a turn in another way once the conversation goes on, so that it "
        "cannot be told what to learn: mark it in the template by {% generation %}, or give rows of prompt and completion "
        "as texts"
    )


def _marked(messages: Messages, tokenizer: Any) -> Row:
    try:
        found = tokenizer.apply_chat_template(
            _plain(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:  # whatever the template raises
        raise LrkitError(f"{_begin(messages)} cannot be written by the chat template: {line_of(error)}") from error
    return Row(list(found["input_ids"]), [bool(each) for each in found["assistant_masks"]])


def _plain(messages: Messages) -> list[dict[str, Any]]:
    """Leave out what `datasets` fills in: None for what other rows' messages have."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _are_messages(prompts: Sequence[Any]) -> bool:
    return bool(len(prompts)) and not isinstance(prompts[0], str)


def _begin(messages: Messages) -> str:
    """Name a conversation in an error."""
    return f"the conversation {cut(' '.join(as_text(messages).split()), 60)!r}"
