"""`mergekit-tspa score`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from mergekit_tspa.commands.command import NamedPath
from mergekit_tspa.commands.options import COMPUTING, PLANNING, TALKING, MergeCommand, report_missing
from mergekit_tspa.plugin.compat import MergeOptions, add_merge_options
from mergekit_tspa.plugin.score_recipes import score_recipes
from mergekit_tspa.progress import Bar
from mergekit_tspa.scoring.scores import NEW_TOKENS

HELD_OUT = (
    "A file of texts by which merges are judged on what adapter NAME is for; once for each adapter.  By "
    "default the recipe's held_out, or a third of its examples."
)
GENERAL = "A file of texts that no adapter was trained on, to see whether a merge harms what the base can do."


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


def judging_texts(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that judges by texts."""
    held_out = click.option(
        "--held-out", multiple=True, metavar="NAME=FILE", callback=texts_by_name, help=HELD_OUT
    )
    return held_out(click.option("--general", metavar="FILE", help=GENERAL)(command))


@click.command("score", cls=MergeCommand, matters=(*PLANNING, *COMPUTING, *TALKING))
@click.argument("inputs", metavar="RECIPE|ADAPTER|MODEL...", nargs=-1, required=True)
@judging_texts
@click.option(
    "--new-tokens",
    default=NEW_TOKENS,
    show_default=True,
    type=click.IntRange(0),
    help="Where a text has an `answer`, each model writes its own of at most so many tokens, and right ones "
    "are counted; 0 writes none.",
)
@click.option(
    "--out",
    type=NamedPath(path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Directory for score.html, score.json and a picture.",
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
    """Compare merges: which one answers texts best?

    Give one or more recipes of the same adapters, and any directories of adapters or models beside them.  The
    table has the base, each adapter alone, the plain sum of all, and every merge that you give.  It says how
    much of each adapter's gain over the base a merge retains (1: all of it, 0: nothing), and how sure that
    is.  The texts should be new to the adapters.

    No merged model is written.
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
