"""The factors themselves as coordinates, `B` and `A` apart: PEFT's way, and where TSPA starts.

Not the space of updates: a sum of factors holds cross terms `B_t A_u`, and depends on how each adapter splits its
update between its factors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_tspa.updates import LoraFactors


def encode(factors: Sequence[LoraFactors]) -> tuple[Tensor, Tensor]:
    """`B (n, d_out, r)` and `A (n, r, d_in)`, smaller ranks padded with zeros to the largest."""
    rank = max(f.rank for f in factors)
    B, A = zip(*(f.padded(rank) for f in factors))
    return torch.stack(B), torch.stack(A)
