"""Any PEFT method as a parameterization: PEFT's own layers in lrkit's places, PEFT's own forward around the model."""

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
from torch import nn

import lrkit
from lrkit.errors import nearest
from lrkit.parameterizations import Target
from lrkit_peft.around import Around

LAYERS = (
    *("LORA", "VERA", "IA3", "LN_TUNING"),
    *("LOHA", "LOKR", "OFT", "BOFT", "HRA", "FOURIERFT", "VBLORA", "RANDLORA", "MISS", "ROAD", "HIRA", "SHIRA", "C3A"),
    *("WAVEFT", "DELORA", "GRALORA", "TINYLORA", "PVERA", "UNILORA", "FROD", "PSOFT", "PEANUT", "GLORA", "BEFT"),
)
"""Methods that put layers in the place of layers."""

PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
"""Methods that put trained tokens before the model's own."""

_ELSEWHERE = {
    "ADALORA": 'PEFT needs a call of update_and_allocate in every step; lrkit\'s own adalora(variant="peft") is the same '
    "method step by step",
}
_OWN_PLACES = ("IA3", "LN_TUNING", "BEFT")
_RATES = {"IA3": 1e-2, "VERA": 3e-2, "LN_TUNING": 1e-3, "PREFIX_TUNING": 1e-2, "PROMPT_TUNING": 3e-2, "P_TUNING": 1e-3}
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def _is_known(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    known = (*LAYERS, *PROMPTS)
    if value in _ELSEWHERE:
        raise lrkit.LrkitError(f"Peft.config={value!r}: {_ELSEWHERE[value]}")
    if value not in known:
        hint = nearest(value, known) if isinstance(value, str) else ""
        raise lrkit.LrkitError(f"Peft.config must be one of {', '.join(known)}, not {value!r}{hint}")


def _is_table(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise lrkit.LrkitError(f"Peft.settings must be a table of the PEFT config's fields, not {value!r}")
    for key, instead in {
        "modules_to_save": "the head is named by attach(..., train_also=...)",
        "peft_type": "it is Peft.config",
        "inference_mode": "what is attached trains",
    }.items():
        if key in value:
            raise lrkit.LrkitError(f"Peft.settings: {key} is not taken from there: {instead}")
    if value.get("bias", "none") != "none":
        raise lrkit.LrkitError(
            f'Peft.settings: bias={value["bias"]!r} trains the model\'s own biases beside the adapters: use bias="none"'
        )


def _copied(value: Any) -> Any:
    return copy.deepcopy(dict(value)) if isinstance(value, Mapping) else value


@attrs.frozen(kw_only=True)
class Peft(lrkit.Parameterization):
    """Any PEFT method as a baseline: the layers, start, forward pass and parameters are PEFT's own.

    It has no units, so no policy acts on it. Source: each method's own paper, through `peft.get_peft_model`.

    Args:
        config: the PEFT method, by the name of its ``PeftType``: ``"LORA"``, ``"VERA"``, ``"PREFIX_TUNING"``, ...
        settings: fields of its PEFT config, as plain data: ``{"r": 8, "use_dora": True}``. If ``target_modules`` is not
            among them, methods of layers adapt what lrkit's `targets` name. But some have places of their own: LN tuning
            takes every ``nn.LayerNorm``; IA3 and BEFT go by PEFT's table for the type of model.
    """

    config: str = attrs.field(default="LORA", validator=_is_known)
    settings: Mapping[str, Any] = attrs.field(factory=dict, converter=_copied, validator=_is_table, hash=False)

    @property
    def learning_rate(self) -> float:  # type: ignore[override]  # of each method, where others have one for their class
        """Return 1e-3; more for vectors and prompts."""
        return _RATES.get(self.config, 1e-3)

    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        """Declare none: a baseline has no units."""
        return ()

    @property
    def takes_targets(self) -> bool:
        """Return False for prompts, IA3 and LN tuning, and if ``target_modules`` is among the settings."""
        return self.config in LAYERS and self.config not in _OWN_PLACES and "target_modules" not in self.settings

    def build(self, target: Target) -> nn.Module:
        """Return PEFT's layer in the place of one layer."""
        holder = nn.ModuleDict({"layer": target.layer})
        return self._layers(holder, ["layer"])["layer"]

    def adapt(self, model: nn.Module, targets: Sequence[Target]) -> dict[str, nn.Module]:
        """Return PEFT's layers by the names of the modules that they replace."""
        if self.config in PROMPTS:
            return {}
        names = [target.name for target in targets] if self.takes_targets else None
        if self.config == "LN_TUNING" and "target_modules" not in self.settings:
            names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
            if not names:
                raise lrkit.LrkitError(f"{self!r}: {type(model).__name__} has no nn.LayerNorm")
        return self._layers(model, names)

    def _layers(self, model: nn.Module, names: list[str] | None) -> dict[str, nn.Module]:
        bones, originals = _skeleton(model)
        config = self._config({} if names is None else {"target_modules": names})
        with _flags_kept(model), _peft_s_words(self):
            import peft

            peft.get_peft_model(bones, config)
            own = [name for name, p in model.named_parameters() if p.requires_grad]
        if own:
            raise lrkit.LrkitError(f"{self!r} trains parameters of the model itself, such as {own[0]}: not supported")
        layers: dict[str, nn.Module] = {}
        for name, original in model.named_modules():
            inside = any(name.startswith(f"{layer}.") for layer in layers)
            if name and not inside and bones.get_submodule(name) is not originals[id(original)]:
                layers[name] = bones.get_submodule(name)
        if not layers:
            raise lrkit.LrkitError(f"{self!r} finds nothing to adapt in {type(model).__name__}")
        if self.config == "LN_TUNING":
            for layer in layers.values():
                layer.__dict__["merge"] = None  # PEFT's own swaps two layers, and adds to no weight
        _register_once(layers.values())
        return layers

    def _config(self, more: Mapping[str, Any]) -> Any:
        with _peft_s_words(self):
            from peft import PeftType
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

            cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.config)]
        known = list(inspect.signature(cls).parameters)
        for key in self.settings:
            if key not in known:
                raise lrkit.LrkitError(
                    f'Peft.settings: {cls.__name__} has no field "{key}"{nearest(key, known)}; there are {", ".join(known)}'
                )
        with _peft_s_words(self):
            return cls(**copy.deepcopy(dict(self.settings)), **more)

    def wrap(self, model: nn.Module) -> nn.Module | None:
        """Return PEFT's forward of a prompt method around the whole model."""
        if self.config not in PROMPTS:
            return None
        kind = type(model).__name__
        task = next((task for ending, task in _TASKS.items() if kind.endswith(ending)), None)
        if task is None and "task_type" not in self.settings:
            raise lrkit.LrkitError(f"{self!r} goes by the task, and {kind} says none: give settings a task_type")
        if self.config == "PREFIX_TUNING" and not _takes_a_past(model):
            raise lrkit.LrkitError(
                f"{self!r} hands keys and values to the model as its past, and {kind} takes no past_key_values"
            )
        task = self.settings.get("task_type", task)
        if self.config != "PREFIX_TUNING" and task in ("TOKEN_CLS", "QUESTION_ANS"):
            raise lrkit.LrkitError(
                f"{self!r} gives outputs of its prompt's tokens as well, and PEFT's loss of {task} takes them for tokens of "
                "the text: PREFIX_TUNING does not"
            )
        config = self._config({"task_type": task})
        bones, _ = _skeleton(model)
        with _flags_kept(model), _peft_s_words(self):
            import peft

            return Around(peft.get_peft_model(bones, config), model)


