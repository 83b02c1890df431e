"""Rotation-symmetry matching (Zhang et al., 2025, arXiv 2502.00264): turn a pair of matrices towards another
pair.

Matrices X (d, p) and Y (d, q) of which only `X^T Y` matters may be turned together, `(R X, R Y)`: query and
key of an attention head, value and transposed output of a head, or the factors of a LoRA update. Leading
dimensions are batches.
"""

import torch
from torch import Tensor


def match(X: Tensor, Y: Tensor, X_0: Tensor, Y_0: Tensor, scale: bool = False) -> tuple[Tensor, Tensor]:
    """`(k R X, R Y / k)`: R is nearest to the anchor in Frobenius norm, and then k; without `scale`, k is
    1.
    """
    R = procrustes(torch.cat([X, Y], dim=-1), torch.cat([X_0, Y_0], dim=-1))
    X, Y = R @ X, R @ Y
    if not scale:
        return X, Y
    k = best_scale(X, Y, X_0, Y_0)[..., None, None]
    return k * X, Y / k


def procrustes(X: Tensor, Y: Tensor) -> Tensor:
    """The orthogonal R (..., d, d) that minimises `||R X - Y||`: `U V^T` for `Y X^T = U S V^T`.

    Directions that X and Y do not share have no best rotation; they are turned as little as possible, which
    the multiple of the identity sees to.
    """
    size = X.norm(dim=(-2, -1)) * Y.norm(dim=(-2, -1))
    one = torch.eye(X.shape[-2], dtype=X.dtype, device=X.device)
    U, _, Vh = torch.linalg.svd(Y @ X.mT + 1e4 * torch.finfo(X.dtype).eps * size[..., None, None] * one)
    R: Tensor = U @ Vh
    return R


def best_scale(X: Tensor, Y: Tensor, X_0: Tensor, Y_0: Tensor) -> Tensor:
    """The positive k (...) that minimises `||k X - X_0||^2 + ||Y / k - Y_0||^2`, 1 if X or Y is zero.

    It is a root of `a k^4 - b k^3 + c k - d`, with `a = ||X||^2`, `b = <X, X_0>`, `c = <Y, Y_0>` and `d =
    ||Y||^2`. The real parts of the other roots cost more.
    """
    a, b, c, d = ((P * Q).sum((-2, -1))[..., None] for P, Q in ((X, X), (X, X_0), (Y, Y_0), (Y, Y)))
    free = (a > 0) & (d > 0)
    a, b, c, d = (torch.where(free, x, 1) for x in (a, b, c, d))
    companion = (
        torch.eye(4, dtype=X.dtype, device=X.device).roll(1, dims=0).expand(*a.shape[:-1], 4, 4).clone()
    )
    companion[..., 0, :] = torch.cat([b, torch.zeros_like(a), -c, d], dim=-1) / a
    k: Tensor = torch.linalg.eigvals(companion).real  # (..., 4)
    cost = (a * k**2 - 2 * b * k + d / k**2 - 2 * c / k).where(k > 0, torch.inf)
    return k.gather(-1, cost.argmin(-1, keepdim=True)).where(free, 1).squeeze(-1)
