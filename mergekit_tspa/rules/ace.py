"""ACE-Merging: RegMean with the covariance of each update's rows in place of texts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_tspa.linalg import numerical_rank


def ace(
    B: Sequence[Tensor],  # (d_out, r_t) each
    A: Sequence[Tensor],  # (r_t, d_in) each
    weights: Tensor,  # (n,)
    ridge: float = 1e-2,
    spread: float = 0.3,
    isotropic: float = 0.3,
    published: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(sum_t P_t (Z_t + ridge I)) (sum_t Z_t + ridge I)^-1`, `Z_t` the covariance of the rows of `P_t`.

    `P_t = a_t B_t A_t`, `Z_t = H_t^T H_t`, where `H_t` is `P_t` less the mean of its rows.  Where the sizes
    of the adapters differ much, `var(log ||P_t||^2) > spread mean(log ||P_t||^2)^2`, covariance and ridge of
    each are divided by its trace, and an isotropic part is added: the leading singular directions of
    `M + sum_t P_t (Z_t - Z)`, `Z` the mean of the covariances with their ridges, all with the mean of their
    singular values.

    Solved on cores.  The ridge and the measure of spread depend on the unit of the updates, as in the
    authors' code.  An adapter alone is itself, unless `published`.

    ACE-Merging: Data-Free Model Merging with Adaptive Covariance Estimation, 2026 (arXiv 2603.02945).

    Args:
        B: left factors, of any ranks
        A: right factors
        weights: of any sign.  An adapter of weight `a` counts as `a` times its update would
        ridge: in the unit of `||P_t||^2`
        spread: above which sizes are taken to differ; infinity never divides by traces
        isotropic: share of the directions, `min(d_out, d_in)`, of the isotropic part; never more than the
            numerical rank of what it is taken from
        published: as the authors' code.  It regresses on `H_t` instead of `P_t`, and the inverse has a prior
            added: in every row the mean of the rows of `sum_t Z_t`, divided by `mean ||P_t||^2` where the
            covariances are divided by their traces

    Returns:
        `Q (d_out, k)` and `X (k, d_in)` whose product is the merged update, in float64
    """
    taken = [(a * B_t.double(), A_t.double()) for a, B_t, A_t in zip(weights.double(), B, A)]
    norms2 = [float(torch.sum((B_t.mT @ B_t) * (A_t @ A_t.mT))) for B_t, A_t in taken]  # ||P_t||^2
    taken = [factors for factors, size in zip(taken, norms2) if size > 0]
    sizes = torch.tensor([size for size in norms2 if size > 0], dtype=torch.float64)
    if not taken:
        return torch.zeros_like(B[0][:, :1]).double(), torch.zeros_like(A[0][:1]).double()

    d_out, d_in = len(B[0]), A[0].shape[1]
    whole = [B_t for B_t, _ in taken]
    centred = [B_t - B_t.mean(dim=0) for B_t in whole]
    ones = whole[0].new_ones(d_out, 1)
    Q_B, _ = torch.linalg.qr(torch.cat([*whole, ones] if published else whole, dim=1))
    Q_A, R_A = torch.linalg.qr(torch.cat([A_t for _, A_t in taken]).mT)
    R_A = R_A.split([len(A_t) for _, A_t in taken], dim=1)  # A_t^T = Q_A R_A^t
    P = [Q_B.mT @ B_t @ R_t.mT for B_t, R_t in zip(whole, R_A)]  # (q_B, q_A) each
    H = [Q_B.mT @ B_t @ R_t.mT for B_t, R_t in zip(centred, R_A)]
    Z = [R_t @ (B_t.mT @ B_t) @ R_t.mT for B_t, R_t in zip(centred, R_A)]  # (q_A, q_A) each
    ridges = [ridge] * len(Z)

    logs = torch.log(sizes + 1e-12)
    differ = len(logs) > 1 and bool(logs.var() > spread * logs.mean().square())
    if differ:
        traces = [float(Z_t.trace()) + 1e-12 for Z_t in Z]
        ridges = [ridge / trace for trace in traces]
        Z = [Z_t / trace for Z_t, trace in zip(Z, traces)]

    total = sum(Z)
    inverse = total + sum(ridges) * torch.eye(len(total)).to(total)
    mean = inverse / len(Z)
    if published:
        column = Q_A.sum(dim=0)  # the vector of ones, in the coordinates of the rows
        prior = torch.outer(column, column @ total) / d_in
        inverse = inverse + (prior / (sizes.mean() + 1e-12) if differ else prior)
    targets = H if published else P
    merged = sum(T_t @ Z_t + rho * T_t for T_t, Z_t, rho in zip(targets, Z, ridges))
    merged = merged @ torch.linalg.pinv(inverse)
    if differ:
        residual = sum(P_t @ (Z_t - mean) for P_t, Z_t in zip(P, Z))
        U, s, Vh = torch.linalg.svd(merged + residual, full_matrices=False)
        k = min(int(isotropic * min(d_out, d_in)), int(numerical_rank(s, (d_out, d_in))))
        if k:
            merged = merged + s[:k].mean() * (U[:, :k] @ Vh[:k])
    return Q_B @ merged, Q_A.mT
