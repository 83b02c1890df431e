"""`mergekit-tspa`: mergekit's own commands with the plugin loaded for certain, and the method table."""

from importlib import import_module
from pathlib import Path

import click

import mergekit_tspa

_MERGEKIT = {"yaml": "mergekit.scripts.run_yaml", "multi": "mergekit.scripts.multimerge"}


class _Commands(click.Group):
    """Loads mergekit's commands when they are asked for: importing them takes seconds."""

    def list_commands(self, ctx):
        return sorted([*super().list_commands(ctx), *_MERGEKIT])

    def get_command(self, ctx, name):
        if name in _MERGEKIT:
            mergekit_tspa.install()
            return import_module(_MERGEKIT[name]).main
        return super().get_command(ctx, name)

    def format_commands(self, ctx, formatter):
        rows = [(name, f"mergekit-{name} with these methods loaded") for name in _MERGEKIT]
        rows += [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))


@click.group(cls=_Commands)
@click.version_option(mergekit_tspa.__version__, prog_name="mergekit-tspa")
def main():
    """LoRA-native merge methods for mergekit."""


@main.command()
def methods():
    """Print the table of methods and their parameters."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=True)
    table.add_column("method", no_wrap=True)
    table.add_column("what it does, rank of the result, paper")
    table.add_column("parameters beside weight", no_wrap=True)
    for method in mergekit_tspa.METHODS.values():
        parameters = "\n".join(f"{name} = {field.default}" for name, field in method.parameter_fields().items())
        table.add_row(method.name, f"{method.summary}\n{method.output}\n[dim]{method.paper}[/]", parameters)
    Console().print(table)


@main.command("emr-task")
@click.argument("merged", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("task")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write; MERGED-TASK by default.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def emr_task(merged: Path, task: str, out: Path | None, quiet: bool):
    """Rebuild the model of one TASK from MERGED, the output of an emr method."""
    from mergekit_tspa.graph.emr_task import rebuild

    rebuild(merged, task, out or merged.with_name(f"{merged.name}-{Path(task).name}"), quiet)
