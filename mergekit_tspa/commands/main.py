"""`mergekit-tspa`: mergekit's own commands with the plugin loaded for certain, and the method table."""

import errno
import gc
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import mergekit_tspa
from mergekit_tspa.commands.command import Command, NamedPath
from mergekit_tspa.errors import InputError

_STOCK = {  # commands of mergekit, and what they do here
    "yaml": "mergekit-yaml with these methods loaded",
    "multi": "mergekit-multi with these methods loaded",
}
_OWN = {  # command: its module, and what it does
    "adapter": (
        "mergekit_tspa.commands.merge_adapter",
        "Merge to one PEFT adapter, without reading or writing a model.",
    ),
    "align": (
        "mergekit_tspa.commands.align_model",
        "Bring a whole model's units and heads to the places of another's.",
    ),
    "batch": (
        "mergekit_tspa.commands.run_batch",
        "Merge every recipe of a directory, here or on many machines.",
    ),
    "inspect": (
        "mergekit_tspa.commands.inspect_adapters",
        "What adapters are, how they agree and fight, and what a merge keeps.",
    ),
    "calibrate": (
        "mergekit_tspa.commands.calibrate_adapters",
        "Statistics of each adapter's texts, to merge without the texts.",
    ),
    "score": (
        "mergekit_tspa.commands.score_merges",
        "Compare merges: which one answers texts best, and how sure that is.",
    ),
    "tune": (
        "mergekit_tspa.commands.tune_merge",
        "Search for the merge that answers best, and write its recipe.",
    ),
    "check": (
        "mergekit_tspa.commands.check_recipe",
        "Say what a merge would do, and all that is wrong with its recipe.",
    ),
}


class _Commands(click.Group):
    """Loads the commands that need mergekit when they are asked for: importing it takes seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_STOCK, *_OWN])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _STOCK and cmd_name not in _OWN:
            return super().get_command(ctx, cmd_name)
        mergekit_tspa.install()
        # What is imported lasts; searching it for garbage costs a short command a third of its time.
        gc.disable()
        try:
            return _load(cmd_name)
        except InputError as error:
            raise click.ClickException(error.message) from error
        finally:
            gc.freeze()
            gc.enable()

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:  # a file that is not there, a name that is too long, a full disk
            if error.errno == errno.EPIPE:  # nobody reads on, as after `| head`; click ends quietly
                raise
            raise click.ClickException(str(error)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [*_STOCK.items(), *((name, what) for name, (_, what) in _OWN.items())]
        rows += [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))


def _load(name: str) -> click.Command:
    """
    Raises:
        InputError: mergekit does not fit.
    """
    from mergekit_tspa.plugin import compat

    if name in _STOCK:
        from mergekit_tspa.commands.options import check_values

        command = compat.stock_command(name)
        check_values(command.params)
        return command
    compat.require()
    module, _ = _OWN[name]
    return import_module(module).main


@click.group(cls=_Commands)
@click.version_option(mergekit_tspa.__version__, prog_name="mergekit-tspa")
def main() -> None:
    """LoRA-native merge methods for mergekit."""
    if os.environ.get("COLUMNS") == "0":  # as some terminals say that do not know; nothing would be printed
        del os.environ["COLUMNS"]
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack letters of names and tables
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@main.command(cls=Command)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--markdown", is_flag=True, help="As the pages in docs have it.")
def methods(names: tuple[str, ...], markdown: bool) -> None:
    """Print the table of methods, or all about those called NAME."""
    if not names and not markdown:
        from mergekit_tspa.commands.method_table import draw

        draw()
        return
    from rich.console import Console
    from rich.markdown import Markdown

    from mergekit_tspa.methods import table

    if markdown:
        click.echo(table.parameter_table(names) if names else table.markdown())
        return
    console = Console()
    for name in names:
        console.print(Markdown(table.about(name)))


@main.command("emr-task", cls=Command)
@click.argument("merged", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("task")
@click.option("--out", type=NamedPath(path_type=Path), help="Where to write; MERGED-TASK by default.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def emr_task(merged: Path, task: str, out: Path | None, quiet: bool) -> None:
    """Rebuild the model of one TASK from MERGED, the output of an emr method."""
    from mergekit_tspa.plugin.emr_task import rebuild

    merged = merged.resolve()
    rebuild(merged, task, out or merged.with_name(f"{merged.name}-{Path(task).name}"), quiet)