def _takes_a_past(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    inner = next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
    return any("past_key_values" in inspect.signature(m.forward).parameters for m in (model, inner))


def _skeleton(model: nn.Module) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Copy the tree of modules with the same leaves, tensors and settings, for PEFT to change.

    Returns:
        The copy, and for the ``id`` of each of the model's modules what stands for it there.
    """
    copies: dict[int, nn.Module] = {}

    def bone(module: nn.Module) -> nn.Module:
        if id(module) not in copies:
            if not module._modules:
                copies[id(module)] = module
            else:
                twin = type(module).__new__(type(module))
                twin.__dict__.update(module.__dict__)
                copies[id(module)] = twin
                twin.__dict__["_modules"] = {
                    name: None if child is None else bone(child) for name, child in module._modules.items()
                }
        return copies[id(module)]

    return bone(model), copies


def _register_once(layers: Iterable[nn.Module]) -> None:
    """Make a module that layers share (VeRA's matrices) a part of the first alone, so that it is saved once."""
    seen: set[int] = set()

    def look(module: nn.Module) -> None:
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in seen:
                del module._modules[name]
                module.__dict__[name] = child
            elif child is not None:
                seen.add(id(child))
                look(child)

    for layer in layers:
        look(layer)


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Keep the model's own flags: PEFT freezes all that it does not train, but lrkit decides which parameters train."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@contextmanager
def _peft_s_words(parameterization: Peft) -> Iterator[None]:
    """Turn PEFT's errors into one line, and its warnings into none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, RuntimeError) as error:
        if isinstance(error, lrkit.LrkitError):
            raise
        raise lrkit.LrkitError(
            f"{parameterization!r}: PEFT refuses: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


__all__ = ["LAYERS", "PROMPTS", "Around", "Peft"]
