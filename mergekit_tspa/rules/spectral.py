"""Rules on singular values and vectors, which commute with changes of orthonormal basis: TSV, Iso and
CART.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mergekit_tspa.linalg import leading_left, numerical_rank
from mergekit_tspa.rules.linear import weighted_sum

Triplets: TypeAlias = tuple[Tensor, Tensor, Tensor]  # U (n, p, k), S (n, k), V^T (n, k, q)


def directions(S: Tensor, shape: Sequence[int], room: int | None) -> int:
    """How many singular directions the updates have: their summed numerical ranks, at most `room`.

    The same in every basis, which the sides of `M` are not: those of a small basis shrink where updates
    share directions.  `room` is what the tensor, or a space that compresses, can hold; by default the
    smaller side of `M`.

    Args:
        S: singular values of each update  # (n, k)
        shape: of `M`  # n, p, q
    """
    ranks = numerical_rank(S, tuple(shape)).sum()
    return max(1, min(int(ranks), min(shape[1:]) if room is None else room))


def polar(M: Tensor) -> Tensor:
    """The partial isometry `P Q^T` of `M = P S Q^T` over its numerical range; `M Q S^-1 Q^T`."""
    if M.shape[0] < M.shape[1]:
        return polar(M.mT).mT
    Q, S = leading_left(M.mT)
    k = int(numerical_rank(S, M.shape))
    isometry: Tensor = M @ ((Q[:, :k] / S[:k]) @ Q[:, :k].mT)
    return isometry


def tsv(
    M: Tensor,
    weights: Tensor,
    rank_per_task: int | None = None,
    orthogonalize: bool = True,
    room: int | None = None,
    triplets: Triplets | None = None,
) -> Tensor:
    """Task Singular Vectors: the leading triplets of every task, their vectors made orthogonal across tasks.

    `M_t = U_t S_t V_t^T`, cut to `k` triplets;
    `polar([U_1|..|U_n]) diag(a_1 S_1, .., a_n S_n) polar([V_1|..|V_n])^T`.
    No triplet below a task's numerical rank is used, where singular vectors are arbitrary, and the polar
    factors leave out directions that the tasks share to rounding, so that equal adapters give that adapter.

    Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, 2024
    (arXiv 2412.00081).

    Args:
        M: (n, p, q)
        weights: (n,)
        rank_per_task: `k`, by default an equal share of the `directions`
        orthogonalize: without it the plain sum of the cut tasks
        room: see `directions`
        triplets: the SVD of every `M_t`, if it is known

    Returns:
        (p, q)
    """
    U, S, Vh = triplets or torch.linalg.svd(M, full_matrices=False)
    k = rank_per_task or max(1, directions(S, M.shape, room) // len(M))
    kept = numerical_rank(S, M.shape).clamp(max=k).tolist()
    if not sum(kept):
        return torch.zeros_like(M[0])
    left = torch.cat([u[:, :r] for u, r in zip(U, kept)], dim=1)
    middle = torch.cat([a * s[:r] for a, s, r in zip(weights, S, kept)])
    right = torch.cat([v[:r] for v, r in zip(Vh, kept)]).mT
    if orthogonalize:
        left, right = polar(left), polar(right)
    return (left * middle) @ right.mT


def iso(
    M: Tensor,
    weights: Tensor,
    common_fraction: float = 1.0,
    room: int | None = None,
    triplets: Triplets | None = None,
) -> Tensor:
    """Isotropic merging: the weighted sum with all its singular values replaced by their mean (Iso-C).

    The mean goes over the numerical rank.  With `common_fraction` below 1 that share of the directions
    comes from the sum and the rest, in equal parts, from what each task has outside of them (Iso-CTS).

    Marczak et al., No Task Left Behind: Isotropic Model Merging, 2025 (arXiv 2502.04959).

    Args:
        M: (n, p, q)
        weights: (n,)
        common_fraction: share of the `directions` that is taken from the sum
        room: see `directions`
        triplets: the SVD of every `M_t`, if it is known

    Returns:
        (p, q)
    """
    n = len(M)
    P = weights.reshape(-1, 1, 1) * M
    U, S, Vh = torch.linalg.svd(P.sum(0), full_matrices=False)
    rank = int(numerical_rank(S, M.shape))
    size = directions(triplets[1] if triplets else torch.linalg.svdvals(M), M.shape, room)
    own = min(round((size - int(size * common_fraction)) / n), size // n)  # directions of each task
    common = min(rank, size - own * n)
    U, S, Vh = U[:, :common], S[:common], Vh[:common]
    if own:
        Ut, St, Vht = torch.linalg.svd(P - U @ (U.mT @ P), full_matrices=False)
        kept = numerical_rank(St, M.shape, torch.linalg.matrix_norm(P, 2)).clamp(max=own).tolist()
        U = torch.cat([*(u[:, :r] for u, r in zip(Ut, kept)), U], dim=1)
        S = torch.cat([*(s[:r] for s, r in zip(St, kept)), S])
        Vh = torch.cat([*(v[:r] for v, r in zip(Vht, kept)), Vh])
    if not len(S):
        return torch.zeros_like(M[0])
    merged: Tensor = S.mean() * polar(U) @ polar(Vh)
    return merged


def cart(
    M: Tensor,
    weights: Tensor,
    share: float = 0.04,
    inner: float = 0.1,
    room: int | None = None,
    triplets: Triplets | None = None,
) -> Tensor:
    """The mean and, cut to their leading directions, the tasks' distances from it.

    `mu + c sum_t svd_j(M_t - mu)`, `mu = sum_t a_t M_t / sum_t |a_t|`, `j = ceil(share * directions)`.

    Choi et al., Revisiting Weight Averaging for Model Merging, 2024 (arXiv 2412.12153).

    Args:
        M: (n, p, q)
        weights: (n,)
        share: share of the `directions` that each distance keeps
        inner: `c`
        room: see `directions`
        triplets: the SVD of every `M_t`, if it is known

    Returns:
        (p, q)
    """
    mu = weighted_sum(M, weights) / weights.abs().sum()
    U, S, Vh = torch.linalg.svd(M - mu, full_matrices=False)
    values = triplets[1] if triplets else torch.linalg.svdvals(M)
    j = math.ceil(share * directions(values, M.shape, room))
    cut: Tensor = (U[..., :j] * S[:, None, :j]) @ Vh[:, :j]  # (n, p, q)
    return mu + inner * cut.sum(0)
