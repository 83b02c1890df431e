"""The pairwise baseline (Li et al., TSPA, Findings of ACL 2026, Eq. 4): every two adapted models compared.

Its cost is quadratic in the number of adapters; it is here to be compared with.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergekit_tspa.alignment.attention import SideGrams
from mergekit_tspa.alignment.stiefel import Objective, Solution, in_parts, leave_saddle, minimise, part_size


def align_pairwise(
    x: Sequence[SideGrams],
    y: Sequence[SideGrams],
    *,
    steps: int = 100,
    lr: float = 0.1,
    tolerance: float = 0.0,
    seed: int = 42,
    solver: str = "amsgrad",
    on_progress: Callable[[float, float], None] | None = None,
) -> tuple[Tensor, Tensor, Solution]:
    """Minimise ``sum_{i<j} ||X_i R_i - X_j R_j||^2 + ||Y_i R_i - Y_j R_j||^2``, one rotation per kv group.

    ``x[l]``, ``y[l]`` are the sides of layer l. Returns ``S^X_t R_t`` (L, n, G, m, r, d), ``S^Y_t R_t``
    (L, n, G, 1, r, d) and the solution; there are no scales. Needs float64: the loss is a small difference of
    the norms of whole models.
    """
    n, d = len(x[0].inner), x[0].K.shape[-1]

    def solve(part: slice) -> tuple[Tensor, Tensor, Solution]:
        N = torch.stack([_cross_grams(a) + _cross_grams(b) for a, b in zip(x[part], y[part])])
        inner_x, inner_y = (torch.stack([side.inner for side in sides[part]]) for sides in (x, y))
        objective, similarity = _objective(N)
        solution = minimise(
            objective,
            leave_saddle(
                torch.eye(d, dtype=N.dtype, device=N.device).expand(*N.shape[:3], d, d),
                similarity[:, None],
                seed if steps else None,
            ),
            N.new_zeros(len(N), n),
            steps=steps,
            lr=lr,
            tolerance=tolerance,
            floor=100 * torch.finfo(N.dtype).eps * similarity.diagonal(dim1=1, dim2=2).sum(1),
            solver=solver,
            on_progress=on_progress
            and (lambda done, left: on_progress((part.start + done * len(N)) / len(x), left)),
            first=part.start,
        )
        R = solution.point.movedim(2, 1)[:, :, :, None]
        return inner_x @ R, inner_y @ R, solution

    return in_parts(solve, len(x), part_size(len(x[0].K) * n * n * d * d, x[0].K))


def _cross_grams(side: SideGrams) -> Tensor:
    """``X_i^T X_j`` of the adapted matrices ``X_i = X + L_i S_i``, summed over heads: (G, n, n, d, d)."""
    mixed = torch.einsum("ighrd,ighre->gide", side.inner, side.C)  # S_i^T C_i
    both = torch.einsum("igard,ijrq,jgaqe->gijde", side.inner, side.H, side.inner)
    return side.K[:, None, None] + mixed[:, :, None] + mixed.mT[:, None] + both


def _objective(N: Tensor) -> tuple[Objective, Tensor]:
    """``(n-1) sum_i tr N_ii - 2 sum_{i<j} tr(R_i^T N_ij R_j)`` for N (L, G, n, n, d, d); ``tr N_ij``."""
    L, G, n, _, d, _ = N.shape
    similarity = N.diagonal(dim1=-2, dim2=-1).sum((1, -1))
    constant = (n - 1) * similarity.diagonal(dim1=1, dim2=2).sum(1)
    apart = 1 - torch.eye(n, dtype=N.dtype, device=N.device)
    N = (N * apart[:, :, None, None]).transpose(3, 4).reshape(L * G, n * d, n * d)

    def objective(R: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        NR = (N @ R.view(L * G, n * d, d)).view(R.shape)
        return constant - (R * NR).flatten(1).sum(1), NR.mul_(-2), torch.zeros_like(log_s)

    return objective, similarity
