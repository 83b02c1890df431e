"""PCB-Merging: balance each entry's own weight against its agreement with the others (Du et al., 2024)."""

import torch
from torch import Tensor

from mergekit_tspa.rules.linear import weighted_sum


def clamp_positions(length: int, share: float) -> tuple[int, int]:
    """Positions of the bounds to which magnitudes are clamped."""
    return min(length - 1, int(length * share)), max(0, int(length * (1 - share) - 1))


def score_positions(length: int, ratio: float) -> tuple[int, int]:
    """Positions of the lowest score that counts and of the highest."""
    return min(length - 1, int(length * (1 - ratio))), length - 1


def clamped(M: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes between their bounds: `c`, and `N` from 0 at the lower to 1 at the upper.  # bounds (n, 2)"""
    low, high = _bounds(bounds, M)
    c = M.abs().clamp(min=low, max=torch.maximum(low, high))
    return c, _unit(c, low, high)


def scores(M: Tensor, N: Tensor, variant: str = "invariant") -> Tensor:
    """`beta_t = exp(n N_t^2) x agreement_t`, up to a common factor.

    The agreement is `sum_u tanh(N'_t N'_u)`, `N' = sgn(M) N`, which does not depend on the updates' unit (the
    authors' code for evolution strategies), or with `variant` v1 `tanh(M_t sum_u M_u)` (their main script).
    """
    if variant == "v1":
        agreement = torch.tanh(M * M.sum(0))
    else:
        signed = M.sign() * N
        agreement = torch.zeros_like(M)
        for other in signed:
            agreement += torch.tanh(signed * other)
    return torch.exp(len(M) * (N.square() - 1)) * agreement  # - 1: no overflow, and the scale is divided out


def pcb(M: Tensor, weights: Tensor, magnitude_bounds: Tensor, score_bounds: Tensor, variant: str = "invariant"):
    """`sum_t a_t C_t Y_t / sum_t Y_t`: clamped entries `C`, weighted by their scores `Y` above the lowest that counts.

    Du et al., Parameter Competition Balancing for Model Merging, 2024 (arXiv 2410.02396).

    Args:
        M: (n, ...)
        magnitude_bounds: of each update's magnitudes  # (n, 2)
        score_bounds: of each update's scores  # (n, 2)
    """
    c, N = clamped(M, magnitude_bounds)
    beta = scores(M, N, variant)
    low, high = _bounds(score_bounds, M)
    Y = torch.where(high > low, _unit(beta.clamp(min=low, max=high), low, high), (beta >= high).to(M.dtype))
    return weighted_sum(M.sign() * c * Y, weights) / Y.sum(0).clamp(min=1e-12)


def _bounds(bounds: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    low, high = bounds.reshape(len(M), 2, *(1,) * (M.ndim - 1)).unbind(1)
    return low, high


def _unit(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
