"""KnOTS: the left singular basis of all updates side by side (Stoica et al., 2024)."""

from collections.abc import Sequence

import torch

from mergekit_tspa.linalg import leading_left, numerical_rank
from mergekit_tspa.spaces.basis import Basis
from mergekit_tspa.spaces.cores import cores
from mergekit_tspa.updates import LoraFactors


def knots(factors: Sequence[LoraFactors]) -> Basis:
    """`[D_1|..|D_n] = U S [V_1^T|..|V_n^T]`, so that `M_t = U^T D_t = S V_t^T`.

    Lossless.  The SVD is taken of the cores, `[C_1|..|C_n]`, whose left singular vectors `U'` give
    `U = Q_B U'`; with `R_A^t = Q_t T_t` they are those of `[R_B^1 T_1^T|..|R_B^n T_n^T]`.  Directions below
    the numerical rank are dropped.

    Stoica et al., Model Merging with SVD to Tie the Knots, 2024 (arXiv 2410.19735).
    """
    c = cores(factors)
    side_by_side = [B @ torch.linalg.qr(A).R.mT for B, A in zip(c.R_B, c.R_A)]  # (q_B, min(r_t, q_A))
    U, S = leading_left(torch.cat(side_by_side, dim=1))
    k = max(1, int(numerical_rank(S, (len(U), len(factors) * c.Q_A.shape[1]))))
    return c.along(U[:, :k], None)
