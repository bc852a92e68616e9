"""The forms that rows of a folder of data may have, each recognised by the names of its fields.

A form is a line in `FORMS`: which fields its rows have, and which task they are for. The names are those of GLUE, of
SQuAD, of transformers' examples and of TRL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import attrs

from lrkit.errors import LrkitError
from lrkit.tasks.base import Task
from lrkit.tasks.entities import is_entity_tag
from lrkit.tasks.fields import ANSWERS, MESSAGES, NUMBER, OPTIONAL_TEXT, TAGS, TEXT, TURN, WORDS, Field, shown
from lrkit.tasks.folder_labels import FIELDS, classification, text_fields
from lrkit.tasks.found import Found, Table
from lrkit.tasks.generated import final_number


def _fine(_: dict[str, Any]) -> None:
    """Say that the fields of any row fit together."""


@attrs.frozen
class Form:
    """A form of rows.

    Attributes:
        fields: the fields of a row, by name.
        make: makes the task.
        check: checks that the fields of a row fit together; it raises LrkitError if they do not.
    """

    fields: Mapping[str, Field]
    make: Callable[[Found], Task]
    check: Callable[[dict[str, Any]], None] = _fine

    @property
    def names(self) -> set[str]:
        """Return the names of the fields that a row must have."""
        return {name for name, field in self.fields.items() if not field.optional}

    def __str__(self) -> str:
        return " + ".join(name for name in self.fields if name in self.names)


def _not_empty(row: dict[str, Any]) -> None:
    """Check that no answer is empty."""
    if not all(row["answers"]["text"]):
        raise LrkitError('field "answers" has an empty text; a question without an answer has none at all: "text": []')


_ASTRAY = 100
"""Of so many rows one may have an answer that is not where it is said to be: data that people made have a few."""


def _check_places(split: Table) -> None:
    """Raise LrkitError if answers are not where their rows say; not for a few of many, which training leaves out."""
    astray = []
    for row, (answers, context) in enumerate(zip(split.columns["answers"], split.columns["context"], strict=True)):
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            if start < 0 or not context.startswith(text, start):
                there = context[max(0, start) : max(0, start) + len(text)]
                astray.append((row, f"answer {shown(text)} is not at {start} of the context, where {shown(there)} is"))
                break
    if len(astray) * _ASTRAY > len(split.lines):
        more = f" ({len(astray):,} of {len(split.lines):,} rows are so)" if len(astray) > 1 else ""
        raise LrkitError(f"{split.where(astray[0][0])}: {astray[0][1]}{more}")


def _questions(found: Found) -> Task:
    """Make questions about a text, some of which have no answer if a row has none."""
    import datasets

    from lrkit.tasks.question_answering import QuestionAnswering

    text = datasets.Value("string")
    features = {
        "question": text,
        "context": text,
        "answers": {"text": [text], "answer_start": [datasets.Value("int64")]},
    }
    for split in found.splits:
        _check_places(split)
    unanswerable = any(not each["text"] for split in found.splits for each in split.columns["answers"])
    return QuestionAnswering(**found.task(features), unanswerable=unanswerable)


def _text_to_text(found: Found) -> Task:
    """Make texts that become texts, of the two columns."""
    from lrkit.tasks.text_to_text import TextToText

    source, target = found.train.columns
    return TextToText(**found.task(), source=source, target=target)


def _of_one_kind(row: dict[str, Any]) -> None:
    """Check that prompt and completion are both texts, or both messages."""
    if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
        raise LrkitError("of prompt and completion one is a text, and the other has messages")


def _answered(row: dict[str, Any]) -> None:
    """Check that there is a message to learn."""
    if all(message["role"] != "assistant" for message in row["messages"]):
        raise LrkitError("no message is the assistant's, so that there is nothing to learn")


def _completion(found: Found) -> Task:
    """Make prompts with completions, or messages."""
    from lrkit.tasks.completion import Completion

    if "prompt" in found.train.columns:
        texts = isinstance(found.train.columns["prompt"][0], str)
        for split in found.splits:
            for row, prompt in enumerate(split.columns["prompt"]):
                if isinstance(prompt, str) != texts:
                    here, first = ("messages", "a text") if texts else ("a text", "messages")
                    raise LrkitError(f"{split.where(row)}: the prompt is {here}, and that of the first row is {first}")
    return Completion(**found.task())


def _solutions(found: Found) -> Task:
    """Make questions with solutions, as those of GSM8K if each ends in "#### number"."""
    from lrkit.tasks import gsm8k
    from lrkit.tasks.completion import Completion

    rows = found.task()
    total = sum(len(split.lines) for split in found.splits)
    unsolved = [
        (split, row) for split in found.splits for row, each in enumerate(split.columns["answer"]) if not _solved(each)
    ]
    if not unsolved:
        return gsm8k.from_rows(**rows)
    if len(unsolved) * _ASTRAY <= total:
        split, row = unsolved[0]
        raise LrkitError(
            f'{split.where(row)}: the answer does not end in "#### number", as {total - len(unsolved):,} of {total:,} do'
        )
    return Completion(**rows | {split: gsm8k.written(rows[split]) for split in ("train", "validation")})


def _solved(answer: str) -> bool:
    _, mark, number = answer.rpartition("####")
    return bool(mark) and final_number(number) is not None


def _instructions(found: Found) -> Task:
    """Make prompts of instructions, in the form of Alpaca (Taori et al. 2023)."""

    def prompts(split: Table) -> dict[str, list[Any]]:
        pairs = zip(split.columns["instruction"], split.columns["input"], strict=True)
        return {"prompt": [_prompt(*pair) for pair in pairs], "completion": split.columns["output"]}

    return _completion(found.with_columns(prompts))


def _prompt(instruction: str, text: str) -> str:
    middle = f"### Input:\n{text}\n\n" if text else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _plain_text(found: Found) -> Task:
    """Make texts to model."""
    from lrkit.tasks.language_modelling import LanguageModelling

    return LanguageModelling(**found.task())


def _of_unlike_length(tags: str, row: dict[str, Any]) -> None:
    """Check that there is a tag per word."""
    if len(row["tokens"]) != len(row[tags]):
        raise LrkitError(f"{len(row['tokens'])} tokens, and {len(row[tags])} {tags}")


def _tagged(tags: str, found: Found) -> Task:
    """Make words with tags: texts, or numbers whose names the training file has."""
    from lrkit.tasks.token_classification import TokenClassification

    found = found.alike(tags)
    names = found.train.names(tags)
    _check_slips(tags, found)
    texts = {tag for split in found.splits for row in split.columns[tags] for tag in row if isinstance(tag, str)}
    labels = names or tuple(sorted(texts))
    known = {label: number for number, label in enumerate(labels)} | {number: number for number, _ in enumerate(names)}

    def numbered(split: Table) -> dict[str, list[Any]]:
        for at, row in enumerate(split.columns[tags]):
            for tag in row:
                if tag not in known:
                    raise LrkitError(f"{split.where(at)}: {tags} has {shown(tag)}, {_unnamed(names)}")
        numbers = [[known[tag] for tag in row] for row in split.columns[tags]]
        return {"tokens": split.columns["tokens"], "tags": numbers}

    return TokenClassification(**found.with_columns(numbered).task() | {"labels": labels})


def _check_slips(tags: str, found: Found) -> None:
    """Raise LrkitError if all tags but a few of many are of entities: those few would make another task of it."""
    total, odd = 0, []
    for split in found.splits:
        for row, texts in enumerate(split.columns[tags]):
            total += len(texts)
            odd += [(split, row, tag) for tag in texts if isinstance(tag, str) and not is_entity_tag(tag)]
    if 0 < len(odd) * _ASTRAY <= total:
        split, row, tag = odd[0]
        raise LrkitError(
            f"{split.where(row)}: {tags} has {shown(tag)}, which is no tag of an entity (O, B-PER, I-PER), as all but "
            f"{len(odd):,} of {total:,} are"
        )


def _unnamed(names: tuple[str, ...]) -> str:
    if names:
        return f"and the training file names the {len(names)} tags {', '.join(names)}"
    return 'and nothing says what that number means: write the tag itself, such as "B-PER"'


FORMS: tuple[Form, ...] = (
    Form({"question": TEXT, "context": TEXT, "answers": ANSWERS}, _questions, _not_empty),
    *(
        Form({source: TEXT, target: TEXT}, _text_to_text)
        for source, target in (
            ("document", "summary"),
            ("article", "highlights"),
            ("dialogue", "summary"),
            ("text", "summary"),
            ("source", "target"),
        )
    ),
    Form({"prompt": TURN, "completion": TURN}, _completion, _of_one_kind),
    Form({"messages": MESSAGES}, _completion, _answered),
    Form({"instruction": TEXT, "input": OPTIONAL_TEXT, "output": TEXT}, _instructions),
    Form({"question": TEXT, "answer": TEXT}, _solutions),
    *(
        Form({"tokens": WORDS, tags: TAGS}, partial(_tagged, tags), partial(_of_unlike_length, tags))
        for tags in ("ner_tags", "pos_tags", "tags")
    ),
)
PLAIN_TEXT = Form({"text": TEXT}, _plain_text)
"""The form of rows that have a text, and nothing that makes them another one."""


def labelled(fields: tuple[str, ...]) -> Form:
    """Return the form of texts with labels."""
    return Form(dict.fromkeys(fields, TEXT) | {"label": NUMBER}, classification)


def form_of(row: Collection[str]) -> Form:
    """Recognise the form of a row by the names of its fields.

    Texts with a label go first. Of the others the one whose fields are all of another one's and more, then plain text.

    Raises:
        LrkitError: it has no known form, or more than one.
    """
    fields, names = text_fields(row), set(row)
    if fields is not None and "label" in names:
        return labelled(fields)
    found = [form for form in FORMS if form.names <= names]
    found = [form for form in found if not any(form.names < other.names for other in found)]
    if len(found) == 1 and "label" in names:
        raise LrkitError(
            f"the fields are those of {found[0]}, and a label, which belongs to texts alone: leave one out"
        )
    if len(found) > 1:
        raise LrkitError(
            f"the fields are those of {' and of '.join(map(str, found))}: leave out those that are not meant"
        )
    if found and found[0].names == {"question", "answer"} and "context" in names:
        raise LrkitError(
            "question and answer come with a context, which would be left out: write answers as SQuAD has them, "
            '{"text": ["..."], "answer_start": [0]}, or prompt and completion'
        )
    if found:
        return found[0]
    if fields is not None:
        near = [name for name in names if re.sub(r"\W", "", name).lower() in ("label", "labels")]
        if near:
            raise LrkitError(f'the field "{near[0]}" is not read: a label\'s field is called "label"')
        return PLAIN_TEXT if fields == ("text",) else labelled(fields)
    texts = " or ".join(" + ".join(fields) for fields in FIELDS)
    raise LrkitError(
        f"no text field: it needs {texts} (with label; text may go without), {', '.join(map(str, FORMS))}; the fields are "
        f"{', '.join(sorted(names)[:8]) or 'none'}"
    )
