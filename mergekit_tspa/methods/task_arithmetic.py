"""Task arithmetic on LoRA updates: the exact weighted sum, kept as factors."""

from collections.abc import Sequence

import torch

from mergekit_tspa.updates import LoraFactors


def task_arithmetic(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """`sum_t a_t B_t A_t = [a_1 B_1 | .. | a_n B_n] [A_1; ..; A_n]`, exact, of rank `sum_t r_t`.

    Ilharco et al., Editing Models with Task Arithmetic, 2022 (arXiv 2212.04089).
    """
    B = torch.cat([a * f.B for f, a in zip(factors, weights)], dim=1)  # (d_out, sum r)
    A = torch.cat([f.A for f in factors], dim=0)  # (sum r, d_in)
    return LoraFactors(B, A)
