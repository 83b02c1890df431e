"""What a method returns for one weight: a low-rank or a dense update."""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_tspa.adapters import LoraFactors
from mergekit_tspa.spaces.cores import encode


class LowRank(LoraFactors):
    """`dW = B @ A`."""

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U (d_out, k)`, `S (k,)`, `V^T (k, d_in)` of the update in float64, by an SVD of its QR core."""
        Q_B, Q_A, C = encode([self])
        U, S, Vh = torch.linalg.svd(C[0], full_matrices=False)
        return Q_B @ U, S, Vh @ Q_A.mT

    def rebuilt(self, U: Tensor, S: Tensor, Vh: Tensor) -> "LowRank":
        """Other singular triplets in the precision of these factors, balanced: `B = U sqrt(S)`, `A = sqrt(S) V^T`."""
        root = S.sqrt()
        return LowRank((U * root).to(self.B.dtype), (root[:, None] * Vh).to(self.A.dtype))

    def truncated(self, rank: int) -> "LowRank":
        """The closest update of a lower rank, in balanced factors."""
        U, S, Vh = self.svd()
        return self.rebuilt(U[:, :rank], S[:rank], Vh[:rank])

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
