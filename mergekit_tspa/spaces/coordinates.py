"""What a rule needs of a space: n matrices to compare, and the way back to an update."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn.functional import pad

from mergekit_tspa.updates import LoraFactors, Spanned


class Part(NamedTuple):
    """n matrices of one shape, as factors `M_t = B_t A_t`, and how much each counts."""

    name: str  # tells the parts of a space apart; empty if there is one
    factors: Sequence[LoraFactors]
    weights: Sequence[float]

    def padded(self, p: int, q: int) -> "Part":
        """The same matrices with rows and columns of zeros up to `(p, q)`, if they are smaller."""
        rows, columns = self.factors[0].shape
        if (rows, columns) == (p, q):
            return self
        below, beside = (0, 0, 0, p - rows), (0, q - columns)
        padded = [LoraFactors(pad(f.B, below), pad(f.A, beside)) for f in self.factors]
        return self._replace(factors=padded)


class Coordinates(Protocol):
    """Coordinates of the updates of one tensor.  A rule merges each of their parts apart."""

    def parts(self, factors: Sequence[LoraFactors], weights: Sequence[float]) -> list[Part]:
        """The updates in these coordinates."""

    def joined(self, merged: Sequence[Tensor]) -> LoraFactors | Spanned | Tensor:
        """The update whose parts are these; as a matrix where it has no factors."""

    def sides(self) -> dict[str, Tensor]:
        """The bases that `joined` uses, by their names, for an update that is joined later."""
