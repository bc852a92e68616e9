"""Read an adapter that PEFT saved: its config and its tensors, checked before a model is touched."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lrkit.adapt.tensorfile import open_tensors
from lrkit.errors import LrkitError, shown
from lrkit.patterns import compiled
from lrkit.peft.files import CONFIG, PREFIX, WEIGHTS, Factors
from lrkit.peft.stacks import interleaved, lies_turned, parameter, turned
from lrkit.reading import read_json

# Settings that lrkit reproduces, or that do not affect a trained adapter's outputs. Any other setting is refused if it
# is set.
_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_dropout"),
    *("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    *("task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "use_dora", "ensure_weight_tying"),
    *("init_lora_weights", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"),
}
_SCHEDULE = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
# Starts that leave the base's weights as they were; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_PATTERNS = 10_000
_MAGNITUDE = "magnitude_vector"
_KEY = re.compile(r"(.+)\.lora_(?:embedding_)?([ABE]|magnitude_vector)(?:\.weight)?")


@attrs.frozen(eq=False)
class Saved:
    """An adapter that PEFT saved.

    Args:
        config: its settings, of which `_UNDERSTOOD` says which may be set.
        layers: layer name to factors.
        rest: parameter name to value, of the modules that PEFT saved in full.
    """

    config: Mapping[str, Any]
    layers: Mapping[str, Factors]
    rest: Mapping[str, Tensor]

    @property
    def dropout(self) -> float:
        """The dropout that it was trained with."""
        return self.config.get("lora_dropout") or 0.0


def read_saved(folder: Path, model: nn.Module) -> Saved:
    """Read a folder that PEFT's ``save_pretrained`` wrote.

    Args:
        folder: the folder.
        model: the base model, which says what the parameters are that PEFT adapted.

    Raises:
        LrkitError: no such files, damaged ones, or an adapter that lrkit cannot represent exactly.
    """
    config = _read_config(folder)
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in _read_weights(folder).items():
        match = _KEY.fullmatch(key)
        if match:
            found.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_" in key:
            raise LrkitError(f"{folder}: {key} is no part of a LoRA: lrkit cannot represent it")
        else:
            rest[key] = tensor
    if not found:
        raise LrkitError(f"{folder / WEIGHTS} holds no lora_A and lora_B")
    layers = {}
    for key, parts in found.items():
        _check_parts(parts, key, config, folder)
        core = parts["E"].flatten() if "E" in parts else None
        # A convolution's are filters: A's are the layer's in size, and B's have size 1.
        a, b = parts["A"].flatten(1), parts["B"].flatten(1)
        magnitude = parts[_MAGNITUDE].flatten() if _MAGNITUDE in parts else None
        name, maps = _place(model, key, config, len(a), folder)
        rank = len(a) // maps
        if maps > 1:
            b = interleaved(b, rank)
            a, b = turned(a, b, maps) if lies_turned(model, name, config.get("peft_version") or "0.17") else (a, b)
        layers[name.removesuffix(".weight")] = Factors(a, b, core, _scale(config, name, rank), magnitude, maps)
    return Saved(config, layers, rest)


def _place(model: nn.Module, key: str, config: Mapping[str, Any], rows: int, folder: Path) -> tuple[str, int]:
    """Return what a key stands for, the name of a module or of a parameter, and how many maps that stacks."""
    try:
        name = parameter(model, key, config.get("target_parameters") or ())
    except LrkitError as error:
        raise LrkitError(f"{folder} does not fit {type(model).__name__}: {error}") from None
    found = dict(model.named_parameters()).get(name)
    maps = 1 if found is None or found.ndim < 3 else len(found)
    if rows % maps:
        raise LrkitError(f"{folder} does not fit: lora_A of {name} has {rows} rows, and there are {maps} experts here")
    return name, maps


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise LrkitError(f"{folder} holds no PEFT adapter: there is no {CONFIG}") from None
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "ADALORA"):
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise LrkitError(f"{folder}: from_peft takes LORA and ADALORA adapters, not {shown(kind)}")
    for key, value in config.items():
        if key not in _UNDERSTOOD and value and value != "none":
            raise LrkitError(f"{folder}: lrkit cannot represent an adapter with {key}={shown(value)} exactly")
    for key in ("lora_alpha", *(_SCHEDULE if config["peft_type"] == "ADALORA" else ())):
        if not _is_number(config.get(key)):
            raise LrkitError(f"{path}: {key} must be a number, not {shown(config.get(key))}")
    dropout = config.get("lora_dropout") or 0.0
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise LrkitError(f"{path}: lora_dropout must be from 0 to 1, not {shown(dropout)}")
    _check_tables(config, path)
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | str) or start not in _STARTS:
        raise LrkitError(
            f"{folder}: init_lora_weights={shown(start)} changes the base's weights: lrkit cannot represent it exactly. "
            "Save it as a LoRA of the plain base, by PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return config


def _check_tables(config: Mapping[str, Any], path: Path) -> None:
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise LrkitError(f"{path}: modules_to_save must be a list of names, not {shown(saved)}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(_is_number(value) for value in patterns.values()):
        raise LrkitError(f"{path}: alpha_pattern must be a table of numbers, not {shown(patterns)}")
    if len(patterns) > _PATTERNS:
        raise LrkitError(f"{path}: alpha_pattern has {len(patterns):,} entries; at most {_PATTERNS:,}")
    for pattern in patterns:
        try:
            _compiled(pattern)
        except LrkitError as error:
            told = "a key of alpha_pattern is no regular expression that can be used"
            raise LrkitError(f"{path}: {told}: {error}") from None


def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile a key of ``alpha_pattern`` as PEFT's own rule uses it."""
    return compiled(pattern, "it", r"(.*\.)?({})$")


