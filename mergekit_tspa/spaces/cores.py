"""The core: many low-rank updates as small matrices between two common orthonormal bases."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.linalg import Span, span
from mergekit_tspa.spaces.basis import Basis
from mergekit_tspa.updates import LoraFactors


class Cores(NamedTuple):
    """`D_t = Q_B C_t Q_A^T`, exact, in float64; `R = sum_t r_t`."""

    Q_B: Span  # (d_out, q_B), q_B = min(d_out, R)
    Q_A: Span  # (d_in, q_A)
    R_B: Sequence[Tensor]  # (q_B, r_t): B_t = Q_B R_B^t
    R_A: Sequence[Tensor]  # (q_A, r_t): A_t^T = Q_A R_A^t
    of: Sequence[LoraFactors]  # the updates, (B_t, A_t)

    @property
    def factors(self) -> list[LoraFactors]:
        """`C_t = R_B^t (R_A^t)^T` as factors."""
        return [LoraFactors(B, A.mT) for B, A in zip(self.R_B, self.R_A)]

    @property
    def C(self) -> Tensor:
        """`C_t`  # (n, q_B, q_A)"""
        return torch.stack([f.dense() for f in self.factors])

    def along(self, P: Tensor, Q: Tensor | None) -> Basis:
        """Coordinates along the columns of `Q_B P` and `Q_A Q`; without Q, along those of the tensor.

        Args:
            P: (q_B, p)
            Q: (q_A, q)
        """
        U = self.Q_B.turned(P)
        if Q is None:
            return Basis(U, None, {f: LoraFactors(P.mT @ R, f.A.double()) for f, R in zip(self.of, self.R_B)})
        turned = [LoraFactors(P.mT @ B, A.mT @ Q) for B, A in zip(self.R_B, self.R_A)]
        return Basis(U, self.Q_A.turned(Q), dict(zip(self.of, turned)))

    def basis(self) -> Basis:
        """Coordinates along `Q_B` and `Q_A`."""
        return Basis(self.Q_B, self.Q_A, dict(zip(self.of, self.factors)))


def cores(factors: Sequence[LoraFactors]) -> Cores:
    """`[B_1|..|B_n] = Q_B [R_B^1|..|R_B^n]`, `[A_1;..;A_n]^T = Q_A [R_A^1|..|R_A^n]`."""
    ranks = [f.rank for f in factors]
    Q_B, R_B = span(torch.cat([f.B for f in factors], dim=1))
    Q_A, R_A = span(torch.cat([f.A for f in factors]).mT)
    return Cores(Q_B, Q_A, R_B.split(ranks, dim=1), R_A.split(ranks, dim=1), factors)
