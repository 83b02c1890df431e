"""Stage 2 of TSPA: align the adapters of one LoRA matrix (Li et al., TSPA, Findings of ACL 2026, Eq. 8-9).

``B' = sum a_t s_t B_t R_t``, ``A' = sum (a_t / s_t) R_t^T A_t``: rotations and scales cancel in every ``B_t
A_t``, only the cross terms of ``B' A'`` move. Letters of shapes: M matrices, n adapters, r rank, N = n r.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_tspa.alignment.stiefel import Objective, Solution, in_parts, leave_saddle, minimise, part_size


def align_lora(
    G_B: Tensor,
    G_A: Tensor,
    weights: Tensor,
    *,
    T_B: Tensor | None = None,
    T_A: Tensor | None = None,
    target_norm2: Tensor | None = None,
    target_scale: float = 1.0,
    steps: int = 2000,
    lr: float = 0.05,
    tolerance: float = 0.0,
    seed: int = 42,
    solver: str = "amsgrad",
    on_progress: Callable[[float, float], None] | None = None,
) -> tuple[Tensor, Tensor, Solution]:
    """Minimise ``||B' A' - tau mean_v Bt_v At_v||^2`` per matrix; returns R (M, n, r, r), s (M, n), Solution.

    ``G_B[:, t, u] = B_t^T B_u`` and ``G_A[:, t, u] = A_t A_u^T`` (M, n, n, r, r), ``weights (M, n)``. The
    targets are the factors themselves, or others, given by ``T_B[:, v, u] = Bt_v^T B_u``, ``T_A[:, v, u] =
    At_v A_u^T`` and ``target_norm2 (M,) = ||sum_v Bt_v At_v||^2``.
    """
    M, n, _, r, _ = G_B.shape
    B, A = _matrix(G_B), _matrix(G_A)  # (M, N, N)
    similarity = torch.einsum("mtuij,mtuij->mtu", G_B, G_A)  # <B_t A_t, B_u A_u>
    factors = torch.stack([G.diagonal(dim1=3, dim2=4).sum(-1) for G in (G_B, G_A)], dim=1)  # (M, 2, n, n)
    if T_B is None or T_A is None or target_norm2 is None:
        cross, norm2 = B @ A, similarity.sum((1, 2))
    else:
        cross, norm2 = _matrix(T_B).mT @ _matrix(T_A), target_norm2
    tau = target_scale / (n if T_B is None else T_B.shape[1])
    left, right = torch.cat([B, tau * cross.mT], dim=1), torch.cat([A, tau * cross], dim=1)  # (M, 2 N, N)

    def solve(part: slice) -> tuple[Tensor, Tensor, Solution]:
        problem = _objective(left[part], right[part], weights[part].to(G_B), tau**2 * norm2[part])
        count = len(left[part])
        solution = minimise(
            problem,
            leave_saddle(
                torch.eye(r, dtype=G_B.dtype, device=G_B.device).expand(count, n, r, r),
                factors[part],
                seed if steps else None,
            ),
            G_B.new_zeros(count, n),
            steps=steps,
            lr=lr,
            tolerance=tolerance,
            floor=100 * torch.finfo(G_B.dtype).eps * tau**2 * norm2[part],
            solver=solver,
            on_progress=on_progress
            and (lambda done, left: on_progress((part.start + done * count) / M, left)),
            first=part.start,
        )
        return solution.point, solution.log_s.exp(), solution

    return in_parts(solve, M, part_size(left[0].numel(), left))


def svd_bound(G_B: Tensor, G_A: Tensor, rank: int, target_scale: float = 1.0) -> Tensor:
    """``||svd_r(tau Dbar) - tau Dbar||^2`` (M,): no rank-r matrix comes closer to the targets' mean.

    ``G_B``, ``G_A`` are the targets' Grams; ``B A`` has the singular values of ``F_B F_A^T``, ``F^T F = G``.
    """

    def root(G: Tensor) -> Tensor:
        eigenvalues, Q = torch.linalg.eigh(_matrix(G))
        F: Tensor = eigenvalues.clamp(min=0).sqrt()[:, :, None] * Q.mT
        return F

    singular: Tensor = torch.linalg.svdvals(root(G_B) @ root(G_A).mT)
    return (target_scale / G_B.shape[1]) ** 2 * singular[:, rank:].square().sum(1)


def _matrix(G: Tensor) -> Tensor:
    """Blocks (M, v, u, r, r) as matrices (M, v r, u r)."""
    return G.movedim(3, 2).flatten(3, 4).flatten(1, 2)


def _objective(left: Tensor, right: Tensor, weights: Tensor, norm2: Tensor) -> Objective:
    """``||B' A'||^2 - 2 <B' A', D> + ||D||^2`` for the scaled target D.

    With ``P_B``, ``P_A`` (M, N, r) the stacked ``a_t s_t R_t`` and ``a_t R_t / s_t``: ``B'^T B' = P_B^T G_B
    P_B``, ``A' A'^T = P_A^T G_A P_A``, ``<B' A', D> = <P_B, C P_A>``; ``left = [G_B; C^T]``, ``right = [G_A;
    C]``.
    """
    N = left.shape[2]

    def objective(R: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = log_s.exp()
        beta, gamma = (weights * s)[:, :, None, None], (weights / s)[:, :, None, None]
        P_B, P_A = (beta * R).flatten(1, 2), (gamma * R).flatten(1, 2)
        (U, C_B), (V, C_A) = (left @ P_B).split(N, 1), (right @ P_A).split(N, 1)
        K_B, K_A = P_B.mT @ U, P_A.mT @ V  # (M, r, r)
        loss = (K_B * K_A).sum((1, 2)) - 2 * (P_B * C_A).sum((1, 2)) + norm2
        d_B, d_A = (torch.baddbmm(C, W, K, beta=-2, alpha=2) for C, W, K in ((C_A, U, K_A), (C_B, V, K_B)))
        d_B, d_A = beta * d_B.view(R.shape), gamma * d_A.view(R.shape)
        return loss, d_B + d_A, (R * (d_B - d_A)).sum((2, 3))

    return objective
