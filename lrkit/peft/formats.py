"""Write the formats of `export`, and read them back.

A format gets a `Draft` and fills its folder. For example, ``peft-lora`` writes PEFT's config and the factors of every
layer, and is read back by ``PeftModel.from_pretrained`` into the plain model.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrkit.adapt.adapted import Adapted
from lrkit.errors import LrkitError
from lrkit.layers import is_conv1d
from lrkit.layers.experts import Stack
from lrkit.parameterizations.lowrank import layer_shape
from lrkit.peft.draft import Draft
from lrkit.peft.files import Factors, commonest, peft
from lrkit.peft.stacks import as_parameters, interleaved, lies_turned, turned, wrapper
from lrkit.peft.twin import twin
from lrkit.settings import in_steps

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def _common(draft: Draft, layers: Mapping[str, Factors], parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that PEFT's LoRA and AdaLoRA share.

    Args:
        draft: the export.
        layers: all layers that are written.
        parameters: those that PEFT is to adapt as parameters, with the parameters' names.
    """
    adapted, model = draft.adapted, draft.adapted.model
    dropouts = {getattr(adapter, "dropout", 0.0) for adapter in adapted.adapters.values()}
    kind = type(model)
    task = next((task for ending, task in _TASKS.items() if kind.__name__.endswith(ending)), None)
    # PEFT expects a trained head in a classifier's file, and vLLM's file holds none.
    if draft.to == "vllm-lora" or (
        task in ("SEQ_CLS", "TOKEN_CLS") and not {"classifier", "score"} & set(adapted.head)
    ):
        task = None
    originals = {name: draft.layer(name) for name in layers}
    return {
        "task_type": task,
        # Without a task, PEFT finds the base model's class by this.
        "auto_mapping": None if task else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "target_modules": [name for name in layers if name not in parameters],
        "target_parameters": list(parameters.values()) or None,
        "modules_to_save": draft.saved_modules() or None,
        "fan_in_fan_out": all(is_conv1d(layer) for layer in originals.values()),
        # PEFT takes none for parameters. It acts in training alone.
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 and not parameters else 0.0,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
        # An embedding's increment is in the output head, too, if that has the same weight.
        "ensure_weight_tying": any(
            isinstance(layer, nn.Embedding) and _tied(draft.plain, layer) for layer in originals.values()
        ),
    }


def _tied(model: nn.Module, layer: nn.Module) -> bool:
    """Return whether another module has a layer's weight."""
    return any(m is not layer and m._parameters.get("weight") is layer.weight for m in model.modules())


