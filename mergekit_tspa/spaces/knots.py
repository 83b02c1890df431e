"""KnOTS: the left singular basis of all updates side by side (Stoica et al., 2024)."""

from collections.abc import Sequence

import torch

from mergekit_tspa.linalg import numerical_rank
from mergekit_tspa.spaces.basis import Basis
from mergekit_tspa.spaces.cores import cores
from mergekit_tspa.updates import LoraFactors


def knots(factors: Sequence[LoraFactors]) -> Basis:
    """`[D_1|..|D_n] = U S [V_1^T|..|V_n^T]`, so that `M_t = U^T D_t = S V_t^T`.

    Lossless.  The SVD is taken of the cores, `[C_1|..|C_n]`, whose left singular vectors `U'` give
    `U = Q_B U'`; directions below the numerical rank are dropped.

    Stoica et al., Model Merging with SVD to Tie the Knots, 2024 (arXiv 2410.19735).
    """
    c = cores(factors)
    side_by_side = torch.cat(list(c.C), dim=1)  # (q_B, n q_A)
    U, S, _ = torch.linalg.svd(side_by_side, full_matrices=False)
    k = max(1, int(numerical_rank(S, side_by_side.shape)))
    return Basis(c.Q_B @ U[:, :k], None)
