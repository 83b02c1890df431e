"""Leave out part of each update: by magnitude, at random, or both."""

from torch import Tensor


def trim(M: Tensor, threshold: Tensor) -> Tensor:
    """Entries of at least the threshold's magnitude; the others are 0.  # (n, ...), (n,) -> (n, ...)"""
    return M * (M.abs() >= _column(threshold, M))


def trim_outliers(M: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Entries whose magnitude lies in the closed interval, as Model Breadcrumbs keeps them.

    Davari and Belilovsky, Model Breadcrumbs, 2023 (arXiv 2312.06795).
    """
    size = M.abs()
    return M * ((size >= _column(lowest, M)) & (size <= _column(highest, M)))


def drop(M: Tensor, density: float, uniform: Tensor, rescale: bool = True) -> Tensor:
    """Keep each entry with probability `density`; with `rescale` divided by it, so that the mean stays.

    Yu et al., Language Models are Super Mario (DARE), 2023 (arXiv 2311.03099).

    Args:
        uniform: draws from [0, 1), in the shape of M
    """
    return M * (uniform < density) / (density if rescale else 1.0)


def magnitude_drop(M: Tensor, density: float, epsilon: float, uniform: Tensor, rescale: bool = True) -> Tensor:
    """MagPrune: keep each entry with a probability that rises with the rank of its magnitude in its row.

    From `density - epsilon` for the smallest to `density + epsilon` for the largest; with `rescale` each entry is
    divided by its own probability.  Deep et al., DELLA-Merging, 2024 (arXiv 2406.11617).

    Args:
        M: (n, rows, columns)
    """
    rank = M.abs().argsort(-1).argsort(-1).to(M.dtype)
    keep = density - epsilon + 2 * epsilon * rank / max(1, M.shape[-1] - 1)
    return M * (uniform < keep) / (keep if rescale else 1.0)


def kept_from(density: float, length: int, floor: bool = False) -> int:
    """The position, in ascending order of magnitude, of the first entry that a trim to `density` keeps.

    The authors of TIES keep `int(density * length) + 1` entries; with `floor` `max(1, int(density * length))`, as
    PEFT and mergekit do.
    """
    count = max(1, int(density * length)) if floor else int(density * length) + 1
    return max(0, length - count)


def outlier_bounds(density: float, gamma: float, length: int) -> tuple[int, int]:
    """Positions of the smallest and largest kept magnitude: the share `gamma` of the largest goes first.

    Where both cannot be had, fewer large ones are left out, as mergekit does.
    """
    count = max(1, int(density * length))
    bottom = max(0, length - count - int(gamma * length))
    return bottom, bottom + count - 1


def _column(values: Tensor, M: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (M.ndim - 1))
