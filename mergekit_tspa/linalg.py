"""Decompositions and their thresholds, each once: what counts as zero, as finite, and as leading."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The squared size of the inverse Cholesky factor up to which a Gram matrix in float64 is as good as a QR: its
# basis is orthonormal to about 1e-9 then.
_WELL_CONDITIONED = 1e7
# The same for each column, up to which a Gram matrix of products in float32 suffices: to about 1e-6 then.
_NEARLY_ORTHOGONAL = 4.0
_SUMMED = 2048  # products in float32 that are added up before their sum goes to float64


class Span(NamedTuple):
    """Orthonormal columns `Q = X T`, which are not formed: what is wanted of them are products."""

    X: Tensor  # (d, m), float64; float32 where `single` asked for it
    T: Tensor | None = None  # (m, q); None: X itself is orthonormal

    @property
    def shape(self) -> tuple[int, int]:
        return self.X.shape[0], (self.X if self.T is None else self.T).shape[1]

    def __matmul__(self, M: Tensor) -> Tensor:
        """`Q M`.  # (q, k) -> (d, k)"""
        return self.X @ (M if self.T is None else self.T @ M).to(self.X)

    def turned(self, P: Tensor) -> "Span":
        """`Q P`, for P of orthonormal columns.  # (q, k)"""
        return Span(self.X, P if self.T is None else self.T @ P)

    def project(self, Y: Tensor) -> Tensor:
        """`Q^T Y`.  # (d, k) -> (q, k)"""
        product = self.X.mT @ Y.to(self.X)
        return product if self.T is None else self.T.mT @ product.to(self.T)

    def dense(self) -> Tensor:
        """Q itself.  # (d, q)"""
        return self.X if self.T is None else self.X @ self.T.to(self.X)


def span(X: Tensor, single: bool = False) -> tuple[Span, Tensor]:
    """`X = Q R` with orthonormal columns `Q (d, q)`, `q = min(d, m)`, and `R (q, m)`; in float64.

    With `X = N D`, D the lengths of the columns, and `N^T N = L L^T`, it is `R = L^T D` and `Q = X R^-1`.
    That is less than half the work of a Householder QR.  It squares the condition of N, so a QR takes its
    place where columns are nearly dependent.

    Stathopoulos & Wu, A block orthogonalization procedure with constant synchronization requirements, 2002.

    Args:
        X: (d, m)
        single: products of the long side in float32 suffice, about 1e-6 of what comes out; they are left to
            float64 where columns are far from orthogonal
    """
    d, m = X.shape
    if m >= d:
        return Span(torch.eye(d, dtype=torch.float64, device=X.device)), X.double()
    if single and X.dtype == torch.float32:
        G = gram(X, rows=_SUMMED)
        # Below this, squares of float32 lose digits.
        if G.diagonal().min() > 1e-24 and (found := _cholesky_qr(X, G, _NEARLY_ORTHOGONAL * m)):
            return found
    X = X.double()
    if found := _cholesky_qr(X, gram(X), _WELL_CONDITIONED):
        return found
    Q, R = torch.linalg.qr(X)
    return Span(Q), R


def _cholesky_qr(X: Tensor, G: Tensor, bound: float) -> tuple[Span, Tensor] | None:
    """Q and R of X by its Gram matrix G, unless the squared size of the inverse of L is above the bound."""
    lengths = G.diagonal().sqrt()  # (m,)
    L, failed = torch.linalg.cholesky_ex(G / lengths / lengths[:, None])
    if failed or not torch.isfinite(L).all():
        return None
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(L)).to(L), upper=False)
    if not inverse.square().sum() <= bound:
        return None
    return Span(X, inverse.mT / lengths[:, None]), L.mT * lengths


def gram(X: Tensor, width: int = 128, rows: int | None = None) -> Tensor:
    """`X^T X`, of which only one half is computed, by blocks of columns.  # (d, m) -> (m, m)

    Args:
        rows: how many of them to add up at a time in the precision of X; their sums are in float64 then
    """
    m = X.shape[1]
    G = X.new_zeros(m, m, dtype=torch.float64 if rows else X.dtype)
    for some in X.split(rows or max(1, len(X))):
        for i in range(0, m, width):
            block = slice(i, i + width)
            G[block, i:] += some[:, block].mT @ some[:, i:]
    return G.triu() + G.triu(1).mT


