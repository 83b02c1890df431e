"""`mergekit-tspa tune`."""

import math
from pathlib import Path
from tempfile import TemporaryFile

import click
import torch
from rich.console import Console

from mergekit_tspa.base.files import replaced
from mergekit_tspa.commands.command import NamedPath
from mergekit_tspa.commands.options import COMPUTING, PLANNING, TALKING, MergeCommand, report_missing
from mergekit_tspa.commands.score_merges import judging_texts
from mergekit_tspa.errors import InputError
from mergekit_tspa.plugin.compat import MergeOptions, add_merge_options
from mergekit_tspa.progress import Bar


@click.command("tune", cls=MergeCommand, matters=(*PLANNING, *COMPUTING, *TALKING))
@click.argument("config_file", metavar="RECIPE", type=NamedPath(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    required=True,
    type=NamedPath(dir_okay=False, path_type=Path),
    help="The recipe that is found is written here, such as best.yml; the trials (best.trials) and a "
    "report (best-report) lie beside it.",
)
@click.option(
    "--minutes",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="For the search, all its runs together.  Loading the base comes on top.",
)
@click.option(
    "--goal",
    default="mean",
    show_default=True,
    type=click.Choice(["mean", "worst"]),
    help="What the search makes large: the share of an adapter's gain that the merge retains, as the mean "
    "over the adapters, or that of the adapter of which least is retained.",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    help="The result must be one adapter of at most this rank.  By default it may have any, or be a model.",
)
@judging_texts
@click.option(
    "--general-loss-at-most",
    type=float,
    metavar="LOSS",
    help="Merges with a higher loss on the texts of --general do not count.  `score --general` says what the "
    "base has.",
)
@click.option(
    "--storage",
    type=NamedPath(dir_okay=False, path_type=Path),
    help="Holds the trials; by default a file beside --out.  With it the same command goes on where it was, "
    "after Ctrl-C or a kill.",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Try several merges at once on the Ray cluster at HOST:PORT, or auto; without an address on all "
    "cores of this machine.  Each worker has as many cores as --num-threads says, 1 by default.",
)
@add_merge_options
def main(
    merge_options: MergeOptions,
    config_file: Path,
    out: Path,
    minutes: float,
    goal: str,
    rank: int | None,
    held_out: dict[str, str],
    general: str | None,
    general_loss_at_most: float | None,
    storage: Path | None,
    ray: str | None,
) -> None:
    """Search for the merge of RECIPE's adapters that answers texts best, and write it as a recipe.

    Methods, their parameters, lambda and the weights of the adapters are varied.  A third of the texts is
    kept from the search; it judges what was found, and says how sure that is.  With `examples` in the recipe,
    methods that look at texts take part.

    No merged model is written.  Ctrl-C ends the search with the best merge so far.
    """
    try:
        from mergekit_tspa.insight.page import check_out
        from mergekit_tspa.plugin.tune_recipe import tune_recipe
        from mergekit_tspa.tuning.problem import Problem
        from mergekit_tspa.tuning.tune_page import GENERATOR, PAGE, write_search
        from mergekit_tspa.tuning.tune_report import sentences
    except ModuleNotFoundError as error:
        if error.name == "optuna":
            raise InputError(
                "a search needs optuna, which is not installed; run pip install 'mergekit-tspa[tune]'"
            ) from error
        raise report_missing(error) from error

    merge_options.apply_global_options()
    if out.suffix not in (".yml", ".yaml"):
        raise InputError(f"{out}: name the recipe that is to be written, such as best.yml")
    if out.exists() and out.resolve() == config_file.resolve():
        raise InputError(f"{out}: it is the recipe that the search begins with; name another file")
    report = out.with_name(f"{out.stem}-report")
    check_out(report, PAGE, GENERATOR)
    _check_writable(out)
    if not math.isfinite(minutes):
        raise InputError(
            f"--minutes {minutes} is no time for a search; give a number, and end it with Ctrl-C"
        )
    problem = Problem(goal, general_loss_at_most, rank, merge_options.random_seed or 0)  # type: ignore[arg-type]
    storage = storage or out.with_suffix(".trials")
    if storage.resolve() in (out.resolve(), config_file.resolve()):
        raise InputError(
            f"{storage}: it is a recipe, and trials cannot be kept there; name another --storage"
        )
    with torch.no_grad(), Bar(merge_options.quiet) as bar:
        tuning = tune_recipe(
            config_file, merge_options, held_out, general, problem, minutes, storage, ray, bar.update
        )
    said = sentences(tuning.found)
    # A name with a line break must not end the comment.
    header = "".join(f"# {' '.join(sentence.split())}\n" for sentence in said[:3])
    with replaced(out) as file:
        file.write_text(header + tuning.recipe, encoding="utf-8")
    page = write_search(tuning.found, tuning.judge, tuning.split, tuning.base, report)
    console = Console(markup=False, highlight=False)
    for sentence in said:
        console.print(f"- {sentence}", soft_wrap=True)
    console.print(f"Recipe: {out}\nReport: {page}", soft_wrap=True)


def _check_writable(out: Path) -> None:
    """Before the search, not after it.

    Raises:
        InputError: nothing can be written beside `out`.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InputError(
            f"{out}: it cannot be written there ({error.strerror}); name another --out"
        ) from error
