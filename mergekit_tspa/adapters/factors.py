"""The update of one weight by one adapter, as two factors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LoraFactors(NamedTuple):
    """`dW = B @ A`; the LoRA scale is folded in, its square root on each side."""

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight it updates, `(d_out, d_in)`."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        return self.B @ self.A

    def norm(self) -> Tensor:
        """`||dW||` in float64, from the Grams: `||B A||^2 = <B^T B, A A^T>`."""
        B, A = self.B.double(), self.A.double()
        return ((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0).sqrt()

    def scaled(self, factor: float) -> "LoraFactors":
        """`factor * dW`, with `sqrt|factor|` on each side and its sign on `B`."""
        root = abs(factor) ** 0.5
        return self._replace(B=self.B * (root if factor >= 0 else -root), A=self.A * root)

    def to(self, dtype: torch.dtype) -> "LoraFactors":
        return self._replace(B=self.B.to(dtype), A=self.A.to(dtype))

    def padded(self, rank: int) -> "LoraFactors":
        """The same update with zero columns and rows up to `rank`."""
        extra = rank - self.rank
        if not extra:
            return self
        return LoraFactors(
            torch.nn.functional.pad(self.B, (0, extra)), torch.nn.functional.pad(self.A, (0, 0, 0, extra))
        )


def nonzero(factors: Sequence[LoraFactors]) -> list[int]:
    """Indices of the adapters whose update is not zero, for rules that divide by norms; of the first, if all are."""
    return [t for t, f in enumerate(factors) if f.norm()] or [0]
