"""A module that takes a layer's place and keeps the layer inside of it."""

from typing import Any

from torch import Tensor, nn


class Around(nn.Module):
    """A module in a layer's place, which shows the layer's weight, bias and settings as its own.

    Args:
        base: the layer. It stays a submodule, so that it moves and is saved with the model.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Models read settings of a layer, such as an embedding's padding_idx or a convolution's stride.
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_") or name not in vars(base):
                raise
            return vars(base)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        # A model that ties its weights again (``tie_weights``) gives the layer its own.
        if name == "weight" and isinstance(value, nn.Parameter) and "base" in self._modules:
            self.base.weight = value
        else:
            super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """Return the base's weight, so that code that looks at ``layer.weight.dtype`` goes on working."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Return the base's bias."""
        bias = getattr(self.base, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias
