"""Commands that take mergekit's own options."""

import textwrap
from collections.abc import Sequence
from typing import Any

import click

from mergekit_tspa.commands.command import Command
from mergekit_tspa.errors import InputError
from mergekit_tspa.plugin.compat import MergeOptions

PLANNING = ("transformers_cache", "trust_remote_code", "allow_crimes", "random_seed")
COMPUTING = ("cuda", "device", "num_threads")
TALKING = ("verbosity", "quiet")


_REPORT = ("jinja2", "matplotlib", "numpy")  # the extra `report`, which nothing else needs


def report_missing(error: ModuleNotFoundError) -> Exception:
    """What is raised where a library is not there: a sentence, if a report needs it, and else the error."""
    if error.name not in _REPORT:
        return error
    return InputError(
        f"a report needs {error.name}, which is not installed; run pip install 'mergekit-tspa[report]'"
    )


class _ShardSize(click.ParamType):
    """mergekit's own type of `--out-shard-size`, which shows a traceback for other values."""

    name = "size"

    def __init__(self, own: click.ParamType):
        self.own = own

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number of parameters."""
        try:
            return self.own.convert(value, param, ctx)
        except (ValueError, IndexError):
            self.fail(f"{value!r} is no number of parameters; write 500000, 500K, 500M or 5B", param, ctx)


# Options whose values mergekit does not check.
_RANGES = {
    "num_threads": click.IntRange(1, 4096),
    "random_seed": click.IntRange(0, 2**32 - 1),  # of numpy
}


def check_values(parameters: Sequence[click.Parameter]) -> None:
    """Let options of mergekit refuse values with which it would stop in a traceback."""
    for parameter in parameters:
        if parameter.name == "out_shard_size" and not isinstance(parameter.type, _ShardSize):
            parameter.type = _ShardSize(parameter.type)
        else:
            parameter.type = _RANGES.get(parameter.name or "", parameter.type)


class MergeCommand(Command):
    """Takes all options of mergekit-yaml, so that its command line can be repeated; explains what matters.

    Args:
        matters: fields of `MergeOptions` that change what the command does; its own options always do
    """

    def __init__(self, *args: Any, matters: Sequence[str], **attributes: Any):
        super().__init__(*args, **attributes)
        self.matters = frozenset(matters)
        check_values(self.params)

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
        if not others:
            return
        with formatter.section("Accepted as by mergekit-yaml, without effect here"):
            lines = textwrap.wrap(", ".join(others), formatter.width - 2, break_on_hyphens=False)
            formatter.write("".join(f"  {line}\n" for line in lines))
