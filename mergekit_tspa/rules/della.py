"""DELLA: drop small entries with a higher probability than large ones (Deep et al., 2024)."""

from torch import Tensor

from mergekit_tspa.rules.ties import elect_and_merge


def della(
    M: Tensor,
    weights: Tensor,
    density: float = 0.5,
    rescale: bool = True,
    normalize: bool = True,
    elect: str = "mass",
    take: str = "mean",
    epsilon: float = 0.15,
    *,
    uniform: Tensor,
) -> Tensor:
    """The election of TIES among the entries that `magnitude_drop` leaves.

    Deep et al., DELLA-Merging: Reducing Interference in Model Merging, 2024 (arXiv 2406.11617).

    Args:
        M: (n, p, q)
        weights: (n,)
        density, epsilon, rescale, uniform: see `magnitude_drop`
        normalize, elect, take: see `elect_and_merge`

    Returns:
        (p, q)
    """
    kept = magnitude_drop(M, density, epsilon, uniform, rescale)
    return elect_and_merge(kept, weights, normalize, elect, take)


def magnitude_drop(
    M: Tensor,
    density: float,
    epsilon: float,
    uniform: Tensor,
    rescale: bool = True,
) -> Tensor:
    """MagPrune: keep each entry with a probability that rises with the rank of its magnitude in its row.

    From `density - epsilon` for the smallest to `density + epsilon` for the largest; with `rescale` each
    entry is divided by its own probability.

    Args:
        M: (n, p, q)
        uniform: draws from [0, 1), in the shape of M

    Returns:
        (n, p, q)
    """
    rank = M.abs().argsort(-1).argsort(-1).to(M.dtype)
    keep = density - epsilon + 2 * epsilon * rank / max(1, M.shape[-1] - 1)
    return M * (uniform < keep) / (keep if rescale else 1.0)
