"""`mergekit-tspa`: mergekit's own commands with the plugin loaded for certain, and the method table."""

import gc
from importlib import import_module
from pathlib import Path

import click

import mergekit_tspa
from mergekit_tspa.commands.command import Command

_LAZY = {  # command: its module, and what it does
    "yaml": ("mergekit.scripts.run_yaml", "mergekit-yaml with these methods loaded"),
    "multi": ("mergekit.scripts.multimerge", "mergekit-multi with these methods loaded"),
    "adapter": (
        "mergekit_tspa.commands.merge_adapter",
        "Merge to one PEFT adapter, without reading or writing a model.",
    ),
    "inspect": (
        "mergekit_tspa.commands.inspect_adapters",
        "What adapters are, how they agree and fight, and what a merge keeps.",
    ),
    "check": (
        "mergekit_tspa.commands.check_recipe",
        "Say what a merge would do, and all that is wrong with its recipe.",
    ),
}


class _Commands(click.Group):
    """Loads mergekit's commands when they are asked for: importing them takes seconds."""

    def list_commands(self, ctx):
        return sorted([*super().list_commands(ctx), *_LAZY])

    def get_command(self, ctx, name):
        if name in _LAZY:
            mergekit_tspa.install()
            gc.disable()  # what is imported lasts; searching it for garbage costs a short command a third of its time
            try:
                return import_module(_LAZY[name][0]).main
            finally:
                gc.freeze()
                gc.enable()
        return super().get_command(ctx, name)

    def format_commands(self, ctx, formatter):
        rows = [(name, what) for name, (_, what) in _LAZY.items()]
        rows += [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))


@click.group(cls=_Commands)
@click.version_option(mergekit_tspa.__version__, prog_name="mergekit-tspa")
def main():
    """LoRA-native merge methods for mergekit."""


@main.command(cls=Command)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--markdown", is_flag=True, help="As README and docs have it.")
def methods(names: tuple[str, ...], markdown: bool):
    """Print the table of methods, or all about those called NAME."""
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    from mergekit_tspa.methods import table

    if markdown:
        click.echo(table.parameter_table(names) if names else table.markdown())
        return
    console = Console()
    for name in names:
        console.print(Markdown(table.about(name)))
    if names:
        return
    for section in table.sections():
        drawn = Table(title=section.title, show_lines=True, title_justify="left")
        drawn.add_column(table.plain(section.columns[0]), no_wrap=True)
        drawn.add_column("what it does")
        drawn.add_column("own parameters")
        for name, what, *facts, parameters, paper in section.rows:
            facts = [f"{column}: {fact}" for column, fact in zip(section.columns[2:], facts) if fact != "-"]
            cells = name, "\n".join([what, *facts, paper]), parameters.replace(", `", "\n`")
            drawn.add_row(*map(table.plain, cells))
        console.print(drawn)
    console.print("[bold]mergekit-tspa methods NAME[/] says what a method's parameters mean.")


@main.command("emr-task", cls=Command)
@click.argument("merged", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("task")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write; MERGED-TASK by default.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def emr_task(merged: Path, task: str, out: Path | None, quiet: bool):
    """Rebuild the model of one TASK from MERGED, the output of an emr method."""
    from mergekit_tspa.plugin.emr_task import rebuild

    merged = merged.resolve()
    rebuild(merged, task, out or merged.with_name(f"{merged.name}-{Path(task).name}"), quiet)
