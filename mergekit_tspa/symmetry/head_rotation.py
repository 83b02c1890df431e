"""How far a head of one model is turned against that of another (Zhang et al., 2025, arXiv 2502.00264).

Query and key of a head may be turned together, and value and output, as only their products matter.  A
rotary embedding stands between query and key; of their rotations only those stay that commute with it.
"""

import torch
from torch import Tensor

from mergekit_tspa.alignment.procrustes import procrustes


def commuting_rotation(X: Tensor, X_0: Tensor, rotary_dim: int) -> Tensor:
    """The rotation R that brings `R X` nearest to `X_0` among those that commute with a rotary embedding.

    The embedding turns the coordinates i and i + rotary_dim / 2 as one complex number, so R turns each of
    these pairs by an angle of its own, `R z = e^(i phi) z` with `phi = arg <z, z_0>`.  On the coordinates
    that the embedding leaves alone R is any rotation; with rotary_dim 0 these are all.

    Args:
        X: (..., d, m)
        X_0: (..., d, m) of the anchor
        rotary_dim: how many of the d coordinates the embedding turns, the first ones

    Returns:
        (..., d, d)
    """
    *batch, d, _ = X.shape
    R = X.new_zeros(*batch, d, d)
    if rotary_dim < d:
        R[..., rotary_dim:, rotary_dim:] = procrustes(X[..., rotary_dim:, :], X_0[..., rotary_dim:, :])
    half = rotary_dim // 2
    z, z_0 = (torch.complex(A[..., :half, :], A[..., half:rotary_dim, :]) for A in (X, X_0))  # (.., half, m)
    inner = (z.conj() * z_0).sum(-1)  # (..., half)
    phi = torch.where(inner.abs() > 0, inner.angle(), 0)
    i = torch.arange(half, device=X.device)
    R[..., i, i] = R[..., i + half, i + half] = phi.cos()
    R[..., i + half, i] = phi.sin()
    R[..., i, i + half] = -phi.sin()
    return R
