"""A coordinate system: an orthonormal basis on each side of a tensor."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from mergekit_tspa.linalg import Span
from mergekit_tspa.spaces.coordinates import Part
from mergekit_tspa.updates import LoraFactors, Spanned


class Basis(NamedTuple):
    """`M_t = U^T D_t V`, the one part of these coordinates; None stands for the identity."""

    U: Span | None  # (d_out, p)
    V: Span | None  # (d_in, q)
    known: Mapping[LoraFactors, LoraFactors] = {}  # coordinates that came with the basis, of its own updates

    def encode(self, factors: Sequence[LoraFactors]) -> list[LoraFactors]:
        """The updates as factors `M_t = (U^T B_t) (A_t V)`, in the basis's precision."""
        return [self.known.get(f) or self._encoded(f) for f in factors]

    def _encoded(self, f: LoraFactors) -> LoraFactors:
        given = next((side.X for side in (self.U, self.V) if side is not None), f.B)
        B = f.B.to(given) if self.U is None else self.U.project(f.B)
        A = f.A.to(given) if self.V is None else self.V.project(f.A.mT).mT
        return LoraFactors(B, A)

    def decode(self, M: Tensor) -> LoraFactors | Spanned | Tensor:
        """`U M V^T`, as factors if a side has a basis.  # (p, q) -> (d_out, d_in)"""
        if self.U is None:
            return M if self.V is None else LoraFactors(M.to(self.V.X), self.V.dense().mT)
        return Spanned(self.U, M.to(self.U.X), self.V)

    def parts(self, factors: Sequence[LoraFactors], weights: Sequence[float]) -> list[Part]:
        return [Part("", self.encode(factors), weights)]

    def joined(self, merged: Sequence[Tensor]) -> LoraFactors | Spanned | Tensor:
        (M,) = merged
        return self.decode(M)

    def sides(self) -> dict[str, Tensor]:
        return {name: side.dense() for name, side in (("U", self.U), ("V", self.V)) if side is not None}


FULL = Basis(None, None)
