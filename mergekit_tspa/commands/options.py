"""Commands that take mergekit's own options."""

import textwrap
from collections.abc import Sequence
from typing import Any

import click

from mergekit_tspa.commands.command import Command
from mergekit_tspa.plugin.compat import MergeOptions

PLANNING = ("transformers_cache", "trust_remote_code", "allow_crimes", "random_seed")
COMPUTING = ("cuda", "device", "num_threads")
TALKING = ("verbosity", "quiet")


class MergeCommand(Command):
    """Takes all options of mergekit-yaml, so that its command line can be repeated; explains what matters.

    Args:
        matters: fields of `MergeOptions` that change what the command does; its own options always do
    """

    def __init__(self, *args: Any, matters: Sequence[str], **attributes: Any):
        super().__init__(*args, **attributes)
        self.matters = frozenset(matters)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options that matter, and below them the names of the others."""
        explained, others = [], []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None or isinstance(parameter, click.Argument):
                continue
            if parameter.name in MergeOptions.model_fields and parameter.name not in self.matters:
                others += parameter.opts[:1]
            else:
                explained.append(record)
        with formatter.section("Options"):
            formatter.write_dl(explained)
        with formatter.section("Accepted as by mergekit-yaml, without effect here"):
            lines = textwrap.wrap(", ".join(others), formatter.width - 2, break_on_hyphens=False)
            formatter.write("".join(f"  {line}\n" for line in lines))
