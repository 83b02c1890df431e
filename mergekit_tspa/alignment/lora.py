"""Stage 2 of TSPA: align the factors of several adapters of one weight.

Li et al., TSPA, Findings of ACL 2026, Eq. 8-9, for many weights at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    start: Tensor  # (M,) objective at R = I, s = 1
    end: Tensor  # (M,)
    orthogonality: float  # largest entry of |R^T R - I|


def lora_objective(
    G_B: Tensor,  # (M, n, n, r, r), blocks B_t^T B_u
    G_A: Tensor,  # (M, n, n, r, r), blocks A_t A_u^T
    beta: Tensor,  # (M, n), a_t s_t
    gamma: Tensor,  # (M, n), a_t / s_t
    R: Tensor,  # (M, n, r, r)
) -> Tensor:
    """`||B'A' - mean_t B_t A_t||^2` per weight, `B' = sum beta_t B_t R_t`, `A' = sum gamma_t R_t^T A_t`.  # (M,)

    The n targets of Eq. 9 collapse to their mean up to a constant and a factor n; only Gram matrices of the
    factors enter, so the cost does not depend on the size of the weight.
    """
    M, n, _, r, _ = G_B.shape
    G_B, G_A = (G.transpose(2, 3).reshape(M, n * r, n * r) for G in (G_B, G_A))
    P_B, P_A = ((c[..., None, None] * R).reshape(M, n * r, r) for c in (beta, gamma))
    U, V = G_B @ P_B, G_A @ P_A
    merged = ((P_B.mT @ U) * (P_A.mT @ V)).sum((-2, -1))
    return merged - 2 / n * (U * V).sum((-2, -1)) + (G_B * G_A).sum((-2, -1)) / n**2


def align_lora(
    G_B: Tensor, G_A: Tensor, weights: Tensor, *, steps: int = 2000, lr: float = 0.05
) -> tuple[Tensor, Tensor, Solution]:
    """Rotations `R (M, n, r, r)` and scales `s (M, n)` that minimise `lora_objective` from `R = I`, `s = 1`.

    Riemannian AMSGrad on the Stiefel manifold (geoopt); each weight's loss is divided by its start value, so
    the step length does not depend on the size of the updates.
    """
    import geoopt

    M, n, _, r, _ = G_B.shape
    eye = torch.eye(r, dtype=G_B.dtype, device=G_B.device).expand(M, n, r, r)
    R = geoopt.ManifoldParameter(eye.clone(), manifold=geoopt.EuclideanStiefel())
    log_s = torch.nn.Parameter(G_B.new_zeros(M, n))

    def objective() -> Tensor:
        return lora_objective(G_B, G_A, weights * log_s.exp(), weights / log_s.exp(), R)

    start = objective().detach()
    scale = torch.where(start > 0, start, 1)
    optimizer = geoopt.optim.RiemannianAdam([R, log_s], lr=lr, amsgrad=True, stabilize=100)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            (objective() / scale).sum().backward()
            optimizer.step()
    R, s = R.detach(), log_s.detach().exp()
    end = lora_objective(G_B, G_A, weights * s, weights / s, R)
    return R, s, Solution(start.clamp(min=0), end.clamp(min=0), (R.mT @ R - eye).abs().max().item())
