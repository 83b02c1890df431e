"""Task arithmetic on LoRA updates: the exact weighted sum, kept as factors."""

from collections.abc import Sequence

import torch

from mergekit_tspa.adapters import LoraFactors
from mergekit_tspa.methods.base import Method, OneByOneParameters, one_by_one


def task_arithmetic(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """`sum_t a_t B_t A_t = [a_1 B_1 | .. | a_n B_n] [A_1; ..; A_n]`, exact, of rank `sum_t r_t`.

    Ilharco et al., Editing Models with Task Arithmetic, 2022 (arXiv 2212.04089).
    """
    B = torch.cat([a * f.B for f, a in zip(factors, weights)], dim=1)  # (d_out, sum r)
    A = torch.cat([f.A for f in factors], dim=0)  # (sum r, d_in)
    return LoraFactors(B, A)


lora_task_arithmetic = Method(
    name="lora_task_arithmetic",
    title="Task arithmetic",
    summary="exact weighted sum of the updates",
    paper="Ilharco et al., 2022",
    url="https://arxiv.org/abs/2212.04089",
    output="sum of ranks",
    merge=one_by_one(lambda w: task_arithmetic(w.factors, w.weights)),
    parameters=OneByOneParameters,
)
