"""PEFT's forward of a prompt method around the plain model: while it trains, and while it writes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

import lrkit

_INPUTS = ("input_ids", "inputs_embeds")


class Base:
    """The plain model as PEFT's model knows it: its attributes, and its own forward alone.

    A call of the model itself would go through whatever stands around its forward a second time: hooks would see two calls,
    and an autocast of accelerate's, which cannot be entered twice, would stay on for the whole process.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = (model,)
        self.call: Callable[..., Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "call") or name.startswith("__"):  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.model[0], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own forward."""
        return (self.model[0] if self.call is None else self.call)(*args, **kwargs)


class Around(nn.Module):
    """PEFT's forward of a prompt method around the plain model.

    If PEFT's model has logits of its prompt's tokens too, before those of the text, these are left out: a row has
    as many as it has tokens. A call that goes on from a cache (``generate``) finds the prompt in the cache.

    Args:
        tuner: a ``PeftModel`` over a copy of the model's skeleton. Its changes to the skeleton (a second classifier) have no
            effect, since it computes with the plain model.
        model: the plain model.
    """

    def __init__(self, tuner: Any, model: nn.Module) -> None:
        super().__init__()
        del tuner._modules["base_model"]
        tuner.__dict__["base_model"] = self._base = Base(model)
        self.prompt_encoder = tuner.prompt_encoder
        self._tuner = (tuner,)  # in a tuple, so that it is no submodule: the model would be a part of itself

    def forward(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output with PEFT's prompts before its input."""
        named = dict(zip(inspect.signature(call).parameters, args, strict=False)) | kwargs
        if named.get("encoder_outputs") is not None:
            raise lrkit.LrkitError(
                f"{self._tuner[0].active_peft_config.peft_type.value}: generate runs an encoder by itself, past the prompt: "
                "its texts would be the plain model's"
            )
        self._base.call = call
        try:
            past = 0 if named.get("use_cache") is False else _length(named.get("past_key_values"))
            if past > 0:
                return call(**self._going_on(named, past))
            return self._without_prompt(self._tuner[0](**named), named)
        except (RuntimeError, IndexError) as error:
            self._check_room(named, error)
            raise
        finally:
            self._base.call = None

    def _going_on(self, named: Mapping[str, Any], past: int) -> dict[str, Any]:
        """Return a call's arguments such that it goes on from a cache, in which the prompt comes first."""
        new = next(named[name].shape[1] for name in _INPUTS if named.get(name) is not None)
        mask = named.get("attention_mask")
        if mask is not None and mask.dim() == 2 and mask.shape[1] < past + new:
            mask = nn.functional.pad(mask, (past + new - mask.shape[1], 0), value=1)
        # The places are those after the cache's, as PEFT, which ignores places that are given, has them in its first call.
        left_out = ("position_ids", "cache_position")
        return {name: value for name, value in named.items() if name not in left_out} | {"attention_mask": mask}

    def _without_prompt(self, outputs: Any, named: Mapping[str, Any]) -> Any:
        """Leave out the logits of the prompt's tokens."""
        logits = getattr(outputs, "logits", None)
        rows = next((named[name] for name in _INPUTS if named.get(name) is not None), None)
        extra = 0 if logits is None or rows is None or logits.dim() < 3 else logits.shape[1] - rows.shape[1]
        if extra == self._tuner[0].active_peft_config.num_virtual_tokens:
            outputs.logits = logits[:, extra:]
        return outputs

    def _check_room(self, given: Mapping[str, Any], error: Exception) -> None:
        """Raise LrkitError if an error came of a prompt and rows that are longer than the model has positions."""
        rows = next((given[name] for name in _INPUTS if given.get(name) is not None), None)
        tuner = self._tuner[0]
        positions = getattr(tuner.base_model.config.get_text_config(), "max_position_embeddings", None)
        prompt = tuner.active_peft_config.num_virtual_tokens
        if rows is not None and positions is not None and rows.shape[1] + prompt > positions:
            raise lrkit.LrkitError(
                f"a row of {rows.shape[1]} tokens and num_virtual_tokens = {prompt} are more than the model's {positions} "
                "positions: lower run.max_length, or truncate the rows"
            ) from error


def _length(cache: Any) -> int:
    """Return how many places a cache of keys and values holds; 0 without one."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
