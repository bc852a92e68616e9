"""Attach an adapter that PEFT trained, to go on from it with any method."""

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from lrkit import methods
from lrkit.adapt.adapted import Adapted, check_model
from lrkit.adapt.foresight import check_fresh, weightless
from lrkit.adapt.targets import find_targets
from lrkit.errors import LrkitError, LrkitWarning, listing, shown
from lrkit.method import Method
from lrkit.parameterizations import DoRA, LoRA
from lrkit.parameterizations.mirror import mirrors
from lrkit.peft.files import CONFIG, WEIGHTS, commonest
from lrkit.peft.saved import Saved, read_saved


def from_peft(model: nn.Module, folder: str | os.PathLike[str], method: Method | None = None) -> Adapted:
    """Attach a LoRA, DoRA or AdaLoRA that PEFT trained, to go on from it with any method.

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
        LrkitError: no such files, an adapter that lrkit cannot represent exactly (trained biases, replicated
            layers), or a method that cannot hold it. The model is then as it was.
    """
    check_model(model)
    folder = Path(folder)
    saved = _without_base(model, read_saved(folder, model), folder)
    head = _head(model, saved, folder)
    method_is_ours = method is None
    method = _method_of(saved) if method is None else method
    if not isinstance(method, Method):
        raise LrkitError(f"from_peft takes a lrkit.Method, such as lrkit.methods.adalora(), not {shown(method)}")
    parameterization = method.parameterization
    if anew := [
        policy for policy in method.policies if policy.scheduler.calibration and policy.action.fate == "removed"
    ]:
        raise LrkitError(
            f"{anew[0].action!r} replaces all components before the first step, and what PEFT trained with them: give a "
            "method that goes on from it"
        )
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
            factors = saved.layers[name]
            plain = factors.magnitude is None
            try:
                if not plain and not hasattr(adapter, "magnitude"):
                    raise LrkitError(
                        "it has a magnitude (use_dora): give a method that has one, such as lrkit.methods.dora()"
                    )
                take(*factors[: 4 if plain else 5])
            except LrkitError as error:
                raise LrkitError(f"{parameterization!r} cannot hold {name}: {error}") from None
        parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in saved.rest.items():
                parameters[name].copy_(tensor)
    except BaseException:
        adapted.detach()
        raise
    if method_is_ours and (odd := _other_scales(adapted, saved)):
        warnings.warn(
            f"PEFT trained {listing(odd)} with other scales than {parameterization!r} has (alpha_pattern): outputs are the "
            "same, training is not",
            LrkitWarning,
            stacklevel=2,
        )
    if any(getattr(adapter, "dropout", 0.0) != saved.dropout for adapter in adapted.adapters.values()):
        warnings.warn(
            f"PEFT trained with lora_dropout={saved.dropout}, and {parameterization!r} goes on with another: outputs are "
            "the same, training is not",
            LrkitWarning,
            stacklevel=2,
        )
    return adapted


def _other_scales(adapted: Adapted, saved: Saved) -> list[str]:
    """Name the layers whose scale is not PEFT's, so that their factors were taken over in other sizes."""
    scales = {name: getattr(adapter, "scaling", None) for name, adapter in adapted.adapters.items()}
    return [
        n for n, s in scales.items() if s is not None and not math.isclose(s, saved.layers[n].scaling, rel_tol=1e-6)
    ]


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


def _without_base(model: nn.Module, saved: Saved, folder: Path) -> Saved:
    """Leave out the weights that PEFT saved although they are the base's own, as it does with embeddings by default.

    Raises:
        LrkitError: they are not those of this model.
    """
    parameters, rest = dict(model.named_parameters(remove_duplicate=False)), {}
    for key, tensor in saved.rest.items():
        name = key.replace(".base_layer.", ".")
        there = parameters.get(name)
        same = there is not None and there.shape == tensor.shape and torch.equal(there.to(tensor), tensor)
        if name != key and not same:
            raise LrkitError(
                f"{folder}: PEFT saved the base's {name} too, {list(tensor.shape)}, and that of this model is another: load "
                "the base that PEFT had, with as many tokens"
            )
        if not same or _is_saved(name.rpartition(".")[0], saved):
            rest[name] = tensor
    return attrs.evolve(saved, rest=rest)


def _is_saved(module: str, saved: Saved) -> bool:
    """Return whether PEFT saved a module in full because it was told to."""
    return any(f".{module}.".find(f".{each}.") >= 0 for each in saved.config.get("modules_to_save") or ())


def _check_layer(name: str, layer: nn.Module, folder: Path) -> None:
    """Raise LrkitError for a convolution whose increment PEFT computes in another way than the layer itself."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and (layer.padding_mode, {*layer.dilation}) != (
        "zeros",
        {1},
    ):
        raise LrkitError(
            f"{folder}: {name} is a convolution with padding_mode={layer.padding_mode} and dilation={layer.dilation}, which "
            "PEFT's increment does not keep: lrkit cannot represent it exactly"
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
    for name in saved.layers:
        _check_layer(name, modules.get(name, model), folder)
    wanted = tuple(saved.config.get("modules_to_save") or ())
    listed = [
        name
        for name, module in modules.items()
        if any(name == w or name.endswith(f".{w}") for w in wanted) and any(True for _ in module.parameters())
    ]
    head = [name for name in listed if any(key.startswith(f"{name}.") for key in saved.rest)]
    inside = {n for n in parameters if n.startswith(tuple(f"{name}." for name in head) or ("\0",))}
    tied = _tied_to(parameters, inside, saved, folder)
    odd = sorted((inside ^ set(saved.rest)) - tied)
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


def _tied_to(parameters: Mapping[str, nn.Parameter], head: set[str], saved: Saved, folder: Path) -> set[str]:
    """Name the parameters that are the head's under another name, too.

    Raises:
        LrkitError: PEFT trained a copy of what this model has in two places.
    """
    inside = {id(parameters[name]): name for name in sorted(head, reverse=True) if name in saved.rest}
    tied = {name: inside[id(p)] for name, p in parameters.items() if inside.get(id(p), name) != name}
    for name, owner in tied.items():
        alike = (
            torch.equal(saved.rest[name], saved.rest[owner])
            if name in saved.rest
            else saved.config.get("ensure_weight_tying")
        )
        if not alike:
            raise LrkitError(
                f"{folder}: PEFT trained a copy of {owner}, and {name}, which has the same weight here, is another there: "
                "load the base with tie_word_embeddings=False"
            )
    return set(tied)


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
    settings: dict[str, Any] = {"rank": rank if set(ranks.values()) == {rank} else ranks, "dropout": saved.dropout}
    if config.get("use_rslora"):
        settings |= {"alpha": float(config["lora_alpha"]), "scale": "sqrt-rank"}
    elif set(ranks.values()) == {rank}:
        settings |= {"alpha": scale * rank}
    elif set(scales.values()) == {scale}:
        settings |= {"alpha": scale * sum(ranks.values()) / len(ranks), "scale_by": "mean-rank"}
    else:
        settings |= {"alpha": commonest({name: scales[name] * rank for name, rank in ranks.items()})}
    return Method(parameterization=(DoRA if config.get("use_dora") else LoRA)(**settings))
