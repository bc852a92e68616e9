"""Files of allocations, and the allocation that a run ended with. No torch where its folder has a result.json."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrkit import toml
from lrkit.errors import LrkitError, nearest, shown
from lrkit.moves import replacing
from lrkit.reading import TOML_BYTES, is_folder, parse_json, parse_toml, read_json, read_text

if TYPE_CHECKING:
    from lrkit.adapt.summary import LayerSummary


def write(path: Path, plain: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write tables of whole numbers and of lists of them, by the file's ending, in one move. Returns the path."""
    if _is_json(path):
        text = json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    else:
        text = "\n".join(f"[{name}]\n{toml.table(table)}" for name, table in plain.items())
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def read(path: Path) -> Any:
    """Read a TOML or JSON file, by its ending. Raises LrkitError, with the path, if there is none or it cannot be read."""
    parse = parse_json if _is_json(path) else parse_toml
    try:
        return parse(read_text(path, TOML_BYTES), path)
    except FileNotFoundError:
        raise LrkitError(f"no allocation at {path}") from None


def _is_json(path: Path) -> bool:
    if path.suffix not in (".toml", ".json"):
        raise LrkitError(
            f"{path}: an allocation's file ends in .toml or .json{nearest(path.suffix, ('.toml', '.json'))}"
        )
    return path.suffix == ".json"


def in_effect(layers: "Iterable[LayerSummary]") -> dict[str, Any]:
    """Return the ranks of layers as plain data, with the layers' sizes if every one has them.

    The rank of a stack of experts is one expert's: the mean over its experts, rounded up. Sizes are all experts'.
    """
    every = list(layers)
    ranks: dict[str, Any] = {"ranks": {each.name: _per_map(each.rank, each.maps) for each in every}}
    sizes = {each.name: [each.maps * each.d_in, each.maps * each.d_out] for each in every if each.d_in and each.d_out}
    return {**ranks, "sizes": sizes} if len(sizes) == len(every) else ranks


def _per_map(rank: Any, maps: Any) -> Any:
    return -(-rank // maps) if isinstance(rank, int) and isinstance(maps, int) and maps > 1 else rank


def found_in(folder: Path) -> dict[str, Any]:
    """Return an allocation as plain data.

    Args:
        folder: of ``lrkit run --out``, of a study's cell, or one with ``lrkit.safetensors``.

    Raises:
        LrkitError: it is none of these, or its method has no ranks.
    """
    path = folder / "result.json"
    try:
        result = read_json(path)
    except FileNotFoundError:
        return _of_state(folder)
    summary = result.get("summary", result) if isinstance(result, Mapping) else None
    layers = summary.get("layers") if isinstance(summary, Mapping) else None
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, Mapping) for layer in layers):
        raise LrkitError(f"{path} is no result of a run: it has no list of layers")
    ranks, sizes = {}, {}
    for index, layer in enumerate(layers):
        name, rank = layer.get("name"), layer.get("rank")
        if not isinstance(name, str):
            raise LrkitError(f"{path}: layers[{index}].name must be a text, not {shown(name)}")
        if rank is None:
            raise LrkitError(f"{path}: {name} has no rank: the run's method has no rank components to allocate")
        maps = layer.get("maps", 1)
        ranks[name] = _per_map(rank, maps)
        size = [layer.get("d_in"), layer.get("d_out")]
        sizes[name] = [maps * n if isinstance(maps, int) and isinstance(n, int) and maps > 1 else n for n in size]
    known = all(size != [None, None] for size in sizes.values())
    return {"ranks": ranks, **({"sizes": sizes} if known else {})}


def _of_state(folder: Path) -> dict[str, Any]:
    """Return the allocation that a saved state has."""
    from lrkit.adapt import checkpoint

    if not is_folder(folder):
        raise LrkitError(
            f"no run at {folder}: give a folder of lrkit run --out, a study's cell, or one that was saved to"
        )
    with checkpoint.stored(folder) as stored:
        allocation = stored.meta.get("allocation") if isinstance(stored.meta, Mapping) else None
    if not isinstance(allocation, Mapping):
        raise LrkitError(
            f"{folder / checkpoint.FILE} has no allocation: its method has no components, or it is from before there were "
            "allocations; load it with lrkit.load, and take adapted.allocation()"
        )
    return dict(allocation)


__all__ = ["found_in", "in_effect", "read", "write"]
