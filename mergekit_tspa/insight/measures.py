"""Numbers about low-rank updates ``D_t = B_t A_t``, from their singular vectors; no ``d_out x d_in`` matrix
is formed.

All numbers but `apart` belong to the updates, not to how they are split into factors.  Letters of shapes:
m modules of one shape, n adapters, r_t rank of the factors of adapter t, R = sum r_t.
"""

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.linalg import numerical_rank, product_svd
from mergekit_tspa.updates import LoraFactors

SAMPLE = 2**18  # about how many entries of an update are looked at for their signs


class Svd(NamedTuple):
    """``D = U diag(S) V^T`` in float64; columns of U and V are zero beyond the numerical rank."""

    U: Tensor  # (m, d_out, k), k = min(r, d_out, d_in)
    S: Tensor  # (m, k)
    V: Tensor  # (m, d_in, k)
    rank: Tensor  # (m,)


def svd(B: Tensor, A: Tensor) -> Svd:
    """Of ``B A``, without what is rounding.

    Args:
        B: (m, d_out, r)
        A: (m, r, d_in)
    """
    U, S, Vh = product_svd(B, A)
    rank = numerical_rank(S, (B.shape[1], A.shape[2]))
    kept = torch.arange(S.shape[1], device=S.device) < rank[:, None]  # (m, k)
    return Svd(U * kept[:, None], S * kept, Vh.mT * kept[:, None], rank)


def effective_rank(S: Tensor) -> Tensor:
    """``exp(-sum p_i ln p_i)``, ``p_i = s_i / sum s``: how many directions of equal size carry as much; 0 of
    zero.

    Roy & Vetterli, The effective rank, EUSIPCO 2007.

    Args:
        S: singular values  # (..., k)
    """
    total = S.sum(-1, keepdim=True)
    p = S / total.where(total > 0, 1)
    return torch.exp(torch.special.entr(p).sum(-1)).where(total[..., 0] > 0, 0)


def stable_rank(S: Tensor) -> Tensor:
    """``||D||_F^2 / ||D||_2^2``; 0 of zero.

    Args:
        S: singular values, the largest first  # (..., k)
    """
    top = S[..., 0].square()
    return S.square().sum(-1) / top.where(top > 0, 1)


def principal_angles(cross: Tensor, dims: Tensor) -> Tensor:
    """Between two subspaces, in degrees, ascending: ``arccos`` of the singular values of ``Q_t^T Q_u``.

    Björck & Golub, Numerical methods for computing angles between linear subspaces, 1973.

    Args:
        cross: ``Q_t^T Q_u`` of orthonormal bases, some of whose columns may be zero  # (m, r_t, r_u)
        dims: of the smaller subspace  # (m,)

    Returns:
        (m, min(r_t, r_u)), NaN beyond `dims`.
    """
    angles = torch.linalg.svdvals(cross).clamp(max=1).acos().rad2deg()
    return angles.where(torch.arange(angles.shape[1], device=angles.device) < dims[:, None], nan)


def sign_conflict(sample: Tensor) -> Tensor:
    """Share of the entries, non-zero in both of two updates, whose signs differ: 0.5 is chance; NaN if there
    is none.

    Args:
        sample: the same entries of every update  # (m, n, entries)

    Returns:
        (m, n, n)
    """
    signs = sample.sign()
    both = signs.abs() @ signs.abs().mT
    return ((1 - (signs @ signs.mT) / both) / 2).double()


