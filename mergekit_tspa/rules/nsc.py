"""NSC: how much of its inputs an adapter does not see, the loss by which null-space compression weighs."""

import torch
from torch import Tensor

from mergekit_tspa.linalg import numerical_rank


def unseen_ratio(A: Tensor, X: Tensor) -> Tensor:
    """`mean_x sqrt(1 - y^T (A A^T)^-1 y / |x|^2)`, `y = A x`: the share of `x` in the null space of `A`.

    Between 0, all inputs lie in the rows of `A`, and 1, none has a part there; an input of 0 counts as 1.
    Taken from the residual of the projection, so that small ratios are exact, and on the numerical range of
    `A`, so that it depends on the span of its rows alone.

    Label-Free Cross-Task LoRA Merging with Null-Space Compression, 2026 (arXiv 2603.26317).

    Args:
        A: the right factor  # (r, d_in)
        X: inputs of the weight  # (inputs, d_in)

    Returns:
        a scalar, in float64
    """
    _, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    V = Vh[: int(numerical_rank(S, A.shape))].mT
    X = X.double()
    length = X.norm(dim=1)
    residual = (X - X @ V @ V.mT).norm(dim=1)
    return torch.where(length > 0, residual / torch.where(length > 0, length, 1), 1).mean()
