"""The model card of an export: a README.md from which others know what it is and how to load it."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lrkit import __version__
from lrkit.adapt.adapted import Adapted
from lrkit.compose import to_plain
from lrkit.peft.exporting import Exported

_LIST = 24  # more layers than these are folded away


def card(adapted: Adapted, exported: Exported, repo_id: str, base_model: str | None = None) -> ModelCard:
    """Write the model card of an export.

    Its metadata name the library that loads it, the base model and how it relates to it, as the hub reads them. Its text has
    the method with its settings, the budget, each layer's rank and the lines that load it.

    Args:
        adapted: the handle that was exported.
        exported: what `export` returned.
        repo_id: where it is going to be.
        base_model: the base's name on the hub; None for the one in the model's config, unless that is a folder.
    """
    base = base_of(adapted) if base_model is None else base_model
    merged = exported.to == "merged"
    tags = ["lrkit"]
    if not merged:
        tags.append("adalora" if exported.to == "peft-adalora" else "lora")
    related: dict[str, Any] = {}
    if base is not None:
        related = {"base_model": base, "base_model_relation": "finetune" if merged else "adapter"}
        tags += [] if merged else [f"base_model:adapter:{base}"]
    data = ModelCardData(library_name="transformers" if merged else "peft", tags=tags, **related)
    text = "\n".join(_text(adapted, exported, repo_id, base))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def base_of(adapted: Adapted) -> str | None:
    """Return the name in the model's config, if it may be one on the hub."""
    name = getattr(getattr(adapted.model, "config", None), "name_or_path", "") or ""
    return None if refusal(name) is not None or os.path.exists(name) else name


def refusal(name: str) -> str | None:
    """Say why the hub does not take a name of a repository; None if it does."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error).rstrip(".")
    return None


def _text(adapted: Adapted, exported: Exported, repo_id: str, base: str | None) -> Iterator[str]:
    known = "a base model that its config does not name" if base is None else f"[{base}](https://huggingface.co/{base})"
    what = "A model that was fine-tuned from" if exported.to == "merged" else "An adapter of"
    total = "" if adapted.total_steps is None else f" of {adapted.total_steps:,}"
    yield f"# {repo_id.rpartition('/')[2]}\n"
    yield (
        f"{what} {known}, trained for {adapted.step:,}{total} optimizer steps with lrkit and exported as `{exported.to}`. "
        f"Read back, its logits were within {exported.difference:.1g} of the trained model's (the largest was "
        f"{exported.largest:.3g}).\n"
    )
    yield "## Load it\n"
    yield from _loading(adapted, exported, repo_id, base)
    yield "## Method\n"
    yield "| part | name | settings |\n|---|---|---|"
    yield from _parts(to_plain(adapted.method))
    summary = adapted.summary()
    head = f", and {summary.head:,} of the head (`{'`, `'.join(adapted.head)}`)" if adapted.head else ""
    yield f"\nTrainable parameters: {summary.start:,} at first, {summary.now:,} at the end{head}.\n"
    for policy, last in {decision.policy: decision for decision in adapted.history}.items():
        which = f"Policy {policy}: the" if policy else "The"
        yield (
            f"{which} last decision, after step {last.step:,}, kept {last.kept:,} of {last.units:,} units; its budget was "
            f"{last.budget:,} {last.amount}.\n"
        )
    if exported.ranks:
        yield from _ranks(exported.ranks)
    yield "## Versions\n"
    yield f"lrkit {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"


def _loading(adapted: Adapted, exported: Exported, repo_id: str, base: str | None) -> Iterator[str]:
    model: Any = adapted.model
    kind, name = type(model), base or "BASE"
    known = kind.__module__.startswith("transformers.")
    labels = f", num_labels={model.config.num_labels}" if adapted.head and known else ""
    made = f'{kind.__name__}.from_pretrained("{name}"{labels})' if known else "..."
    imports = f"from transformers import {kind.__name__}\n" if known else ""
    what = "" if known else f"  # the {kind.__name__} that it was attached to"
    if exported.to == "merged":
        yield f'```python\n{imports}\nmodel = {kind.__name__}.from_pretrained("{repo_id}")\n```\n'
        return
    if exported.to == "vllm-lora":
        first = ""
        if any(file.startswith("base/") for file in exported.files):  # it holds the trained head
            first, name = f"hf download {repo_id} --local-dir adapter\n", "adapter/base"
            repo_id = "adapter"
        yield f"```bash\n{first}vllm serve {name} --enable-lora --lora-modules adapter={repo_id}\n```\n"
        return
    yield "With PEFT:\n"
    yield f"```python\nfrom peft import PeftModel\n{imports}\nbase = {made}{what}"
    yield f'model = PeftModel.from_pretrained(base, "{repo_id}")\n```\n'
    yield "With lrkit, to go on training by any method:\n"
    yield f"```python\nimport lrkit\nfrom huggingface_hub import snapshot_download\n{imports}\nbase = {made}{what}"
    yield f'adapted = lrkit.from_peft(base, snapshot_download("{repo_id}"))\n```\n'


def _parts(plain: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for part, own in plain.items():
        if part == "also":
            for index, policy in enumerate(own):
                yield from _parts(policy, f"also.{index}.")
        elif own is not None:
            settings = ", ".join(f"`{key}={_value(value)}`" for key, value in own.items() if key != "name")
            yield f"| {before}{part} | `{own['name']}` | {settings} |"


def _value(value: Any) -> str:
    return "a table, see below" if isinstance(value, Mapping) else json.dumps(value).replace("|", "\\|")


def _ranks(ranks: Mapping[str, int]) -> Iterator[str]:
    """List each layer's rank; many of them folded."""
    fold = len(ranks) > _LIST
    yield f"## Ranks\n\n{sum(ranks.values()):,} components in {len(ranks):,} layers.\n"
    if fold:
        yield "<details><summary>Each layer's rank</summary>\n"
    yield "| layer | rank |\n|---|---|"
    yield from (f"| `{name}` | {rank} |" for name, rank in ranks.items())
    yield "\n</details>\n" if fold else ""