def _is_number(value: object) -> bool:
    """Say whether it is a number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        with open_tensors(folder / WEIGHTS) as file:
            return {key.removeprefix(PREFIX): tensor for key, tensor in file.tensors().items()}
    except FileNotFoundError:
        raise LrkitError(
            f"{folder} holds no {WEIGHTS} (pickled files are not read: save the adapter again with PEFT)"
        ) from None


def _check_parts(parts: Mapping[str, Tensor], name: str, config: Mapping[str, Any], folder: Path) -> None:
    """Raise LrkitError if the tensors of a layer are no factors of one rank."""
    kind = config["peft_type"]
    wanted = {*("ABE" if kind == "ADALORA" else "AB"), *([_MAGNITUDE] if config.get("use_dora") else [])}
    told = ", ".join(f"lora_{part} {list(tensor.shape)}" for part, tensor in sorted(parts.items()))
    if set(parts) != wanted or not _are_factors(parts["A"], parts["B"]):
        raise LrkitError(f"{folder}: {name} is no {kind} of a linear layer: it has {told}")
    bad = [part for part, t in parts.items() if not t.is_floating_point() or not bool(torch.isfinite(t).all())]
    if bad:
        raise LrkitError(f"{folder}: lora_{bad[0]} of {name} is not made of finite floating-point numbers")
    rank = len(parts["A"])
    if parts["B"].shape[1] != rank or ("E" in parts and parts["E"].numel() != rank):
        raise LrkitError(f"{folder}: the tensors of {name} are of different ranks: {told}")
    if _MAGNITUDE in parts and parts[_MAGNITUDE].numel() != len(parts["B"]):
        raise LrkitError(f"{folder}: {name} has not one magnitude per output: {told}")


def _are_factors(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are matrices, or the filters of convolutions, B's of size 1."""
    return a.ndim == b.ndim and 2 <= a.ndim <= 5 and b.numel() == b.shape[0] * b.shape[1]


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Compute s of one layer as PEFT does."""
    alpha = config["lora_alpha"]
    if config["peft_type"] == "ADALORA":
        return float((alpha if alpha > 0 else config["init_r"]) / (config["init_r"] + 1e-5))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if _compiled(pattern).match(name):  # the first that matches
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else max(rank, 1)))
