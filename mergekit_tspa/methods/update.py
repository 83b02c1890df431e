"""What a method returns for one weight: a low-rank or a dense update."""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_tspa.adapters import LoraFactors
from mergekit_tspa.spaces.cores import svd


class LowRank(LoraFactors):
    """`dW = B @ A`."""

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U (d_out, k)`, `S (k,)`, `V^T (k, d_in)` of the update in float64."""
        return svd(self)

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

    def norm(self) -> Tensor:
        return self.dW.norm()

    def scaled(self, factor: float) -> "Dense":
        return self if factor == 1 else Dense(self.dW * factor)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U`, `S`, `V^T` of the whole matrix in float64."""
        return torch.linalg.svd(self.dW.double(), full_matrices=False)

    def rebuilt(self, U: Tensor, S: Tensor, Vh: Tensor) -> "Dense":
        """Other singular triplets in the precision of this update."""
        return Dense(((U * S) @ Vh).to(self.dW.dtype))

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
