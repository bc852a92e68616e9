"""Attach an adapter that PEFT trained, to go on from it with any method."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrkit import methods
from lrkit.adapt.adapted import Adapted, check_model
from lrkit.adapt.foresight import check_fresh, weightless
from lrkit.adapt.targets import find_targets
from lrkit.errors import LrkitError, LrkitWarning, shown
from lrkit.method import Method
from lrkit.parameterizations import LoRA
from lrkit.parameterizations.mirror import mirrors
from lrkit.peft.files import CONFIG, WEIGHTS, commonest
from lrkit.peft.saved import Saved, read_saved


def from_peft(model: nn.Module, folder: str | os.PathLike[str], method: Method | None = None) -> Adapted:
    """Attach a LoRA or AdaLoRA that PEFT trained, to go on from it with any method.

    The outputs are PEFT's. The layers are those in the file, experts of ``target_parameters`` too. Modules that PEFT
    saved in full (``modules_to_save``: a classifier, for example) are the head, and train on.

    Args:
        model: the base model as PEFT had it.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        method: None for the one in the config: `lrkit.methods.lora` with each layer's rank, or `lrkit.methods.adalora`
            with its schedule and ``variant="peft"``. Any other method with low-rank adapters of enough rank will do: LoRA's
            B A goes into SVD form by an SVD of ΔW, which is exact. If a layer's rank is smaller than the method's, it gets
            further components that add nothing at first.

    Returns:
        The handle, to be bound to an optimizer.

    Raises:
        LrkitError: no such files, an adapter that lrkit cannot represent exactly (DoRA, trained biases, replicated
            layers), or a method that cannot hold it. The model is then as it was.
    """
    check_model(model)
    folder = Path(folder)
    saved = read_saved(folder, model)
    head = _head(model, saved, folder)
    method = _method_of(saved) if method is None else method
    if not isinstance(method, Method):
        raise LrkitError(f"from_peft takes a lrkit.Method, such as lrkit.methods.adalora(), not {shown(method)}")
    parameterization = method.parameterization
    if (twin := weightless(model)) is not None:
        given = sum(factors.a.numel() + factors.b.numel() for factors in saved.layers.values())
        check_fresh(twin, find_targets(twin, list(saved.layers), exact=True), parameterization, given)
    adapted = Adapted(model, method, list(saved.layers), head, exact=True)
    try:
        for name, adapter in adapted.adapters.items():
            take = getattr(adapter, "import_factors", None)
            if take is None:
                raise LrkitError(f"{parameterization!r} has no low-rank adapters, and cannot hold what PEFT trained")
            _check_ties(model, name, adapted, saved, folder)
            try:
                take(*saved.layers[name][:4])
            except LrkitError as error:
                raise LrkitError(f"{parameterization!r} cannot hold {name}: {error}") from None
        parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in saved.rest.items():
                parameters[name].copy_(tensor)
    except BaseException:
        adapted.detach()
        raise
    if any(getattr(adapter, "dropout", 0.0) != saved.dropout for adapter in adapted.adapters.values()):
        warnings.warn(
            f"PEFT trained with lora_dropout={saved.dropout}, and {parameterization!r} goes on with another: outputs are "
            "the same, training is not",
            LrkitWarning,
            stacklevel=2,
        )
    return adapted


def _check_ties(model: nn.Module, name: str, adapted: Adapted, saved: Saved, folder: Path) -> None:
    """Raise LrkitError if PEFT had another increment, or none, in a layer that is tied to this one."""
    tied = [each for each, module in model.named_modules() if mirrors(module, adapted.adapters[name])]
    if tied and not saved.config.get("ensure_weight_tying"):
        raise LrkitError(
            f"{folder}: PEFT adapted {name} and not {tied[0]}, which has the same weight: lrkit adapts both or none. "
            "Train it with ensure_weight_tying=True"
        )
    layer = saved.layers[name]
    for each in tied:
        other = saved.layers.get(each)
        if other is not None and not (torch.equal(other.a, layer.b.t()) and torch.equal(other.b, layer.a.t())):
            raise LrkitError(
                f"{folder}: {each} is tied to {name}, and its increment is another: lrkit has one for both"
            )


def _head(model: nn.Module, saved: Saved, folder: Path) -> list[str]:
    """Find the modules that PEFT saved in full, and check that everything in the file fits the model.

    Raises:
        LrkitError: a layer or a parameter that the model does not have, or has in another shape.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if odd_layers := [name for name in saved.layers if name not in modules and name not in parameters]:
        raise LrkitError(f"{folder} does not fit {type(model).__name__}: it has no layer {shown(odd_layers[0])}")
    wanted = tuple(saved.config.get("modules_to_save") or ())
    listed = [
        name
        for name, module in modules.items()
        if any(name == w or name.endswith(f".{w}") for w in wanted) and any(True for _ in module.parameters())
    ]
    head = [name for name in listed if any(key.startswith(f"{name}.") for key in saved.rest)]
    inside = {n for n in parameters if n.startswith(tuple(f"{name}." for name in head) or ("\0",))}
    odd = sorted(inside ^ set(saved.rest))
    if odd:
        where = "is in the file, and in no head of this model" if odd[0] in saved.rest else "is not in the file"
        raise LrkitError(f"{folder} does not fit {type(model).__name__}: {odd[0]} {where}")
    if missing := [name for name in listed if name not in head]:
        raise LrkitError(
            f"{folder / WEIGHTS} is damaged: {CONFIG} says that {missing[0]} was saved, and it is not there"
        )
    for name, tensor in saved.rest.items():
        if parameters[name].shape != tensor.shape:
            raise LrkitError(
                f"{folder} does not fit: {name} is {list(tensor.shape)} there, and {list(parameters[name].shape)} here"
            )
    return head


def _method_of(saved: Saved) -> Method:
    config = saved.config
    if config["peft_type"] == "ADALORA":
        alpha = config["lora_alpha"]
        return methods.adalora(
            rank=config["init_r"],
            target_rank=config["target_r"],
            warmup=config["tinit"],
            final=config["tfinal"],
            interval=max(1, config["deltaT"]),
            beta1=config["beta1"],
            beta2=config["beta2"],
            alpha=float(alpha if alpha > 0 else config["init_r"]),
            orthogonality=config["orth_reg_weight"],
            variant="peft",
        )
    ranks = {name: factors.rank for name, factors in saved.layers.items()}
    scales = {name: factors.scaling for name, factors in saved.layers.items()}
    scale, rank = commonest(scales), commonest(ranks)
    if config.get("use_rslora"):
        each: Any = rank if set(ranks.values()) == {rank} else ranks
        return methods.lora(rank=each, alpha=float(config["lora_alpha"]), dropout=saved.dropout, scale="sqrt-rank")
    if set(ranks.values()) == {rank}:
        return methods.lora(rank=rank, alpha=scale * rank, dropout=saved.dropout)
    if set(scales.values()) == {scale}:
        mean = sum(ranks.values()) / len(ranks)
        lora = LoRA(rank=ranks, alpha=scale * mean, dropout=saved.dropout, scale_by="mean-rank")
    else:
        alpha = commonest({name: scales[name] * rank for name, rank in ranks.items()})
        lora = LoRA(rank=ranks, alpha=alpha, dropout=saved.dropout)
    return Method(parameterization=lora)
