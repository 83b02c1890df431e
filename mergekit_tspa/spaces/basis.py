"""A coordinate system: an orthonormal basis on each side of a weight."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mergekit_tspa.updates import LoraFactors


class Basis(NamedTuple):
    """`M_t = U^T D_t V`; None stands for the identity."""

    U: Tensor | None  # (d_out, p)
    V: Tensor | None  # (d_in, q)

    def encode(self, factors: Sequence[LoraFactors]) -> list[LoraFactors]:
        """The updates in these coordinates, still as factors: `M_t = (U^T B_t) (A_t V)`, in the basis's precision."""
        given = next((side for side in self if side is not None), factors[0].B)
        left = [f.B.to(given) if self.U is None else self.U.mT @ f.B.to(given) for f in factors]
        right = [f.A.to(given) if self.V is None else f.A.to(given) @ self.V for f in factors]
        return [LoraFactors(B, A) for B, A in zip(left, right)]

    def decode(self, M: Tensor) -> LoraFactors | Tensor:
        """`U M V^T`, as factors if a side has a basis.  # (p, q) -> (d_out, d_in)"""
        if self.U is None and self.V is None:
            return M
        if self.V is None:
            return LoraFactors(self.U, M.to(self.U))
        if self.U is None:
            return LoraFactors(M.to(self.V), self.V.mT)
        M = M.to(self.U)
        return LoraFactors(self.U @ M, self.V.mT) if M.shape[0] > M.shape[1] else LoraFactors(self.U, M @ self.V.mT)


FULL = Basis(None, None)
