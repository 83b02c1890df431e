"""TSPA, two-stage parameter alignment (Li et al., Findings of ACL 2026), its two ablations and its original.

Stage 1 aligns the adapters inside the products of attention (Eq. 5-7), stage 2 the factors of each weight
(Eq. 8-9); the aligned factors are summed, so that the result has the rank of one adapter.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_tspa.alignment.lora import align_lora
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.inputs import Pair, Parameters, Progress, TensorInputs
from mergekit_tspa.methods.method import LARGEST_RANK, Merged, Method
from mergekit_tspa.methods.pairs import align_pairs, solve_pairwise, solve_products
from mergekit_tspa.methods.report import Report
from mergekit_tspa.rules.linear import weighted_sum
from mergekit_tspa.spaces.factor import encode
from mergekit_tspa.updates import LoraFactors, LowRank

_STEPS: dict[str, Any] = {"ge": 0, "le": 1_000_000}
_RATE: dict[str, Any] = {"gt": 0, "le": 1, "allow_inf_nan": False}


class SolverParameters(Parameters):
    coefficients: Literal["linear", "paper"] = Field(
        "linear",
        description=(
            "`weight` is a multiple of an adapter's update; or, as printed in the paper, of each of its "
            "factors"
        ),
    )
    seed: int = Field(
        42, ge=0, lt=2**63, description="seed of the small random start that identical adapters need"
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="stop when 20 steps lower the objective by less than this fraction; 0: never",
    )
    solver: Literal["amsgrad", "geoopt"] = Field(
        "amsgrad", description="own fast step, or geoopt's as the reference"
    )


class TargetParameters(SolverParameters):
    # The paper aims at the mean. With twice that both stages keep more on all sets of adapters tried, and
    # stage 2 more or as much; stage 1 alone gains nothing (docs/reproduction.md).
    target_scale: float = Field(
        2.0,
        gt=0,
        allow_inf_nan=False,
        description="aim at this multiple of the adapters' mean, at most at their sum; in the paper 1",
    )


class LoraParameters(TargetParameters):
    lora_steps: int = Field(2000, **_STEPS, description="steps of stage 2; 0 leaves it out")
    lora_lr: float = Field(0.05, **_RATE, description="learning rate of stage 2")


class PairParameters(SolverParameters):
    attention_steps: int = Field(100, **_STEPS, description="steps of stage 1; 0 leaves it out")
    attention_lr: float = Field(0.1, **_RATE, description="learning rate of stage 1")


class AttentionParameters(PairParameters, TargetParameters):
    align_space: Literal["head", "input"] = Field(
        "head", description="what query and key rotations turn: the coordinates of a head, or the model's"
    )
    rope_safe: bool = Field(False, description="only query and key rotations that commute with RoPE")


class TspaParameters(AttentionParameters, LoraParameters):
    # Eq. 9 can be read either way; comparing with the original adapters gave lower losses on all adapter sets
    # tried.
    lora_target: Literal["aligned", "original"] = Field(
        "original", description="what stage 2 compares with: the adapters as they came, or after stage 1"
    )


def sum_aligned(
    B: Tensor,  # (n, d_out, r)
    A: Tensor,  # (n, r, d_in)
    weights: Tensor,  # (n,)
    R: Tensor,  # (n, r, r)
    s: Tensor,  # (n,)
) -> LoraFactors:
    """`B' = sum_t a_t s_t B_t R_t`, `A' = sum_t (a_t / s_t) R_t^T A_t` (Eq. 8)."""
    return LoraFactors(weighted_sum(B @ R, weights * s), weighted_sum(R.mT @ A, weights / s))


def weighted(inputs: Sequence[TensorInputs]) -> list[TensorInputs]:
    """Updates times their weights, which are 1 from here on: each factor carries the square root.

    So an adapter of weight w alone comes back as w times itself, and every target is one of weighted updates.
     As the paper prints it (`coefficients: paper`) each factor carries the whole weight and the targets none.
    """
    return [
        w
        if w.parameters.coefficients == "paper"
        else w._replace(
            factors=[f.scaled(a) for f, a in zip(w.factors, w.weights)], weights=[1.0] * len(w.weights)
        )
        for w in inputs
    ]


def sum_factors(inputs: Sequence[TensorInputs]) -> list[LowRank]:
    """The plain factor sum, `R = I` and `s = 1`."""
    updates = []
    for w in inputs:
        B, A = encode(w.factors)
        a = B.new_tensor(w.weights)
        update = LoraFactors(weighted_sum(B, a), weighted_sum(A, a))
        updates.append(LowRank(*update.scaled(w.parameters.lambda_)))
    return updates


def align_tensors(
    inputs: Sequence[TensorInputs], originals: Sequence[TensorInputs], progress: Progress
) -> tuple[list[LowRank], list[Report]]:
    """Stage 2 for many weights; those of equal adapter count, rank and parameters are one batch.

    The target is the mean of the inputs themselves, or that of `originals` with `lora_target: original`.
    """
    merged: dict[int, LowRank] = {}
    reports = []
    batches: dict[tuple, list[int]] = {}
    for i, w in enumerate(inputs):
        batches.setdefault((len(w.factors), max(f.rank for f in w.factors), repr(w.parameters)), []).append(i)
    for batch in batches.values():
        p = inputs[batch[0]].parameters
        stacked = [encode(inputs[i].factors) for i in batch]
        G_B = torch.stack([_inner(B, B) for B, _ in stacked])
        G_A = torch.stack([_inner(A.mT, A.mT) for _, A in stacked])
        weights = G_B.new_tensor([inputs[i].weights for i in batch])  # (M, n)
        other = {}
        if getattr(p, "lora_target", "aligned") == "original":
            goals = [encode(originals[i].factors) for i in batch]
            other["T_B"] = torch.stack([_inner(T, B) for (T, _), (B, _) in zip(goals, stacked)])
            other["T_A"] = torch.stack([_inner(T.mT, A.mT) for (_, T), (_, A) in zip(goals, stacked)])
            other["target_norm2"] = torch.stack([(_inner(B, B) * _inner(A.mT, A.mT)).sum() for B, A in goals])
        names = [inputs[i].name for i in batch]
        try:
            R, s, solution = align_lora(
                *(G_B, G_A, weights),
                **other,
                target_scale=min(p.target_scale, weights.shape[1]),
                steps=p.lora_steps,
                lr=p.lora_lr,
                tolerance=p.tolerance,
                seed=p.seed,
                solver=p.solver,
                on_progress=lambda done, left: progress("LoRA alignment", done, left),
            )
        except FloatingPointError as error:
            culprit = inputs[batch[error.args[1]]]
            raise InputError(
                f"{culprit.name}: the loss of LoRA alignment is not finite; "
                f"adapters {', '.join(adapter.name for adapter in culprit.adapters)}"
            ) from error
        reports.append(
            Report.of("LoRA alignment", names, [inputs[i].adapters for i in batch], solution, axis=1)
        )
        for i, (B, A), a, R_i, s_i in zip(batch, stacked, weights, R, s):
            merged[i] = LowRank(*sum_aligned(B, A, a, R_i, s_i).scaled(inputs[i].parameters.lambda_))
    return [merged[i] for i in range(len(inputs))], reports


def _inner(B: Tensor, C: Tensor) -> Tensor:
    """All products `B_t^T C_u`  # (n, d, r), (m, d, r) -> (n, m, r, r)"""
    return torch.einsum("tdi,udj->tuij", B, C)


