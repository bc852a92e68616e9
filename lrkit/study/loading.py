"""How a model is loaded: its dtype, its attention, quantized or not, which revision, and whether its code may run.

On the command line ``--set model.dtype=bfloat16 --set model.quantization=bnb-4bit`` and ``--trust-remote-code``; in a study
file the table ``[loading]``; in Python ``Loading(dtype="bfloat16")``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.errors import LrkitError, shown
from lrkit.settings import check_settings, flag, one_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = ("float32", "bfloat16", "float16", "auto")
_FLASH = "flash_attention_2"
_PACKAGES = {  # of a scheme of quantization: what is imported, and what is installed
    "bnb-8bit": ("bitsandbytes", "bitsandbytes"),
    "bnb-4bit": ("bitsandbytes", "bitsandbytes"),
    "torchao-int8": ("torchao", "torchao"),
    "quanto-int8": ("optimum.quanto", "optimum-quanto"),
    "quanto-int4": ("optimum.quanto", "optimum-quanto"),
}
SCHEMES = tuple(_PACKAGES)


def _text(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise LrkitError(f"Loading.{attribute.name} must be a text, not {shown(value)}")


@attrs.frozen(kw_only=True)
class Loading:
    """How a model is loaded.

    Args:
        dtype: of its weights: ``"float32"``, whatever type they are stored in; ``"bfloat16"``; ``"float16"``; or
            ``"auto"``, as they are stored. Adapters train in float32 beside a half-precision model.
        attn_implementation: as transformers takes it (``"eager"``, ``"sdpa"``, ``"flash_attention_2"``, ...); None for
            the model's own.
        quantization: one of `SCHEMES`, such as ``"bnb-4bit"`` (NF4, as in QLoRA); None for none. A new head stays as it is.
        revision: a branch, a tag or a commit of a model of the hub; None for the newest.
        trust_remote_code: run the Python code that comes with the model.
    """

    dtype: str = attrs.field(default="float32", validator=one_of(DTYPES))
    attn_implementation: str | None = attrs.field(default=None, validator=_text)
    quantization: str | None = attrs.field(default=None, validator=attrs.validators.optional(one_of(SCHEMES)))
    revision: str | None = attrs.field(default=None, validator=_text)
    trust_remote_code: bool = attrs.field(default=False, validator=flag())

    def to_plain(self) -> dict[str, Any]:
        """Return plain data of the settings that are not at their defaults; empty if all are."""
        return {
            field.name: each for field in attrs.fields(Loading) if (each := getattr(self, field.name)) != field.default
        }

    @property
    def package(self) -> str | None:
        """Return the package that quantizes, which has a say in a run's result; None without quantization."""
        return None if self.quantization is None else _PACKAGES[self.quantization][1]

    def check(self, spec: str, *, hub: bool) -> None:
        """Raise LrkitError if a model cannot be loaded so on this machine; nothing is fetched to find out.

        Args:
            spec: the model's name, as the user gave it.
            hub: whether it comes from the hub.
        """
        if self.revision is not None and not hub:
            raise LrkitError(
                f'model "{spec}" has no revisions, since it does not come from the hub: leave model.revision out'
            )
        if self.attn_implementation == _FLASH and not _is_installed("flash_attn"):
            raise LrkitError(f"model.attn_implementation={_FLASH} needs flash-attn and a GPU: pip install flash-attn")
        needed = [] if self.quantization is None else [_PACKAGES[self.quantization], ("accelerate", "accelerate")]
        for module, package in needed:
            if not _is_installed(module):
                raise LrkitError(f"model.quantization={self.quantization} needs {package}: pip install {package}")

    def asked(self) -> dict[str, Any]:
        """Return what transformers must be told to find a model's files: arguments of any ``from_pretrained``."""
        # Without an answer transformers would ask on stdin.
        found: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        return found | ({} if self.revision is None else {"revision": self.revision})

    def attention(self) -> dict[str, Any]:
        """Return what transformers must be told of a model's attention; nothing for the model's own."""
        return {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}

    def settings(self, config: PretrainedConfig, spec: str, head: list[str]) -> dict[str, Any]:
        """Return what transformers must be told beyond `asked` to load a model's weights.

        Args:
            config: the model's.
            spec: its name, as the user gave it.
            head: names of the modules that are new, which are not quantized.

        Raises:
            LrkitError: the weights are quantized already, and are to be quantized another time.
        """
        import torch

        found = {"dtype": "auto" if self.dtype == "auto" else getattr(torch, self.dtype), **self.attention()}
        if self.quantization is None:
            return found
        if getattr(config, "quantization_config", None) is not None:
            raise LrkitError(f'model "{spec}" is quantized already: leave model.quantization out')
        return found | {"quantization_config": _scheme(self.quantization, found["dtype"], head or None)}


def loading_from(plain: Mapping[str, Any], where: str = "model") -> Loading:
    """Make a `Loading` from plain data.

    Args:
        plain: settings by name.
        where: the name that errors call them by: ``model.dtype``.

    Raises:
        LrkitError: an unknown setting (with the nearest right one), or a wrong value.
    """
    try:
        return Loading(**check_settings(Loading, dict(plain), where))
    except LrkitError as error:
        raise LrkitError(str(error).replace("Loading.", f"{where}.")) from None


def without_trust(plain: Any, where: str) -> None:
    """Refuse a study file that would have code from a repository run: that is for the command line to say.

    Args:
        plain: the file's table ``[loading]``, or anything that it has in its place.
        where: the file.

    Raises:
        LrkitError: the table has the key.
    """
    if isinstance(plain, Mapping) and "trust_remote_code" in plain:
        raise LrkitError(
            f"{where}: loading.trust_remote_code: no file makes code from a repository run; look at the code, and say "
            "--trust-remote-code on the command line"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the package around it is missing
        return False


def _scheme(name: str, dtype: Any, kept: list[str] | None) -> Any:
    """Return transformers' record of a scheme of quantization, with the modules that are kept out of it."""
    import torch
    import transformers

    if name == "torchao-int8":
        plain = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
        return transformers.TorchAoConfig(plain, modules_to_not_convert=kept)
    if name.startswith("quanto-"):
        return transformers.QuantoConfig(weights=name.removeprefix("quanto-"), modules_to_not_convert=kept)
    record: Any = transformers.BitsAndBytesConfig
    if name == "bnb-8bit":
        return record(load_in_8bit=True, llm_int8_skip_modules=kept)
    computed = torch.float32 if dtype == "auto" else dtype
    return record(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed, llm_int8_skip_modules=kept
    )
