"""What a method returns for one weight: a low-rank or a dense update."""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """`dW = B @ A`."""

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    def dense(self) -> Tensor:
        return self.B @ self.A

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
