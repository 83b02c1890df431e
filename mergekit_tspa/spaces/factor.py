"""The factors themselves as coordinates, `B` and `A` apart: PEFT's way, and where TSPA starts.

Not the space of updates: a sum of factors holds cross terms `B_t A_u`, and depends on how each adapter
splits its update between its factors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_tspa.spaces.coordinates import Part
from mergekit_tspa.updates import LoraFactors


class Factors:
    """Two parts: all `B_t` with the weights `sqrt|a_t|`, and all `A_t` with `sgn(a_t) sqrt|a_t|`."""

    def parts(self, factors: Sequence[LoraFactors], weights: Sequence[float]) -> list[Part]:
        """`B_t I` and `I A_t`, of one rank."""
        B, A = encode(factors)
        one = torch.eye(B.shape[2]).to(B)
        roots = [abs(a) ** 0.5 for a in weights]
        signed = [root if a > 0 else -root for root, a in zip(roots, weights)]
        return [
            Part("B", [LoraFactors(b, one) for b in B], roots),
            Part("A", [LoraFactors(one, a) for a in A], signed),
        ]

    def joined(self, merged: Sequence[Tensor]) -> LoraFactors:
        """`B` and `A`.  # (d_out, r), (r, d_in)"""
        B, A = merged
        return LoraFactors(B, A)

    def sides(self) -> dict[str, Tensor]:
        return {}


def encode(factors: Sequence[LoraFactors]) -> tuple[Tensor, Tensor]:
    """`B (n, d_out, r)` and `A (n, r, d_in)`, smaller ranks padded with zeros to the largest."""
    rank = max(f.rank for f in factors)
    padded = [f.padded(rank) for f in factors]
    return torch.stack([f.B for f in padded]), torch.stack([f.A for f in padded])
