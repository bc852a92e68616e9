"""``lrkit report``, ``lrkit pack`` and ``lrkit unpack``: show what came of a study, and let its cells travel."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lrkit.cli import screen
from lrkit.cli.findings import Findings
from lrkit.cli.options import Json


def pack(
    folder: Annotated[Path, typer.Argument(help="A study's folder; it may still be running.")],
    dest: Annotated[Path, typer.Argument(help="The folder of the pack, such as docs/replication/NAME.")],
    as_json: Json = False,
) -> None:
    """Pack a study's finished cells into one small file, without weights.

    cells.jsonl.gz, for lrkit ablate --packed on any machine, and cells.csv for people. Packing again replaces both.
    """
    from lrkit.study.pack import write_pack

    written, number = write_pack(folder, dest)
    if as_json:
        screen.say_json({"files": [str(path) for path in written], "cells": number})
        return
    size = written[0].stat().st_size / 1024
    screen.say(f"{number} {'cell' if number == 1 else 'cells'}, {size:,.0f} KiB: {' '.join(map(str, written))}")


def unpack(
    path: Annotated[Path, typer.Argument(metavar="PACK", help="A pack of `lrkit pack`, or its folder.")],
    folder: Annotated[Path, typer.Argument(help="The study's folder, which is not there yet.")],
    as_json: Json = False,
) -> None:
    """Make a study's folder of a pack, for lrkit report: neither data nor models are needed.

    To go on from a pack, with both: lrkit ablate --packed PACK. Weights and predictions are not in a pack.
    """
    from lrkit.study.taken import unpack as restored

    number = restored(path, folder)
    if as_json:
        screen.say_json({"folder": str(folder), "cells": number})
        return
    screen.say(f"{number} {'cell' if number == 1 else 'cells'}: {folder}")
    screen.say(f"its report: lrkit report {shlex.quote(str(folder))}")


def report(
    folder: Annotated[Path, typer.Argument(help="A study's folder; it may still be running.")],
    as_json: Json = False,
) -> None:
    """Write a study's report, in HTML and as tables.

    report.html, table.csv, table.md, table.tex and cells.csv, in the study's folder.
    """
    found = Findings.of(folder)
    if as_json:
        screen.say_json(found.to_plain())
        return
    found.show()
    screen.say("written: " + " ".join(str(path) for path in found.written))
