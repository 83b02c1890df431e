"""Model Breadcrumbs: leave out the smallest and the very largest entries (Davari and Belilovsky, 2023)."""

from torch import Tensor

from mergekit_tspa.rules.linear import weighted_sum
from mergekit_tspa.rules.update_statistics import Updates, Whole, column, magnitudes


def breadcrumbs(
    M: Tensor,
    weights: Tensor,
    density: float = 0.9,
    gamma: float = 0.01,
    statistics: Tensor | None = None,
) -> Tensor:
    """`sum_t a_t m_t M_t`, where the mask `m_t` keeps the magnitudes of a middle range.

    Davari and Belilovsky, Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, 2023
    (arXiv 2312.06795).

    Args:
        M: (n, p, q)
        weights: (n,)
        density: share of the entries that is kept
        gamma: share of the largest entries that is left out
        statistics: `magnitude_range` of the whole updates, if `M` is a block of their rows  # (n, 2)

    Returns:
        (p, q)
    """
    if statistics is None:
        statistics = magnitude_range(Whole(M, weights), density, gamma)
    lowest, highest = statistics.mT
    return weighted_sum(trim_outliers(M, lowest, highest), weights)


def magnitude_range(updates: Updates, density: float = 0.9, gamma: float = 0.01) -> Tensor:
    """The smallest and the largest magnitude that is kept of each update.  # (n, 2)"""
    return updates.order_statistics(magnitudes, lambda length: kept_range(density, gamma, length))


def trim_outliers(M: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Entries whose magnitude lies in the closed interval; the others are 0.

    Args:
        M: (n, ...)
        lowest, highest: of each update  # (n,)

    Returns:
        (n, ...)
    """
    size = M.abs()
    return M * ((size >= column(lowest, M)) & (size <= column(highest, M)))


def kept_range(density: float, gamma: float, length: int) -> tuple[int, int]:
    """Positions of the smallest and largest kept magnitude: the share `gamma` of the largest goes first.

    Where both cannot be had, fewer large ones are left out, as mergekit does.
    """
    count = max(1, int(density * length))
    bottom = max(0, length - count - int(gamma * length))
    return bottom, bottom + count - 1
