"""RegMean: the update that answers each adapter's own inputs as that adapter does (Jin et al., 2023).

`M* = argmin_M sum_t |a_t| tr((M - s_t D_t) C_t (M - s_t D_t)^T) = (sum_t a_t D_t C_t) S^-1` with `s_t` the
sign of `a_t` and `S = sum_t |a_t| C_t`, where `C_t = mean x x^T` over the inputs `x` that the weight sees on
texts of task `t`.

Every row of `M*` lies in the span of the columns of `B_1, .., B_n`, so that `M* = Q_B X` with an orthonormal
`Q_B` of at most `sum_t r_t` columns.  Only `A_t C_t` and `S` are formed, never an update of full size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_tspa.linalg import gram, span
from mergekit_tspa.rules.grams import descending


def regmean(
    B: Sequence[Tensor],  # (d_out, r_t) each
    A: Sequence[Tensor],  # (r_t, d_in) each
    C: Sequence[Tensor],  # (d_in, d_in) each
    weights: Tensor,  # (n,)
    rank: int | None = None,
    ridge: float = 0.01,
    off_diagonal: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`M* = (sum_t a_t D_t C_t)(sum_t |a_t| C_t)^-1` of `D_t = B_t A_t`, as factors.

    A mean by nature: a weight says how much an adapter's inputs count, so that an adapter alone comes back
    as itself whatever its positive weight, and equal statistics give `sum a_t D_t / sum |a_t|`.  A negative
    weight asks for the opposite answer, and counts as much as a positive one.  An adapter of weight 0 takes
    no part; one whose update is 0 asks for the answer 0 on its inputs.

    With `rank` the best answer of that rank for the same inputs: `svd_r(M* L) L^-1`, `S = L L^T`, which has
    the least `||(M - M*) L||` (Eckart and Young).

    RegMean++ (Nguyen et al., 2025, arXiv 2508.03121) is this rule with statistics of inputs that come from
    the model that is already merged below the weight.

    Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, 2023 (arXiv 2212.09849).

    Args:
        B: left factors, of any ranks
        A: right factors
        C: second moments of the inputs, symmetric and positive semidefinite; see `second_moment`
        rank: at most so many columns of the result's factor; None is the exact answer
        ridge: `rho` of `C_t + rho mean(diag C_t) I`.  With 0 a singular `S` has its pseudo-inverse, up to
            the precision of `C`
        off_diagonal: the factor of the entries beside the diagonals, .9 or .95 in published code

    Returns:
        `Q (d_out, k)`, whose columns are orthonormal, and `X (k, d_in)` with `M* = Q X`, in float64.  `k` is
        `min(d_out, sum_t r_t)`, or `rank` if that is less.
    """
    rows, parts = _parts(A)
    S = torch.zeros_like(C[0], dtype=torch.float64)
    for a, A_t, C_t, part in zip(weights.double(), A, C, parts):
        moment = _conditioned(C_t.double(), ridge, off_diagonal)
        torch.mul(A_t.double() @ moment, a, out=part)
        S += a.abs() * moment
    return _answer(B, rows, DenseMetric(S, _precision(C[0], ridge)), rank)


