"""A command that answers bad input with one sentence."""

from typing import Any

import click

from mergekit_tspa.errors import InputError


class NamedPath(click.Path):
    """A path that is not empty, as an unset variable of the shell is; that would be the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if value == "":
            self.fail("the name is empty; for the current directory write .", param, ctx)
        return super().convert(value, param, ctx)


class Command(click.Command):
    """Prints an `InputError` as `Error: <message>` and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise click.ClickException(error.message) from error
