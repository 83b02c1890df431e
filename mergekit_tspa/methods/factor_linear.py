"""PEFT's `linear` combination: the factors are summed apart."""

from collections.abc import Sequence
from math import copysign, sqrt

from mergekit_tspa.adapters import LoraFactors
from mergekit_tspa.methods.base import Method, one_by_one


def factor_linear(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """`B = sum_t sqrt|a_t| B_t`, `A = sum_t sgn(a_t) sqrt|a_t| A_t`; smaller ranks are padded with zeros.

    The product contains the cross terms `B_t A_u`, so it is not the sum of the updates; it depends on how
    each adapter splits its update between `B` and `A`.  This is `combination_type="linear"` of PEFT's
    `add_weighted_adapter`, and the factor sum that TSPA starts from.
    """
    rank = max(f.rank for f in factors)
    padded = [f.padded(rank) for f in factors]
    B = sum(sqrt(abs(a)) * f.B for f, a in zip(padded, weights))  # (d_out, r)
    A = sum(copysign(sqrt(abs(a)), a) * f.A for f, a in zip(padded, weights))  # (r, d_in)
    return LoraFactors(B, A)


factor_linear_method = Method(
    name="factor_linear",
    title="Factor sum",
    summary="factors summed apart, as PEFT's `linear`; contains cross terms",
    paper="PEFT",
    url="https://huggingface.co/docs/peft/developer_guides/model_merging",
    output="largest rank",
    merge=one_by_one(factor_linear),
)
