"""An export that is being written: the factors that go into it, and how its files are written and read back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrkit.adapt.adapted import Adapted
from lrkit.errors import LrkitError
from lrkit.peft.blocks import joined
from lrkit.peft.files import CONFIG, PREFIX, WEIGHTS, Factors, peft
from lrkit.units import maps_of


@attrs.frozen(eq=False)
class Draft:
    """An export that is being written.

    Args:
        to: the format's name.
        adapted: the trained handle.
        plain: the model as it was before `attach`, with float layers for quantized ones: a copy that this export may change.
        folder: where the files go.
        final: what the folder is called once the export has been checked.
        tokenizer: to be written beside a plain model; None for none.
    """

    to: str
    adapted: Adapted
    plain: nn.Module
    folder: Path
    final: Path
    tokenizer: Any

    def increments(self) -> dict[str, Factors]:
        """Return each layer's ΔW as factors, without the layers of rank 0; a fused projection's for its slices.

        Raises:
            LrkitError: the method trains more than low-rank increments and a head, or no layer has a rank.
        """
        adapted, method = self.adapted, self.adapted.method
        beside = [n for n in method.parameterization.own_parameters(self.plain) if not self._in_head(n)]
        if beside:
            raise LrkitError(
                f"{self.to} holds low-rank increments and a head, and this method trains {len(beside)} of the model's own "
                f'parameters, such as {beside[0]}: export to "merged"'
            )
        if adapted.around is not None:
            kind = type(adapted.around).__name__
            raise LrkitError(
                f"{self.to} holds low-rank increments, and this method has a {kind} around the whole model"
            )
        every = {name: self._factors(name, adapter) for name, adapter in adapted.adapters.items()}
        layers = {name: factors for name, factors in every.items() if factors.rank}
        if not layers:
            raise LrkitError(f'every layer has rank 0, and there is nothing for {self.to} to hold: export to "merged"')
        return joined(layers, adapted.originals)

    def _factors(self, name: str, adapter: nn.Module) -> Factors:
        factors = getattr(adapter, "export_factors", None)
        if factors is None:
            kind = type(adapter)
            # Another package may have a class of the same plain name.
            told = kind.__name__ if kind.__module__.startswith("lrkit") else f"{kind.__module__}.{kind.__qualname__}"
            raise LrkitError(
                f"{self.to} holds low-rank increments, and {name} has a {told}, which is none"
                + ('; what can be merged goes out as "merged"' if getattr(adapter, "merge", None) else "")
            )
        found = Factors(*factors())._replace(maps=maps_of(adapter))
        if found.magnitude is not None and (self.to != "peft-lora" or found.maps > 1):
            raise LrkitError(
                f"{self.to} holds low-rank increments, and {name} has a magnitude (DoRA)"
                + (' for each expert, which PEFT has not: export to "merged"' if found.maps > 1 else "")
                + (': export to "peft-lora" or "merged"' if found.maps == 1 else "")
            )
        return found

    def layer(self, name: str) -> nn.Module:
        """Return a layer, or what shows a part of a module as one; of a fused projection's slices, the projection."""
        try:
            return self.plain.get_submodule(name)
        except AttributeError:
            return self.adapted.originals[name]

    def _in_head(self, name: str) -> bool:
        return name.startswith(tuple(f"{head}." for head in self.adapted.head) or ("\0",))

    def head(self) -> dict[str, Tensor]:
        """Return the head's parameters as they were trained, under every name that they have: those of tied layers, too."""
        trained = {id(p) for p in self.adapted.head_parameters()}
        every = self.adapted.model.named_parameters(remove_duplicate=False)
        return {name: p.detach() for name, p in every if id(p) in trained}

    def saved_modules(self) -> list[str]:
        """Return the head's modules, and those that are tied to it."""
        tied = [name.rpartition(".")[0] for name in self.head() if not self._in_head(name)]
        return [*self.adapted.head, *dict.fromkeys(tied)]

    def save(self, config: Any, tensors: Mapping[str, Tensor]) -> None:
        """Write PEFT's two files."""
        clones = {PREFIX + name: t.clone(memory_format=torch.contiguous_format).cpu() for name, t in tensors.items()}
        save_file(clones, self.folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(self.folder))

    def save_plain(self, model: nn.Module, folder: Path) -> None:
        """Write a plain transformers model, and the tokenizer beside it."""
        save = getattr(model, "save_pretrained", None)
        if save is None:
            raise LrkitError(f"{type(model).__name__} is no transformers model: it has no save_pretrained")
        save(str(folder))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))

    def read(self) -> nn.Module:
        """Read the files back, by transformers and PEFT alone."""
        folders = [folder for folder in (self.folder, self.folder / "base") if (folder / "config.json").is_file()]
        kind: Any = type(self.adapted.model)
        plain = kind.from_pretrained(str(folders[0]), dtype=self.adapted.model.dtype) if folders else self.plain
        is_adapter = (self.folder / CONFIG).is_file()
        model: nn.Module = peft().PeftModel.from_pretrained(plain, str(self.folder)) if is_adapter else plain
        return model
