"""A command that answers bad input with one sentence."""

from typing import Any

import click

from mergekit_tspa.errors import InputError


class Command(click.Command):
    """Prints an `InputError` as `Error: <message>` and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise click.ClickException(error.message) from error
