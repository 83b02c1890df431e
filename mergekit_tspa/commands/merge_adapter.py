"""`mergekit-tspa adapter`."""

from pathlib import Path

import click

from mergekit_tspa.commands.command import NamedPath
from mergekit_tspa.commands.options import COMPUTING, PLANNING, TALKING, MergeCommand
from mergekit_tspa.errors import InputError
from mergekit_tspa.plugin.adapter_output import write_merged_adapter
from mergekit_tspa.plugin.compat import MergeOptions, add_merge_options
from mergekit_tspa.plugin.output import held
from mergekit_tspa.plugin.recipe_file import read_recipe


@click.command(
    "adapter",
    cls=MergeCommand,
    matters=(*PLANNING, *COMPUTING, *TALKING, "lazy_unpickle", "gpu_rich", "multi_gpu", "read_to_gpu"),
)
@click.argument("config_file", type=NamedPath(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_path", type=NamedPath(file_okay=False, path_type=Path))
@add_merge_options
def main(merge_options: MergeOptions, config_file: Path, out_path: Path) -> None:
    """Merge to one PEFT adapter: the recipe of a full merge, without reading or writing a model."""
    merge_options.apply_global_options()
    config, source = read_recipe(config_file)
    if (out_path / "config.json").exists():
        raise InputError(
            f"{out_path}: holds a model, and transformers would apply an adapter beside its config.json a "
            "second time; name another directory"
        )
    with held(out_path):
        write_merged_adapter(config, merge_options, out_path, source)
