"""Compress-then-Merge: one pair of low-rank subspaces shared by all updates (He et al., ICML 2026)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_tspa.linalg import leading_left
from mergekit_tspa.spaces.basis import Basis
from mergekit_tspa.spaces.cores import cores
from mergekit_tspa.spaces.factor import encode
from mergekit_tspa.updates import LoraFactors

_SMALL = 96  # a side whose eigenvectors cost little beside the steps that they save


def ctm(factors: Sequence[LoraFactors], rank: int, beta: float = 0.0) -> Basis:
    """The rank-`k` bases `U, V` that minimise `sum_t ||X_t - U G_t V^T||^2` over free `G_t`, by HOOI.

    `X_t = D_t / ||D_t|| (beta ||D_t|| + (1 - beta) mean_u ||D_u||)`: with `beta` 0 every adapter counts
    alike, with 1 by its norm.  Lossless if `rank` is at least the sum of ranks.  Solved on the cores, where
    all norms are those of the updates.

    He et al., Compress then Merge, 2026 (arXiv 2606.03723).
    """
    c = cores(factors)
    norms = torch.stack([f.norm() for f in c.factors])  # (n,)
    sizes = beta * norms + (1 - beta) * norms.mean()
    roots = (sizes / norms.clamp(min=torch.finfo(norms.dtype).tiny)).sqrt()
    B, A = encode([LoraFactors(root * f.B, root * f.A) for root, f in zip(roots, c.factors)])
    return c.along(*shared_subspaces(B, A, rank))


def shared_subspaces(
    B: Tensor,
    A: Tensor,
    rank: int,
    tolerance: float = 1e-6,
    iterations: int = 1000,
) -> tuple[Tensor, Tensor]:
    """HOOI for Tucker-2 of `X_t = B_t A_t`.

    `P = top_k([X_1 Q|..|X_n Q])` and `Q = top_k([X_1^T P|..|X_n^T P])` in turn, from the truncated HOSVD,
    until the relative error changes by less than `tolerance`.  On a large side a step towards `top_k` takes
    its place.  The largest entry of every column is positive.

    Args:
        B: (n, p, r)
        A: (n, r, q)

    Returns:
        P (p, k) and Q (q, k), each k at most its own side.
    """
    given = B.dtype
    if max(B.shape[1], A.shape[2]) > _SMALL:  # the steps are many, and float32 tells these subspaces apart
        B, A = B.float(), A.float()
        tolerance /= 2  # one step gains less than all of them
    N = A.mT  # (n, q, r)
    total = ((B.mT @ B) * (N.mT @ N)).double().sum().clamp(min=torch.finfo(B.dtype).tiny)
    P = _top(_beside(B @ torch.linalg.qr(N).R.mT), rank)
    Q = _top(_beside(N @ torch.linalg.qr(B).R.mT), rank)
    S, T = B.mT @ P, N.mT @ Q  # (n, r, k)
    before = float("inf")
    for step in range(iterations):
        P = _improved(P, B, S, T)
        S = B.mT @ P
        Q = _improved(Q, N, T, S)
        T = N.mT @ Q
        kept = (S.mT @ T).double().square().sum()
        error = ((total - kept).abs() / total).sqrt().item()
        if step >= 2 and abs(before - error) < tolerance:
            break
        before = error
    return _positive(_orthonormal(P.to(given))), _positive(_orthonormal(Q.to(given)))


def _beside(Y: Tensor) -> Tensor:
    """`[Y_1|..|Y_n]`.  # (n, p, k) -> (p, n k)"""
    return Y.movedim(0, 1).flatten(1)


def _top(Y: Tensor, k: int) -> Tensor:
    """The leading left singular vectors.  # (p, m) -> (p, k)"""
    return leading_left(Y, min(k, len(Y)))[0]


def _improved(P: Tensor, B: Tensor, S: Tensor, T: Tensor) -> Tensor:
    """`top_k(Y)` of `Y = [B_1 T_1|..|B_n T_n]`, or where that is much work, one step towards it.

    The step is that of a power iteration, `P <- orth((Y Y^T - s) P)`, and Y changes little from one to the
    next.  With s half of the smallest eigenvalue of `P^T Y Y^T P`, none of the directions that are left out
    gains on those that are kept, and those close to them lose twice as fast.

    Args:
        P: (p, k)
        B: (n, p, r)
        S: `B_t^T P`  # (n, r, k)
        T: (n, r, k)
    """
    if len(P) <= _SMALL:
        return _top(_beside(B @ T), P.shape[1])
    Z = (B @ (T @ (T.mT @ S))).sum(0)  # Y Y^T P
    s = 0.5 * torch.linalg.eigvalsh(P.mT @ Z)[0].clamp(min=0)
    improved: Tensor = torch.linalg.qr(Z - s * P).Q
    return improved


def _orthonormal(P: Tensor) -> Tensor:
    """The same columns, orthonormal to their precision: `P (P^T P)^-1/2`."""
    values, V = torch.linalg.eigh(P.mT @ P)
    orthonormal: Tensor = P @ (V / values.sqrt()) @ V.mT
    return orthonormal


def _positive(P: Tensor) -> Tensor:
    """The columns with such signs that the largest entry of each is positive."""
    signed: Tensor = P * P.gather(0, P.abs().argmax(0, keepdim=True)).sign()
    return signed
