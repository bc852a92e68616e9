"""One file for a run's state: safetensors, with the JSON data in its metadata. Never pickle.

Being one file, it is replaced in one move: if a process is killed, the old state is there or the new one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor

from lrkit.adapt.tensorfile import TensorFile, open_tensors
from lrkit.errors import LrkitError
from lrkit.moves import replacing
from lrkit.reading import is_folder, parse_json
from lrkit.shards import is_sharded, told

FILE = "lrkit.safetensors"
_KEY = "lrkit"
_WORDS = 1000
"""Bytes of an error's words that one process tells the others."""


def write(folder: Path, state: Mapping[str, Any]) -> Path:
    """Write a state into a folder in one move. The folder is made if it is not there.

    Args:
        folder: the folder.
        state: ``{"meta": JSON data, "tensors": name to tensor}``.

    Returns:
        The file's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in state["tensors"].items()}
    with replacing(folder / FILE) as draft:
        save_file(tensors, draft, metadata={_KEY: json.dumps(state["meta"])})
    return folder / FILE


def write_once(folder: Path, state: Mapping[str, Any], trained: Sequence[Tensor]) -> Path:
    """Write a state. If processes hold parts of what trains, the first of them writes, and the others wait for it.

    If it fails there, all of them raise: the first its own error, and the others an OSError with the same words.

    Args:
        folder: the folder.
        state: as `write` takes it.
        trained: all that trains.

    Returns:
        The file's path.
    """
    first: Any = next((p for p in trained if is_sharded(p)), None)
    if first is None:
        return write(folder, state)
    failure: BaseException | None = None
    if not any(first.device_mesh.get_coordinate()):
        try:
            write(folder, state)
        except BaseException as error:
            failure = error
    words = b"" if failure is None else (f"{failure}" or type(failure).__name__).encode()[:_WORDS]
    said = bytes(told(torch.tensor(list(words.ljust(_WORDS, b"\0")), dtype=torch.uint8), first)[0].tolist())
    if failure is not None:
        raise failure
    if words := said.rstrip(b"\0"):
        raise OSError(words.decode(errors="replace"))
    return folder / FILE


@attrs.frozen(eq=False)
class Stored:
    """A state in an open file: its data and its tensors' shapes, before any tensor is read.

    Args:
        meta: its JSON data.
    """

    meta: Any
    _file: TensorFile

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        return self._file.shapes

    def state(self) -> dict[str, Any]:
        """Read all of it, tensors included."""
        return {"meta": self.meta, "tensors": self._file.tensors()}


@contextmanager
def stored(folder: Path) -> Iterator[Stored]:
    """Open a state that `write` wrote, in a folder or as a file.

    Raises:
        LrkitError: no such file, a truncated one, or one that lrkit did not write.
    """
    path = folder / FILE if is_folder(folder) else folder
    study = ": this is a study's folder, and a run's is one of its cells/*" if is_folder(folder / "cells") else ""
    try:
        with open_tensors(path) as file:
            if _KEY not in file.metadata:
                raise LrkitError(f"{path} is a safetensors file, but not one of lrkit's")
            yield Stored(parse_json(file.metadata[_KEY], f"{path} is truncated, or no lrkit state: its metadata"), file)
    except FileNotFoundError:
        raise LrkitError(f"no lrkit state at {path}{study}") from None


def read(folder: Path) -> dict[str, Any]:
    """Read a state that `write` wrote. Raises as `stored`."""
    with stored(folder) as found:
        return found.state()
