"""Commands that take mergekit's own options."""

from mergekit.options import PrettyPrintHelp

from mergekit_tspa.commands.command import Command


class MergeCommand(Command, PrettyPrintHelp):
    """Shows mergekit's options in its sections."""