def leading_left(R: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Left singular vectors `P (p, k)` and values `S (k,)` of a small `R (p, m)`, the largest first.

    From `R R^T` in float64, so values below 1e-8 of the largest are rounding.
    """
    values, P = torch.linalg.eigh(gram(R.mT))
    k = k or min(R.shape)
    return P.flip(1)[:, :k], values.flip(0)[:k].clamp(min=0).sqrt()


def numerical_rank(S: Tensor, shape: torch.Size | tuple[int, ...], largest: Tensor | None = None) -> Tensor:
    """How many singular values rise above rounding, `s > max(shape) eps s_max`.

    The factors come as float32, so `eps` is that of float32, whatever the precision of `S`.

    Args:
        S: singular values in descending order  # (..., k)
        shape: of the matrix that they belong to, of which the last two sides count
        largest: `s_max` of what the matrix was computed from; by default its own, `S[..., 0]`  # (...)

    Returns:
        (...)
    """
    top = S[..., :1] if largest is None else largest[..., None]
    return (S > max(shape[-2:]) * torch.finfo(torch.float32).eps * top).sum(-1)


def finite(*tensors: Tensor) -> bool:
    """Whether no entry is NaN or infinite, without a copy of the size of a tensor."""
    return all(math.isfinite(bound) for tensor in tensors if tensor.numel() for bound in tensor.aminmax())


def product_overflows(factors: Sequence[Tensor], rank: int) -> bool:
    """Whether an entry of the product of two factors could exceed the largest number of their precision.

    Args:
        factors: `B (d_out, r)` and `A (r, d_in)`
        rank: r, how many products an entry adds up
    """
    largest = math.prod(max(map(abs, map(float, factor.aminmax()))) for factor in factors)
    return not largest * rank < torch.finfo(factors[0].dtype).max


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U (.., d_out, k)`, `S (.., k)`, `V^T (.., k, d_in)` of `B A` in float64, by an SVD of its core.

    `B = Q_B R_B`, `A^T = Q_A R_A`, and `R_B R_A^T` is small: `k = min(r, d_out, d_in)`.

    Args:
        B: (.., d_out, r)
        A: (.., r, d_in)
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def leading_subspace(M: Tensor, width: int, seed: int, steps: int | None = None) -> Tensor:
    """An orthonormal basis `Q (n, width)` close to the leading right singular vectors of `M (m, n)`.

    Subspace iteration from random directions: Halko, Martinsson & Tropp, 2011 (arXiv 0909.4061).

    Args:
        M: (m, n)
        width: how many columns Q has, some 16 more than the vectors that are wanted
        seed: of the directions at the start
        steps: iterations; by default they go on until one gains less than a thousandth of `||M Q||^2`
    """
    # Drawn on the CPU, so that every device starts from the same directions.
    generator = torch.Generator().manual_seed(seed)
    Q = torch.randn(M.shape[1], width, generator=generator, device="cpu", dtype=M.dtype).to(M.device)
    before, held, step = -1.0, 0.0, 0
    while held - before > 1e-3 * held if steps is None else step < steps:
        Z = M.mT @ torch.linalg.qr(M @ Q).Q
        Q = torch.linalg.qr(Z).Q
        before, held, step = held, Z.square().sum().item(), step + 1
    return Q


def leading_triplets(M: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`U (m, k)`, `S (k,)`, `V^T (k, n)` of the `k` largest singular values of `M (m, n)`.

    They come from `leading_subspace`, or from an SVD of M where M is so small that this is no more work.

    Args:
        M: (m, n)
        rank: k
        seed: of the subspace
    """
    width = rank + 16
    if 2 * width > min(M.shape):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    Q = leading_subspace(M, width, seed)
    U, S, Vh = torch.linalg.svd(M @ Q, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank] @ Q.mT


def seed_of(*names: str) -> int:
    """A seed that depends on names only, so that results do not depend on the order of execution."""
    return int.from_bytes(hashlib.sha256("\0".join(names).encode()).digest()[:7], "big")
