"""What counts as zero, and what as finite."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def numerical_rank(S: Tensor, shape: torch.Size | tuple[int, ...], largest: Tensor | None = None) -> Tensor:
    """How many singular values rise above rounding, `s > max(shape) eps s_max`.

    The factors come as float32, so float32's epsilon decides, whatever the precision of `S`.

    Args:
        S: in descending order  # (..., k)
        shape: of the matrix they belong to; the last two sides count
        largest: `s_max` of what the matrix was computed from, if that is not its own  # (...)
    """
    top = S[..., :1] if largest is None else largest[..., None]
    return (S > max(shape[-2:]) * torch.finfo(torch.float32).eps * top).sum(-1)


def finite(*tensors: Tensor) -> bool:
    """Without a copy of their size."""
    return all(math.isfinite(bound) for tensor in tensors if tensor.numel() for bound in tensor.aminmax())


def product_overflows(factors: Sequence[Tensor], rank: int) -> bool:
    """Whether an entry of the product of two factors could exceed its precision."""
    largest = math.prod(max(map(abs, map(float, factor.aminmax()))) for factor in factors)
    return not largest * rank < torch.finfo(factors[0].dtype).max
