"""PCB-Merging: balance each entry's own weight against its agreement with the others (Du et al., 2024)."""

import torch
from torch import Tensor

from mergekit_tspa.rules.linear import weighted_sum
from mergekit_tspa.rules.update_statistics import Block, Updates, Whole, magnitudes


def pcb(
    M: Tensor,
    weights: Tensor,
    ratio: float = 0.1,
    clamp: float = 1e-4,
    variant: str = "invariant",
    statistics: Tensor | None = None,
) -> Tensor:
    """`sum_t a_t C_t Y_t / sum_t Y_t`: clamped entries `C`, weighted by their scores `Y`.

    `C_t = sgn(M_t) c_t` with the magnitudes `c_t` between their bounds, and `Y_t` is the score `beta_t`
    between its own bounds, from 0 at the lower to 1 at the upper.

    Du et al., Parameter Competition Balancing for Model Merging, 2024 (arXiv 2410.02396).

    Args:
        M: (n, p, q)
        weights: (n,)
        ratio: share of the scores that counts
        clamp: share of the magnitudes that is clamped at either end
        variant: see `scores`
        statistics: `pcb_bounds` of the whole updates, if `M` is a block of their rows  # (n, 4)

    Returns:
        (p, q)
    """
    if statistics is None:
        statistics = pcb_bounds(Whole(M, weights), ratio, clamp, variant)
    c, N = clamped(M, statistics[:, :2])
    beta = scores(M, N, variant)
    low, high = _bounds(statistics[:, 2:], M)
    Y = torch.where(high > low, _unit(beta.clamp(min=low, max=high), low, high), (beta >= high).to(M.dtype))
    return weighted_sum(M.sign() * c * Y, weights) / Y.sum(0).clamp(min=1e-12)


def pcb_bounds(
    updates: Updates,
    ratio: float = 0.1,
    clamp: float = 1e-4,
    variant: str = "invariant",
) -> Tensor:
    """Of each update the bounds of its magnitudes, then those of its scores.  # (n, 4)"""
    of_magnitudes = updates.order_statistics(magnitudes, lambda length: clamp_positions(length, clamp))

    def beta(block: Block) -> Tensor:
        _, N = clamped(block.M, of_magnitudes[list(block.numbers)])
        return scores(block.M, N, variant)

    of_scores = updates.order_statistics(beta, lambda length: score_positions(length, ratio))
    return torch.cat([of_magnitudes, of_scores], dim=1)


def clamp_positions(length: int, share: float) -> tuple[int, int]:
    """Positions of the bounds to which magnitudes are clamped."""
    return min(length - 1, int(length * share)), max(0, int(length * (1 - share) - 1))


def score_positions(length: int, ratio: float) -> tuple[int, int]:
    """Positions of the lowest score that counts and of the highest."""
    return min(length - 1, int(length * (1 - ratio))), length - 1


def clamped(M: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes `c` between their bounds (n, 2), and `N`: from 0 at the lower to 1 at the upper."""
    low, high = _bounds(bounds, M)
    c = M.abs().clamp(min=low, max=torch.maximum(low, high))
    return c, _unit(c, low, high)


def scores(M: Tensor, N: Tensor, variant: str = "invariant") -> Tensor:
    """`beta_t = exp(n N_t^2) x agreement_t`, up to a common factor.

    The agreement is `sum_u tanh(N'_t N'_u)`, `N' = sgn(M) N`, which does not depend on the updates' unit
    (the authors' code for evolution strategies), or with `variant` v1 `tanh(M_t sum_u M_u)` (their main
    script).
    """
    if variant == "v1":
        agreement = torch.tanh(M * M.sum(0))
    else:
        signed = M.sign() * N
        agreement = torch.zeros_like(M)
        for other in signed:
            agreement += torch.tanh(signed * other)
    return torch.exp(len(M) * (N.square() - 1)) * agreement  # - 1: no overflow, and the scale is divided out


def _bounds(bounds: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    low, high = bounds.reshape(len(M), 2, *(1,) * (M.ndim - 1)).unbind(1)
    return low, high


def _unit(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
