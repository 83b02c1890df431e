"""What counts as zero, and what as finite."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def numerical_rank(S: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """How many singular values rise above rounding, `s > max(shape) eps s_max`.

    The factors come as float32, so float32's epsilon decides, whatever the precision of `S`.

    Args:
        S: in descending order  # (..., k)
        shape: of the matrix they belong to; the last two sides count
    """
    return (S > max(shape[-2:]) * torch.finfo(torch.float32).eps * S[..., :1]).sum(-1)


def finite(*tensors: Tensor) -> bool:
    """Without a copy of their size."""
    return all(math.isfinite(bound) for tensor in tensors for bound in tensor.aminmax())


def product_overflows(factors: Sequence[Tensor], rank: int) -> bool:
    """Whether an entry of the product of two factors could exceed its precision."""
    largest = math.prod(max(map(abs, map(float, factor.aminmax()))) for factor in factors)
    return not largest * rank < torch.finfo(factors[0].dtype).max
