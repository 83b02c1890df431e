"""Exceptions that mergekit's own commands print as one sentence, where they would show a traceback."""

from click import ClickException

from mergekit_tspa.errors import InputError


class PrintedError(ClickException, InputError):  # type: ignore[misc]  # both set `message`, to the same
    """Bad input of a merge."""


class UnclearReference(ClickException, RuntimeError):
    """A reference to a model that cannot be read; no `ValueError`, which pydantic would collect."""
