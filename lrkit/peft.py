"""PEFT's formats, out and in. The only file that knows them.

`export` writes what was trained for those who do not use lrkit, and loads it back to see that nothing was lost.
`from_peft` takes up an adapter that PEFT trained. Only `export` needs PEFT itself, to read its own file back.

A low-rank adapter is whatever offers ``export_factors`` (out) and ``import_factors`` (in), as `LowRank` does.
"""

import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrkit import moves
from lrkit.adapted import Adapted, check_model
from lrkit.errors import LrkitError, LrkitWarning, nearest, shown
from lrkit.foresight import check_fresh, weightless
from lrkit.method import Method
from lrkit.parameterizations.lowrank import oriented_weight
from lrkit.patterns import compiled
from lrkit.reading import read_json
from lrkit.settings import in_steps
from lrkit.targets import find_targets
from lrkit.tensorfile import open_tensors

TOLERANCE = 1e-6
"""How far logits may be apart, in float64 arithmetic; a share of the largest where that is above 1."""

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


# ---- out -------------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Exported:
    """What `export` wrote, and how it was found to be when it was read back.

    Args:
        to: the target.
        folder: where it is.
        files: its files, relative to the folder.
        ranks: layer name to the rank written; empty for ``"merged"``.
        difference: the largest distance of a logit from the adapted model's, in float64.
        largest: the largest logit.
    """

    to: str
    folder: Path
    files: tuple[str, ...]
    ranks: dict[str, int]
    difference: float
    largest: float


def export(
    adapted: Adapted,
    folder: str | os.PathLike[str],
    *,
    to: str = "peft-lora",
    tokenizer: Any = None,
    batch: Mapping[str, Tensor] | None = None,
) -> Exported:
    """Write an adapted model in a format that others read, and check it by reading it back.

    The check loads the written files into a copy of the model as it was before `attach`, and compares its logits with the
    adapted model's on one batch. Both run in float64, so that a difference is one of the files, and not of the order in
    which sums are taken. What differs by more than `TOLERANCE` is removed again.

    Args:
        adapted: the trained handle. It stays as it is.
        folder: a new or empty folder.
        to: ``"peft-lora"``: a LoRA for PEFT, with every layer's own rank and scale. ``"peft-adalora"``: an AdaLoRA for
            PEFT. ``"vllm-lora"``: a LoRA for vLLM, which knows one rank and one scale: scales are in B, and ranks are
            padded with zeros. vLLM takes no trained head from an adapter, so where a head was trained ``base/`` holds
            the model to serve. ``"merged"``: a plain transformers model.
        tokenizer: a transformers tokenizer, written beside a plain model; None for none.
        batch: keyword arguments of the model's forward for the check; None for random tokens.

    Returns:
        What was written.

    Raises:
        LrkitError: an unknown target, a folder with something in it, a method that the format cannot hold, or an export
            that does not read back the same. Nothing is left in the folder then.
    """
    if to not in TARGETS:
        raise LrkitError(f'there is no export to "{to}"{nearest(to, TARGETS)}; there are {", ".join(TARGETS)}')
    adapted.check_finished()  # refuses adapters that were merged or detached
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LrkitError(f"{folder} exists and is not empty: nothing is overwritten, choose another folder")
    batch = _tokens(adapted.model) if batch is None else batch
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    inside = Path(tempfile.mkdtemp(dir=parent, prefix=f".{folder.name}."))
    try:
        inside.chmod(0o777 & ~moves.umask())  # mkdtemp makes folders for their owner alone
        # Fresh adapters and heads are drawn on the way: the run that goes on must not notice.
        with torch.random.fork_rng(), _quiet():
            ranks = TARGETS[to].write(adapted, inside, tokenizer, folder.absolute())
            expected = _logits(adapted.model, batch, adapted.as_computed)
            found = _logits(TARGETS[to].read(adapted, inside), batch)
        difference = float((found - expected).abs().max())
        largest = float(expected.abs().max())
        if not difference <= TOLERANCE * max(1.0, largest):
            raise LrkitError(
                f"the export to {to} was removed: read back, its logits are off by {difference:.2g} "
                f"(the largest is {largest:.3g}), and {TOLERANCE * max(1.0, largest):.2g} is allowed"
                f"{_rounding(adapted.model)}"
            )
        if folder.exists():
            folder.rmdir()
        inside.rename(folder)
    except BaseException:
        shutil.rmtree(inside, ignore_errors=True)
        raise
    files = tuple(sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()))
    return Exported(to=to, folder=folder, files=files, ranks=ranks, difference=difference, largest=largest)


