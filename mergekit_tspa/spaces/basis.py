"""A coordinate system: an orthonormal basis on each side of a tensor."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mergekit_tspa.spaces.coordinates import Part
from mergekit_tspa.updates import LoraFactors


class Basis(NamedTuple):
    """`M_t = U^T D_t V`, the one part of these coordinates; None stands for the identity."""

    U: Tensor | None  # (d_out, p)
    V: Tensor | None  # (d_in, q)

    def encode(self, factors: Sequence[LoraFactors]) -> list[LoraFactors]:
        """The updates as factors `M_t = (U^T B_t) (A_t V)`, in the basis's precision."""
        given = next((side for side in self if side is not None), factors[0].B)
        left = [f.B.to(given) if self.U is None else self.U.mT @ f.B.to(given) for f in factors]
        right = [f.A.to(given) if self.V is None else f.A.to(given) @ self.V for f in factors]
        return [LoraFactors(B, A) for B, A in zip(left, right)]

    def decode(self, M: Tensor) -> LoraFactors | Tensor:
        """`U M V^T`, as factors if a side has a basis.  # (p, q) -> (d_out, d_in)"""
        if self.U is None:
            return M if self.V is None else LoraFactors(M.to(self.V), self.V.mT)
        if self.V is None:
            return LoraFactors(self.U, M.to(self.U))
        M = M.to(self.U)
        if M.shape[0] > M.shape[1]:
            return LoraFactors(self.U @ M, self.V.mT)
        return LoraFactors(self.U, M @ self.V.mT)

    def parts(self, factors: Sequence[LoraFactors], weights: Sequence[float]) -> list[Part]:
        return [Part("", self.encode(factors), weights)]

    def joined(self, merged: Sequence[Tensor]) -> LoraFactors | Tensor:
        (M,) = merged
        return self.decode(M)

    def sides(self) -> dict[str, Tensor]:
        return {name: side for name, side in (("U", self.U), ("V", self.V)) if side is not None}


FULL = Basis(None, None)
