"""Export a trained model, and check the export by reading it back."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lrkit.adapt.adapted import Adapted
from lrkit.errors import LrkitError, nearest
from lrkit.foreign import line_of
from lrkit.layers.dequantized import is_packed
from lrkit.models import experts_by, quiet_transformers
from lrkit.moves import umask
from lrkit.peft.draft import Draft
from lrkit.peft.formats import TARGETS
from lrkit.peft.twin import twin
from lrkit.process import swapped

TOLERANCE = 1e-6
"""How far logits may be apart, in float64 arithmetic; a share of the largest logit if that is above 1."""


@attrs.frozen(kw_only=True)
class Exported:
    """The files that `export` wrote, and how well they read back.

    Args:
        to: the target.
        folder: the folder.
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
    adapted model's on one batch. Both run in float64, so that a difference comes from the files, and not from the order in
    which sums are taken; quantized layers, which have no float64, are dequantized for it. If logits differ by more than
    `TOLERANCE`, the files are removed again.

    Args:
        adapted: the trained handle. It stays as it is.
        folder: a new or empty folder.
        to: ``"peft-lora"``: a LoRA for PEFT, with every layer's own rank and scale, and experts as its
            ``target_parameters``. ``"peft-adalora"``: an AdaLoRA for PEFT. ``"vllm-lora"``: a LoRA for vLLM, which knows
            one rank and one scale: scales are in B, and ranks are padded with zeros. vLLM takes no trained head from an
            adapter, so if a head was trained, ``base/`` holds the model to serve. ``"merged"``: a plain transformers model.
            A model that is written is a float one, without quantized layers.
        tokenizer: a transformers tokenizer, written beside a plain model; None for none.
        batch: keyword arguments of the model's forward for the check; None for random tokens.

    Returns:
        The folder, and how well its outputs agree.

    Raises:
        LrkitError: an unknown target, a folder that is not empty, a method that the format cannot hold, or an export that
            does not read back the same. Nothing is left in the folder then.
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
        inside.chmod(0o777 & ~umask())  # mkdtemp makes folders for their owner alone
        # Fresh adapters and heads are drawn on the way: the run that goes on must not notice.
        with torch.random.fork_rng(), _quiet():
            draft = Draft(to, adapted, adapted.original(dequantize=True), inside, folder.absolute(), tokenizer)
            expected = _expected(adapted, draft.plain, batch)
            ranks = TARGETS[to](draft)
            found = _logits(_read(draft), batch)
        difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
        allowed = TOLERANCE * max(1.0, largest)
        if not difference <= allowed:
            raise LrkitError(
                f"the export to {to} was removed: read back, its logits are off by {difference:.2g} "
                f"(the largest is {largest:.3g}), and {allowed:.2g} is allowed{_rounding(adapted.model)}"
            )
        if folder.exists():
            folder.rmdir()
        inside.rename(folder)
    except BaseException:
        shutil.rmtree(inside, ignore_errors=True)
        raise
    files = tuple(sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()))
    return Exported(to=to, folder=folder, files=files, ranks=ranks, difference=difference, largest=largest)


def _read(draft: Draft) -> nn.Module:
    try:
        return draft.read()
    except LrkitError:
        raise
    except Exception as error:  # PEFT's and transformers' own, of what they cannot load
        raise LrkitError(f"the export to {draft.to} was removed: it does not load again: {line_of(error)}") from error


def _expected(adapted: Adapted, plain: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of an adapted model; if its base is quantized, those of its adapters on the dequantized base."""
    if not any(map(is_packed, adapted.model.modules())):
        return _logits(adapted.model, batch, adapted.as_computed)
    other = twin(adapted, plain)
    logits = _logits(other.model, batch, other.as_computed)
    other.detach()
    return logits


def _rounding(model: nn.Module) -> str:
    narrow = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    if narrow:
        return f": the model's weights are {narrow.pop()}, which rounds ΔW; export it in float32 (--dtype float32)"
    return ". Where it is a little, it may be float32's rounding, above all of merged weights: try it in float64"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what PEFT and transformers say of weights that are about to be compared anyway."""
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        yield


def _tokens(model: nn.Module) -> dict[str, Tensor]:
    """Make a fixed batch of random tokens, without the special ones, the last two of the first row masked."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise LrkitError(f"{type(model).__name__} takes no tokens: give the check a batch of its own, batch={{...}}")
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls")}
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in special])
    length = min(16, (getattr(config, "max_position_embeddings", None) or 32) // 2)
    padding = getattr(config, "pad_token_id", None)
    shape = (1 if padding is None else 4, length)
    drawn = torch.randint(len(ordinary), shape, generator=torch.Generator().manual_seed(0))
    ids = ordinary[drawn].to(next(model.parameters()).device)
    mask = torch.ones_like(ids)
    if padding is not None:
        ids[0, -2:], mask[0, -2:] = padding, 0
    decoded = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, "attention_mask": mask, **decoded}


def _in_float64(model: nn.Module, as_computed: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """Put float64 copies in the places of a model's floating-point tensors for a while.

    `torch.func.functional_call` does so by name, and leaves its copies behind in a module that has two names.
    """
    return swapped(_wide(model, as_computed))


def _wide(model: nn.Module, as_computed: Callable[[Tensor], Tensor]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    wide: dict[int, Tensor] = {}
    for module in list(model.modules()):
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if tensor is not None and tensor.is_floating_point():
                    if id(tensor) not in wide:
                        wide[id(tensor)] = as_computed(tensor).detach().double()
                    yield table, name, wide[id(tensor)]


@torch.no_grad()
def _logits(
    model: nn.Module, batch: Mapping[str, Tensor], as_computed: Callable[[Tensor], Tensor] = lambda p: p
) -> Tensor:
    """Return the model's logits (or first output) in evaluation, in float64; the model stays as it is."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        given = {
            name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in batch.items()
        }
        with experts_by(model, "eager"), _in_float64(model, as_computed):
            output = model(**given)
    finally:
        for module, training in modes:
            module.training = training
    if isinstance(output, Tensor):
        return output
    logits: Tensor | None = getattr(output, "logits", None)
    return output[0] if logits is None else logits
