"""`mergekit-tspa align`."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from mergekit_tspa.commands.command import Command, NamedPath
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.arguments import usable
from mergekit_tspa.plugin.align_checkpoint import check_out, open_aligned, open_turned, write_aligned
from mergekit_tspa.progress import Bar
from mergekit_tspa.symmetry.align import AlignedModel
from mergekit_tspa.symmetry.alignment_report import by_layer, summary
from mergekit_tspa.symmetry.blocks import DEFAULT_KINDS, kinds_of


@click.command("align", cls=Command)
@click.argument("model")
@click.option("--to", "anchor", required=True, help="The model that it is brought near to.")
@click.option("--out", type=NamedPath(path_type=Path), help="Where to write it; only measure by default.")
@click.option(
    "--by",
    default=", ".join(DEFAULT_KINDS),
    show_default=True,
    help="Which symmetries to use: permutation, rotation, scale, or all.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER",
    help="An adapter of MODEL, which turns with it and is written to OUT/adapters; may be repeated.",
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where permutations and rotations are found."
)
@click.option("--quiet", is_flag=True, help="No progress bar and no report.")
def main(
    model: str,
    anchor: str,
    out: Path | None,
    by: str,
    adapters: tuple[str, ...],
    device: str,
    quiet: bool,
) -> None:
    """Align a whole MODEL to another one: hidden units and heads in the same places, turned the same way.

    The aligned model computes the same function, so it takes the place of MODEL in any tool.
    """
    usable(device)
    if out is not None:
        check_out(out)
    elif adapters:
        raise InputError("--adapter: it is written beside the model; name a directory with --out")
    if not (kinds := kinds_of(by)):
        raise InputError("--by: name a symmetry: permutation, rotation, scale, or all")
    aligned = open_aligned(model, anchor, kinds, device)
    turned = [open_turned(adapter, aligned) for adapter in adapters]
    with Bar(quiet) as bar:
        if out is not None:
            write_aligned(aligned, out, bar.update, turned)
        for done, _ in enumerate(aligned.all_aligned()):
            bar.update("aligning", (done + 1) / len(aligned.blocks))
    if not quiet:
        draw(aligned)


def draw(aligned: AlignedModel) -> None:
    """Print how far each layer was from the anchor's, and what was left alone."""
    table = Table("layer", "what", title=f"{aligned.name} to {aligned.anchor.name}", title_justify="left")
    for column in ("in place", "distance before", "after"):
        table.add_column(column, justify="right")
    for row in by_layer(aligned.known):
        after = f"{row.after:.3f}" if row.turned else "the same"
        table.add_row(row.layer, row.what, f"{row.matched:.1%}", f"{row.before:.3f}", after)
    console = Console(markup=False, highlight=False)
    console.print(table)
    for sentence in (summary(aligned), *aligned.notes):
        console.print(f"- {sentence}.", soft_wrap=True)
