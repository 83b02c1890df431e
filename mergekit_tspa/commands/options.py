"""Commands that take mergekit's own options."""

from mergekit_tspa.commands.command import Command
from mergekit_tspa.plugin.compat import PrettyPrintHelp


class MergeCommand(Command, PrettyPrintHelp):
    """Shows mergekit's options in its sections."""
