"""SVC, after a merge: singular values that several adapters count are calibrated (arXiv 2602.05536)."""

from collections.abc import Sequence

import torch

from mergekit_tspa.updates import Dense, LoraFactors, LowRank, nonzero

ROUNDING = 1e-6  # of float32 factors; an adapter's smaller response to a direction is none


def svc(update: LowRank | Dense, factors: Sequence[LoraFactors], floor: float = 1.0) -> LowRank | Dense:
    """`S_j <- S_j / mean_t max(s_jt, floor)` for the merged `D = U S V^T`, with the share of each weighted
    adapter `s_jt = <u_j^T D, u_j^T D_t> / ||u_j^T D_t||^2`.

    `floor` is the share of a direction that only one adapter has: 1 if the rule is a sum.  Then orthogonal
    adapters stay as they are, and the sum of n equal adapters becomes one of them.
    """
    U, S, Vh = update.svd()  # (d_out, k), (k,), (k, d_in)
    shares = []
    for f in (factors[t] for t in nonzero(factors)):
        A = f.A.double()
        G = (U.mT @ f.B.to(U.dtype)).double()  # (k, r): u_j^T D_t = G_j A, which is never formed
        size = (G @ (A @ A.mT) * G).sum(1).clamp(min=0).sqrt()
        share = S.double() * (G * (Vh @ f.A.to(U.dtype).mT).double()).sum(1) / size.square()
        shares.append(torch.where(size > ROUNDING * f.norm(), share, 0.0).clamp(min=floor))
    return update.rebuilt(U, S / torch.stack(shares).mean(0).to(S.dtype), Vh)
