"""WUDI and its closed forms: the update that disturbs every adapter least on that adapter's own rows.

The loss is `sum_t ||(M - P_t) P_t^T||^2 / ||P_t||^2`, `P_t = a_t M_t`, and its gradient `2 (M S - E)` with
`E = sum_t P_t G_t`, `S = sum_t G_t`, `G_t = P_t^T P_t / ||P_t||^2`.  WUDI takes steps of Adam from the sum;
SWUDI and SWUDI-A go along the eigenvectors of `S` at once, `S = V e V^T`:

    M = M_0 - (M_0 S - E) V (f / e) V^T,   M_0 the sum or the mean,   0 <= f <= 1,

which leaves `M_0` where `f` is 0 and solves the loss where it is 1.  With a single adapter every variant
returns that adapter.
"""

import math

import torch
from torch import Tensor

from mergekit_tspa.rules.grams import descending, normal_equations, unit, weighted


def wudi(M: Tensor, weights: Tensor, steps: int = 300, rate: float = 1e-5) -> Tensor:
    """Steps of Adam on the loss above, from the sum of the updates.

    Adam moves every entry by about `rate` a step, whatever the size of the updates: the result depends on
    the basis, so that they must have full size, and on their unit.  With the published settings it stays
    near the sum.

    Cheng et al., Whoever Started the Interference Should End It, 2025 (arXiv 2503.08099).

    Args:
        M: updates in full size  # (n, p, q)
        weights: of any sign.  An adapter of weight `a` counts as `a` times its update would  # (n,)
        steps: of Adam, with its usual constants
        rate: its learning rate

    Returns:
        (p, q), in M's precision
    """
    P = weighted(M, weights)
    if not len(P):
        return torch.zeros_like(M[0])
    E, S = normal_equations(P, unit(P))
    merged = P.sum(0)
    mean, square = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, steps + 1):
        gradient = 2 * (merged @ S - E)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        size = (square / (1 - 0.999**step)).sqrt() + 1e-8
        merged = merged - rate * mean / (1 - 0.9**step) / size
    return merged.to(M.dtype)


def swudi(
    M: Tensor,
    weights: Tensor,
    time: float = 300.0,
    share: float | None = None,
    columns: int | None = None,
    start: str = "sum",
    floor: float = 1e-8,
) -> Tensor:
    """Spectral WUDI: `f = 1 - exp(-e t)`, the gradient flow after the time `t`, on the `K` largest `e`.

    The same in every orthonormal basis: run it on cores.

    Closed-Form Spectral Regularization for Multi-Task Model Merging, 2026 (arXiv 2606.07289).

    Args:
        M: updates in orthonormal coordinates  # (n, p, q)
        weights: of any sign.  An adapter of weight `a` counts as `a` times its update would  # (n,)
        time: `t`
        share: `K = ceil(share * columns)`; None keeps all
        columns: of the updates in full size, of which `q` may be coordinates; by default `q`
        start: `M_0`, the `sum` or the `mean` of the updates
        floor: the least `e` that is divided by

    Returns:
        (p, q), in M's precision

    Raises:
        ValueError: for another word in `start`.
    """
    P = weighted(M, weights)
    first = _start(P, start)
    if not len(P):
        return torch.zeros_like(M[0])
    E, S = normal_equations(P, unit(P))
    e, V = descending(S)
    e = e.clamp(min=floor)
    kept = len(e) if share is None else math.ceil(share * (columns or len(e)))
    gains = -torch.expm1(-e * time) / e
    return filtered(first, E, S, V[:, :kept], gains[:kept]).to(M.dtype)


def swudi_a(
    M: Tensor,
    weights: Tensor,
    select: str = "participation",
    columns: int | None = None,
    start: str = "sum",
    floor: float = 1e-8,
) -> Tensor:
    """Adaptive SWUDI: `f = 1` on as many of the largest `e` as the spectrum has directions of weight.

    `K = ceil((sum sqrt e)^2 / sum e)`, or, by `entropy`, `K = ceil(exp(-sum p log p))`, `p = e / sum e`.
    All `columns` count, each with at least the `floor`.  The same in every orthonormal basis: run it on
    cores.

    Closed-Form Spectral Regularization for Multi-Task Model Merging, 2026 (arXiv 2606.07289).

    Args:
        M: updates in orthonormal coordinates  # (n, p, q)
        weights: of any sign.  An adapter of weight `a` counts as `a` times its update would  # (n,)
        select: `participation`, the first formula, or `entropy`
        columns: of the updates in full size, of which `q` may be coordinates; by default `q`
        start: `M_0`, the `sum` or the `mean` of the updates
        floor: the least `e`

    Returns:
        (p, q), in M's precision

    Raises:
        ValueError: for another word in `select` or `start`.
    """
    P = weighted(M, weights)
    first = _start(P, start)
    if select not in ("participation", "entropy"):
        raise ValueError(f"select is {select!r}; it can be 'participation' or 'entropy'.")
    if not len(P):
        return torch.zeros_like(M[0])
    E, S = normal_equations(P, unit(P))
    e, V = descending(S)
    e = e.clamp(min=floor)
    outside = max(0, (columns or len(e)) - len(e))  # columns that no update reaches
    spectrum = torch.cat([e, e.new_full((outside,), floor)])
    if select == "participation":
        directions = spectrum.sqrt().sum() ** 2 / spectrum.sum()
    else:
        p = spectrum / spectrum.sum()
        directions = torch.exp(-(p * p.log()).sum())
    kept = math.ceil(directions)
    return filtered(first, E, S, V[:, :kept], 1 / e[:kept]).to(M.dtype)


def filtered(first: Tensor, E: Tensor, S: Tensor, V: Tensor, gains: Tensor) -> Tensor:
    """`M_0 - (M_0 S - E) V h V^T`, `h = f / e`: a step of its own length along each eigenvector of `S`.

    Args:
        first: `M_0`  # (p, q)
        E: (p, q)
        S: (q, q)
        V: eigenvectors of `S`, or some of them  # (q, k)
        gains: `h`  # (k,)

    Returns:
        (p, q)
    """
    return first - ((first @ S - E) @ V * gains) @ V.mT


def _start(P: Tensor, start: str) -> Tensor:
    if start not in ("sum", "mean"):
        raise ValueError(f"start is {start!r}; it can be 'sum' or 'mean'.")
    return P.sum(0) if start == "sum" else P.mean(0)
