"""Malformed data: whatever is wrong with a folder is told in one line, with the file and the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from row_forms import GOOD, rows_of

from lrkit.cli import main
from lrkit.errors import LrkitError
from lrkit.tasks import load_folder

Row = dict[str, Any]

LINE = 3
"""The row of a split that is damaged, which is not the first: the first says which form it is."""


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


# ---- damage to a field -----------------------------------------------------------------------------------------------

ANY: dict[str, tuple[Callable[[Row, str], Any], str]] = {
    "missing": (lambda row, name: row.pop(name), 'field "{}" is missing'),
    "null": (lambda row, name: row.update({name: None}), "{}"),
    "a flag": (lambda row, name: row.update({name: True}), "{}"),
    "NaN": (lambda row, name: row.update({name: float("nan")}), "{}"),
    "a table": (lambda row, name: row.update({name: {"x": [1]}}), "{}"),
    "nested 500 deep": (lambda row, name: row.update({name: deep(500)}), "{}"),
    "10 MB": (lambda row, name: row.update({name: ["x" * 10_000_000, 7]}), "{}"),
}
TEXT: dict[str, tuple[Callable[[Row, str], Any], str]] = {
    "a number": (lambda row, name: row.update({name: 7}), 'field "{}" is 7, not a string'),
    "a list": (lambda row, name: row.update({name: ["x"]}), "{}"),
    "half a pair": (
        lambda row, name: row.update({name: "x\ud800"}),
        'field "{}" is not valid Unicode: a lone surrogate',
    ),
}


def damages() -> Iterator[Any]:
    """Every damage of every field of every form; the largest and the deepest of one field of each."""
    for form, good in GOOD.items():
        for number, (name, value) in enumerate(good.items()):
            optional = name == "input"
            for what, (change, message) in (ANY | (TEXT if isinstance(value, str) else {})).items():
                if (
                    (what == "10 MB" and form != "summaries")
                    or (what == "missing" and optional)
                    or (what[0] == "n" and number)
                ):
                    continue
                yield pytest.param(
                    form, lambda row, c=change, n=name: c(row, n), message.format(name), id=f"{form}-{name}-{what}"
                )


def put(*path: Any) -> Callable[[Row], Any]:
    """Return a change of a row: the last of `path` is put where the others lead."""

    def change(row: Row) -> None:
        at: Any = row
        for step in path[:-2]:
            at = at[step]
        at[path[-2]] = path[-1]

    return change


def gone(*path: Any) -> Callable[[Row], Any]:
    """Return a change of a row: what `path` leads to is taken away."""

    def change(row: Row) -> None:
        at: Any = row
        for step in path[:-1]:
            at = at[step]
        del at[path[-1]]

    return change


SPECIAL: list[tuple[str, str, Callable[[Row], Any], str]] = [
    (
        "questions",
        "beyond the context",
        put("answers", "answer_start", 0, 99),
        'answer "bird" is not at 99 of the context',
    ),
    ("questions", "one off", put("answers", "answer_start", 0, 3), 'at 3 of the context, where "ird " is'),
    ("questions", "the second one off", put("answers", "answer_start", 1, 1), 'answer "A bird" is not at 1'),
    ("questions", "before the context", put("answers", "answer_start", 0, -1), "is not at -1"),
    ("questions", "another context", put("context", "Nobody."), 'answer "bird" is not at 2'),
    ("questions", "other case", put("answers", "text", 0, "Bird"), 'answer "Bird" is not at 2'),
    ("questions", "an empty text", put("answers", "text", 0, ""), '"text": []'),
    ("questions", "a start too few", put("answers", "answer_start", [2]), "has 2 texts and 1 values of answer_start"),
    ("questions", "no starts", gone("answers", "answer_start"), "answer_start"),
    ("questions", "no texts", gone("answers", "text"), "answer_start"),
    ("questions", "a text alone", put("answers", "text", "bird"), "answer_start"),
    ("questions", "a start that is a text", put("answers", "answer_start", 0, "2"), "answer_start"),
    ("questions", "a start that is a flag", put("answers", "answer_start", 0, True), "answer_start"),
    ("questions", "a start with a point", put("answers", "answer_start", 0, 2.0), "answer_start"),
    ("questions", "a list", put("answers", ["bird"]), 'field "answers" is ["bird"], not'),
    ("questions", "half a pair", put("answers", "text", 0, "\udc00"), "a lone surrogate"),
    ("chats", "no messages", put("messages", []), "not a list of messages"),
    ("chats", "no role", gone("messages", 1, "role"), 'messages[1] is {"content": "A bird."}, not'),
    ("chats", "no content", gone("messages", 0, "content"), 'messages[0] is {"role": "user"}, not'),
    (
        "chats",
        "an unknown role",
        put("messages", 1, "role", "robot"),
        'role "robot"; roles are system, user, assistant, tool',
    ),
    ("chats", "a role that is a number", put("messages", 1, "role", 7), "messages[1] is"),
    ("chats", "null content", put("messages", 1, "content", None), "messages[1] is"),
    ("chats", "content in parts", put("messages", 1, "content", [{"type": "text", "text": "x"}]), "messages[1] is"),
    ("chats", "a text for a message", put("messages", 1, "A bird."), 'messages[1] is "A bird.", not'),
    ("chats", "no answer", gone("messages", 1), "no message is the assistant's"),
    ("completions", "a text and messages", put("completion", [{"role": "assistant", "content": "x"}]), "one is a text"),
    ("completions", "no message", put("prompt", []), 'field "prompt" is [], not a list of messages'),
    ("chats", "half a pair", put("messages", 1, "content", "\ud800"), "a lone surrogate"),
    ("entities", "a tag too few", put("ner_tags", ["O"]), "2 tokens, and 1 ner_tags"),
    ("entities", "a tag too many", put("ner_tags", ["O", "O", "O"]), "2 tokens, and 3 ner_tags"),
    (
        "entities",
        "numbers without names",
        put("ner_tags", [0, 1]),
        "ner_tags has 0, and nothing says what that number means",
    ),
    ("entities", "a number below 0", put("ner_tags", [0, -1]), "a tag is a number from 0"),
    ("entities", "a huge number", put("ner_tags", [0, 10**30]), "a tag is a number from 0"),
    ("entities", "tags of two kinds", put("ner_tags", ["O", 1]), "not a list of strings or of whole numbers"),
    ("entities", "a tag that is null", put("ner_tags", ["O", None]), "not a list of strings or of whole numbers"),
    ("entities", "one text", put("tokens", "Bob slept"), 'field "tokens" is "Bob slept", not a list of strings'),
    ("entities", "no words", put("tokens", []), 'field "tokens" is [], not a list of strings, one at least'),
    ("entities", "a word that is a number", put("tokens", ["Bob", 7]), "not a list of strings"),
    ("entities", "half a pair", put("tokens", ["Bob", "\udfff"]), "a lone surrogate"),
    ("sentences", "a label that is a text", put("label", "1"), 'label is "1", not a number'),
    ("sentences", "a label without end", put("label", float("inf")), "label is Infinity, not a finite number"),
    ("sentences", "a class that is left out", put("label", 7), "label is 7, but no row has label 2"),
    ("sentences", "no label of GLUE's", put("label", -1), "label is -1"),
]


def check(folder: Path, where: str, message: str, *, line: int | None = LINE) -> None:
    """Load a folder: it must be refused in one short line, with the file, the line and the reason."""
    with pytest.raises(LrkitError) as error:
        load_folder(folder)
    said = str(error.value)
    assert "\n" not in said and len(said) <= 900
    assert said.startswith(f"{folder}/{where}" if line is None else f"{folder}/{where}:{line}: "), said
    assert message in said


def write(folder: Path, form: str, split: str, text: bytes | None = None) -> None:
    """Write good rows of a form into the split that is not damaged, and a text into the one that is."""
    for each in ("train", "validation"):
        good = "".join(json.dumps(row) + "\n" for row in rows_of(form)).encode()
        (folder / f"{each}.jsonl").write_bytes(text if each == split and text is not None else good)


SPLITS = cycle(("train", "validation"))


@pytest.mark.parametrize(("form", "change", "message"), list(damages()))
def test_fields_are_checked(tmp_path: Path, form: str, change: Callable[[Row], Any], message: str) -> None:
    """A field that is missing, or of another type, is refused with its line."""
    damaged(tmp_path, form, change, message)


@pytest.mark.parametrize(
    ("form", "change", "message"), [pytest.param(f, c, m, id=f"{f}-{w}") for f, w, c, m in SPECIAL]
)
def test_rows_are_checked(tmp_path: Path, form: str, change: Callable[[Row], Any], message: str) -> None:
    """A row whose parts do not fit together is refused with its line."""
    damaged(tmp_path, form, change, message, split="train")


def damaged(folder: Path, form: str, change: Callable[[Row], Any], message: str, split: str | None = None) -> None:
    rows, split = rows_of(form), split or next(SPLITS)
    change(rows[LINE - 1])
    write(folder, form, split, "".join(json.dumps(row) + "\n" for row in rows).encode())
    check(folder, f"{split}.jsonl", message)


# ---- damage to a file ------------------------------------------------------------------------------------------------

LINES = [json.dumps(row).encode() for row in rows_of("summaries")]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"document": "a", "summary": "b"', "not JSON"),
        (b"{'document': 'a', 'summary': 'b'}", "not JSON"),
        (b'{"document": "a", "summary": "b"},', "not JSON"),
        (b"document,summary", "not JSON"),
        (b'{"document": "\xff", "summary": "b"}', "not UTF-8: invalid start byte at byte 15 of the line"),
        ('{"document": "\u00e4"}'.encode("latin-1"), "not UTF-8"),
        (json.dumps({"document": "a"}).encode("utf-16"), "not UTF-8"),
        (b'["a", "b"]', "not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"NaN", "not a JSON object"),
        (b'{"document": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"document": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b'{"document": 1e999, "summary": "b"}', 'field "document" is Infinity'),
        (b"x" * 10_000_000, "not JSON"),
        (b"\0" * 100, "not JSON"),
    ],
    ids=lambda value: repr(value[:30]),
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_are_checked(tmp_path: Path, bad: bytes, message: str, suffix: str) -> None:
    """A line that is no JSON object in UTF-8 is refused, packed or not."""
    lines = [*LINES[: LINE - 1], bad or b"\x01", *LINES[LINE - 1 :]]
    write(tmp_path, "summaries", "train")
    text = b"\n".join(lines)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / f"train{suffix}").write_bytes(gzip.compress(text, 1) if suffix.endswith("gz") else text)
    check(tmp_path, f"train{suffix}", message)


def table(rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


HEADER, CELLS = ["sentence", "label"], [["a", 0], ["b, c", 1], ["d", 0]]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (table([HEADER, ["a", 0], ["b"]]), 3, "the row has 1 cells, and the header 2"),
        (table([HEADER, ["a", 0], ["b", 1, 2]]), 3, "the row has 3 cells, and the header 2"),
        (table([HEADER, ["a", 0], ["b", "one"]]), 3, 'label is "one", not a number'),
        (table([HEADER, ["a", 0], ["b", ""]]), 3, 'label is "", not a number'),
        (table([HEADER, ["a", 0], ["b", "NaN"]]), 3, "label is NaN, not a finite number"),
        (table([HEADER, ["a", 0], ["b", 2]]), 3, "no row has label 1"),
        (table([HEADER, ["two\nlines", 0], ["b", "x"]]), 4, 'label is "x", not a number'),
        (table([["sentence", "sentence"], ["a", 0]]), 1, "names a column twice"),
        (table([["one", "two"], ["a", 0]]), 2, "no text field: it needs"),
        (table([["sentence"], ["a"]]), 2, 'field "label" is missing'),
        (b'sentence,label\na,0\n"b,1\n', 3, "not CSV"),
        (b'sentence,label\na,0\n"b"c,1\n', 3, "not CSV"),
        (b"sentence,label\na,0\n\xff,1\n", 3, "not UTF-8"),
        (b"sentence;label\na;0\n", 2, "no text field"),
        (b"sentence,label\na,0\nb," + b"[" * 100_000 + b"\n", 3, "not a number"),
        (table([["tokens", "tags"], ['["a"]', '["O"]'], ["a b", '["O"]']]), 3, 'field "tokens" is "a b", not a list'),
        (table([["tokens", "tags"], ['["a"]', '["O"]'], ['["a"', '["O"]']]), 3, 'field "tokens" is'),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_tables_are_checked(tmp_path: Path, text: bytes, line: int, message: str) -> None:
    """A CSV file with a row that does not fit is refused with the line that the row begins at."""
    (tmp_path / "train.csv").write_bytes(text)
    (tmp_path / "validation.csv").write_bytes(table([HEADER, *CELLS]))
    check(tmp_path, "train.csv", message, line=line)


def packed(columns: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def undecodable() -> bytes:
    words = pyarrow.array(["a", "bc"])
    broken = pyarrow.StringArray.from_buffers(2, words.buffers()[1], pyarrow.py_buffer(b"a\xff\xfe"))
    return packed({"sentence": broken, "label": [0, 1]})


WHOLE = packed({"sentence": [str(n**9) for n in range(2000)], "label": [n % 2 for n in range(2000)]})
MIDDLE = len(WHOLE) // 4


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        (b"", ", row 1: ", "cannot be read"),
        (b"PAR1", ", row 1: ", "cannot be read"),
        (b"plainly no Parquet" * 9, ", row 1: ", "cannot be read"),
        (json.dumps(rows_of("sentences")[0]).encode(), ", row 1: ", "cannot be read"),
        (WHOLE[: len(WHOLE) // 2], ", row 1: ", "cannot be read"),
        (WHOLE[:-8] + b"\xff\xff\xff\x7fPAR1", ", row 1: ", "cannot be read"),
        (WHOLE[:4] + b"\xaa" * 4000 + WHOLE[4004:], ", row ", "cannot be read"),
        (undecodable(), ", row 2: ", "not UTF-8"),
        (packed({"sentence": ["a", None], "label": [0, 1]}), ", row 2: ", 'field "sentence" is null, not a string'),
        (packed({"sentence": [b"a", b"b"], "label": [0, 1]}), ", row 1: ", 'field "sentence" is'),
        (packed({"sentence": ["a", "b"], "label": ["0", "1"]}), ", row 1: ", 'label is "0", not a number'),
        (packed({"sentence": ["a", "b"], "label": [0, 2]}), ", row 2: ", "no row has label 1"),
        (packed({"words": ["a", "b"]}), ", row 1: ", "no text field"),
        (packed({"tokens": [["a"], ["b", "c"]], "tags": [["O"], ["O"]]}), ", row 2: ", "2 tokens, and 1 tags"),
        (packed({"sentence": [], "label": []}), ": ", "has no rows"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_parquet_is_checked(tmp_path: Path, text: bytes, where: str, message: str) -> None:
    """A Parquet file that is none, or whose rows do not fit, is refused with the number of the row."""
    (tmp_path / "train.parquet").write_bytes(text)
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("sentences")))
    check(tmp_path, f"train.parquet{where}", message, line=None)


# ---- damage to a folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 9, 18, 200, 4000])
def test_cut_archives_are_told(tmp_path: Path, size: int) -> None:
    """A .gz that ends too early is refused with the line that it ends at."""
    text = b"".join(json.dumps({"document": str(n**9), "summary": ""}).encode() + b"\n" for n in range(2000))
    write(tmp_path, "summaries", "train")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(text)[:size])
    check(tmp_path, "train.jsonl.gz", "" if size else "has no rows", line=None)


def endless(folder: Path) -> None:
    os.mkfifo(folder / "train.jsonl")


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two forms": (
        lambda folder: (folder / "train.csv").write_bytes(b""),
        "train.jsonl and train.csv are two forms of one",
    ),
    "no training": (
        lambda folder: (folder / "train.jsonl").unlink(),
        "there is no train.jsonl or train.jsonl.gz in it",
    ),
    "train only": (
        lambda folder: (folder / "validation.jsonl").unlink(),
        "nor valid, nor dev; it has no other split: write {}:validation=NAME",
    ),
    "train and test": (
        lambda folder: (folder / "validation.jsonl").rename(folder / "test.jsonl"),
        "it has test: write {}:validation=test",
    ),
    "a folder for a file": (
        lambda folder: ((folder / "train.jsonl").unlink(), (folder / "train.jsonl").mkdir()),
        "train.jsonl cannot be read: it is a folder",
    ),
    "a FIFO": (lambda folder: ((folder / "train.jsonl").unlink(), endless(folder)), "it is a FIFO"),
    "a link to nothing": (
        lambda folder: ((folder / "train.jsonl").unlink(), (folder / "train.jsonl").symlink_to("gone")),
        "a link to a file that is not there",
    ),
    "a link to itself": (
        lambda folder: ((folder / "train.jsonl").unlink(), (folder / "train.jsonl").symlink_to("train.jsonl")),
        "cannot be read",
    ),
    "no rows": (lambda folder: (folder / "train.jsonl").write_text("\n \n"), "train.jsonl: has no rows"),
    "blank lines": (
        lambda folder: (folder / "train.jsonl").write_text("\n" * 200_000),
        "more than 100,000 blank lines",
    ),
    "a bomb": (
        lambda folder: (
            (folder / "train.jsonl").unlink(),
            (folder / "train.jsonl.gz").write_bytes(gzip.compress(b" " * 80_000_000, 1)),
        ),
        "bytes, which no such file does",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_are_checked(tmp_path: Path, case: str) -> None:
    """A folder whose files are not there, or are no files, is refused in one line that says so."""
    change, message = FOLDERS[case]
    write(tmp_path, "summaries", "train")
    change(tmp_path)
    with pytest.raises(LrkitError) as error:
        load_folder(tmp_path)
    said = str(error.value)
    assert "\n" not in said and str(tmp_path) in said
    assert message.format(tmp_path) in said


@pytest.mark.parametrize(
    "splits",
    ["validation", "validation=", "valid=test", "validation=a/b", "validation=..", "validation=a,validation=b"],
)
def test_splits_are_checked(tmp_path: Path, splits: str) -> None:
    """Splits that are not spelt as they should be are refused in one line."""
    write(tmp_path, "summaries", "train")
    with pytest.raises(LrkitError) as error:
        load_folder(f"{tmp_path}:{splits}")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["prompt", "completion", "messages"], "those of prompt + completion and of messages"),
        (["document", "summary", "source", "target"], "those of document + summary and of source + target"),
        (["tokens", "ner_tags", "pos_tags"], "those of tokens + ner_tags and of tokens + pos_tags"),
        (["prompt", "completion", "label"], "prompt + completion, and a label"),
        (["prompt", "chosen", "rejected"], "no text field: it needs sentence1 + sentence2 or"),
        (["words", "number"], "messages"),
    ],
)
def test_forms_are_told_apart(tmp_path: Path, fields: list[str], message: str) -> None:
    """Fields that are of two forms, or of none, are refused with those that are known."""
    (tmp_path / "train.jsonl").write_text(json.dumps(dict.fromkeys(fields, "x")))
    (tmp_path / "validation.jsonl").write_text("")
    check(tmp_path, "train.jsonl", message, line=1)


@pytest.mark.parametrize("form", ["questions", "chats", "entities", "summaries"])
def test_command_line_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    """On the command line it is one line on stderr, and exit code 2."""
    rows = rows_of(form)
    rows[LINE - 1].popitem()
    write(tmp_path, form, "train", "".join(json.dumps(row) + "\n" for row in rows).encode())
    with pytest.raises(SystemExit) as stop:
        main(["run", "lora", "--data", str(tmp_path)])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith(f"lrkit: {tmp_path}/train.jsonl:{LINE}: field ") and err.count("\n") == 1
