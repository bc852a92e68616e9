"""The answers of a run in its folder: those to all validation rows, and a few to be read. No torch here.

- ``predictions.npz``, one array ``predictions``; or ``predictions.jsonl``, a line of JSON per validation row.
- ``samples.json``, of a model that answers in words: a list of `Sampled`.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lrkit.errors import LrkitError
from lrkit.study.store import read_json, structured_line, write_bytes, write_json

if TYPE_CHECKING:
    from lrkit.study.run import Result

SAMPLES = "samples.json"
_LONGEST = 20_000
"""Characters of a text that a sample keeps."""


@attrs.frozen(kw_only=True)
class Sampled:
    """A validation row, and what is said to it.

    Args:
        input: what the model is asked.
        reference: the right answer.
        output: the trained model's.
        base: the model's without its training; None if its head is new, so that it has nothing to say.
    """

    input: str
    reference: str
    output: str
    base: str | None = None


def keep_answers(result: "Result", folder: Path) -> list[str]:
    """Write what a run answers into its folder, and return the files' names."""
    kept = ["predictions.jsonl" if isinstance(result.predictions, list) else "predictions.npz"]
    if isinstance(result.predictions, list):
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in result.predictions)
        write_bytes(folder / kept[0], text.encode("utf-8", "replace"))
    else:
        import numpy as np

        packed = io.BytesIO()
        np.savez_compressed(packed, predictions=result.predictions)
        write_bytes(folder / kept[0], packed.getvalue())
    if result.samples:
        write_json(
            folder / SAMPLES, [{key: text and text[:_LONGEST] for key, text in s.items()} for s in result.samples]
        )
        kept.append(SAMPLES)
    else:
        (folder / SAMPLES).unlink(missing_ok=True)  # of an earlier lrkit's run
    return kept


def samples_in(folder: Path) -> tuple[Sampled, ...]:
    """Read a run's samples; empty if it has none, or they cannot be read."""
    try:
        listed = read_json(folder / SAMPLES)
    except LrkitError:
        return ()
    lines = [line for line in listed if isinstance(line, Mapping)] if isinstance(listed, list) else []
    found = (structured_line(line, Sampled) for line in lines)
    return tuple(each for each in found if each is not None)
