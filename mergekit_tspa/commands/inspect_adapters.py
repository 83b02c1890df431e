"""`mergekit-tspa inspect`."""

import os
from pathlib import Path

import click
import torch
from rich.console import Console

from mergekit_tspa.commands.command import NamedPath
from mergekit_tspa.commands.options import COMPUTING, PLANNING, TALKING, MergeCommand, report_missing
from mergekit_tspa.errors import InputError
from mergekit_tspa.insight.gather import inspect_adapters
from mergekit_tspa.plugin.compat import MergeOptions, add_merge_options
from mergekit_tspa.plugin.inspect_recipe import inspect_recipe
from mergekit_tspa.plugin.recipe_file import read_recipe
from mergekit_tspa.progress import Bar
from mergekit_tspa.symmetry.blocks import kinds_of


@click.command(
    "inspect", cls=MergeCommand, matters=(*PLANNING, *COMPUTING, *TALKING, "lazy_unpickle", "gpu_rich")
)
@click.argument("inputs", metavar="CONFIG|ADAPTER...", nargs=-1, required=True)
@click.option(
    "--out", type=NamedPath(path_type=Path), default=Path("report"), help="Directory of the report."
)
@click.option("--base", help="Base model of ADAPTERs, needed for PiSSA and OLoRA; a recipe names its own.")
@click.option("--align", help="Align full models to the base first: permutation, rotation, scale, or all.")
@click.option(
    "--layers", type=click.IntRange(min=1), help="Merge this many evenly spaced layers of a CONFIG."
)
@add_merge_options
def main(
    merge_options: MergeOptions,
    inputs: tuple[str, ...],
    out: Path,
    base: str | None,
    align: str | None,
    layers: int | None,
) -> None:
    """What adapters are, how they agree and fight, and what a merge keeps of them, on one page with pictures.

    Takes a recipe, with its weights, gradients and filters, or adapters, each with weight 1.
    """
    try:
        from mergekit_tspa.insight.findings import findings
        from mergekit_tspa.insight.page import check_out, write_page
    except ModuleNotFoundError as error:
        raise report_missing(error) from error

    merge_options.apply_global_options()
    check_out(out)
    kinds_of(align or "")
    recipes = [path for path in inputs if os.path.isfile(path) or path.endswith((".yml", ".yaml"))]
    if layers and not recipes:
        raise InputError(
            "--layers: adapters alone are measured on all layers; it is for the merge of a recipe"
        )
    if recipes and len(inputs) > 1:
        raise InputError(f"{recipes[0]}: give one recipe alone, or directories of adapters")
    with torch.no_grad(), Bar(merge_options.quiet) as bar:
        if recipes:
            if base:
                raise InputError("--base: a recipe names its base itself; set base_model there")
            if align:
                raise InputError("--align: a recipe says so itself; set align under parameters there")
            inspection = inspect_recipe(read_recipe(Path(recipes[0]))[0], merge_options, layers, bar.update)
        else:
            inspection = inspect_adapters(inputs, base, merge_options.device, bar.update, align)
        sentences = findings(inspection)
        page = write_page(inspection, sentences, out, bar.update)
    if not merge_options.quiet:
        console = Console(markup=False, highlight=False)
        for sentence in sentences:
            console.print(f"- {sentence.text}", soft_wrap=True)
        console.print(f"Report: {page}", soft_wrap=True)
