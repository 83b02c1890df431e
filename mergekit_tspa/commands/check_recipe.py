"""`mergekit-tspa check`."""

from pathlib import Path

import click
import torch
from rich.console import Console

from mergekit_tspa.commands.command import NamedPath
from mergekit_tspa.commands.options import PLANNING, MergeCommand
from mergekit_tspa.methods import MEAN_OF_MODELS, METHODS
from mergekit_tspa.methods.table import find
from mergekit_tspa.plugin.compat import (
    MergeConfiguration,
    MergeOptions,
    add_merge_options,
    registered_methods,
)
from mergekit_tspa.plugin.dry_run import DryRun, attempt, check, stage_problems
from mergekit_tspa.plugin.dry_run_mean import MeanDryRun, check_mean
from mergekit_tspa.plugin.recipe_file import read_documents, unknown_keys


@click.command(
    "check", cls=MergeCommand, matters=(*PLANNING, "out_shard_size", "safe_serialization", "num_threads")
)
@click.argument("config_file", type=NamedPath(path_type=Path))
@add_merge_options
@click.pass_context
def main(context: click.Context, merge_options: MergeOptions, config_file: Path) -> None:
    """Say what a merge would do, and all that is wrong with its recipe; no linear weight of the base is read.

    Takes the options of the merge itself.  Exits with 0 only if the merge would start.
    """
    torch.set_num_threads(
        merge_options.num_threads or 1
    )  # thousands of small products: threads would only wait
    console = Console(markup=False, highlight=False)
    documents = read_documents(config_file)
    names = [document.pop("name", None) for document in documents]
    problems, foreign, stages = [], [], []
    for name, document in zip(names, documents):
        place = f"{name or 'final merge'}: " if len(documents) > 1 else ""
        found: list[str] = []
        others = {other for other in names if isinstance(other, str) and other != name}
        config = attempt(found, config_file, lambda: MergeConfiguration.model_validate(document))  # noqa: B023
        if config and config.merge_method in (*METHODS, MEAN_OF_MODELS):
            look = check_mean if config.merge_method == MEAN_OF_MODELS else check
            report: DryRun | MeanDryRun = look(config, merge_options, others)
            report.warnings = [*unknown_keys(document), *report.warnings]
            console.print(place, end="")
            report.print(console)
            found += report.problems
        elif config and config.merge_method in {method.spec.name for method in registered_methods()}:
            foreign.append(
                f"{place}{config.merge_method} is mergekit's own method, and its recipe is not checked here"
            )
        elif config:
            attempt(found, config_file, lambda: find(config.merge_method))  # noqa: B023
        problems += [place + problem for problem in found]
        stages.append((name, config))
    problems += stage_problems(stages) if len(stages) > 1 else ()
    if len(foreign) == len(documents):
        problems += foreign
    else:
        for note in foreign:
            console.print(note, soft_wrap=True)
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    context.exit(1 if problems else 0)
