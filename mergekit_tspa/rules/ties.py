"""TIES: trim each update, elect a sign per entry, merge what agrees with it (Yadav et al., 2023)."""

import torch
from torch import Tensor

from mergekit_tspa.rules.linear import weighted_sum
from mergekit_tspa.rules.prune import trim, trim_thresholds
from mergekit_tspa.rules.update_statistics import Updates, Whole, column


def ties(
    M: Tensor,
    weights: Tensor,
    density: float = 0.2,
    normalize: bool = True,
    elect: str = "mass",
    take: str = "mean",
    convention: str = "paper",
    statistics: Tensor | None = None,
) -> Tensor:
    """Keep the largest entries of each update, elect a sign per entry, and average the entries that have it.

    In three steps, with the paper's symbols beside ours (`tau_t` is `M_t`, `k` is `density`):

        S_t = trim(M_t)                       the largest `density` of its entries    (paper: tau^_t)
        g   = sgn(sum_t a_t S_t)              the elected sign of each entry          (paper: gamma_m)
        M   = sum_{t in P} a_t S_t / sum_{t in P} |a_t|,  P: those with sgn(a_t S_t) = g   (paper: A^p)

    The paper has no weights, `a_t = 1`; here they take part in the election, and the mean is theirs.

    Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023 (arXiv 2306.01708).

    Args:
        M: (n, p, q)
        weights: (n,)
        density: share of the entries that is kept
        normalize, elect, take: see `elect_and_merge`
        convention: paper, peft or mergekit, where their codes differ: in the count that is kept
            (`kept_from`), and in PEFT's weights, which come in after the election
        statistics: `trim_thresholds` of the whole updates, if `M` is a block of their rows  # (n, 1)

    Returns:
        (p, q)
    """
    if statistics is None:
        statistics = ties_statistics(Whole(M, weights), density, convention=convention)
    trimmed = trim(M, statistics)
    return elect_and_merge(trimmed, weights, normalize, elect, take, weigh_after=convention == "peft")


def ties_statistics(
    updates: Updates,
    density: float = 0.2,
    *,
    convention: str = "paper",
    **election: object,
) -> Tensor:
    """`trim_thresholds`: the parameters of the election do not matter.  # (n, 1)"""
    return trim_thresholds(updates, density, convention)


def elect_and_merge(
    M: Tensor,  # (n, ...), sparsified
    weights: Tensor,  # (n,)
    normalize: bool = True,
    elect: str = "mass",
    take: str = "mean",
    weigh_after: bool = False,
) -> Tensor:
    """Keep the entries that agree with the elected sign `g = sgn(sum_t a_t M_t)`, and combine them.

    `sum_t a_t S_t / sum_{t: S_t != 0} |a_t|`, where `S_t` is what agrees; without `normalize` the sum alone.
    Where the votes cancel nothing is elected and the result is 0.  A negative weight votes, and counts,
    with the opposite of its update.

    Args:
        elect: the sign of the `mass` (the sum), or of the `count` (the sum of signs; the mass decides a
            draw).
        take: the `mean` as above, or the entry of the largest magnitude (`max`).
        weigh_after: as PEFT does: elect without weights, plus where the votes cancel, and divide by the
            number of agreeing entries.

    Returns:
        (...)
    """
    P = column(weights, M) * M
    votes = M if weigh_after else P
    g = votes.sum(0).sign()
    if elect == "count":
        count = votes.sign().sum(0).sign()
        g = torch.where(count == 0, 0 if weigh_after else g, count)
    if weigh_after:
        g = torch.where(g == 0, 1, g)
    agree = (votes.sign() == g) & (g != 0)
    S = P * agree
    if take == "max":
        return g * S.abs().amax(0)
    if not normalize:
        return S.sum(0)
    counted = torch.ones_like(weights) if weigh_after else weights.abs()
    total = weighted_sum(agree.to(M.dtype), counted)
    return S.sum(0) / torch.where(total > 0, total, 1.0)
