"""QR cores: all updates of one weight as small matrices between two orthonormal bases.

Norms, inner products and singular values are those of the updates, so whatever is linear or spectral is done here and
mapped back; no `d_out x d_in` matrix is formed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.adapters import LoraFactors


class Cores(NamedTuple):
    """`D_t = Q_B C_t Q_A^T`, in float64; q is the sum of the ranks, or the width of the weight if that is smaller."""

    Q_B: Tensor  # (d_out, q_B)
    Q_A: Tensor  # (d_in, q_A)
    C: Tensor  # (n, q_B, q_A)


def encode(factors: Sequence[LoraFactors]) -> Cores:
    """`[B_1 | .. | B_n] = Q_B R_B`, `[A_1; ..; A_n]^T = Q_A R_A`; by their column blocks, `C_t = R_B^t (R_A^t)^T`."""
    Q_B, R_B = torch.linalg.qr(torch.cat([f.B for f in factors], dim=1).double())
    Q_A, R_A = torch.linalg.qr(torch.cat([f.A.mT for f in factors], dim=1).double())
    ranks = [f.rank for f in factors]
    return Cores(Q_B, Q_A, torch.stack([b @ a.mT for b, a in zip(R_B.split(ranks, dim=1), R_A.split(ranks, dim=1))]))
