"""The QR core: many low-rank updates as small matrices between two common orthonormal bases."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.updates import LoraFactors


class Cores(NamedTuple):
    """`D_t = Q_B C_t Q_A^T`, exact, in float64; `R = sum_t r_t`."""

    Q_B: Tensor  # (d_out, q_B), q_B = min(d_out, R)
    Q_A: Tensor  # (d_in, q_A)
    R_B: Sequence[Tensor]  # (q_B, r_t): B_t = Q_B R_B^t
    R_A: Sequence[Tensor]  # (q_A, r_t): A_t^T = Q_A R_A^t

    @property
    def C(self) -> Tensor:
        """`C_t = R_B^t (R_A^t)^T`  # (n, q_B, q_A)"""
        return torch.stack([B @ A.mT for B, A in zip(self.R_B, self.R_A)])


def cores(factors: Sequence[LoraFactors]) -> Cores:
    """`[B_1|..|B_n] = Q_B [R_B^1|..|R_B^n]`, `[A_1;..;A_n]^T = Q_A [R_A^1|..|R_A^n]`."""
    ranks = [f.rank for f in factors]
    Q_B, R_B = torch.linalg.qr(torch.cat([f.B for f in factors], dim=1).double())
    Q_A, R_A = torch.linalg.qr(torch.cat([f.A for f in factors]).double().mT)
    return Cores(Q_B, Q_A, R_B.split(ranks, dim=1), R_A.split(ranks, dim=1))
