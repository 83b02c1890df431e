"""Magnitude pruning: keep the largest entries of each update (the trim of Yadav et al., 2023)."""

from torch import Tensor

from mergekit_tspa.rules.linear import weighted_sum
from mergekit_tspa.rules.update_statistics import Updates, Whole, column, magnitudes


def magnitude_prune(
    M: Tensor,
    weights: Tensor,
    density: float = 0.2,
    convention: str = "paper",
    statistics: Tensor | None = None,
) -> Tensor:
    """`sum_t a_t trim(M_t)`: the first step of TIES alone.

    Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023 (arXiv 2306.01708).

    Args:
        M: (n, p, q)
        weights: (n,)
        density: share of the entries that is kept
        convention: see `kept_from`
        statistics: `trim_thresholds` of the whole updates, if `M` is a block of their rows  # (n, 1)

    Returns:
        (p, q)
    """
    if statistics is None:
        statistics = trim_thresholds(Whole(M, weights), density, convention)
    return weighted_sum(trim(M, statistics), weights)


def trim(M: Tensor, threshold: Tensor) -> Tensor:
    """Entries of at least the threshold's magnitude; the others are 0.  # (n, ...), (n, 1) -> (n, ...)"""
    return M * (M.abs() >= column(threshold, M))


def trim_thresholds(updates: Updates, density: float = 0.2, convention: str = "paper") -> Tensor:
    """The smallest magnitude that is kept of each update.  # (n, 1)"""
    return updates.order_statistics(magnitudes, lambda length: [kept_from(density, length, convention)])


def kept_from(density: float, length: int, convention: str = "paper") -> int:
    """The position, in ascending order of magnitude, of the first entry that a trim to `density` keeps.

    The authors of TIES keep `int(density * length) + 1` entries; PEFT and mergekit, the other two
    conventions, `max(1, int(density * length))`.
    """
    kept = int(density * length)
    count = kept + 1 if convention == "paper" else max(1, kept)
    return max(0, length - count)