def _rounding(model: nn.Module) -> str:
    narrow = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    if narrow:
        return f": the model's weights are {narrow.pop()}, which rounds ΔW; load it in float32 to export it"
    return ". Where it is a little, it may be float32's rounding, above all of merged weights: try it in float64"


@attrs.frozen
class _Layer:
    """ΔW = s · B diag(c) A of one layer."""

    a: Tensor
    b: Tensor
    core: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.core)


def _type(module: nn.Module) -> str:
    """A class with its module, where another package has one of the same plain name."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("lrkit") else f"{kind.__module__}.{kind.__qualname__}"


def _layers(adapted: Adapted, to: str) -> dict[str, _Layer]:
    """The increments by layer name, those of rank 0 left out."""
    own = [n for n, p in adapted.model.named_parameters() if id(p) in adapted._saved_ids - adapted._fresh_ids]
    head = tuple(f"{name}." for name in adapted.head)
    beside = [name for name in own if not name.startswith(head or ("\0",))]
    if beside:
        raise LrkitError(
            f"{to} holds low-rank increments and a head, and this method trains {len(beside)} of the model's own "
            f'parameters, such as {beside[0]}: export to "merged"'
        )
    if adapted.around is not None:
        kind = type(adapted.around).__name__
        raise LrkitError(f"{to} holds low-rank increments, and this method has a {kind} around the whole model")
    layers = {}
    for name, adapter in adapted.adapters.items():
        factors = getattr(adapter, "export_factors", None)
        if factors is None:
            raise LrkitError(
                f"{to} holds low-rank increments, and {name} has a {_type(adapter)}, which is none"
                + ('; what can be merged goes out as "merged"' if hasattr(adapter, "merge") else "")
            )
        layer = _Layer(*factors())
        if layer.rank:
            layers[name] = layer
    if not layers:
        raise LrkitError(f'every layer has rank 0, and there is nothing for {to} to hold: export to "merged"')
    return layers


def _save(adapted: Adapted, folder: Path, config: Any, tensors: dict[str, Tensor], head: bool = True) -> None:
    if head:
        saved = tuple(f"{name}." for name in adapted.head)
        for name, p in adapted.model.named_parameters():
            if name.startswith(saved or ("\0",)):
                tensors[name] = p.detach()
    clones = {_PREFIX + name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file({name: tensor.cpu() for name, tensor in clones.items()}, folder / _WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _common(adapted: Adapted, layers: Mapping[str, _Layer]) -> dict[str, Any]:
    """What the configs of PEFT's LoRA and AdaLoRA have in common."""
    dropouts = {getattr(adapted.adapters[name], "dropout", 0.0) for name in layers}
    kind = type(adapted.model).__name__
    task = next((task for ending, task in _TASKS.items() if kind.endswith(ending)), None)
    # For a classifier PEFT always expects a trained head in the file.
    if task in ("SEQ_CLS", "TOKEN_CLS") and not {"classifier", "score"} & set(adapted.head):
        task = None
    return {
        "task_type": task,
        "auto_mapping": None if task else _auto_mapping(adapted.model),
        "target_modules": list(layers),
        "modules_to_save": adapted.head or None,
        "fan_in_fan_out": all(_is_transposed(adapted._originals[name]) for name in layers),
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "base_model_name_or_path": getattr(getattr(adapted.model, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
    }


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    """By which PEFT finds the base model's class where there is no task."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def _is_transposed(layer: nn.Module) -> bool:
    return oriented_weight(layer) is not layer.weight


def _round(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _write_lora(adapted: Adapted, folder: Path, _: Any, __: Path) -> dict[str, int]:
    layers = _layers(adapted, "peft-lora")
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.core[:, None] * layer.a
        tensors[f"{name}.lora_B.weight"] = layer.b
        ranks[name], alphas[name] = layer.rank, _round(layer.scaling * layer.rank)
    rank, alpha = _most(ranks), _most(alphas)
    config = _peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,  # PEFT computes alpha / r: a float serves
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        **_common(adapted, layers),
    )
    _save(adapted, folder, config, tensors)
    return ranks


def _most(values: Mapping[str, Any]) -> Any:
    """The commonest value, so that the patterns of exceptions are short."""
    every = list(values.values())
    return max(dict.fromkeys(every), key=every.count)


def _write_adalora(adapted: Adapted, folder: Path, _: Any, __: Path) -> dict[str, int]:
    layers = _layers(adapted, "peft-adalora")
    ranks = {name: layer.rank for name, layer in layers.items()}
    first = max(*(adapted._controller.initial_ranks[name] for name in layers), *ranks.values())
    # PEFT computes alpha / (init_r + 1e-5) for all layers alike.
    scale = _most({name: layer.scaling for name, layer in layers.items()})
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A"] = layer.a
        tensors[f"{name}.lora_B"] = layer.b
        tensors[f"{name}.lora_E"] = (layer.core * (layer.scaling / scale))[:, None]
    # PEFT warns that these names match nothing; its own files have them, and it goes by them.
    pattern = {f"{name}.lora_E": [True] * rank + [False] * (first - rank) for name, rank in ranks.items()}
    config = _peft().AdaLoraConfig(
        init_r=first,
        lora_alpha=_near(scale * (first + 1e-5)),  # as above
        rank_pattern=pattern if any(r != first for r in ranks.values()) else None,
        **_schedule(adapted, ranks),
        **_common(adapted, layers),
    )
    _save(adapted, folder, config, tensors)
    return ranks


def _near(alpha: float) -> float | int:
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _schedule(adapted: Adapted, ranks: Mapping[str, int]) -> dict[str, Any]:
    """AdaLoRA's schedule in PEFT's words, where the method has one; else one that PEFT accepts and never uses."""
    total = adapted.total_steps or 1
    plain: dict[str, Any] = {"total_step": total, "target_r": max(1, sum(ranks.values()) // len(ranks))}
    plain["orth_reg_weight"] = getattr(adapted.method.parameterization, "orthogonality", 0.0)
    for policy in adapted.method.policies:
        if policy.action.unit == "component" and adapted.total_steps is not None:
            begin, end = policy.scheduler.bounds(total)
            if begin < end:
                plain |= {"tinit": begin, "tfinal": total - end}
                plain["deltaT"] = max(1, in_steps(policy.scheduler.interval, total))
            target = policy.scheduler.target
            most = adapted.method.parameterization.components or 0
            plain["target_r"] = target if isinstance(target, int) else max(1, round(target * most))
            plain |= {b: getattr(policy.metric, b) for b in ("beta1", "beta2") if hasattr(policy.metric, b)}
    return plain


def _write_vllm(adapted: Adapted, folder: Path, tokenizer: Any, final: Path) -> dict[str, int]:
    layers = _layers(adapted, "vllm-lora")
    ranks = {name: layer.rank for name, layer in layers.items()}
    rank = max(ranks.values())
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a = layer.a.new_zeros(rank, layer.a.shape[1])
        b = layer.b.new_zeros(layer.b.shape[0], rank)
        a[: layer.rank] = layer.core[:, None] * layer.a
        b[:, : layer.rank] = layer.b * layer.scaling
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    # vLLM refuses modules_to_save, and any tensor in the file that is no lora_A or lora_B.
    settings = _common(adapted, layers) | {"modules_to_save": None, "task_type": None}
    settings["auto_mapping"] = _auto_mapping(adapted.model)
    if adapted.head:
        _save_plain(_with_head(adapted), folder / "base", tokenizer)
        settings["base_model_name_or_path"] = str(final / "base")
    _save(adapted, folder, _peft().LoraConfig(r=rank, lora_alpha=rank, **settings), tensors, head=False)
    return ranks


def _with_head(adapted: Adapted) -> nn.Module:
    """The model as it was before attach, with the trained head in it."""
    plain = adapted.original()
    trained = dict(adapted.model.named_parameters())
    head = tuple(f"{name}." for name in adapted.head)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name.startswith(head):
                p.copy_(trained[name])
    return plain


def _write_merged(adapted: Adapted, folder: Path, tokenizer: Any, _: Path) -> dict[str, int]:
    twin = Adapted(adapted.original(), adapted.method, list(adapted.adapters), adapted.head, exact=True)
    twin.load_state_dict(adapted.state_dict())
    _save_plain(twin.merge(), folder, tokenizer)
    return {}


def _save_plain(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise LrkitError(f"{type(model).__name__} is no transformers model: it has no save_pretrained")
    save(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _read_peft(adapted: Adapted, folder: Path) -> nn.Module:
    base = folder / "base"
    plain = _read_plain(adapted, base) if base.is_dir() else adapted.original()
    model: nn.Module = _peft().PeftModel.from_pretrained(plain, str(folder))
    return model


def _read_plain(adapted: Adapted, folder: Path) -> nn.Module:
    read: Callable[..., nn.Module] = type(adapted.model).from_pretrained  # type: ignore[attr-defined]
    return read(str(folder), dtype=adapted.model.dtype)


@attrs.frozen
class _Target:
    """How one format is written, giving ranks, and read back, giving a model."""

    write: Callable[[Adapted, Path, Any, Path], dict[str, int]]
    read: Callable[[Adapted, Path], nn.Module]


TARGETS = {
    "peft-lora": _Target(_write_lora, _read_peft),
    "peft-adalora": _Target(_write_adalora, _read_peft),
    "vllm-lora": _Target(_write_vllm, _read_peft),
    "merged": _Target(_write_merged, _read_plain),
}
"""The formats of `export`."""


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise LrkitError('writing PEFT\'s formats needs PEFT to read them back: pip install "lrkit[peft]"') from None
    return peft


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PEFT and transformers say of weights that are about to be compared anyway."""
    from lrkit.hub import quiet_transformers

    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        yield


def _tokens(model: nn.Module) -> dict[str, Tensor]:
    """A fixed batch of random tokens, without the special ones, the last two of the first row masked."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise LrkitError(f"{type(model).__name__} takes no tokens: give the check a batch of its own, batch={{...}}")
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls")}
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in special])
    length = min(16, (getattr(config, "max_position_embeddings", None) or 32) // 2)
    padded = getattr(config, "pad_token_id", None) is not None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ordinary), (4 if padded else 1, length), generator=generator)
    device = next(model.parameters()).device
    ids = ordinary[drawn].to(device)
    mask = torch.ones_like(ids)
    if padded:
        assert config is not None
        ids[0, -2:], mask[0, -2:] = config.pad_token_id, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def _logits(
    model: nn.Module, batch: Mapping[str, Tensor], as_computed: Callable[[Tensor], Tensor] = lambda p: p
) -> Tensor:
    """The model's logits (or first output) in evaluation, computed in float64; the model stays as it is."""
    modes = [(module, module.training) for module in model.modules()]
    state = [*model.named_parameters(), *model.named_buffers()]
    wide = {name: as_computed(t).detach().double() for name, t in state if t.is_floating_point()}
    try:
        model.eval()
        output = torch.func.functional_call(model, wide, kwargs=dict(batch), tie_weights=True)
    finally:
        for module, training in modes:
            module.training = training
    if isinstance(output, Tensor):
        return output
    logits: Tensor | None = getattr(output, "logits", None)
    return output[0] if logits is None else logits


# ---- in --------------------------------------------------------------------------------------------------------------

# What lrkit carries over, and what says nothing about the outputs of a trained adapter. Any other setting that is set at
# all makes them something that lrkit does not compute.
_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_dropout"),
    *("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    *("task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("init_lora_weights", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"),
}
# Starts that leave the base's weights as they were; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_PATTERNS = 10_000
_KEY = re.compile(r"(.+)\.lora_([ABE])(?:\.weight)?")

_Factors = tuple[Tensor, Tensor, Tensor | None, float]
"""A, B, c (None for ones) and s: what ``import_factors`` takes."""


def from_peft(model: nn.Module, folder: str | os.PathLike[str], method: Method | None = None) -> Adapted:
    """Attach a LoRA or AdaLoRA that PEFT trained, to go on from it with any method.

    The outputs are PEFT's. The layers are those in the file; what PEFT saved in full (``modules_to_save``: a classifier)
    is the head, and trains on.

    Args:
        model: the base model as PEFT had it.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        method: None for what the config says: `lrkit.methods.lora`, or `lrkit.methods.adalora` with its schedule and
            ``variant="peft"``. Any other method with low-rank adapters of enough rank will do: LoRA's B A goes into SVD
            form by an SVD of ΔW, which is exact. Layers of a smaller rank than the method's get further components that
            add nothing at first.

    Returns:
        The handle, to be bound to an optimizer.

    Raises:
        LrkitError: no such files, an adapter that lrkit cannot represent exactly (DoRA, trained biases, replicated
            layers), or a method that cannot hold it. The model is then as it was.
    """
    check_model(model)
    folder = Path(folder)
    config = _read_config(folder)
    layers, rest = _read_layers(config, _read_weights(folder), folder, model)
    head = _read_head(model, config, rest, folder)
    if method is None:
        method = _method_of(config, layers)
    if not isinstance(method, Method):
        raise LrkitError(f"from_peft takes a lrkit.Method, such as lrkit.methods.adalora(), not {shown(method)}")
    if (twin := weightless(model)) is not None:
        given = sum(a.numel() + b.numel() for a, b, *_ in layers.values())
        check_fresh(twin, find_targets(twin, list(layers), exact=True), method.parameterization, given)
    adapted = Adapted(model, method, list(layers), head, exact=True)
    try:
        for name, adapter in adapted.adapters.items():
            take = getattr(adapter, "import_factors", None)
            if take is None:
                raise LrkitError(
                    f"{method.parameterization!r} has no low-rank adapters, and cannot hold what PEFT trained"
                )
            try:
                take(*layers[name])
            except LrkitError as error:
                raise LrkitError(f"{method.parameterization!r} cannot hold {name}: {error}") from None
        parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in rest.items():
                parameters[name].copy_(tensor)
    except BaseException:
        adapted.detach()
        raise
    dropout = config.get("lora_dropout") or 0.0
    if any(getattr(adapter, "dropout", 0.0) != dropout for adapter in adapted.adapters.values()):
        warnings.warn(
            f"PEFT trained with lora_dropout={dropout}, and {method.parameterization!r} goes on with another: outputs are "
            "the same, training is not",
            LrkitWarning,
            stacklevel=2,
        )
    return adapted


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise LrkitError(f"{folder} holds no PEFT adapter: there is no {_CONFIG}") from None
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "ADALORA"):
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise LrkitError(f"{folder}: from_peft takes LORA and ADALORA adapters, not {shown(kind)}")
    for key, value in config.items():
        if key not in _UNDERSTOOD and value and value != "none":
            raise LrkitError(f"{folder}: lrkit cannot represent an adapter with {key}={shown(value)} exactly")
    numbers = ["lora_alpha"]
    if config["peft_type"] == "ADALORA":
        numbers += ["init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"]
    for key in numbers:
        if not _is_number(config.get(key)):
            raise LrkitError(f"{path}: {key} must be a number, not {shown(config.get(key))}")
    if not _is_number(config.get("lora_dropout") or 0.0) or not 0 <= (config.get("lora_dropout") or 0.0) < 1:
        raise LrkitError(f"{path}: lora_dropout must be from 0 to 1, not {shown(config['lora_dropout'])}")
    _check_patterns(config, path)
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | str) or start not in _STARTS:
        raise LrkitError(
            f"{folder}: init_lora_weights={shown(start)} changes the base's weights: lrkit cannot represent it exactly"
        )
    return config


def _check_patterns(config: Mapping[str, Any], path: Path) -> None:
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise LrkitError(f"{path}: modules_to_save must be a list of names, not {shown(saved)}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(_is_number(value) for value in patterns.values()):
        raise LrkitError(f"{path}: alpha_pattern must be a table of numbers, not {shown(patterns)}")
    if len(patterns) > _PATTERNS:
        raise LrkitError(f"{path}: alpha_pattern has {len(patterns):,} entries; at most {_PATTERNS:,}")
    for pattern in patterns:
        _pattern(pattern, path)


def _pattern(pattern: str, path: Path) -> re.Pattern[str]:
    """A key of ``alpha_pattern`` as PEFT's own rule uses it."""
    try:
        return compiled(pattern, "it", r"(.*\.)?({})$")
    except LrkitError as error:
        raise LrkitError(f"{path}: a key of alpha_pattern is no regular expression that can be used: {error}") from None


def _is_number(value: object) -> bool:
    """A number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / _WEIGHTS
    try:
        with open_tensors(path) as file:
            return {key.removeprefix(_PREFIX): tensor for key, tensor in file.tensors().items()}
    except FileNotFoundError:
        raise LrkitError(
            f"{folder} holds no {_WEIGHTS} (pickled files are not read: save the adapter again with PEFT)"
        ) from None


def _read_layers(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path, model: nn.Module
) -> tuple[dict[str, _Factors], dict[str, Tensor]]:
    """Factors by layer name, and the tensors that are of no adapter."""
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            found.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_" in key:
            raise LrkitError(f"{folder}: {key} is no part of a LoRA of linear layers: lrkit cannot represent it")
        else:
            rest[key] = tensor
    if not found:
        raise LrkitError(f"{folder / _WEIGHTS} holds no lora_A and lora_B")
    wanted = {"A", "B", "E"} if config["peft_type"] == "ADALORA" else {"A", "B"}
    layers: dict[str, _Factors] = {}
    names = {name for name, _ in model.named_modules()}
    for name, parts in found.items():
        if name not in names:
            raise LrkitError(f"{folder} does not fit {type(model).__name__}: it has no layer {shown(name)}")
        if set(parts) != wanted or parts["A"].ndim != 2 or parts["B"].ndim != 2:
            raise LrkitError(f"{folder}: {name} is no {config['peft_type']} of a linear layer: it has {_shapes(parts)}")
        core = parts["E"].flatten() if "E" in parts else None
        rank = len(parts["A"])
        bad = [part for part, t in parts.items() if not t.is_floating_point() or not bool(torch.isfinite(t).all())]
        if bad:
            raise LrkitError(f"{folder}: lora_{bad[0]} of {name} is not made of finite floating-point numbers")
        if parts["B"].shape[1] != rank or (core is not None and len(core) != rank):
            raise LrkitError(f"{folder}: the tensors of {name} are of different ranks: {_shapes(parts)}")
        layers[name] = (parts["A"], parts["B"], core, _scale(config, name, rank))
    return layers, rest


def _shapes(parts: Mapping[str, Tensor]) -> str:
    return ", ".join(f"lora_{part} {list(tensor.shape)}" for part, tensor in sorted(parts.items()))


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """s of one layer, as PEFT computes it."""
    alpha = config["lora_alpha"]
    if config["peft_type"] == "ADALORA":
        return float((alpha if alpha > 0 else config["init_r"]) / (config["init_r"] + 1e-5))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if _pattern(pattern, Path(_CONFIG)).match(name):  # the first that matches
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else max(rank, 1)))


def _read_head(model: nn.Module, config: Mapping[str, Any], rest: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Names of the modules that PEFT saved in full."""
    wanted = tuple(config.get("modules_to_save") or ())
    listed = [
        name
        for name, module in model.named_modules()
        if any(name == w or name.endswith(f".{w}") for w in wanted) and any(True for _ in module.parameters())
    ]
    head = [name for name in listed if any(key.startswith(f"{name}.") for key in rest)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    inside = {n for n in parameters if n.startswith(tuple(f"{name}." for name in head) or ("\0",))}
    odd = sorted(inside ^ set(rest))
    if odd:
        where = "is in the file, and in no head of this model" if odd[0] in rest else "is not in the file"
        raise LrkitError(f"{folder} does not fit {type(model).__name__}: {odd[0]} {where}")
    if missing := [name for name in listed if name not in head]:
        raise LrkitError(
            f"{folder / _WEIGHTS} is damaged: {_CONFIG} says that {missing[0]} was saved, and it is not there"
        )
    for name, tensor in rest.items():
        if parameters[name].shape != tensor.shape:
            raise LrkitError(
                f"{folder} does not fit: {name} is {list(tensor.shape)} there, and {list(parameters[name].shape)} here"
            )
    return head


def _method_of(config: Mapping[str, Any], layers: Mapping[str, _Factors]) -> Method:
    from lrkit import methods

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
    rank = max(len(a) for a, *_ in layers.values())
    scale = _most({name: s for name, (*_, s) in layers.items()})
    return methods.lora(rank=rank, alpha=scale * rank, dropout=config.get("lora_dropout") or 0.0)


__all__ = ["TARGETS", "TOLERANCE", "Exported", "export", "from_peft"]