def sample_rows(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    """Rows that make about `SAMPLE` entries, drawn without replacement, the same for one shape and seed."""
    count = min(d_out, max(8, SAMPLE // d_in))
    return torch.randperm(d_out, generator=torch.Generator().manual_seed(seed))[:count].sort().values


class Measures(NamedTuple):
    """Of m modules and n adapters; NaN where an adapter has no part, and where a zero update has nothing to
    say.
    """

    norm: Tensor  # (m, n)  ||D_t||
    rank: Tensor  # (m, n)  numerical
    effective_rank: Tensor  # (m, n)
    stable_rank: Tensor  # (m, n)
    inner: Tensor  # (m, n, n)  <D_t, D_u>
    overlap_out: Tensor  # (m, n, n)  mean squared cosine of the principal angles of the column spaces
    overlap_in: Tensor  # (m, n, n)  of the row spaces
    angle_out: Tensor  # (m, n, n)  the smallest principal angle, degrees
    angle_in: Tensor  # (m, n, n)
    conflict: Tensor  # (m, n, n)  share of opposite signs
    apart: Tensor  # (m,)  norm of the factors summed apart

    @classmethod
    def empty(cls, m: int, n: int) -> "Measures":
        shapes = [(m, n)] * 4 + [(m, n, n)] * 6 + [(m,)]
        return cls(*(torch.full(shape, nan, dtype=torch.float64) for shape in shapes))

    def put(self, modules: Sequence[int], adapters: Sequence[int], part: "Measures") -> None:
        """Write what was measured of some modules and of the adapters that touch them."""
        rows, columns = torch.tensor(modules), torch.tensor(adapters)
        for whole, some in zip(self, part):
            index = [(rows,), (rows[:, None], columns), (rows[:, None, None], columns[:, None], columns)]
            whole[index[whole.ndim - 1]] = some.to(whole)


def measure(factors: Sequence[LoraFactors], seed: int = 0) -> Measures:
    """Everything about m modules of one shape that the same n adapters touch.

    With ``O = [U_1 .. U_n]^T [U_1 .. U_n]``, and ``I`` alike of the V, ``<D_t, D_u>`` is the sum of
    ``s_i s_j O_ij I_ij`` over i of t and j of u; the singular values of their blocks are the cosines of the
    principal angles.

    Args:
        factors: per adapter ``B (m, d_out, r_t)`` and ``A (m, r_t, d_in)``
        seed: of the rows whose signs are compared
    """
    parts = [svd(*f) for f in factors]
    widths = [p.S.shape[1] for p in parts]
    owner = torch.eye(len(parts)).double().repeat_interleave(torch.tensor(widths), 0).to(parts[0].S)  # (R, n)
    U, S, V = (torch.cat(sides, -1) for sides in zip(*(p[:3] for p in parts)))
    O, I = U.mT @ U, V.mT @ V  # (m, R, R)  # noqa: E741
    rank = torch.stack([p.rank for p in parts], 1)  # (m, n)
    ranks = [torch.stack([of(p.S) for p in parts], 1) for of in (effective_rank, stable_rank)]
    smaller = torch.minimum(rank[:, :, None], rank[:, None])
    overlap_out, overlap_in = (owner.mT @ G.square() @ owner / smaller for G in (O, I))
    rows = sample_rows(U.shape[1], V.shape[1], seed)
    sample = torch.stack(
        [((p.U[:, rows] * p.S[:, None]).float() @ p.V.float().mT).flatten(1) for p in parts], 1
    )  # (m, n, entries)
    return Measures(
        norm=torch.stack([p.S.square().sum(1).sqrt() for p in parts], 1),
        rank=rank,
        effective_rank=ranks[0].where(rank > 0, nan),  # zero updates would only blur the means
        stable_rank=ranks[1].where(rank > 0, nan),
        inner=owner.mT @ (S[:, :, None] * S[:, None] * O * I) @ owner,
        overlap_out=overlap_out,
        overlap_in=overlap_in,
        angle_out=_smallest_angles(O, widths, smaller),
        angle_in=_smallest_angles(I, widths, smaller),
        conflict=sign_conflict(sample),
        apart=apart(factors),
    )


def _smallest_angles(G: Tensor, widths: Sequence[int], smaller: Tensor) -> Tensor:
    """From the blocks of a Gram matrix (m, R, R) of orthonormal bases: (m, n, n)."""
    angles = smaller.new_zeros(smaller.shape, dtype=G.dtype)
    blocks = [row.split(widths, 2) for row in G.split(widths, 1)]
    for t in range(len(widths)):
        for u in range(t):
            angles[:, t, u] = angles[:, u, t] = principal_angles(blocks[t][u], smaller[:, t, u])[:, 0]
    return angles.where(smaller > 0, nan)


def interference(inner: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """How the weighted updates of a module add up.

    Returns:
        ``||sum_t a_t D_t|| / sum_t ||a_t D_t||``, which is 1 if all point the same way and ``1 / sqrt(n)``
        for n orthogonal ones of equal size; and ``||sum_t a_t D_t||^2 / sum_t ||a_t D_t||^2 - 1``, the share
        that the cross terms add to the energy: 0 if they are orthogonal, below 0 where they cancel, above 0
        where they add up.  NaN where fewer than two updates meet.

    Args:
        inner: <D_t, D_u>  # (..., n, n)
        weights: a_t  # (..., n)
    """
    weighted = inner.nan_to_num() * weights.nan_to_num()[..., :, None] * weights.nan_to_num()[..., None, :]
    energy = weighted.diagonal(dim1=-2, dim2=-1)  # (..., n)
    total = weighted.sum((-2, -1)).clamp(min=0)
    meet = (energy > 0).sum(-1) > 1
    ratio, cross = total.sqrt() / energy.sqrt().sum(-1), total / energy.sum(-1) - 1
    return ratio.where(meet, nan), cross.where(meet, nan)


def cosines(inner: Tensor) -> Tensor:
    """``<D_t, D_u> / (||D_t|| ||D_u||)``, NaN where one is absent or zero  # (..., n, n)"""
    norm = inner.diagonal(dim1=-2, dim2=-1).sqrt()
    norm = norm.where(norm > 0, nan)
    return (inner / (norm[..., :, None] * norm[..., None, :])).clamp(-1, 1)


def apart(factors: Sequence[LoraFactors]) -> Tensor:
    """``||(sum_t B_t)(sum_t A_t)||`` (m,): the norm of the sum of the factors apart, with its cross terms
    ``B_t A_u``.

    NaN for ranks that differ.  The only number here that depends on how an update is split into its factors.
    """
    if len({f.B.shape[-1] for f in factors}) > 1:
        return factors[0].B.new_full((len(factors[0].B),), nan, dtype=torch.float64)
    B, A = (torch.stack(side).sum(0, dtype=torch.float64) for side in zip(*factors))
    return ((B.mT @ B) * (A @ A.mT)).sum((1, 2)).clamp(min=0).sqrt()


def projection(update: LoraFactors | Tensor, factors: Sequence[LoraFactors]) -> tuple[Tensor, Tensor]:
    """``<M, D_t>`` (n,) and ``||M||`` of one module's merged update, in float64.

    Args:
        update: M, low-rank or dense
        factors: of the adapters
    """
    if isinstance(update, Tensor):
        inner = [((update @ f.A.mT) * f.B).sum(dtype=torch.float64) for f in factors]
    else:
        inner = [((update.B.mT @ f.B).double() * (update.A @ f.A.mT).double()).sum() for f in factors]
    return torch.stack(inner), update.norm().double()
