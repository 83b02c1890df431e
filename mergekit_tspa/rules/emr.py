"""EMR-Merging: one unified update, and a mask and a scale per task (Huang et al., 2024)."""

from torch import Tensor


def unify(M: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Elect the sign of the mean, take the largest entry that has it; and which entries have it.

    `g = sgn(sum_t a_t M_t)` (-1 where it is 0), `mask_t = a_t M_t g > 0`, `uni = g max_t |mask_t a_t M_t|`.

    Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, 2024 (arXiv 2405.17461).

    Returns:
        uni (...) and mask (n, ...).
    """
    P = weights.reshape(-1, *(1,) * (M.ndim - 1)) * M
    g = 2 * (P.sum(0) > 0).to(M.dtype) - 1
    mask = g * P > 0
    return g * (P * mask).abs().amax(0), mask


def rescalers(own: Tensor, masked: Tensor) -> Tensor:
    """`sum mean|M_t| / sum mean|uni mask_t|`, and 1 where nothing of a task is left.  # (n,), (n,) -> (n,)"""
    return (own / masked.where(masked > 0, 1)).where(masked > 0, 1)
