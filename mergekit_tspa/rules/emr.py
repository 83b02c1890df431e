"""EMR-Merging: one unified update, and a mask and a scale per task (Huang et al., 2024)."""

import torch
from torch import Tensor

from mergekit_tspa.rules.update_statistics import Block, Updates, column


def emr(M: Tensor, weights: Tensor) -> Tensor:
    """The unified update: the sign of the mean, and the largest entry that has it.

    A task comes back from it as `uni mask_t scale_t`, by its mask (`unify`) and its scale (`task_scales`).

    Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, 2024 (arXiv 2405.17461).

    Args:
        M: (n, p, q)
        weights: (n,)

    Returns:
        (p, q)
    """
    unified, _ = unify(M, weights)
    return unified


def unify(M: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Elect the sign of the mean, take the largest entry that has it; and which entries have it.

    `g = sgn(sum_t a_t M_t)` (-1 where it is 0), `mask_t = a_t M_t g > 0`, `uni = g max_t |mask_t a_t M_t|`.

    Returns:
        uni (...) and mask (n, ...).
    """
    P = column(weights, M) * M
    g = 2 * (P.sum(0) > 0).to(M.dtype) - 1
    mask = g * P > 0
    return g * (P * mask).abs().amax(0), mask


def task_scales(updates: Updates) -> Tensor:
    """`sum mean|a_t M_t| / sum mean|uni mask_t|`: sums over tensors, means over entries.  # (n, 1)"""
    own, masked = updates.sums(_mean_magnitudes).mT
    return rescalers(own, masked).float()[:, None]


def rescalers(own: Tensor, masked: Tensor) -> Tensor:
    """`own / masked`, and 1 where nothing of a task is left.  # (n,), (n,) -> (n,)"""
    return (own / masked.where(masked > 0, 1)).where(masked > 0, 1)


def _mean_magnitudes(block: Block) -> Tensor:
    """What these rows add to `mean|a_t M_t|` and to `mean|uni mask_t|` of their tensor.  # (m, 2)"""
    unified, mask = unify(block.M, block.weights)
    own = block.weights.abs() * block.M.abs().sum((1, 2))
    masked = (unified.abs() * mask).sum((1, 2))
    return torch.stack([own, masked], dim=1).double() / block.size
