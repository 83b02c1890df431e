"""What a method returns for one weight: a low-rank or a dense update."""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_tspa.adapters import LoraFactors


class LowRank(LoraFactors):
    """`dW = B @ A`."""

    def truncated(self, rank: int) -> "LowRank":
        """The closest update of a lower rank, `B = U_k sqrt(S_k)`, `A = sqrt(S_k) V_k^T`, by an SVD of the QR core."""
        Q_B, R_B = torch.linalg.qr(self.B)
        Q_A, R_A = torch.linalg.qr(self.A.mT)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        root = S[:rank].sqrt()
        return LowRank(Q_B @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ Q_A.mT)

    def apply_to(self, W: Tensor) -> Tensor:
        """`W + B A`, computed and returned in the precision of the factors."""
        return torch.addmm(W.to(self.B.dtype), self.B, self.A)


class Dense(NamedTuple):
    """`dW` itself."""

    dW: Tensor  # (d_out, d_in)

    @property
    def rank(self) -> int:
        return min(self.dW.shape)

    def dense(self) -> Tensor:
        return self.dW

    def apply_to(self, W: Tensor) -> Tensor:
        """`W + dW`, computed and returned in the precision of the update."""
        return W.to(self.dW.dtype) + self.dW


MergedUpdate: TypeAlias = LowRank | Dense
