"""Write the formats of `export`, and read them back.

A format gets a `Draft` and fills its folder. For example, ``peft-lora`` writes PEFT's config and the factors of every
layer, and is read back by ``PeftModel.from_pretrained`` into the plain model.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrkit.adapt.adapted import Adapted
from lrkit.errors import LrkitError
from lrkit.layers import is_conv1d
from lrkit.parameterizations.lowrank import layer_shape
from lrkit.peft.blocks import joined
from lrkit.peft.files import CONFIG, PREFIX, WEIGHTS, Factors, commonest
from lrkit.peft.twin import twin
from lrkit.settings import in_steps
from lrkit.units import maps_of

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


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
        if maps_of(adapter) > 1:
            raise LrkitError(
                f'{self.to} is written for layers, and {name} is a 3-D parameter of all experts: export to "merged"'
            )
        return Factors(*factors())

    def _in_head(self, name: str) -> bool:
        return name.startswith(tuple(f"{head}." for head in self.adapted.head) or ("\0",))

    def head(self) -> dict[str, Tensor]:
        """Return the head's parameters as they were trained."""
        return {name: p.detach() for name, p in self.adapted.model.named_parameters() if self._in_head(name)}

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
        model: nn.Module = _peft().PeftModel.from_pretrained(plain, str(self.folder)) if is_adapter else plain
        return model


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise LrkitError('writing PEFT\'s formats needs PEFT to read them back: pip install "lrkit[peft]"') from None
    return peft


def _common(draft: Draft, layers: Mapping[str, Factors]) -> dict[str, Any]:
    """Return the settings that PEFT's LoRA and AdaLoRA share."""
    adapted, model = draft.adapted, draft.adapted.model
    dropouts = {getattr(adapter, "dropout", 0.0) for adapter in adapted.adapters.values()}
    kind = type(model)
    task = next((task for ending, task in _TASKS.items() if kind.__name__.endswith(ending)), None)
    # PEFT expects a trained head in a classifier's file, and vLLM's file holds none.
    if draft.to == "vllm-lora" or (
        task in ("SEQ_CLS", "TOKEN_CLS") and not {"classifier", "score"} & set(adapted.head)
    ):
        task = None
    originals = [draft.plain.get_submodule(name) for name in layers]
    return {
        "task_type": task,
        # Without a task, PEFT finds the base model's class by this.
        "auto_mapping": None if task else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "target_modules": list(layers),
        "modules_to_save": adapted.head or None,
        "fan_in_fan_out": all(is_conv1d(layer) for layer in originals),
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
        # An embedding's increment is in the output head, too, if that has the same weight.
        "ensure_weight_tying": any(
            isinstance(layer, nn.Embedding) and _tied(draft.plain, layer) for layer in originals
        ),
    }


def _tied(model: nn.Module, layer: nn.Module) -> bool:
    """Return whether another module has a layer's weight."""
    return any(m is not layer and m._parameters.get("weight") is layer.weight for m in model.modules())


def _named(draft: Draft, name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return the two factors of a layer under PEFT's names, in PEFT's shapes.

    Raises:
        LrkitError: PEFT has no such form for this layer.
    """
    layer = draft.plain.get_submodule(name)
    if isinstance(layer, nn.Embedding):
        if draft.to == "vllm-lora":
            raise LrkitError(
                f'vllm-lora holds linear layers, and {name} is an embedding: export to "peft-lora" or "merged"'
            )
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
        if draft.to == "vllm-lora" or not plain:
            raise LrkitError(
                f"{draft.to} has no LoRA of this {type(layer).__name__}, {name} (groups, dilation and padding modes are not "
                'kept by PEFT): export to "merged"'
            )
        a, b = a.view(len(a), *layer.weight.shape[1:]), b.view(*b.shape, *[1] * (layer.weight.ndim - 2))
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def _write_lora(draft: Draft) -> dict[str, int]:
    layers = draft.increments()
    tensors, ranks, alphas = draft.head(), {}, {}
    for name, layer in layers.items():
        assert layer.core is not None
        tensors |= _named(draft, name, layer.core[:, None] * layer.a, layer.b)
        ranks[name], alpha = layer.rank, layer.scaling * layer.rank
        alphas[name] = int(alpha) if alpha == int(alpha) else alpha
    rank, alpha = commonest(ranks), commonest(alphas)
    config = _peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,  # PEFT computes alpha / r: a float serves
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        **_common(draft, layers),
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
    if odd := [name for name in layers if layer_shape(draft.plain.get_submodule(name)) is None]:
        raise LrkitError(f'PEFT\'s AdaLoRA adapts linear layers, and {odd[0]} is none: export to "peft-lora"')
    for name, layer in layers.items():
        assert layer.core is not None
        tensors[f"{name}.lora_A"] = layer.a
        tensors[f"{name}.lora_B"] = layer.b
        tensors[f"{name}.lora_E"] = (layer.core * (layer.scaling / scale))[:, None]
    # PEFT warns that these names match nothing; its own files have them, and it goes by them.
    pattern = {f"{name}.lora_E": [True] * rank + [False] * (first - rank) for name, rank in ranks.items()}
    config = _peft().AdaLoraConfig(
        init_r=first,
        lora_alpha=round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha,
        rank_pattern=pattern if any(r != first for r in ranks.values()) else None,
        **_schedule(draft.adapted, ranks),
        **_common(draft, layers),
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
    ranks = {name: layer.rank for name, layer in layers.items()}
    rank = max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        assert layer.core is not None
        a = layer.a.new_zeros(rank, layer.a.shape[1])
        b = layer.b.new_zeros(layer.b.shape[0], rank)
        a[: layer.rank] = layer.core[:, None] * layer.a
        b[:, : layer.rank] = layer.b * layer.scaling
        tensors |= _named(draft, name, a, b)
    # vLLM refuses modules_to_save, and any tensor in the file that is no lora_A or lora_B.
    settings = _common(draft, layers) | {"modules_to_save": None}
    if draft.adapted.head:
        parameters = dict(draft.plain.named_parameters())
        with torch.no_grad():
            for name, trained in draft.head().items():
                parameters[name].copy_(trained)
        draft.save_plain(draft.plain, draft.folder / "base")
        settings["base_model_name_or_path"] = str(draft.final / "base")
    draft.save(_peft().LoraConfig(r=rank, lora_alpha=rank, **settings), tensors)
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
