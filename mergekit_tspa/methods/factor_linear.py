"""PEFT's `linear` combination: the factors are summed apart."""

from collections.abc import Sequence

from mergekit_tspa.methods.inputs import OneByOneParameters
from mergekit_tspa.methods.method import LARGEST_RANK, Method, OneByOne
from mergekit_tspa.rules.linear import weighted_sum
from mergekit_tspa.spaces.factor import encode
from mergekit_tspa.updates import LoraFactors


def factor_linear(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """`B = sum_t sqrt|a_t| B_t`, `A = sum_t sgn(a_t) sqrt|a_t| A_t`.

    This is `combination_type="linear"` of PEFT's `add_weighted_adapter`, for any ranks.
    """
    B, A = encode(factors)
    a = B.new_tensor(weights)
    root = a.abs().sqrt()
    return LoraFactors(weighted_sum(B, root), weighted_sum(A, a.sign() * root))


factor_linear_method = Method(
    name="factor_linear",
    title="Factor sum",
    summary="factors summed apart, as PEFT's `linear`; contains cross terms",
    paper="PEFT",
    url="https://huggingface.co/docs/peft/developer_guides/model_merging",
    result=LARGEST_RANK,
    split="yes",
    merge=OneByOne(lambda w: factor_linear(w.factors, w.weights)),
    parameters=OneByOneParameters,
)