def _named(draft: Draft, layers: Mapping[str, Factors], name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return the two factors of a layer, and its magnitude, under PEFT's names, in PEFT's shapes.

    Args:
        draft: the export.
        layers: all layers that are written.
        name: the layer.
        a: its A, with core values.
        b: its B.

    Raises:
        LrkitError: the format has no such form for this layer.
    """
    layer, magnitude = draft.layer(name), layers[name].magnitude
    beside = {} if magnitude is None else {f"{name}.lora_magnitude_vector": magnitude}
    if isinstance(layer, nn.Embedding):
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b, **beside}
    if isinstance(layer, Stack):
        maps = layers[name].maps
        a, b = turned(a, b, maps) if lies_turned(draft.plain, name) else (a, b)
        name, b = wrapper(draft.plain, name, layers), interleaved(b, maps)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
        if draft.to == "vllm-lora" or not plain:
            raise LrkitError(
                f"{draft.to} has no LoRA of this {type(layer).__name__}, {name} (groups, dilation and padding modes are not "
                'kept by PEFT): export to "merged"'
            )
        ones = [1] * (layer.weight.ndim - 2)
        a, b = a.view(len(a), *layer.weight.shape[1:]), b.view(*b.shape, *ones)
        beside = {key: m.view(1, -1, *ones) for key, m in beside.items()}
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, **beside}


def _write_lora(draft: Draft) -> dict[str, int]:
    layers = draft.increments()
    tensors, ranks, alphas = draft.head(), {}, {}
    for name, layer in layers.items():
        assert layer.core is not None
        tensors |= _named(draft, layers, name, layer.core[:, None] * layer.a, layer.b)
        ranks[name], alpha = layer.rank, layer.scaling * layer.rank
        alphas[name] = int(alpha) if alpha == int(alpha) else alpha
    rank, alpha = commonest(ranks), commonest(alphas)
    parameters = as_parameters(draft.plain, {name: draft.layer(name) for name in layers})
    config = peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,  # PEFT computes alpha / r: a float serves
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
        rank_pattern={parameters.get(name, name): r for name, r in ranks.items() if r != rank},
        alpha_pattern={parameters.get(name, name): a for name, a in alphas.items() if a != alpha},
        **_common(draft, layers, parameters),
    )
    draft.save(config, tensors)
    return ranks


def _write_adalora(draft: Draft) -> dict[str, int]:
    layers = draft.increments()
    ranks = {name: layer.rank for name, layer in layers.items()}
    initial = draft.adapted.controller.run.ranks
    first = max(*(initial.get(name, 0) for name in layers), *ranks.values())
    # PEFT computes alpha / (init_r + 1e-5) for all layers alike.
    scale = commonest({name: layer.scaling for name, layer in layers.items()})
    alpha = scale * (first + 1e-5)
    tensors = draft.head()
    originals = {name: draft.layer(name) for name in layers}
    if odd := [name for name, layer in originals.items() if isinstance(layer, Stack) or layer_shape(layer) is None]:
        raise LrkitError(f'PEFT\'s AdaLoRA adapts linear layers, and {odd[0]} is none: export to "peft-lora"')
    for name, layer in layers.items():
        assert layer.core is not None
        tensors[f"{name}.lora_A"] = layer.a
        tensors[f"{name}.lora_B"] = layer.b
        tensors[f"{name}.lora_E"] = (layer.core * (layer.scaling / scale))[:, None]
    # PEFT warns that these names match nothing; its own files have them, and it goes by them.
    pattern = {f"{name}.lora_E": [True] * rank + [False] * (first - rank) for name, rank in ranks.items()}
    config = peft().AdaLoraConfig(
        init_r=first,
        lora_alpha=round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha,
        rank_pattern=pattern if any(r != first for r in ranks.values()) else None,
        **_schedule(draft.adapted, ranks),
        **_common(draft, layers, {}),
    )
    draft.save(config, tensors)
    return ranks


def _schedule(adapted: Adapted, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Tell AdaLoRA's schedule in PEFT's words if the method has one; else one that PEFT accepts and never uses."""
    total = adapted.total_steps or 1
    plain: dict[str, Any] = {"total_step": total, "target_r": max(1, sum(ranks.values()) // len(ranks))}
    plain["orth_reg_weight"] = getattr(adapted.method.parameterization, "orthogonality", 0.0)
    for policy in adapted.method.policies:
        if policy.action.unit == "component" and adapted.total_steps is not None:
            begin, end = policy.scheduler.over(total, units=1, layers=1).bounds
            if begin < end:
                plain |= {"tinit": begin, "tfinal": total - end}
                plain["deltaT"] = max(1, in_steps(policy.scheduler.interval, total))
            target = policy.scheduler.target
            most = max(adapted.controller.run.ranks.values())
            plain["target_r"] = target if isinstance(target, int) else max(1, round(target * most))
            plain |= {b: getattr(policy.metric, b) for b in ("beta1", "beta2") if hasattr(policy.metric, b)}
    return plain


def _write_vllm(draft: Draft) -> dict[str, int]:
    layers = draft.increments()
    originals = {name: draft.layer(name) for name in layers}
    for name, original in originals.items():
        if isinstance(original, nn.Embedding | Stack):
            what = "an embedding" if isinstance(original, nn.Embedding) else "a 3-D parameter of all experts"
            raise LrkitError(f'vllm-lora holds linear layers, and {name} is {what}: export to "peft-lora" or "merged"')
    ranks = {name: layer.rank for name, layer in layers.items()}
    rank = max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        assert layer.core is not None
        a = layer.a.new_zeros(rank, layer.a.shape[1])
        b = layer.b.new_zeros(layer.b.shape[0], rank)
        a[: layer.rank] = layer.core[:, None] * layer.a
        b[:, : layer.rank] = layer.b * layer.scaling
        tensors |= _named(draft, layers, name, a, b)
    # vLLM refuses modules_to_save, and any tensor in the file that is no lora_A or lora_B.
    settings = _common(draft, layers, as_parameters(draft.plain, originals)) | {"modules_to_save": None}
    if draft.adapted.head:
        parameters = dict(draft.plain.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, trained in draft.head().items():
                parameters[name].copy_(trained)
        draft.save_plain(draft.plain, draft.folder / "base")
        settings["base_model_name_or_path"] = str(draft.final / "base")
    draft.save(peft().LoraConfig(r=rank, lora_alpha=rank, **settings), tensors)
    return ranks


def _write_merged(draft: Draft) -> dict[str, int]:
    draft.save_plain(twin(draft.adapted, draft.plain).merge(), draft.folder)
    return {}


TARGETS: dict[str, Callable[[Draft], dict[str, int]]] = {
    "peft-lora": _write_lora,
    "peft-adalora": _write_adalora,
    "vllm-lora": _write_vllm,
    "merged": _write_merged,
}
"""The formats of `export`: name to the function that fills a draft's folder, and returns each layer's rank."""
