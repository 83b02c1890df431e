"""`mergekit-tspa batch`."""

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from mergekit_tspa.commands.command import NamedPath
from mergekit_tspa.commands.options import MergeCommand
from mergekit_tspa.plugin.batch import RECORD, Row, merge_all
from mergekit_tspa.plugin.compat import MergeOptions, add_merge_options


@click.command("batch", cls=MergeCommand, matters=tuple(MergeOptions.model_fields))
@click.argument("directory", metavar="DIR", type=NamedPath(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out",
    required=True,
    type=NamedPath(file_okay=False, path_type=Path),
    help=f"Takes a directory for each recipe, and {RECORD}.",
)
@click.option("--models", is_flag=True, help="Merge to models, as mergekit-yaml does, and not to adapters.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Merge on the Ray cluster at HOST:PORT, or auto; without an address on all cores of this machine. "
    "Each merge has as many cores as --num-threads says, 1 by default.",
)
@add_merge_options
@click.pass_context
def main(
    context: click.Context,
    merge_options: MergeOptions,
    directory: Path,
    out: Path,
    models: bool,
    ray: str | None,
) -> None:
    """Merge every recipe *.yml and *.yaml of DIR to a directory of its own.

    A recipe that fails does not stop the others. The same command again goes on with what is not complete.
    Exits with 0 only if all are merged.
    """
    merge_options.apply_global_options()
    rows = []
    for row, before in merge_all(directory, out, merge_options, models, ray):
        rows.append(row)
        if not merge_options.quiet:
            click.echo(f"{row.name}: {_said(row, before)}", err=True)
        for warning in row.warnings if ray is not None and not before else ():
            click.echo(f"{row.name}: warning: {warning}", err=True)
    _draw(rows, out)
    context.exit(1 if any(row.error for row in rows) else 0)


def _said(row: Row, before: bool) -> str:
    if row.error:
        return f"failed: {row.error}"
    return f"{row.result}, complete from before" if before else f"{row.result} in {row.seconds:.1f} s"


def _draw(rows: Sequence[Row], out: Path) -> None:
    table = Table("recipe", "what came out", title=str(out), title_justify="left")
    table.add_column("seconds", justify="right")
    for row in sorted(rows, key=lambda row: row.name):
        came = f"failed: {row.error}" if row.error else row.result
        table.add_row(row.name, came, "" if row.seconds is None else f"{row.seconds:.1f}")
    Console(markup=False, highlight=False).print(table)
