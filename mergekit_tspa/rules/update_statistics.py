"""What an entrywise rule may ask of n whole updates: order statistics and sums."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Block(NamedTuple):
    """Rows of the updates of one tensor."""

    numbers: Sequence[int]  # which of all updates these m are
    M: Tensor  # (m, rows, q)
    weights: Tensor  # (m,)
    size: int  # entries of the whole tensor, p q


# From the length of an update to places in its ascending order, counted from 0.
Positions = Callable[[int], Sequence[int]]


class Updates(Protocol):
    """n updates, each of one tensor or of several tensors one after the other."""

    def order_statistics(self, values: Callable[[Block], Tensor], positions: Positions) -> Tensor:
        """Of each update's values, those at the k positions of their ascending order.

        Args:
            values: of a block  # (m, rows, q)

        Returns:
            (n, k)
        """

    def sums(self, values: Callable[[Block], Tensor]) -> Tensor:
        """Sums over the blocks.

        Args:
            values: of a block  # (m, k)

        Returns:
            (n, k)
        """


class Whole:
    """The updates of one tensor, held whole."""

    def __init__(self, M: Tensor, weights: Tensor) -> None:
        """
        Args:
            M: (n, ...)
            weights: (n,)
        """
        self.block = Block(range(len(M)), M, weights, M[0].numel())

    def order_statistics(self, values: Callable[[Block], Tensor], positions: Positions) -> Tensor:
        ordered = values(self.block).flatten(1).sort().values
        return ordered[:, list(positions(ordered.shape[1]))]

    def sums(self, values: Callable[[Block], Tensor]) -> Tensor:
        return values(self.block)


def magnitudes(block: Block) -> Tensor:
    return block.M.abs()


def column(values: Tensor, M: Tensor) -> Tensor:
    """One value per update, in a shape that broadcasts over its entries.  # (n,) -> (n, 1, ..)"""
    return values.reshape(-1, *(1,) * (M.ndim - 1))
