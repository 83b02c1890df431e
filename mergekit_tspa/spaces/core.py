"""Core Space: the singular bases of the stacked factors (Panariello et al., 2025)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_tspa.linalg import leading_left, numerical_rank, product_svd
from mergekit_tspa.spaces.basis import Basis
from mergekit_tspa.spaces.cores import cores
from mergekit_tspa.updates import LoraFactors


def core(factors: Sequence[LoraFactors], balance: bool = False) -> Basis:
    """`U` left singular vectors of `[B_1|..|B_n]`, `V` right ones of `[A_1;..;A_n]`.

    Lossless.  The bases depend on how each adapter shares its scale between `B` and `A`; with `balance`
    every adapter is first written with the singular factors of its update, and they do not.

    Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, 2025 (arXiv 2509.17786).
    """
    c = cores([balanced(f) for f in factors] if balance else factors)
    return c._replace(of=factors).along(_left(torch.cat([*c.R_B], dim=1)), _left(torch.cat([*c.R_A], dim=1)))


def balanced(f: LoraFactors) -> LoraFactors:
    """`(U sqrt(S), sqrt(S) V^T)` of the update's SVD `U S V^T`, the same whatever factors it came in."""
    U, S, Vh = product_svd(*f)
    root = S.sqrt()
    return LoraFactors(U * root, root[:, None] * Vh)


def _left(R: Tensor) -> Tensor:
    """Left singular vectors of the numerical range."""
    P, S = leading_left(R)
    return P[:, : max(1, int(numerical_rank(S, R.shape)))]
