"""TSPA stage 2: align the factors of each weight by rotations and scales, then sum them."""

import logging
from collections.abc import Sequence
from itertools import groupby

import torch
from pydantic import Field

from mergekit_tspa.adapters import LoraFactors
from mergekit_tspa.alignment.lora import align_lora
from mergekit_tspa.methods.base import Method, Parameters, WeightInputs
from mergekit_tspa.methods.update import LowRank

LOG = logging.getLogger(__name__)


class TspaLoraParameters(Parameters):
    lora_steps: int = Field(2000, ge=0, le=1_000_000, description="steps of Riemannian AMSGrad in stage 2")
    lora_lr: float = Field(0.05, gt=0, le=1, description="learning rate of stage 2")


def stack(factors: Sequence[LoraFactors], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of one weight as `B (n, d_out, r)` and `A (n, r, d_in)`, padded to `rank`."""
    return tuple(torch.stack(sides) for sides in zip(*(f.padded(rank) for f in factors)))


def sum_aligned(
    B: torch.Tensor,  # (n, d_out, r)
    A: torch.Tensor,  # (n, r, d_in)
    weights: torch.Tensor,  # (n,)
    R: torch.Tensor,  # (n, r, r)
    s: torch.Tensor,  # (n,)
) -> LoraFactors:
    """`B' = sum_t a_t s_t B_t R_t`, `A' = sum_t (a_t / s_t) R_t^T A_t` (Li et al., TSPA, Eq. 8)."""
    return LoraFactors(
        torch.einsum("n,nor,nrk->ok", weights * s, B, R), torch.einsum("n,nrk,nri->ki", weights / s, R, A)
    )


def tspa_lora(inputs: Sequence[WeightInputs]) -> list[LowRank]:
    """Stage 2 of TSPA for many weights; those with equal adapter count, rank and parameters are one batch."""
    merged: dict[int, LowRank] = {}

    def batch_of(index: int):
        w = inputs[index]
        return len(w.factors), max(f.rank for f in w.factors), w.parameters.lora_steps, w.parameters.lora_lr

    for (_, rank, steps, lr), batch in groupby(sorted(range(len(inputs)), key=batch_of), key=batch_of):
        batch = list(batch)
        stacked = [stack(inputs[i].factors, rank) for i in batch]
        G_B = torch.stack([torch.einsum("tor,uos->turs", B, B) for B, _ in stacked])  # (M, n, n, r, r)
        G_A = torch.stack([torch.einsum("tri,usi->turs", A, A) for _, A in stacked])
        weights = G_B.new_tensor([inputs[i].weights for i in batch])  # (M, n)
        R, s, report = align_lora(G_B.double(), G_A.double(), weights.double(), steps=steps, lr=lr)
        LOG.info(
            "LoRA alignment of %d weights, %d adapters, rank %d: objective %.4g -> %.4g, orthogonality %.1e",
            *(len(batch), weights.shape[1], rank, report.start.sum(), report.end.sum(), report.orthogonality),
        )
        for i, (B, A), a, R_i, s_i in zip(batch, stacked, weights, R.to(weights), s.to(weights)):
            merged[i] = LowRank(*sum_aligned(B, A, a, R_i, s_i).scaled(inputs[i].parameters.lambda_))
    return [merged[i] for i in range(len(inputs))]


tspa_lora_method = Method(
    name="tspa_lora",
    title="TSPA, LoRA alignment (stage 2)",
    summary="factors of each weight aligned by rotations and scales, then summed",
    paper="Li et al., Findings of ACL 2026",
    url="https://openreview.net/forum?id=iE0dWuv6jU",
    output="largest rank",
    merge=tspa_lora,
    parameters=TspaLoraParameters,
    min_weight=0.0,
)
