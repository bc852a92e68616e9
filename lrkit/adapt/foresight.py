"""The memory that adapters would take, found before any of it is allocated."""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lrkit.errors import LrkitError, LrkitWarning
from lrkit.loop.state import Saved
from lrkit.parameterizations import Parameterization, Target
from lrkit.ranks import ranks_of
from lrkit.units import rank_of, ranked

_TIMES = 64
_ALWAYS = 2**20


def weightless(model: nn.Module) -> nn.Module | None:
    """Copy a model to the meta device, which takes no memory. Return None for a model that cannot be copied."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        blank = torch.empty(p.shape, dtype=p.dtype, device="meta")
        memo[id(p)] = nn.Parameter(blank, requires_grad=p.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    try:
        return copy.deepcopy(model, memo)
    except (LrkitError, LrkitWarning):
        raise
    except Exception:  # a model may hold anything, also things that cannot be copied
        return None


def check_fresh(
    twin: nn.Module,
    found: Sequence[Target],
    parameterization: Parameterization,
    given: int,
    saved: Saved | None = None,
    grows: bool = False,
) -> None:
    """Check a file's adapters before they are made, since a few bytes can name a rank of any size.

    Args:
        twin: the copy that `weightless` returned. Do not use it afterwards.
        found: its layers that are to be adapted.
        parameterization: how.
        given: how many numbers the file's tensors hold.
        saved: the data of a state, for its ranks; None if there is no state.
        grows: whether the method adds components.

    Raises:
        LrkitError: they would take far more than the file holds and the model has, or begin with other ranks than `saved`
            says.
    """
    own = {id(p) for p in twin.parameters()}
    there = sum(p.numel() for p in twin.parameters())
    try:
        with torch.random.fork_rng(devices=[]):
            modules = dict(parameterization.adapt(twin, found))
            around = parameterization.wrap(twin)
    except Exception:  # it cannot be built without values; if it cannot be built at all, attach says so
        return
    put_in = [*modules.values(), *([] if around is None else [around])]
    fresh = {id(p): p.numel() for module in put_in for p in module.parameters() if id(p) not in own}
    if saved is not None:
        parts = ranked(parameterization.parts)
        if parts and set(modules) == set(saved.targets):
            saved.check_ranks({name: rank_of(module, parts) for name, module in modules.items()}, grows)
    most = max(_TIMES * given, there, _ALWAYS)
    if sum(fresh.values()) > most:
        raise LrkitError(
            f"{parameterization!r} begins with {sum(fresh.values()):,} numbers in this model, and the file holds {given:,}: "
            "its rank is not that of its tensors"
        )


def check_room(found: Sequence[Target], parameterization: Parameterization) -> None:
    """Raise LrkitError if low-rank adapters and their optimizer's state would not fit into this machine's memory.

    Raises:
        LrkitError: likewise if a table of ranks does not fit the layers, or gives none of them a rank.
    """
    if not found:
        return
    rank = parameterization.components or 0
    ranks = ranks_of(rank, [t.name for t in found])
    if not isinstance(rank, int) and not any(ranks.values()):
        raise LrkitError("rank is 0 in every adapted layer, so that no adapter would train: give one of them a rank")
    layers = [
        t for t in found if getattr(getattr(t.layer, "weight", None), "device", torch.device("cpu")).type == "cpu"
    ]
    # float32: the factors, gradients, and Adam's two moments
    needed = 16 * sum(t.maps * ranks[t.name] * (t.d_in + t.d_out) for t in layers)
    if needed > (memory := _memory()):
        raise LrkitError(
            f"{parameterization!r} on {len(layers)} layers would take {needed / 2**30:,.0f} GiB with gradients and Adam's "
            f"state, and this machine has {memory / 2**30:,.0f}: give a lower rank"
        )


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # a system that does not say
        return 2**63
