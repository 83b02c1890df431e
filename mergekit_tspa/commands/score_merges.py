"""`mergekit-tspa score`."""

from pathlib import Path

import click
import torch
from rich.console import Console

from mergekit_tspa.commands.command import NamedPath
from mergekit_tspa.commands.options import COMPUTING, PLANNING, TALKING, MergeCommand, report_missing
from mergekit_tspa.plugin.compat import MergeOptions, add_merge_options
from mergekit_tspa.plugin.score_recipes import score_recipes
from mergekit_tspa.progress import Bar
from mergekit_tspa.scoring.scores import NEW_TOKENS


def texts_by_name(
    _context: click.Context, _option: click.Parameter, given: tuple[str, ...]
) -> dict[str, str]:
    """`NAME=FILE` as a mapping.

    Raises:
        BadParameter: there is no `=`, or a name is there twice.
    """
    found: dict[str, str] = {}
    for one in given:
        name, equals, file = one.rpartition("=")
        if not (equals and name and file):
            raise click.BadParameter(f"{one!r} is not NAME=FILE")
        if name in found:
            raise click.BadParameter(f"{name} is there twice")
        found[name] = file
    return found


@click.command("score", cls=MergeCommand, matters=(*PLANNING, *COMPUTING, *TALKING))
@click.argument("inputs", metavar="RECIPE|ADAPTER|MODEL...", nargs=-1, required=True)
@click.option(
    "--held-out",
    multiple=True,
    metavar="NAME=FILE",
    callback=texts_by_name,
    help="Texts of adapter NAME to judge by; by default held_out of the recipe, or a third of examples.",
)
@click.option("--general", metavar="FILE", help="Texts that no adapter was trained on, so that harm is seen.")
@click.option(
    "--new-tokens",
    default=NEW_TOKENS,
    show_default=True,
    type=click.IntRange(0),
    help="Written at most to a text with an answer; 0: nothing.",
)
@click.option(
    "--out", type=NamedPath(path_type=Path), default=Path("report"), help="Directory of the report."
)
@add_merge_options
def main(
    merge_options: MergeOptions,
    inputs: tuple[str, ...],
    held_out: dict[str, str],
    general: str | None,
    new_tokens: int,
    out: Path,
) -> None:
    """Which merge answers best: the base, each adapter alone, their plain sum, every RECIPE, and what is on
    disk.

    Nothing is merged to disk.  The table says, for each adapter's texts, the loss per token and the share of
    the
    adapter's own gain that the merge retains.
    """
    try:
        from mergekit_tspa.insight.page import check_out
        from mergekit_tspa.scoring.score_page import GENERATOR, PAGE, write_scores
    except ModuleNotFoundError as error:
        raise report_missing(error) from error
    check_out(out, PAGE, GENERATOR)
    merge_options.apply_global_options()
    with torch.no_grad(), Bar(merge_options.quiet) as bar:
        report = score_recipes(inputs, merge_options, held_out, general, new_tokens, bar.update)
        page = write_scores(report, out)
    console = Console(markup=False, highlight=False)
    for table in report.tables():
        console.print(table)
    for sentence in report.sentences():
        console.print(f"- {sentence}", soft_wrap=True)
    console.print(f"Report: {page}", soft_wrap=True)
