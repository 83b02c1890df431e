"""How much memory a merge may take for the tensors that it works on."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil

GIB = 2**30
_limit: int | None = None  # bytes


def budget() -> int:
    """Bytes for all tensors that are worked on at the same time: what was asked for, or 1/32 of the
    machine's memory and at least one GiB.

    It depends on the machine and not on what else runs there, because it decides how many threads a tensor
    gets, and with that the last bits of its update.
    """
    return _limit or max(GIB, psutil.virtual_memory().total // 32)


@contextmanager
def limited(gib: float | None) -> Iterator[None]:
    """Work within this much memory; None leaves the budget as it is."""
    global _limit
    before = _limit
    _limit = before if gib is None else int(gib * GIB)
    try:
        yield
    finally:
        _limit = before
