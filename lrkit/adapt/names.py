"""Names in state dicts: an adapted layer's tensors keep the names that they have without the adapter."""

import functools
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_PREFIX = "_lrkit_prefix"


def keep_names(adapter: nn.Module, layer: nn.Module) -> list[RemovableHandle]:
    """Give the tensors of a layer that lies inside its adapter the names of the plain layer, in every state dict.

    For example the model's ``state_dict()`` has ``q_proj.weight`` and ``q_proj.A``, and no ``q_proj.base.weight``. Loading
    takes both names, since checkpoints were once written with the longer ones. Under FSDP state dicts have the longer names.

    Returns:
        Handles that end it. None if the layer does not lie inside the adapter.
    """
    path = next((name for name, module in adapter.named_modules() if module is layer), "")
    if not path:
        return []
    return [
        adapter.register_state_dict_post_hook(functools.partial(_shorten, f"{path}.")),  # type: ignore[no-untyped-call]
        adapter.register_load_state_dict_pre_hook(functools.partial(_lengthen, f"{path}.")),  # type: ignore[no-untyped-call]
        adapter.register_load_state_dict_post_hook(functools.partial(_shorten_told, f"{path}.")),  # type: ignore[no-untyped-call]
    ]


def _is_own(adapter: nn.Module, name: str) -> bool:
    """Return whether a name within an adapter is one of its own, so that its layer cannot use it."""
    first, dot, _ = name.partition(".")
    # A module of experts has a parameter gate_up_proj, and its adapter a module of that name.
    return first in adapter._modules if dot else first in adapter._parameters or first in adapter._buffers


def _shorten(path: str, adapter: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    if getattr(adapter, "_is_fsdp_managed_module", False):
        return  # FSDP's own hooks, which run after this one, ask for the longer names
    # The adapter's keys are the last ones: torch has just put them in.
    keys = list(takewhile(lambda key: key.startswith(prefix), reversed(state)))
    for key in reversed(keys):
        name = key[len(prefix) :].removeprefix(path)
        state[key if _is_own(adapter, name) else prefix + name] = state.pop(key)


def _lengthen(path: str, adapter: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    adapter.__dict__[_PREFIX] = prefix
    for key in [key for key in state if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if not _is_own(adapter, name):
            state[prefix + path + name] = state.pop(key)


def _shorten_told(path: str, adapter: nn.Module, told: Any) -> None:
    """Let the keys that torch reports as missing or unexpected have the plain layer's names too."""
    prefix = adapter.__dict__.pop(_PREFIX)
    for keys in (told.missing_keys, told.unexpected_keys):
        keys[:] = [prefix + key.removeprefix(prefix + path) if key.startswith(prefix + path) else key for key in keys]