def regmean_low_rank(
    B: Sequence[Tensor],  # (d_out, r_t) each
    A: Sequence[Tensor],  # (r_t, d_in) each
    U: Sequence[Tensor],  # (d_in, k_t) each
    values: Sequence[Tensor],  # (k_t,) each
    rest: Sequence[Tensor],  # (d_in,) each
    weights: Tensor,  # (n,)
    rank: int | None = None,
    ridge: float = 0.01,
    off_diagonal: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`regmean` for `C_t = U_t diag(l_t) U_t^T + diag(rest_t)`, without a `d_in x d_in` matrix.

    `S = E + V V^T` with a diagonal `E` and `sum_t k_t` columns `V`, so that by the SVD `E^-1/2 V = P s R^T`
    its root is `L = E^1/2 (I + P (sqrt(1 + s^2) - 1) P^T)`, and its inverse is Woodbury's.  The same answer
    as `regmean` for these `C_t`, in memory and time linear in `d_in`.

    Args:
        B: left factors, of any ranks
        A: right factors
        U: as `low_rank_moment` gives them; the columns need not be orthonormal
        values: `l_t`, none negative
        rest: none negative.  Where their sum, with the ridge, is 0 it is taken as rounding of the mean
        weights: as for `regmean`, and so are `rank`, `ridge` and `off_diagonal`

    Returns:
        as `regmean`
    """
    rows, parts = _parts(A)
    V_T, columns = _parts([U_t.mT for U_t in U])
    E = torch.zeros_like(rest[0], dtype=torch.float64)
    for a, A_t, U_t, l_t, rest_t, part, column in zip(weights.double(), A, U, values, rest, parts, columns):
        A_t, U_t = A_t.double(), U_t.double()
        whole = U_t.square() @ l_t.double() + rest_t.double()  # the diagonal, which `off_diagonal` leaves
        l_t = off_diagonal * l_t.double()
        rest_t = whole - U_t.square() @ l_t + ridge * whole.mean()
        torch.addmm(A_t * rest_t, A_t @ U_t * l_t, U_t.mT, out=part).mul_(a)
        torch.mul(U_t, (a.abs() * l_t).sqrt(), out=column.mT)
        E += a.abs() * rest_t
    return _answer(B, rows, LowRankMetric(V_T.mT, E), rank)


def regmean_in_rows(
    B: Sequence[Tensor],  # (d_out, r_t) each
    A: Sequence[Tensor],  # (r_t, d_in) each
    K: Sequence[Tensor],  # (R, R) each, R = sum_t r_t
    weights: Tensor,  # (n,)
    rank: int | None = None,
    ridge: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """The best answer whose rows lie in those of `A = [A_1;..;A_n]`, from the adapters' bottlenecks alone.

    `M = Y A` with `Y = (sum_t a_t [0|B_t|0] K_t)(sum_t |a_t| K_t)^-1`, where `K_t = A C_t A^T` is the second
    moment of `A x` on texts of task `t`: `R^2` numbers instead of `d_in^2`.

    Solved as `regmean` in an orthonormal basis of the rows.  Where adapters share `A`, or nearly so, it
    has only the directions that the precision of `K` tells apart.

    Args:
        B: left factors, of any ranks
        A: right factors
        K: `second_moment` of `X A^T`, `X` the inputs
        weights: as for `regmean`, and so is `rank`
        ridge: as for `regmean`, with the mean over the rows of `A`

    Returns:
        as `regmean`
    """
    stacked = torch.cat(list(A)).double()
    gram = stacked @ stacked.mT
    values, V = descending(gram)
    kept = values > len(gram) * torch.finfo(K[0].dtype).eps * values[0]
    if not kept.any():
        Q, _ = torch.linalg.qr(torch.cat(list(B), dim=1).double())
        return Q[:, :rank], torch.zeros_like(stacked[: Q[:, :rank].shape[1]])
    to_basis = (V[:, kept] / values[kept].sqrt()).mT  # (k, R); the rows of `to_basis A` are orthonormal
    moments = [to_basis @ K_t.double() @ to_basis.mT for K_t in K]
    coordinates = (gram @ to_basis.mT).split([len(A_t) for A_t in A])  # A_t in that basis
    Q, X = regmean(B, coordinates, moments, weights, rank, ridge)
    return Q, X @ to_basis @ stacked


def second_moment(X: Tensor) -> Tensor:
    """`C = mean x x^T`, in float64; 0 of no inputs.  # (inputs, d_in) -> (d_in, d_in)"""
    X = X.double()
    return X.mT @ X / max(1, len(X))


def low_rank_moment(C: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`C ~ U diag(l) U^T + diag(rest)`: the `k` largest eigenvalues, and what they leave of the diagonal.

    The diagonal stays exact.  `(k + 1) d_in` numbers beside an adapter instead of `d_in^2`.

    Args:
        C: symmetric and positive semidefinite  # (d_in, d_in)
        k: at most `d_in`

    Returns:
        `U (d_in, k)` with orthonormal columns, `l (k,)` and `rest (d_in,)`, none negative, in float64
    """
    values, U = descending(C.double())
    values, U = values[:k].clamp(min=0), U[:, :k]
    return U, values, (C.double().diagonal() - U.square() @ values).clamp(min=0)


class DenseMetric:
    """The length `||X L||`, `S = L L^T`, of a map `X` on inputs whose second moment is `S`.

    By Cholesky; where `S` is singular to the precision of its statistics, by its eigenvalues above that, and
    `L^-1` is a pseudo-inverse.
    """

    def __init__(self, S: Tensor, precision: float = torch.finfo(torch.float64).eps):
        """S is (d, d), and `precision` the relative one of what it was made of."""
        self._L: Tensor
        self._L, failed = torch.linalg.cholesky_ex(S)
        self._spectrum: tuple[Tensor, Tensor] | None = (
            None  # roots of eigenvalues (d',), eigenvectors (d, d')
        )
        smallest = self._L.diagonal().square().min()
        if bool(failed) or bool(smallest <= len(S) * precision * S.diagonal().max()):
            values, V = descending(S)
            kept = values > len(S) * precision * values[0]
            self._spectrum = values[kept].sqrt(), V[:, kept]

    def color(self, X: Tensor) -> Tensor:
        """`X L`, whose Frobenius norm is the root mean square of the answers.  # (m, d) -> (m, d')"""
        if self._spectrum is None:
            return X @ self._L
        root, V = self._spectrum
        return X @ V * root

    def whiten(self, Y: Tensor) -> Tensor:
        """`Y L^-T`, which is `(Y S^-1) L`.  # (m, d) -> (m, d')"""
        if self._spectrum is None:
            solved: Tensor = torch.linalg.solve_triangular(self._L, Y.mT, upper=False)
            return solved.mT
        root, V = self._spectrum
        return Y @ V / root

    def uncolor(self, Z: Tensor) -> Tensor:
        """`Z L^-1`  # (m, d') -> (m, d)"""
        if self._spectrum is None:
            solved: Tensor = torch.linalg.solve_triangular(self._L.mT, Z.mT, upper=True)
            return solved.mT
        root, V = self._spectrum
        return Z / root @ V.mT


class LowRankMetric:
    """`DenseMetric` of `S = V V^T + diag(E)`, from the eigenvectors of a Gram matrix of `E^-1/2 V` alone.

    With `N = E^-1/2 V`, `N^T N = R diag(s^2) R^T` and `f = sqrt(1 + s^2)`, the root of `I + N N^T` is
    `I + N R diag((f - 1) / s^2) R^T N^T`, where `(f - 1) / s^2 = 1 / (f + 1)`; so no direction is too small.
    """

    def __init__(self, V: Tensor, E: Tensor):
        """V is (d, k), which is overwritten, and E (d,), none negative."""
        diagonal = V.square().sum(1) + E
        mean = diagonal.mean() + torch.finfo(E.dtype).tiny
        rounding = torch.finfo(E.dtype).eps * mean
        unseen = diagonal == 0  # which may have any scale, and keep a harmless one
        self._scale = torch.where(unseen, mean, torch.maximum(E, rounding)).sqrt()
        self._N = V.div_(self._scale[:, None])
        squares, R = torch.linalg.eigh(gram(self._N))
        f = (1 + squares.clamp(min=0)).sqrt()
        self._root = R / (f + 1) @ R.mT  # (k, k)
        self._inverse = R / (-f * (f + 1)) @ R.mT

    def color(self, X: Tensor) -> Tensor:
        """`X L`  # (m, d) -> (m, d)"""
        return self._stretch(X * self._scale, self._root)

    def whiten(self, Y: Tensor) -> Tensor:
        """`Y L^-T`  # (m, d) -> (m, d)"""
        return self._stretch(Y / self._scale, self._inverse)

    def uncolor(self, Z: Tensor) -> Tensor:
        """`Z L^-1`  # (m, d) -> (m, d)"""
        return self._stretch(Z, self._inverse) / self._scale

    def _stretch(self, X: Tensor, G: Tensor) -> Tensor:
        """`X (I + N G N^T)`"""
        return torch.addmm(X, X @ self._N @ G, self._N.mT)


def _conditioned(C: Tensor, ridge: float, off_diagonal: float) -> Tensor:
    diagonal = C.diagonal()
    moment = off_diagonal * C
    moment.diagonal().copy_(diagonal + ridge * diagonal.mean())
    return moment


def _precision(statistics: Tensor, ridge: float) -> float:
    """A ridge is exact, and what it adds must not be taken for rounding beside a few large inputs."""
    return torch.finfo(torch.float64 if ridge else statistics.dtype).eps


def _parts(A: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Room for matrices of the shapes of `A_t`, one below the other, and the part of each in it."""
    ranks = [len(A_t) for A_t in A]
    whole = torch.empty(sum(ranks), A[0].shape[1], dtype=torch.float64, device=A[0].device)
    return whole, whole.split(ranks)


def _answer(
    B: Sequence[Tensor], rows: Tensor, metric: DenseMetric | LowRankMetric, rank: int | None
) -> tuple[Tensor, Tensor]:
    """`[B_1|..|B_n] rows S^-1` in the basis of the `B_t`, or the best of that rank."""
    Q, R = span(torch.cat(list(B), dim=1))
    W = metric.whiten(rows)  # (sum_t r_t, d'); the answers are M* L = Q R W
    if rank is None:
        return Q.dense(), metric.uncolor(R @ W)
    P = descending(R @ gram(W.mT) @ R.mT)[1][:, : min(rank, W.shape[1])]
    return Q @ P, metric.uncolor(P.mT @ R @ W)
