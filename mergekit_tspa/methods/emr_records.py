"""What EMR-Merging keeps beside the unified model, and how a task's update comes back from it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_tspa.linalg import Span
from mergekit_tspa.rules.emr import unify
from mergekit_tspa.rules.stream import row_blocks
from mergekit_tspa.spaces.basis import Basis
from mergekit_tspa.updates import Dense, LoraFactors, LowRank, Spanned

RECORDS, DESCRIPTION = "emr_masks.safetensors", "emr_tasks.json"  # beside the unified model
_STEPS = 2**15 - 1


def record(factors: Sequence[LoraFactors], weights: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The unified update and, per task, its mask and its scale.

    The unified update is stored apart from the model, whose precision may be too low to tell it from the
    base, in steps of 2^-15 of its `largest` entry.

    Args:
        factors: of M_t  # (p, r_t), (r_t, q)
        weights, scale: (n,)

    Returns:
        unified (p, q) int16, largest (1,), mask (n, p, ceil(q / 8)) bit-packed, scale (n,).
    """
    blocks = [unify(M, weights.to(M)) for _, M in row_blocks(factors)]
    unified = torch.cat([rows for rows, _ in blocks])
    largest = unified.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return {
        "unified": (unified / largest * _STEPS).round().to(torch.int16),
        "largest": largest[None],
        "mask": torch.cat([pack_bits(mask) for _, mask in blocks], dim=1),
        "scale": scale.float(),
    }


def task_update(kept: Mapping[str, Tensor], task: int) -> LowRank | Dense:
    """`uni * mask_t * scale_t`, mapped back to the tensor by the bases `U` and `V` that `kept` has."""
    unified = kept["unified"].float() * (kept["largest"] / _STEPS)
    M = unified * unpack_bits(kept["mask"][task], unified.shape[1]) * kept["scale"][task]
    U, V = (Span(kept[side]) if side in kept else None for side in "UV")
    merged = Basis(U, V).decode(M)
    if isinstance(merged, Spanned):
        return merged.low_rank()
    return Dense(merged) if isinstance(merged, Tensor) else LowRank(*merged)


def pack_bits(mask: Tensor) -> Tensor:
    """Eight entries a byte, the first in the lowest bit; rows are padded.  # (..., q) -> (..., ceil(q /
    8))
    """
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :columns].bool()
