"""RobustMerge (arXiv 2502.17159): factors lose their small entries, rank directions are weighed by what they
lost.

The paper and its code (AuroraZengfh/RobustMerge) differ in more than details; here are both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mergekit_tspa.methods.inputs import OneByOneParameters
from mergekit_tspa.methods.method import LARGEST_RANK, SUM_OF_RANKS, Method, OneByOne
from mergekit_tspa.updates import LoraFactors, nonzero


class RobustMergeParameters(OneByOneParameters):
    lambda_: float = Field(
        2.0, alias="lambda", allow_inf_nan=False, description="factor on the merged update"
    )
    density: float = Field(
        0.2, gt=0, le=1, description="share of the entries kept in each factor, the largest"
    )


class RobustMergeCodeParameters(RobustMergeParameters):
    lambda_: float = Field(
        4.0,
        alias="lambda",
        allow_inf_nan=False,
        description="factor on the merged update, 2 for each of its factors",
    )
    att: float = Field(
        0.2, ge=0, le=1, description="share of rank directions with a weight of their own, the largest"
    )


def robustmerge(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, density: float = 0.2
) -> LoraFactors:
    """`sum_t a_t Bh_t diag(s_t / sum_u s_u) Ah_t`, of rank `sum_t r_t` (Eq. 3-4).

    Hats mark pruned factors and `s_t[i] = ||A_t[i]||_1 / ||Ah_t[i]||_1` is what row i lost.  Rows that lost
    everything, adapters without an update and, for unequal ranks, rows that are not there have no share in
    the sum over adapters.
    """
    pruned = _prune(factors, weights, density)
    total = pad_sequence([s_t for _, _, s_t in pruned]).sum(1)  # (largest rank,)
    B = [B_t * _ratio(s_t, total[: len(s_t)]) for B_t, _, s_t in pruned]
    return LoraFactors(torch.cat(B, dim=1), torch.cat([A_t for _, A_t, _ in pruned]))


def robustmerge_code(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, density: float = 0.2, att: float = 0.2
) -> LoraFactors:
    """`B = sum_t Bh_t diag(s_t / sum_u s_u)`, `A = sum_t Ah_t`, for equal ranks; contains cross terms.

    `s_t` as in the paper, but with its largest `att r` values apart all are raised to one value.
    """
    B, A, s = (torch.stack(part) for part in zip(*_prune(factors, weights, density)))
    r = s.shape[1]
    least = s.sort(dim=1).values[:, min(int(r * (1 - att)), r - 1), None]  # (n, 1)
    s = s.clamp(min=least)
    return LoraFactors((B * _ratio(s, s.sum(0))[:, None]).sum(0), A.sum(0))


def _prune(
    factors: Sequence[LoraFactors], weights: Sequence[float], density: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`Bh_t (d_out, r_t)`, `Ah_t (r_t, d_in)` and `s_t (r_t,)` of the weighted updates that are not zero."""
    pruned = []
    for t in nonzero(factors):
        B, A = factors[t].scaled(weights[t])
        kept = _largest(A, density)
        pruned.append((_largest(B, density), kept, _ratio(A.abs().sum(1), kept.abs().sum(1))))
    return pruned


def _largest(x: Tensor, density: float) -> Tensor:
    """The entries from the k-th smallest magnitude on, `k = int((1 - density) size)`; zeros elsewhere."""
    k = int(x.numel() * (1 - density))
    size = x.abs()
    return torch.where(size >= size.flatten().kthvalue(k).values, x, 0) if k else x


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """`x / y`, 0 where there is nothing to divide by."""
    return torch.where(y > 0, x / y, 0)


_PAPER: dict[str, Any] = {"paper": "Zeng et al., 2025", "url": "https://arxiv.org/abs/2502.17159"}
ROBUSTMERGE_METHODS = (
    Method(
        name="robustmerge",
        title="RobustMerge",
        summary="pruned factors, rank directions weighed by what they lost, updates summed",
        result=SUM_OF_RANKS,
        split="yes",
        merge=OneByOne(lambda w: robustmerge(w.factors, w.weights, **w.parameters.own())),
        parameters=RobustMergeParameters,
        **_PAPER,
    ),
    Method(
        name="robustmerge_code",
        title="RobustMerge, as its code does it",
        summary="pruned and weighed factors summed apart, for equal ranks; contains cross terms",
        result=LARGEST_RANK,
        split="yes",
        merge=OneByOne(lambda w: robustmerge_code(w.factors, w.weights, **w.parameters.own())),
        parameters=RobustMergeCodeParameters,
        equal_ranks=True,
        **_PAPER,
    ),
)
