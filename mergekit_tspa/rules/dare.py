"""DARE: drop entries of each update at random, rescale the others (Yu et al., 2023)."""

from torch import Tensor

from mergekit_tspa.rules.linear import weighted_sum
from mergekit_tspa.rules.ties import elect_and_merge


def dare_linear(
    M: Tensor,
    weights: Tensor,
    density: float = 0.5,
    rescale: bool = True,
    *,
    uniform: Tensor,
) -> Tensor:
    """`sum_t a_t drop(M_t)`.

    Yu et al., Language Models are Super Mario, 2023 (arXiv 2311.03099).

    Args:
        M: (n, p, q)
        weights: (n,)
        density, rescale, uniform: see `drop`

    Returns:
        (p, q)
    """
    return weighted_sum(drop(M, density, uniform, rescale), weights)


def dare_ties(
    M: Tensor,
    weights: Tensor,
    density: float = 0.5,
    rescale: bool = True,
    normalize: bool = True,
    elect: str = "mass",
    take: str = "mean",
    *,
    uniform: Tensor,
) -> Tensor:
    """The election of TIES among the entries that `drop` leaves.

    Yu et al., Language Models are Super Mario, 2023 (arXiv 2311.03099).

    Args:
        M: (n, p, q)
        weights: (n,)
        density, rescale, uniform: see `drop`
        normalize, elect, take: see `elect_and_merge`

    Returns:
        (p, q)
    """
    return elect_and_merge(drop(M, density, uniform, rescale), weights, normalize, elect, take)


def drop(M: Tensor, density: float, uniform: Tensor, rescale: bool = True) -> Tensor:
    """Keep each entry with probability `density`; with `rescale` divided by it, so that the mean stays.

    Args:
        M: (n, ...)
        uniform: draws from [0, 1), in the shape of M

    Returns:
        (n, ...)
    """
    return M * (uniform < density) / (density if rescale else 1.0)
