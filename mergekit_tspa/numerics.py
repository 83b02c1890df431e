"""What counts as zero."""

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
