"""`mergekit-tspa adapter`."""

import math
from pathlib import Path

import click

from mergekit_tspa.commands.command import NamedPath
from mergekit_tspa.commands.options import COMPUTING, PLANNING, TALKING, MergeCommand
from mergekit_tspa.merging.memory import limited
from mergekit_tspa.plugin.adapter_output import merge_to_adapter
from mergekit_tspa.plugin.compat import MergeOptions, add_merge_options


@click.command(
    "adapter",
    cls=MergeCommand,
    matters=(*PLANNING, *COMPUTING, *TALKING, "lazy_unpickle", "gpu_rich", "multi_gpu", "read_to_gpu"),
)
@click.argument("config_file", type=NamedPath(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_path", type=NamedPath(file_okay=False, path_type=Path))
@click.option(
    "--memory",
    type=click.FloatRange(min=0.1, max=2**20),
    help="GiB for the tensors that are merged at the same time; by default 1/32 of the machine's, "
    "and at least 1",
)
@add_merge_options
def main(merge_options: MergeOptions, config_file: Path, out_path: Path, memory: float | None) -> None:
    """Merge to one PEFT adapter: the recipe of a full merge, without reading or writing a model."""
    if memory is not None and math.isnan(memory):
        raise click.UsageError(f"--memory {memory} is no amount of memory; give a number of GiB")
    merge_options.apply_global_options()
    with limited(memory):
        merge_to_adapter(config_file, merge_options, out_path)
