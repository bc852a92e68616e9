"""The head: a model's own modules that train in full beside the adapters."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lrkit.adapt.grammar import entries
from lrkit.errors import LrkitError, LrkitWarning, listing, nearest
from lrkit.parameterizations.lowrank import layer_shape
from lrkit.precision import is_plain
from lrkit.shards import is_sharded

_RUNNING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)  # noqa: SLF001 (torch offers no other)
_HEADS = ("classifier", "score", "head", "classification_head", "qa_outputs")


def find_head(model: nn.Module, train_also: str | Sequence[str], *, exact: bool = False) -> list[str]:
    """Return the names of the modules that train in full beside the adapters.

    Args:
        model: the model.
        train_also: ``"auto"``: the task head that is new. Of a transformers model this is what it has outside its base
            model (classifier, score, ...) and the base's ``pooler`` before it; of a language model, whose head was
            pretrained, only what is as wide as the config's ``num_labels``; of a base model alone nothing. In other models,
            modules called classifier, score, head, classification_head or qa_outputs. A list: names, or name suffixes at a
            dot.
        exact: a list holds whole names only.

    Raises:
        LrkitError: an entry of the list matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if train_also == "auto":
        return _auto(model, modules)
    chosen: list[str] = []
    given = [train_also] if isinstance(train_also, str) else train_also
    for suffix, fits in entries(given, "train_also", '"auto" or a list of names', exact=exact):
        found = list(filter(fits, modules))
        if not found:
            endings = {name.rsplit(".", 1)[-1] for name in modules}
            raise LrkitError(
                f'train_also: "{suffix}" matches no module of {type(model).__name__}{nearest(suffix, endings)}'
            )
        chosen += found
    return chosen


def _auto(model: nn.Module, modules: dict[str, nn.Module], prefix: str = "") -> list[str]:
    """Return the names within a model of its new head. `prefix` is the model's own name in a larger one, with a dot."""
    poolers = [n for n, m in modules.items() if n.rsplit(".", 1)[-1] == "pooler" and list(m.parameters())]
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module):
        head = _of_transformers(model, base)
        if not head:
            _leave([prefix + pooler for pooler in poolers], type(model).__name__)
            return []
    else:
        # Models of transformers inside of another module speak for themselves.
        head = []
        within: tuple[str, ...] = ("\0",)
        for name, module in modules.items():
            if isinstance(getattr(module, "base_model", None), nn.Module) and not name.startswith(within):
                within = (*within, f"{name}.")
                inner = {n: m for n, m in module.named_modules() if n}
                head += [f"{name}.{each}" for each in _auto(module, inner, f"{prefix}{name}.")]
        own = [n for n, m in modules.items() if n.rsplit(".", 1)[-1] in _HEADS and list(m.parameters())]
        head += [n for n in own if not n.startswith(within)]
        poolers = [n for n in poolers if not n.startswith(within)]
    return [n for n in poolers if n not in head and not n.startswith(tuple(f"{h}." for h in head) or ("\0",))] + head


def _leave(poolers: Sequence[str], kind: str) -> None:
    if poolers:
        warnings.warn(
            f"{', '.join(poolers)} stays as it is: {kind} has no task head, and the loss may never reach a pooler (mean "
            f'pooling does not). Where it does, name it: train_also=["{poolers[0]}"]',
            LrkitWarning,
            stacklevel=7,
        )


def _of_transformers(model: nn.Module, base: nn.Module) -> list[str]:
    """Return the names of a transformers model's children that are a new task head."""
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    labels: Any = getattr(getattr(model, "config", None), "num_labels", None)
    inside = set() if base is model else {id(p) for p in base.parameters()}
    head = []
    for name, child in model.named_children():
        if child is base or any(m is embeddings for m in child.modules() if embeddings is not None):
            continue
        parameters = list(child.parameters())
        if not parameters or all(id(p) in inside for p in parameters):
            continue
        # Beside output embeddings, and in a model that is its own base, most modules were pretrained: a new one maps to
        # the labels that the config was given.
        known = embeddings is None and base is not model
        named = (embeddings is not None or name in _HEADS) and isinstance(labels, int)
        if known or (named and _maps_to(child, labels)):
            head.append(name)
    return head


def _maps_to(module: nn.Module, width: int) -> bool:
    """Return whether the last linear map of a module has so many outputs."""
    shapes = [shape for m in module.modules() if (shape := layer_shape(m)) is not None]
    return bool(shapes) and shapes[-1][1] == width


def head_parameters(model: nn.Module, head: Sequence[str]) -> Iterator[nn.Parameter]:
    """Yield every parameter of the head's modules once, also those that another module before them has (tied ones)."""
    yield from dict.fromkeys(p for name in head for p in model.get_submodule(name).parameters())


def tell_tied(model: nn.Module, head: Sequence[str]) -> None:
    """Warn if a parameter of the head is another module's too, which then changes with it."""
    mine = {id(p) for p in head_parameters(model, head)}
    prefixes = tuple(f"{name}." for name in head) or ("\0",)
    others = [
        name
        for name, module in model.named_modules()
        if not f"{name}.".startswith(prefixes) and any(id(p) in mine for p in module._parameters.values())
    ]
    if others:
        warnings.warn(
            f"{', '.join(head)} is tied to {', '.join(others)}, which trains and moves with it",
            LrkitWarning,
            stacklevel=5,
        )


def tell_left(model: nn.Module, train_also: str | Sequence[str], trains: Sequence[str]) -> None:
    """Warn if modules are named to train in full, and a task head that ``"auto"`` would have found is not among them.

    Args:
        model: the model.
        train_also: as `find_head` takes it. An empty list leaves the head alone on purpose.
        trains: names of the modules that train.
    """
    if train_also == "auto" or not train_also:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of poolers
        new = find_head(model, "auto")
    if new and not any(_overlap(name, each) for name in new for each in trains):
        warnings.warn(
            f'{", ".join(new)} stays as it is: train_also names other modules, and not the head, which train_also="auto" '
            "would train; if it is new, name it too",
            LrkitWarning,
            stacklevel=5,
        )


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def tell_running(model: nn.Module) -> None:
    """Warn of running statistics, which move in training mode although nothing of them is a parameter."""
    running = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _RUNNING) and module.running_mean is not None and module.momentum != 0
    ]
    if running:
        warnings.warn(
            f"{listing(running)}: running statistics move in training mode, and are neither saved with the adapters nor put "
            "back by detach; with momentum = 0 they stay",
            LrkitWarning,
            stacklevel=5,
        )


def check_trainable(tensors: Mapping[str, Tensor]) -> None:
    """Raise LrkitError for a parameter that is to train in full and cannot."""
    for name, p in tensors.items():
        if not (is_plain(p) or p.is_complex() or is_sharded(p)):
            raise LrkitError(
                f"{name} is a quantized {type(p).__name__} of {p.dtype}, and cannot train in full (a head is left "
                "out with train_also)"
            )
