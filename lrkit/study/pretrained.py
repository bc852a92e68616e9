"""The pretrained model of a run: with a new head for its task, or made again from what the run saved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError, shown
from lrkit.models import quiet_transformers
from lrkit.study.kinds import check_kind
from lrkit.study.loading import Loading
from lrkit.study.models import (
    carried_configs,
    check_config,
    drop_pooler,
    empty_model,
    failure,
    is_of_hub,
    load_config,
    source_of,
)
from lrkit.tasks.tokens import check_tokenizer, knows_words

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lrkit.tasks import Head


@attrs.frozen(eq=False)
class Pretrained:
    """A pretrained model with a new head.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        fresh: names of the parameters that are not pretrained: the new head, and a pooler that had no weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fresh: frozenset[str]
    _put_back: Callable[[], None] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        """Remember configs, buffers, modes and attributes, which a run changes."""
        object.__setattr__(self, "_put_back", _memory_of(self.model))

    def restart(self, seed: int) -> PreTrainedModel:
        """Draw the fresh parameters anew, as a function of the seed alone, and return the model."""
        from transformers import set_seed

        self._put_back()
        set_seed(seed)
        for prefix, module in self.model.named_modules():
            own = [p for n, p in module.named_parameters(prefix, recurse=False) if n in self.fresh]
            for p in own:
                p._is_hf_initialized = False  # transformers' mark: leave it alone
            if own:
                self.model._init_weights(module)  # type: ignore[no-untyped-call]
        return self.model


def _memory_of(model: PreTrainedModel) -> Callable[[], None]:
    """Return a function that gives a model back the configs, buffers, modes and attributes that it has now."""
    modules = [module for module in model.modules() if hasattr(module, "config")]
    generation = [
        module.generation_config for module in modules if getattr(module, "generation_config", None) is not None
    ]
    configs = list({id(config): config for config in (*(module.config for module in modules), *generation)}.values())

    def copies(of: dict[str, Any]) -> dict[str, Any]:
        # A config within another stays the object that a submodule has as its own.
        return copy.deepcopy(of, {id(config): config for config in configs})

    values = [copies(vars(config)) for config in configs]
    modes = [(module, module.training) for module in model.modules()]
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
    names = {*vars(model)}

    def put_back() -> None:
        # By accelerate's mark a model counts as prepared, and is not wrapped for mixed precision again.
        for name in {*vars(model)} - names:
            delattr(model, name)
        for config, was in zip(configs, values, strict=True):
            vars(config).clear()
            vars(config).update(copies(was))
        for module, training in modes:
            module.training = training
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.detach().copy_(buffers[name])

    return put_back


def load_model(
    spec: str, head: Head, loading: Loading | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the pretrained model with a task's head, and its tokenizer. See `load_pretrained`."""
    loaded = load_pretrained(spec, head, loading)
    return loaded.model, loaded.tokenizer


def load_pretrained(spec: str, head: Head, loading: Loading | None = None) -> Pretrained:
    """Load a pretrained encoder or decoder with a task's head, and its tokenizer.

    The head is drawn from torch's global generator: seed it before for a repeatable run. If a tokenizer has no pad token
    (GPT-2, Llama), it pads with its end token, and the model is told so: it reads the last position that is not padding.

    Args:
        spec: "minilm" or another name in `lrkit.study.carried.MODELS`, a folder that `save_pretrained` wrote, or a hub id.
        head: the head.
        loading: how to load it; None for float32, whatever type the weights are stored in.

    Raises:
        LrkitError: there is no such model, it is of another kind than the head, or it cannot be loaded so.
    """
    loading = loading or Loading()
    loading.check(spec, hub=is_of_hub(spec))
    source, local_only = source_of(spec)
    import transformers
    from transformers import AutoTokenizer

    config = load_config(spec, loading)
    check_kind(spec, config, head.auto_class, carried_configs())
    settings = head.settings() | ({} if head.dropout else _dropouts(config))
    new = [] if loading.quantization is None else _new_modules(empty_model(spec, head, loading), head)
    settings |= loading.settings(config, spec, new)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_only, **loading.asked())
            model, report = getattr(transformers, head.auto_class).from_pretrained(
                source,
                local_files_only=local_only,
                ignore_mismatched_sizes=True,  # a head fine-tuned for other classes gives way to a new one
                output_loading_info=True,
                **loading.asked(),
                **settings,
            )
    except Exception as error:  # OSError, ValueError, KeyError, safetensors' own, ..., depending on the files
        raise failure(spec, source, local_only, error) from error
    # transformers' report is silenced, so only the head and a pooler may have stayed random.
    encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
    fresh = _unloaded(report)
    if head.num_labels is None:
        encoder = ""  # a head that the model brings along
    absent = sorted(name for name in fresh if name.startswith(encoder) and ".pooler." not in f".{name}")
    if absent and len(absent) == sum(name.startswith(encoder) for name, _ in model.named_parameters()):
        raise LrkitError(
            f'model "{spec}": none of its weights is where a {type(model).__name__} of transformers has them: take another '
            "model for this task, such as an encoder"
        )
    if absent:
        raise LrkitError(
            f'model "{spec}": its weights do not fit its config: {absent[0]} is missing or has another shape '
            f"(and {len(absent) - 1} more)"
        )
    if tokenizer.pad_token is None and knows_words(tokenizer):
        if tokenizer.eos_token is None:
            raise LrkitError(f'model "{spec}": its tokenizer has neither a pad token nor an end token to pad with')
        tokenizer.pad_token = tokenizer.eos_token
    if model.base_model is model:
        drop_pooler(model)
    check_tokenizer(spec, tokenizer, model)
    return Pretrained(model, tokenizer, frozenset(fresh))


