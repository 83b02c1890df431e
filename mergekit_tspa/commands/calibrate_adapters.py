"""`mergekit-tspa calibrate`."""

from pathlib import Path

import click

from mergekit_tspa.commands.command import NamedPath
from mergekit_tspa.commands.options import COMPUTING, PLANNING, TALKING, MergeCommand
from mergekit_tspa.plugin.calibrate import calibrate
from mergekit_tspa.plugin.compat import MergeOptions, add_merge_options
from mergekit_tspa.plugin.recipe_file import read_recipe


@click.command("calibrate", cls=MergeCommand, matters=(*PLANNING, *COMPUTING, *TALKING))
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=NamedPath(file_okay=False, path_type=Path), help="A directory.")
@click.option("-k", default=64, show_default=True, type=click.IntRange(1), help="Columns kept of an input.")
@add_merge_options
def main(merge_options: MergeOptions, config_file: Path, out: Path, k: int) -> None:
    """Read each adapter's examples and write NAME.calibration.safetensors, statistics that hold no text.

    With `calibration: FILE` in place of `examples` a recipe of regmean needs neither texts nor a model that
    runs.
    """
    merge_options.apply_global_options()
    config, _ = read_recipe(config_file)
    for file in calibrate(config, merge_options, out, k):
        click.echo(f"{file} ({file.stat().st_size / 2**20:.1f} MiB)")
