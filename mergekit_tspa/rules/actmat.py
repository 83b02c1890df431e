"""ACTMat and TACT: RegMean with the updates themselves in place of texts."""

import torch
from torch import Tensor

from mergekit_tspa.linalg import numerical_rank
from mergekit_tspa.rules.grams import descending, normal_equations, weighted


def actmat(M: Tensor, weights: Tensor, ridge: float = 0.0, shrink_to: str = "mean") -> Tensor:
    """`(sum_t P_t G_t)(sum_t G_t)^+`, `P_t = a_t M_t`, `G_t = P_t^T P_t`.

    An update's rows are sums of the inputs that it was trained on, so that `G_t` stands for their second
    moment.  The same in every orthonormal basis: run it on cores.

    Updates with no input direction in common are added; those that have the same `G_t` are averaged.  Where
    adapters nearly share `A`, directions of little weight blow up, and a ridge keeps them small:
    `S + rho m I` for `S = sum_t G_t`, `m` the mean of its eigenvalues that are not 0.

    Model Merging via Data-Free Covariance Estimation, 2026 (arXiv 2604.01329).

    Args:
        M: updates in orthonormal coordinates  # (n, p, q)
        weights: of any sign.  An adapter of weight `a` counts as `a` times its update would  # (n,)
        ridge: `rho`; 0 is the pseudo-inverse
        shrink_to: what the ridge leads to.  `mean`: each update counts with `G_t + rho m / n I`, so that an
            adapter alone is itself.  `zero`: the ridge is on the inverse alone, and shortens the result

    Returns:
        (p, q), in M's precision

    Raises:
        ValueError: for another word in `shrink_to`.
    """
    P = weighted(M, weights)
    return _regressed(P, P, ridge, shrink_to, M)


def tact(
    M: Tensor,
    weights: Tensor,
    density: float = 0.5,
    ridge: float = 0.0,
    shrink_to: str = "mean",
) -> Tensor:
    """ACTMat whose `G_t = T_t^T T_t` are made of each update's largest entries; the `P_t` stay whole.

    Depends on the basis: for updates in full size.  An adapter alone comes back whole with a ridge that
    shrinks to the mean; without one the part is lost that lies outside the rows of its trimmed self.

    Model Merging via Data-Free Covariance Estimation, 2026 (arXiv 2604.01329).

    Args:
        M: updates in full size  # (n, p, q)
        weights: as for `actmat`, and so are `ridge` and `shrink_to`
        density: share of the entries of each update that its Gram matrix is made of, in (0, 1]

    Returns:
        (p, q), in M's precision

    Raises:
        ValueError: for another word in `shrink_to`.
    """
    P = weighted(M, weights)
    size = P.abs()
    dropped = M[0].numel() - max(1, int(density * M[0].numel()))
    least = size.flatten(1).sort(dim=1).values[:, dropped, None, None]
    return _regressed(P, P * (size >= least), ridge, shrink_to, M)


def _regressed(P: Tensor, X: Tensor, ridge: float, shrink_to: str, M: Tensor) -> Tensor:
    """`argmin_M sum_t ||(M - P_t) X_t^T||^2`, with a ridge."""
    if shrink_to not in ("mean", "zero"):
        raise ValueError(f"shrink_to is {shrink_to!r}; it can be 'mean' or 'zero'.")
    if not len(P):
        return torch.zeros_like(M[0])
    E, S = normal_equations(P, X)
    values, V = descending(S)
    values = values.clamp(min=0)
    rank = int(numerical_rank(values.sqrt(), X.shape))
    if not ridge:
        values, V = values[:rank], V[:, :rank]
    strength = ridge * values[:rank].mean()
    if shrink_to == "mean":
        E = E + strength * P.mean(0)
    return ((E @ V / (values + strength)) @ V.mT).to(M.dtype)
