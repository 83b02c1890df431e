"""The linear rule."""

import torch
from torch import Tensor


def weighted_sum(M: Tensor, weights: Tensor) -> Tensor:
    """`sum_t a_t M_t`  # (n, ...), (n,) -> (...)"""
    return torch.tensordot(weights, M, dims=1)
