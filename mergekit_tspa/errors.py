"""The one exception of this package."""

from click import ClickException


class InputError(ClickException, ValueError):
    """The recipe or one of its files cannot be merged; the message is one sentence with the cause and the way out.

    It is a `ValueError` for library users and a `ClickException` for mergekit's commands, which print such
    an exception as `Error: <message>` and exit with 1 instead of showing a traceback.
    """

    def __init__(self, message: str):
        ClickException.__init__(self, " ".join(message.split()))
