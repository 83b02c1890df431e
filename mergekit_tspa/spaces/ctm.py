"""Compress-then-Merge: one pair of low-rank subspaces shared by all updates (He et al., ICML 2026)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_tspa.spaces.basis import Basis
from mergekit_tspa.spaces.cores import cores
from mergekit_tspa.updates import LoraFactors


def ctm(factors: Sequence[LoraFactors], rank: int, beta: float = 0.0) -> Basis:
    """The rank-`k` bases `U, V` that minimise `sum_t ||X_t - U G_t V^T||^2` over free `G_t`, by HOOI.

    `X_t = D_t / ||D_t|| (beta ||D_t|| + (1 - beta) mean_u ||D_u||)`: with `beta` 0 every adapter counts
    alike, with 1 by its norm.  Lossless if `rank` is at least the sum of ranks.  Solved on the cores, where
    all norms are those of the updates.

    He et al., Compress then Merge, 2026 (arXiv 2606.03723).
    """
    c = cores(factors)
    C = c.C
    norms = torch.linalg.matrix_norm(C, keepdim=True)  # (n, 1, 1)
    unit = C / norms.clamp(min=torch.finfo(C.dtype).tiny)
    P, Q = shared_subspaces(unit * (beta * norms + (1 - beta) * norms.mean()), rank)
    return Basis(c.Q_B @ P, c.Q_A @ Q)


def shared_subspaces(
    X: Tensor,
    rank: int,
    tolerance: float = 1e-6,
    iterations: int = 1000,
) -> tuple[Tensor, Tensor]:
    """HOOI for Tucker-2: `P = top_k([X_1 Q|..|X_n Q])`, `Q = top_k([X_1^T P|..|X_n^T P])` in turn.

    Starts at the truncated HOSVD and stops when the relative error changes by less than `tolerance`.  The
    largest entry of every column is positive.

    Args:
        X: (n, p, q)

    Returns:
        P (p, k) and Q (q, k), each k at most its own side.
    """
    total = X.square().sum().clamp(min=torch.finfo(X.dtype).tiny)
    P, Q = _top(X, rank), _top(X.mT, rank)
    before = float("inf")
    for step in range(iterations):
        P = _top(X @ Q, rank)
        Q = _top(X.mT @ P, rank)
        error = ((total - (P.mT @ X @ Q).square().sum()).abs() / total).sqrt().item()
        if step >= 2 and abs(before - error) < tolerance:
            break
        before = error
    return P, Q


def _top(X: Tensor, k: int) -> Tensor:
    """Leading left singular vectors of `[X_1|..|X_n]`, from its Gram matrix.  # (n, p, q) -> (p, k)"""
    _, U = torch.linalg.eigh((X @ X.mT).sum(0))
    U = U[:, -k:].flip(1)
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    turned: Tensor = U * largest.sign()
    return turned