def tspa(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
    """Both stages."""
    inputs = weighted(inputs)
    aligned, reports = align_pairs(pairs, inputs, progress, solve_products)
    updates, more = align_tensors(aligned, inputs, progress)
    return Merged(updates, reports + more)


def tspa_attention(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
    """Stage 1 alone; tensors outside attention get the plain factor sum."""
    aligned, reports = align_pairs(pairs, weighted(inputs), progress, solve_products)
    return Merged(sum_factors(aligned), reports)


def tspa_pairwise(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
    """The original of stage 1, whose cost is quadratic in the number of adapters."""
    aligned, reports = align_pairs(pairs, weighted(inputs), progress, solve_pairwise)
    return Merged(sum_factors(aligned), reports)


def tspa_lora(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
    """Stage 2 alone."""
    inputs = weighted(inputs)
    return Merged(*align_tensors(inputs, inputs, progress))


_PAPER: dict[str, Any] = {
    "paper": "Li et al., Findings of ACL 2026",
    "url": "https://openreview.net/forum?id=iE0dWuv6jU",
    "result": LARGEST_RANK,
    "split": "yes",
    "min_weight": 0.0,
    "solves": True,
    "drops_zeros": False,  # the mean it aims at counts every adapter
}
TSPA_METHODS = (
    Method(
        name="tspa",
        title="TSPA",
        summary="attention products aligned, then the factors of each weight, then summed",
        merge=tspa,
        parameters=TspaParameters,
        attention=True,
        **_PAPER,
    ),
    Method(
        name="tspa_attention",
        title="TSPA, attention alignment (stage 1)",
        summary="attention products aligned by rotations and scales of the adapters, factors summed",
        merge=tspa_attention,
        parameters=AttentionParameters,
        attention=True,
        **_PAPER,
    ),
    Method(
        name="tspa_lora",
        title="TSPA, LoRA alignment (stage 2)",
        summary="factors of each weight aligned by rotations and scales, then summed",
        merge=tspa_lora,
        parameters=LoraParameters,
        **_PAPER,
    ),
    Method(
        name="tspa_pairwise",
        title="TSPA, pairwise original",
        summary="every two adapted attention blocks compared (quadratic), factors summed; for comparison",
        merge=tspa_pairwise,
        parameters=PairParameters,
        attention=True,
        **_PAPER,
    ),
)
