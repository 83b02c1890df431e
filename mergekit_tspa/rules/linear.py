"""Linear rules: sums of the updates, whose coefficients depend on the weights alone."""

import torch
from torch import Tensor

from mergekit_tspa.errors import InputError


def task_arithmetic(M: Tensor, weights: Tensor) -> Tensor:
    """`sum_t a_t M_t`.

    Ilharco et al., Editing Models with Task Arithmetic, 2022 (arXiv 2212.04089).

    Args:
        M: (n, ...)
        weights: (n,)

    Returns:
        (...)
    """
    return weighted_sum(M, weights)


def mean(M: Tensor, weights: Tensor) -> Tensor:
    """`sum_t a_t M_t / sum_t a_t`.

    Wortsman et al., Model Soups: Averaging Weights of Multiple Fine-Tuned Models, 2022 (arXiv 2203.05482).

    Args:
        M: (n, ...)
        weights: (n,)

    Returns:
        (...)

    Raises:
        InputError: the weights add up to 0.
    """
    return weighted_sum(M, shares(weights))


def weighted_sum(M: Tensor, weights: Tensor) -> Tensor:
    """`sum_t a_t M_t`  # (n, ...), (n,) -> (...)"""
    total: Tensor = torch.tensordot(weights, M, dims=1)
    return total


def unchanged(weights: Tensor) -> Tensor:
    """The coefficients of task arithmetic, `a_t`."""
    return weights


def shares(weights: Tensor) -> Tensor:
    """The coefficients of the mean, `a_t / sum_u a_u`.

    Raises:
        InputError: the weights add up to 0.
    """
    total = weights.sum()
    if total.abs() <= 1e-6 * weights.abs().sum():
        raise InputError(f"the weights {weights.tolist()} add up to 0, so there is no mean of its adapters")
    return weights / total
