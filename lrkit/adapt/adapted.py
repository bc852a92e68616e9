"""Put a method's adapters into a model, fresh or as they were saved."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lrkit.adapt import checkpoint, foresight
from lrkit.adapt.choice import find
from lrkit.adapt.graft import check_model
from lrkit.adapt.handle import Adapted
from lrkit.adapt.saved import WEIGHT
from lrkit.compose import from_plain
from lrkit.errors import LrkitError
from lrkit.loop import state as states
from lrkit.method import Method

__all__ = ["Adapted", "attach", "check_model", "load"]


def attach(
    model: nn.Module,
    method: Method,
    *,
    targets: str | Sequence[str] = "all-linear",
    train_also: str | Sequence[str] = "auto",
    slices: bool = False,
    exclude: str | Sequence[str] = (),
) -> Adapted:
    """Put a method's adapters into a model, in place.

    Everything else is frozen but the task head, which trains in full. Fresh adapters leave the outputs as they are
    (ΔW = 0), and draw their random start from torch's global generator.

    Args:
        model: any model with ``nn.Linear`` or transformers' ``Conv1D`` layers.
        method: the method.
        targets: ``"all-linear"`` for every linear map inside the transformer's blocks (or those of them that the
            parameterization chooses, if it has places of its own), a regular expression that matches whole layer names, or a
            list of names or name suffixes.
        train_also: ``"auto"`` for the task head that is new (classifier, score, and the pooler before it), or a list of
            names or name suffixes of modules that train in full; an empty list for none.
        slices: adapt the parts of fused projections (q, k and v of a ``qkv_proj``), each with a rank of its own, in the
            place of the projection. Without it ``targets=["qkv_proj.q", "qkv_proj.v"]`` names some.
        exclude: layers to leave out of those that `targets` means: a regular expression that matches whole layer names, or a
            list of names or name suffixes, each of which must match one of them. For example ``exclude=["lm_head"]``.

    Returns:
        The handle on what was attached.

    Raises:
        LrkitError: nothing matches, or the method cannot adapt this model. The model is then as it was.
    """
    if not isinstance(method, Method):
        raise LrkitError(f"attach takes a lrkit.Method, such as lrkit.methods.adalora(), not {method!r}")
    check_model(model)
    with torch.inference_mode(False):  # what is made in the mode for inference could never train
        return Adapted(model, method, targets, train_also, exclude=exclude, slices=slices)


def load(model: nn.Module, folder: str | os.PathLike[str]) -> Adapted:
    """Attach to a plain model what `Adapted.save` wrote, with its weights and everything adaptive.

    Args:
        model: the model as it was when the saved adapters were attached.
        folder: the folder that was saved to.

    Raises:
        LrkitError: no such file, a truncated or foreign one, or one that does not fit this model. The model is then as
            it was.
    """
    with torch.inference_mode(False), checkpoint.stored(Path(folder)) as stored:  # the mode: as in `attach`
        saved = states.read({"meta": stored.meta, "tensors": {}})
        saved.check()
        method = from_plain(saved.method)
        check_model(model)
        if (twin := foresight.weightless(model)) is not None:
            found, _ = find(twin, method.parameterization, saved.targets, exact=True)
            given = sum(math.prod(shape) for name, shape in stored.shapes.items() if name.startswith(WEIGHT))
            grows = any(policy.action.grows for policy in method.policies)
            foresight.check_fresh(twin, found, method.parameterization, given, saved, grows)
        tensors = stored.state()["tensors"]
        states.check_tensors(tensors)
        return Adapted(model, method, saved.targets, saved.head, exact=True, state=(saved, tensors))
