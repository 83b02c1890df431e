"""SVD + CUR: what adapters share in singular directions, what each has alone in a few rows and columns.

After Lu et al., On the Representation Geometry of LoRA Model Merging (Findings of ACL 2026).  Reconstructed
from the abstract, which says that the two decompositions are combined but not how; no parity with the paper
is claimed.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.inputs import OneByOneParameters, Planned
from mergekit_tspa.methods.method import Method, OneByOne, ResultRank
from mergekit_tspa.rules.linear import weighted_sum
from mergekit_tspa.spaces.cores import cores
from mergekit_tspa.updates import LoraFactors, LowRank

Select = Literal["deim", "leverage", "norm"]
Combine = Literal["residual", "interpolate"]
Shared = Literal["mean", "sum"]


class SvdCurParameters(OneByOneParameters):
    k: int | None = Field(None, ge=0, description="shared singular directions; the largest rank by default")
    c: int | None = Field(
        None, ge=1, description="rows and columns per adapter; half the largest rank by default"
    )
    gamma: float = Field(1.0, ge=0, le=1, description="weight of the rows and columns")
    select: Select = Field("deim", description="how rows and columns are chosen")
    combine: Combine = Field(
        "residual", description="whether rows and columns are of what the shared part leaves"
    )
    shared: Shared = Field("mean", description="how the shared parts are merged")


def svd_cur(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    k: int | None = None,
    c: int | None = None,
    gamma: float = 1.0,
    select: Select = "deim",
    combine: Combine = "residual",
    shared: Shared = "mean",
) -> LoraFactors:
    """`rule(a_t S_t) + gamma sum_t a_t CUR(D_t - S_t)`, of rank `k + n c` at most, where the rule is the mean
    or sum.

    `S_t = L L^T D_t N N^T` with the k leading left singular vectors L of `[D_1 | .. | D_n]` and N of
    `[D_1^T | .. | D_n^T]`; CUR keeps c rows and c columns.  The other way to combine them is
    `rule(a_t ((1 - gamma) S_t + gamma CUR(D_t)))`.
    """
    r = max(f.rank for f in factors)
    k = r if k is None else k
    c = max(1, r // 2) if c is None else c
    share = 1 / len(factors) if shared == "mean" else 1
    common = cores(factors)
    Q_B, Q_A, C = common.Q_B.dense(), common.Q_A.dense(), common.C  # (d_out, q_B), (d_in, q_A), (n, q_B, q_A)
    L, N = (torch.linalg.svd(torch.cat([*M], dim=1), full_matrices=False).U[:, :k] for M in (C, C.mT))
    S = L @ L.mT @ C @ N @ N.mT
    E = C - S if combine == "residual" else C
    K = torch.stack([cur(E_t, Q_B, Q_A, c, select, size=C_t.norm()) for E_t, C_t in zip(E, C)])
    M = share * S + gamma * K if combine == "residual" else share * ((1 - gamma) * S + gamma * K)
    merged = weighted_sum(M, M.new_tensor(weights))
    return LowRank(Q_B @ merged, Q_A.mT).truncated(k + len(factors) * c).to(factors[0].B.dtype)


def cur(C: Tensor, Q_B: Tensor, Q_A: Tensor, c: int, select: Select, size: Tensor) -> Tensor:
    """The core of `E[:,J] X E[I,:]`, `X = E[:,J]^+ E E[I,:]^+`, for c rows I and c columns J of `E = Q_B C
    Q_A^T`.

    No more of them than the rank of E, for which rounding errors of a matrix of norm `size` do not count.
    """
    U, S, Vh = torch.linalg.svd(C, full_matrices=False)
    c = min(c, int((S > max(C.shape) * torch.finfo(S.dtype).eps * size).sum()))
    rows = choose(Q_B @ U, S, c, select)
    columns = choose(Q_A @ Vh.mT, S, c, select)
    E_J, E_I = C @ Q_A[columns].mT, Q_B[rows] @ C  # (q_B, c), (c, q_A)
    return E_J @ torch.linalg.pinv(E_J) @ C @ torch.linalg.pinv(E_I) @ E_I


def choose(U: Tensor, S: Tensor, c: int, select: Select) -> list[int]:
    """c rows of `U diag(S)`: by their norms, by those of the first c singular vectors alone (leverage), or by
    DEIM.

    DEIM takes for each vector the row where the rows chosen before interpolate it worst (Sorensen and Embree,
    2016); these are the pivots of an LU decomposition.
    """
    if select == "norm":
        return (U * S).norm(dim=1).topk(c).indices.tolist()
    if select == "leverage":
        return U[:, :c].norm(dim=1).topk(c).indices.tolist()
    rows = list(range(len(U)))
    # On the CPU, because the library that does it on a GPU prints warnings of tall matrices.
    for i, pivot in enumerate(torch.linalg.lu_factor(U[:, :c].cpu()).pivots.tolist()):
        rows[i], rows[pivot - 1] = rows[pivot - 1], rows[i]
    return rows[:c]


def _check_size(plans: Sequence[Planned]) -> None:
    """Refuse more directions, rows or columns than any tensor has; smaller ones among them take what they
    have.
    """
    for name, what in (("k", "shared singular directions"), ("c", "rows and columns")):
        asked = [plan for plan in plans if getattr(plan.parameters, name) is not None]
        if not asked:
            continue
        value, largest = min(getattr(plan.parameters, name) for plan in asked), max(asked, key=_room)
        if value > _room(largest):
            raise InputError(
                f"{name} {value}: the adapters have {_room(largest)} {what} for a tensor at most "
                f"({largest.name}); ask for no more, or leave it out"
            )


def _room(plan: Planned) -> int:
    """The largest rank that the stacked updates of a tensor can have."""
    return min(*plan.shape, sum(plan.ranks))


K_AND_ROWS = ResultRank("k + n c", lambda ranks, p: sum(ranks), exact=False)
svd_cur_method = Method(
    name="svd_cur",
    title="SVD + CUR",
    summary=(
        "shared singular directions, a few rows and columns of each adapter; reconstructed from the abstract"
    ),
    paper="after Lu et al., Findings of ACL 2026",
    url="https://aclanthology.org/2026.findings-acl.261/",
    result=K_AND_ROWS,
    merge=OneByOne(lambda w: svd_cur(w.factors, w.weights, **w.parameters.own())),
    parameters=SvdCurParameters,
    check=_check_size,
)
