"""The one exception of this package, and the hint that most of its messages need."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The recipe or one of its files cannot be merged; one sentence says the cause and the way out.

    Library users catch it as a `ValueError`.  Commands print `Error: <message>` and exit with 1 instead of
    showing a traceback.
    """

    def __init__(self, message: str):
        self.message = " ".join(message.split())
        super().__init__(self.message)


def nearest(name: str, known: Iterable[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """Known names that `name` may be a misspelling of, the most similar first."""
    spelt = {_folded(candidate): candidate for candidate in known}
    return [spelt[near] for near in difflib.get_close_matches(_folded(name), list(spelt), n=n, cutoff=cutoff)]


def _folded(name: str) -> str:
    """A name without the differences that are no other name: capitals, and `-` for `_`."""
    return name.casefold().replace("-", "_")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?`, or nothing where no known name is similar."""
    near = nearest(name, known)
    return f"; did you mean {near[0]}?" if near else ""


def reason_of(error: Exception) -> str:
    """The first line of what another library says, and the second where the first ends in a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
