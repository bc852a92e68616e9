"""The table of roles, by hand: `make roles` builds every family of transformers without storage and writes docs/roles.md.

A family that is not built is listed with its reason: a package that it asks for, or default settings that make no model.
"""

import collections
import os
import re
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import families
import transformers
from torch import nn
from transformers.utils import logging

import lrkit
from lrkit.adapt.targets import find_targets

PAGE = Path(__file__).parent.parent / "docs" / "roles.md"
SECONDS = 60
HEAD = """# Roles of layers by model family

`Target.role` says where a layer stands in a transformer's block (attention, FFN or other), and `Target.output` if it is the
last map of attention or FFN. AFLoRA freezes by it, and Houlsby's bottlenecks stand by it. Classes of the modules around a
layer say it, else the components of its name do. State spaces, recurrences and short convolutions mix tokens, and count as
attention.

`make roles` writes this page. It builds the base model of every family that `AutoModel` knows on the meta device, with
default sizes and at most {depth} layers per stack where the configuration has a field for it (transformers {version}), and
counts the linear maps that `targets="all-linear"` means. *Experts* are parameters of three dimensions; they are no linear
layers, and stand in none of the columns before.

{built} of {all} families are built and have linear maps in blocks: {attention} of their layers are attention, {ffn} FFN and
{other} other. In {none} of these families no layer is an output of attention or of FFN.

"""


class NoBlocks(Exception):
    """Raised if a model has no linear map in a block."""


def row(name):
    """Count a family's layers: attention, FFN, other, outputs of attention and FFN, experts; and name the others."""
    with families.alarm(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = families.build(name)
        try:
            found = find_targets(model, "all-linear")
        except lrkit.LrkitError as error:
            raise NoBlocks(str(error)) from None
    counts = collections.Counter(target.role for target in found)
    outputs = collections.Counter(target.role for target in found if target.output)
    others = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", target.name) for target in found if target.role == "other")
    experts = sum(
        p.ndim == 3 and "expert" in f"{path} {type(module).__name__}".lower()
        for path, module in model.named_modules()
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
        for p in module._parameters.values()
        if p is not None
    )
    return [counts["attention"], counts["ffn"], counts["other"], outputs["attention"], outputs["ffn"], experts], list(
        others
    )


def reason(error):
    """Say in one line why a family is not built."""
    words = re.sub(r" from '[^']*'", "", " ".join(str(error).split()))
    if package := re.search(r"requires the (\S+) library", words):
        return f"needs {package[1]}"
    return f"{type(error).__name__}: {words[:120]}".replace("|", "\\|").replace("<", "").replace(">", "")


def main():
    logging.set_verbosity_error()
    rows, none, gaps = {}, [], {}
    for name in families.families():
        try:
            rows[name] = row(name)
        except NoBlocks:
            none.append(name)
        except Exception as error:
            gaps.setdefault(reason(error), []).append(name)
        print(".", end="", flush=True)
    sums = [sum(counts[at] for counts, _ in rows.values()) for at in range(3)]
    text = HEAD.format(
        depth=families.DEPTH,
        version=transformers.__version__,
        built=len(rows),
        all=len(rows) + len(none) + sum(map(len, gaps.values())),
        attention=f"{sums[0]:,}",
        ffn=f"{sums[1]:,}",
        other=f"{sums[2]:,}",
        none=sum(not counts[3] and not counts[4] for counts, _ in rows.values()),
    )
    text += "| family | linear layers | attention (outputs) | FFN (outputs) | other | experts | names of the others |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for name, (counts, others) in rows.items():
        attention, ffn, other, out_attention, out_ffn, experts = counts
        told = ", ".join(f"`{each}`" for each in others[:3])
        told += f" and {len(others) - 3} more" if len(others) > 3 else ""
        text += f"| {name} | {attention + ffn + other} | {attention} ({out_attention}) | {ffn} ({out_ffn}) "
        text += f"| {other or ''} | {experts or ''} | {told} |\n"
    text += (
        "\n## Families without linear maps in blocks\n\nConvolutions alone, other classes of linear maps, or no list: "
    )
    text += f"{', '.join(none)}.\n"
    text += "\n## Families that are not built\n\n| why | families |\n|---|---|\n"
    for why, names in sorted(gaps.items(), key=lambda each: (-len(each[1]), each[0])):
        text += f"| {why} | {', '.join(names)} |\n"
    PAGE.write_text(text)
    print(f"\n{PAGE}: {len(rows)} families, {len(none)} without blocks, {sum(map(len, gaps.values()))} not built")


if __name__ == "__main__":
    main()