def _dropouts(config: PretrainedConfig) -> dict[str, Any]:
    """Return the dropout probabilities of a config, each set to 0."""
    named = [name for name in vars(config) if "dropout" in name or name.endswith("pdrop")]
    return {name: 0.0 for name in named if isinstance(getattr(config, name), float)}


def _new_modules(model: PreTrainedModel, head: Head) -> list[str]:
    """Name the modules that may have no pretrained weights: all around the encoder if the head is new, and a pooler."""
    if head.num_labels is None or model.base_model is model:
        return []
    encoder = model.base_model_prefix
    around = [name for name, _ in model.named_children() if name != encoder]
    return around + [f"{encoder}.{name}" for name, _ in model.base_model.named_children() if name == "pooler"]


def _unloaded(report: dict[str, Any]) -> set[str]:
    """Name the parameters that transformers had no weights for, or weights of another shape."""
    return {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}


def load_base(
    base: Any, spec: str | None = None, trained: Collection[str] = (), loading: Loading | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the model that saved adapters were attached to, and its tokenizer, or None if it has none.

    It has the dtype that it had then, and is quantized as it was then.

    Args:
        base: class, config, dtype and name of the model, as `Adapted.state_dict` has them in ``["meta"]["base"]``.
        spec: the weights: "minilm", a folder or a hub id; None for the name in `base`.
        trained: names of parameters that the saved state holds, so that no weights are needed for them.
        loading: its revision and attention, and whether its own code may run; None for the defaults.

    Raises:
        LrkitError: there is no such model, it cannot be loaded, or it lacks weights.
    """
    kinds = {"class": str, "name": str, "dtype": str, "config": dict}
    if not isinstance(base, dict) or not all(isinstance(base.get(key), kind) for key, kind in kinds.items()):
        raise LrkitError("the saved state does not say what its base model was: class, name, dtype and config")
    check_config(base["config"], "the saved state's base config")
    spec = spec or base["name"]
    if not spec:
        raise LrkitError("the saved state does not say where its base model came from: give it with --model")
    loading = loading or Loading()
    loading.check(spec, hub=is_of_hub(spec))
    source, local_only = source_of(spec)
    import torch
    from transformers import AutoTokenizer
    from transformers.quantizers.auto import AutoQuantizationConfig

    cls = _class_of(base["class"], spec, loading)
    dtype = getattr(torch, base["dtype"], None) if base["dtype"].isidentifier() else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LrkitError(f"the base model's dtype is {shown(base['dtype'])}, which is no floating-point type of torch")
    settings = {**base["config"]}
    if getattr(load_config(spec, loading), "quantization_config", None) is None:
        scheme = settings.pop("quantization_config", None)  # the weights are to be quantized as they were
    else:
        scheme = None  # they are quantized already
    try:
        with quiet_transformers():
            model, report = cls.from_pretrained(
                source,
                config=cls.config_class.from_dict(settings),
                local_files_only=local_only,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **loading.asked(),
                **loading.attention(),
                **({} if scheme is None else {"quantization_config": AutoQuantizationConfig.from_dict(scheme)}),
            )
    except Exception as error:  # as in load_pretrained
        raise failure(spec, source, local_only, error) from error
    absent = sorted(_unloaded(report) - set(trained))
    if absent:
        raise LrkitError(
            f'model "{spec}" is not the {base["class"]} that was adapted: it has no weights for {absent[0]} '
            f"(and {len(absent) - 1} more)"
        )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_only, **loading.asked())
    except Exception:  # a model without a tokenizer is a model
        return model, None
    if not knows_words(tokenizer):  # one that transformers made up
        return model, None
    if tokenizer.pad_token is None and model.config.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    return model, tokenizer


def _class_of(name: str, spec: str, loading: Loading) -> Any:
    """Find the class of a saved base model: transformers', or one that comes with the model's weights.

    Raises:
        LrkitError: there is none, or only one whose code may not run.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    cls: Any = getattr(transformers, name, None) if name.isidentifier() else None
    if cls is None and loading.trust_remote_code:
        places = getattr(load_config(spec, loading), "auto_map", None) or {}
        if (place := next((p for p in places.values() if str(p).endswith(f".{name}")), None)) is not None:
            cls = get_class_from_dynamic_module(place, source_of(spec)[0], revision=loading.revision)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel) or cls.config_class is None:
        hint = (
            ""
            if cls is not None or loading.trust_remote_code
            else " (code from a repository needs --trust-remote-code)"
        )
        raise LrkitError(f"the base model is a {shown(name)}, which is no model that transformers has{hint}")
    return cls
