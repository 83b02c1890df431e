"""Exact order statistics of streams that need not fit into memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mergekit_tspa.rules.update_statistics import Positions

Blocks = Callable[[], Iterable[tuple[Sequence[int], Tensor]]]
_HIGH = 1 << 16


def order_statistics(blocks: Blocks, positions: Positions) -> Tensor:
    """Values at the given positions of each stream's ascending order.

    A radix selection in two passes: float32 bit patterns, made monotone, are counted by their upper 16
    bits, then by the lower 16 bits inside the bins that hold the wanted positions.  It needs a histogram
    per stream and nothing else, whatever the length.

    Args:
        blocks: called once per pass; yields the numbers of streams and the next values of each of them,
            float32  # (m,), (m, ...)
        positions: from the length of a stream to the k wanted positions, counted from 0

    Returns:
        (streams, k), float32
    """
    high: dict[int, Tensor] = {}
    for s, key in _keys(blocks):
        counts = torch.bincount((key >> 16) + _HIGH // 2, minlength=_HIGH)
        high[s] = high[s] + counts if s in high else counts
    wanted: dict[int, tuple[Tensor, Tensor]] = {}
    low: dict[int, Tensor] = {}
    for s, counts in high.items():
        ends = counts.cumsum(0)
        at = torch.tensor(positions(int(ends[-1])), device=counts.device)
        bins = torch.searchsorted(ends, at, right=True)
        wanted[s] = bins - _HIGH // 2, at - (ends - counts)[bins]
        low[s] = torch.zeros(len(at), _HIGH, dtype=counts.dtype, device=counts.device)
    for s, key in _keys(blocks):
        upper = key >> 16
        for i, bin_ in enumerate(wanted[s][0]):
            low[s][i] += torch.bincount(key[upper == bin_] & (_HIGH - 1), minlength=_HIGH)
    found = []
    for s in range(len(wanted)):
        bins, rest = wanted[s]
        lower = torch.searchsorted(low[s].cumsum(1), rest[:, None], right=True)[:, 0]
        found.append(_monotone((bins << 16) | lower).view(torch.float32))
    return torch.stack(found)


def _keys(blocks: Blocks) -> Iterator[tuple[int, Tensor]]:
    for indices, values in blocks():
        for s, v in zip(indices, values):
            yield s, _monotone(v.flatten().contiguous().view(torch.int32))


def _monotone(bits: Tensor) -> Tensor:
    """Between a float's bits and an integer of the same order; its own inverse."""
    bits = bits.int()
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
