"""The update of one tensor: as two factors, or as a whole matrix."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mergekit_tspa.linalg import Span, gram, leading_left, leading_subspace, product_svd, span

_Factors = TypeVar("_Factors", bound="LoraFactors")
_CACHED = 2**20  # entries of a tensor that are in float32 at the same time


class LoraFactors(NamedTuple):
    """`dW = B @ A`; the LoRA scale is folded in, its square root on each side."""

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the tensor it updates, `(d_out, d_in)`."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        return self.B @ self.A

    def norm(self) -> Tensor:
        """`||dW||` in float64, from the Grams: `||B A||^2 = <B^T B, A A^T>`."""
        return (gram(self.B.double()) * gram(self.A.double().mT)).sum().clamp(min=0).sqrt()

    def scaled(self: _Factors, factor: float) -> _Factors:
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


class LowRank(LoraFactors):
    """`dW = B @ A`."""

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U (d_out, k)`, `S (k,)`, `V^T (k, d_in)` of the update in float64."""
        return product_svd(self.B, self.A)

    def rebuilt(self, U: Tensor, S: Tensor, Vh: Tensor) -> "LowRank":
        """Other singular triplets as factors of this precision: `B = U sqrt(S)`, `A = sqrt(S) V^T`."""
        root = S.sqrt()
        return LowRank((U * root).to(self.B.dtype), (root[:, None] * Vh).to(self.A.dtype))

    def spanned(self) -> "Spanned":
        """The same update between orthonormal bases of its two sides, to about 1e-6, to be cut."""
        (U, R_B), (V, R_A) = span(self.B, single=True), span(self.A.mT, single=True)
        return Spanned(U, R_B @ R_A.mT, V)

    def truncated(self, rank: int) -> "LowRank":
        """The closest update of a lower rank, in balanced factors."""
        return self.spanned().truncated(rank, self.B.dtype)

    def apply_to(self, W: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`W + B A`, computed in the precision of the factors and rounded once.

        On a processor some rows at a time, so that what is not rounded yet stays in its cache.

        Args:
            W: of any shape with d_out in front; a convolution's is taken as `(d_out, d_in * kernel)`
            dtype: of the result; by default that of the factors
        """
        rows = W.flatten(1)  # (d_out, d_in)
        result = torch.empty_like(rows, dtype=dtype or self.B.dtype)
        count = len(rows) if rows.is_cuda else max(1, _CACHED // max(1, rows.shape[1]))
        for start in range(0, len(rows), count):
            some = slice(start, start + count)
            result[some] = torch.addmm(rows[some].to(self.B.dtype), self.B[some], self.A)
        return result.view_as(W)


class Spanned(NamedTuple):
    """`dW = U M V^T` with orthonormal columns U and V: what it takes to know of an update is in M."""

    U: Span  # (d_out, p)
    M: Tensor  # (p, q), float64
    V: Span | None  # (d_in, q); None: the identity

    @property
    def rank(self) -> int:
        return min(self.M.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[0], self.M.shape[1] if self.V is None else self.V.shape[0]

    def dense(self) -> Tensor:
        return self.low_rank(torch.float64).dense()

    def norm(self) -> Tensor:
        norm: Tensor = self.M.norm()
        return norm

    def scaled(self, factor: float) -> "Spanned":
        return self if factor == 1 else self._replace(M=factor * self.M)

    def truncated(self, rank: int, dtype: torch.dtype = torch.float32) -> LowRank:
        """The closest update of a lower rank, in balanced factors: `B = U P sqrt(S)` of `M = P S Q^T`."""
        P, S = leading_left(self.M, rank)
        root = S.sqrt()
        right = (P / root.where(root > 0, 1)).mT @ self.M  # (k, q), sqrt(S) Q^T
        return LowRank((self.U @ (P * root)).to(dtype), self._turned(right).to(dtype))

    def low_rank(self, dtype: torch.dtype = torch.float32) -> LowRank:
        """The update as factors, of the rank of the smaller basis."""
        if self.V is not None and self.M.shape[0] > self.M.shape[1]:
            return LowRank((self.U @ self.M).to(dtype), self.V.dense().mT.to(dtype))
        return LowRank(self.U.dense().to(dtype), self._turned(self.M).to(dtype))

    def _turned(self, X: Tensor) -> Tensor:
        """`X V^T`  # (k, q) -> (k, d_in)"""
        return X if self.V is None else (self.V @ X.mT).mT


class Dense(NamedTuple):
    """`dW` itself."""

    dW: Tensor  # (d_out, d_in)

    @property
    def rank(self) -> int:
        return min(self.dW.shape)

    def dense(self) -> Tensor:
        return self.dW

    def norm(self) -> Tensor:
        norm: Tensor = self.dW.norm()
        return norm

    def scaled(self, factor: float) -> "Dense":
        return self if factor == 1 else Dense(self.dW * factor)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U (d_out, k)`, `S (k,)`, `V^T (k, d_in)` in the precision of the matrix, because it is large."""
        U, S, Vh = torch.linalg.svd(self.dW, full_matrices=False)
        return U, S, Vh

    def rebuilt(self, U: Tensor, S: Tensor, Vh: Tensor) -> "Dense":
        """Other singular triplets in the precision of this update."""
        return Dense(((U * S) @ Vh).to(self.dW.dtype))

    def truncated(self, rank: int) -> LowRank:
        """The closest update of a lower rank; a large one by subspace iteration on a few more directions."""
        M = self.dW
        if min(M.shape) <= 1024:
            one = torch.eye(min(M.shape)).to(M)
            return (LowRank(one, M) if len(one) == len(M) else LowRank(M, one)).truncated(rank)
        Q = leading_subspace(M, rank + 16, seed=0, steps=8)
        return LowRank(M @ Q, Q.mT).truncated(rank)

    def apply_to(self, W: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`W + dW`, computed in the precision of the update and rounded once.

        Args:
            W: of any shape with d_out in front
            dtype: of the result; by default that of the update
        """
        return (W.to(self.dW.dtype) + self.dW.reshape(W.shape)).to(dtype or self.dW.dtype)


def nonzero(factors: Sequence[LoraFactors]) -> list[int]:
    """Indices of the adapters whose update is not zero, for rules that divide by norms.

    If all of them are zero, it is the index of the first, so that there is always one.
    """
    return [t for t, f in enumerate(factors) if f.norm()] or [0]
