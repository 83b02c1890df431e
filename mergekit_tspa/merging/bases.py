"""Whether adapters belong to the base that they are merged on, as far as their configurations say."""

import logging
import os
from collections.abc import Iterable

from mergekit_tspa.adapters import Adapter

LOG = logging.getLogger(__name__)


def other_base(adapter: Adapter, base: str | None) -> str | None:
    """A sentence on an adapter that names another base; None where the last parts of the names are the
    same.
    """
    if not adapter.base or not base or _last(adapter.base) == _last(base):
        return None
    return f"{adapter.name}: it says that it was trained on {adapter.base}, and the merge is on {base}"


def warn_of_other_bases(adapters: Iterable[Adapter], base: str | None) -> None:
    """Say so once of each adapter that names another base; its shapes fit, or it would have been refused."""
    for adapter in adapters:
        if said := other_base(adapter, base):
            LOG.warning("%s", said)


def warn_of_different_bases(adapters: Iterable[Adapter]) -> None:
    """Where no base is given: say so once of each adapter that names another base than the first that names
    one.
    """
    first: Adapter | None = None
    for adapter in adapters:
        if first is None:
            first = adapter if adapter.base else None
        elif other_base(adapter, first.base):
            LOG.warning(
                "%s: it says that it was trained on %s, and %s on %s",
                adapter.name,
                adapter.base,
                first.name,
                first.base,
            )


def _last(path: str) -> str:
    return os.path.basename(os.path.realpath(path) if os.path.exists(path) else path.rstrip("/")).lower()
