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

    def scaled(self, factor: float) -> "Dense":
        return self if factor == 1 else Dense(self.dW * factor)

    def truncated(self, rank: int) -> LowRank:
        """The closest update of a lower rank; for large weights by subspace iteration on a few more directions."""
        M = self.dW
        if min(M.shape) <= 1024:
            return LowRank(M, torch.eye(M.shape[1]).to(M)).truncated(rank)
        generator = torch.Generator(M.device).manual_seed(0)
        Q = torch.randn(M.shape[1], rank + 16, generator=generator, device=M.device, dtype=M.dtype)
        for _ in range(8):
            Q = torch.linalg.qr(M.mT @ torch.linalg.qr(M @ Q).Q).Q
        return LowRank(M @ Q, Q.mT).truncated(rank)

    def apply_to(self, W: Tensor) -> Tensor:
        """`W + dW`, computed and returned in the precision of the update."""
        return W.to(self.dW.dtype) + self.dW


MergedUpdate: TypeAlias = LowRank | Dense
