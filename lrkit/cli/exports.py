"""``lrkit export``: write a trained run for PEFT, vLLM or transformers."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from lrkit.cli import screen
from lrkit.cli.folders import new_folder
from lrkit.cli.options import Json, Trust
from lrkit.errors import LrkitError, LrkitWarning, nearest
from lrkit.reading import read_json


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="What `lrkit run --out` wrote, or a study's cell: a folder with lrkit.safetensors."
        ),
    ],
    to: Annotated[str, typer.Option(help="peft-lora, peft-adalora, vllm-lora or merged.")],
    out: Annotated[Path | None, typer.Option(help="A new folder; with --push it may be left out.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The base model, if RUN's own is not at hand.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload it to the Hugging Face hub, with a model card.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a new repository is private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push: show what would be uploaded, without a network.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="With --push: the base's name on the hub, for the card.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the base model on the hub, if not RUN's own.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base's weights, if not RUN's own: float32, ...")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a trained run for PEFT, vLLM or transformers.

    The files are read back and compared: the same outputs, or nothing is left.
    """
    import attrs

    from lrkit import peft
    from lrkit.adapt import checkpoint
    from lrkit.adapt.adapted import load
    from lrkit.loop import state
    from lrkit.study.loading import loading_from
    from lrkit.study.pretrained import load_base

    if to not in peft.TARGETS:
        raise LrkitError(
            f'there is no export to "{to}"{nearest(to, peft.TARGETS)}; there are {", ".join(peft.TARGETS)}'
        )
    if push is None and (dry_run or private or base_model is not None):
        raise LrkitError("--dry-run, --private and --base-model are of --push USER/NAME")
    if out is None and push is None:
        raise LrkitError("say where to: --out DIR, --push USER/NAME, or both")
    if out is not None:
        new_folder(out)
    with checkpoint.stored(run) as stored:
        base = state.read({"meta": stored.meta, "tensors": {}}).base
        trained = {name.removeprefix("weight.") for name in stored.shapes}
    if base is None:
        raise LrkitError(f"{run} does not say which transformers model it was attached to: export it with lrkit.export")
    if dtype is not None:
        base = {**base, "dtype": loading_from({"dtype": dtype}).dtype}
    named, loading = _model_of(run)
    # Another model than the run's has revisions of its own; and no file says that code is to be run.
    how: dict[str, Any] = {name: loading[name] for name in ("revision", "attn_implementation") if name in loading}
    how = {} if model is not None else how
    how |= {} if revision is None else {"revision": revision}
    how |= {"trust_remote_code": True} if trust_remote_code else {}
    net, tokenizer = load_base(base, model or named, trained, loading_from(how))
    adapted = load(net, run)
    if to == "merged" and tokenizer is None:
        warnings.warn("the base model has no tokenizer, so none is written", LrkitWarning, stacklevel=1)
    pushed = None
    if push is not None:
        pushed = peft.push_to_hub(
            adapted,
            push,
            to=to,
            folder=out,
            private=private or None,
            base_model=base_model,
            dry_run=dry_run,
            tokenizer=tokenizer,
        )
        exported = pushed.exported
    else:
        assert out is not None
        exported = peft.export(adapted, out, to=to, tokenizer=tokenizer)
    if as_json:
        more = {} if pushed is None else {"pushed": {"repo_id": push, "url": pushed.url, "files": pushed.files}}
        screen.say_json(attrs.asdict(exported) | {"tolerance": peft.TOLERANCE} | more)
        return
    ranks = exported.ranks.values()
    low, high = (min(ranks), max(ranks)) if ranks else (0, 0)
    rank = f"rank {low}" if low == high else f"rank {low} to {high}"
    out_of = f" of {len(adapted.adapters)}" if len(ranks) < len(adapted.adapters) else ""
    what = f"{len(ranks)}{out_of} layers, {rank}" if ranks else "a plain model"
    screen.say(
        f"{what}; read back, logits are within {exported.difference:.1g} (the largest is {exported.largest:.3g})"
    )
    if out is not None:
        screen.say("written: " + " ".join(str(out / name) for name in exported.files))
    if pushed is not None:
        files = ", ".join(f"{name} ({size:,} bytes)" for name, size in pushed.files.items())
        screen.say(f"{push} would get {files}" if pushed.url is None else f"uploaded to {pushed.url}: {files}")


def _model_of(run: Path) -> tuple[str | None, dict[str, Any]]:
    """Return what a run was told as its model, and how it was loaded; None and nothing if it left no word."""
    for name in ("result.json", "config.json"):
        try:
            found = read_json(run / name)
        except (FileNotFoundError, LrkitError):
            continue
        if isinstance(found, dict) and isinstance(found.get("model"), str):
            loading = found.get("loading")
            return str(found["model"]), loading if isinstance(loading, dict) else {}
    return None, {}
