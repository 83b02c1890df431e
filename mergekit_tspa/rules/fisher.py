"""Fisher merging: every entry a mean, weighted by how much each adapter's loss depends on it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def fisher(
    M: Tensor,  # (n, ...)
    F: Tensor,  # (n, ...)
    weights: Tensor,  # (n,)
    floor: float = 1e-6,
    cutoff: float = 0.0,
    norms: Tensor | None = None,
) -> Tensor:
    """`sum_t w_t M_t / sum_t |w_t|`, entry by entry, with `w_t = a_t n_t (F_t + floor)`.

    A mean by nature: an adapter alone comes back as itself whatever its positive weight.  A negative weight
    counts as much as a positive one, with the opposite of its update, so that no entry exceeds the largest
    of the adapters'.  An adapter of weight 0 takes no part.

    Published code comes in two conventions.  One adds a `floor` and divides by each model's norm over all of
    its tensors: `norms`, `floor=1e-6`.  The other leaves 0 where the sum of the weights is small: `floor=0`,
    `cutoff=1e-8`.  Both constants are in the unit of `F`, whose values can lie far below them; then the
    first is a plain mean and the second is 0.

    Matena and Raffel, Merging Models with Fisher-Weighted Averaging, 2022 (arXiv 2111.09832).

    Args:
        M: updates in full size; the rule depends on the basis
        F: `mean (dL/dW)^2` over examples of each adapter's task, none negative
        weights: `a_t`, of any sign
        floor: what every entry of `F` counts more
        cutoff: where `sum_t |w_t|` is at most this much the result is 0
        norms: `||F_t||` over all tensors, for `n_t = 1 / (||F_t|| + 1e-6)`; None is 1 for all  # (n,)

    Returns:
        (...)
    """
    w = weights.to(M) if norms is None else weights.to(M) / (norms.to(M) + 1e-6)
    w = w.reshape(-1, *(1,) * (M.ndim - 1)) * (F + floor)
    return _quotient((w * M).sum(0), w.abs().sum(0), cutoff)


def fisher_rank_one(
    B: Sequence[Tensor],  # (d_out, r_t) each
    A: Sequence[Tensor],  # (r_t, d_in) each
    outputs: Tensor,  # (n, d_out)
    inputs: Tensor,  # (n, d_in)
    weights: Tensor,  # (n,)
    floor: float = 0.0,
    cutoff: float = 0.0,
) -> Tensor:
    """`fisher` of `F_t = mean(g_i^2) mean(x_j^2)`: a linear weight's gradient `g x^T`, its sides apart.

    Numerator and denominator are products of thin matrices, `[.. a_t g_t B_t ..] [.. A_t x_t ..]` and
    `[.. |a_t| g_t ..] [.. x_t ..]^T`, so that no update and no `F_t` of full size is formed.  Their quotient
    has no low rank.

    Args:
        B: left factors, of any ranks
        A: right factors
        outputs: `mean g_i^2` of the gradients of each adapter's outputs, none negative
        inputs: `mean x_j^2` of its inputs, none negative
        weights: as for `fisher`, and so are `floor` and `cutoff`

    Returns:
        (d_out, d_in), in float64
    """
    a, g, x = weights.double(), outputs.double(), inputs.double()
    left = torch.cat([a_t * g_t[:, None] * B_t.double() for a_t, g_t, B_t in zip(a, g, B)], dim=1)
    right = torch.cat([A_t.double() * x_t for A_t, x_t in zip(A, x)])
    total = left @ right
    counted = (a.abs()[:, None] * g).mT @ x
    if floor:
        plain = torch.cat([a_t * B_t.double() for a_t, B_t in zip(a, B)], dim=1)
        total += floor * (plain @ torch.cat([A_t.double() for A_t in A]))
        counted += floor * a.abs().sum()
    return _quotient(total, counted, cutoff)


def _quotient(total: Tensor, counted: Tensor, cutoff: float) -> Tensor:
    defined = counted > cutoff
    return torch.where(defined, total / torch.where(defined, counted, 1), 0)
