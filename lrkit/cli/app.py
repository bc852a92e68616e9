"""The commands by name. A command imports what it needs when it runs, so that ``--help`` imports nothing heavy."""

from typing import Annotated

import typer

from lrkit.cli.demos import demo
from lrkit.cli.exports import export
from lrkit.cli.methods import list_methods, params
from lrkit.cli.plugins import doctor, new, plugins, show
from lrkit.cli.power import power
from lrkit.cli.reports import pack, report, unpack
from lrkit.cli.runs import run
from lrkit.cli.studies import ablate
from lrkit.cli.tuning import tune

_WITH_H = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="lrkit",
    help="Adaptive parameter-efficient fine-tuning, composed from four parts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_WITH_H,
)


def _version(asked: bool) -> None:
    if asked:
        from lrkit import __version__

        typer.echo(f"lrkit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Adaptive parameter-efficient fine-tuning, composed from four parts."""


for command in (demo, run, tune, ablate, report, pack, unpack, power, params):
    app.command()(command)
app.command(name="methods")(list_methods)
app.command()(export)

plugins_app = typer.Typer()
plugins_app.callback(invoke_without_command=True)(plugins)
for subcommand in (show, new, doctor):
    plugins_app.command()(subcommand)
app.add_typer(plugins_app, name="plugins")
