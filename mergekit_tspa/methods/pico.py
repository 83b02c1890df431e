"""Pico, before a merge: the output directions that adapters share are damped (arXiv 2604.16826)."""

from collections.abc import Sequence

import torch

from mergekit_tspa.updates import Dense, LoraFactors, LowRank, nonzero


def pico(factors: Sequence[LoraFactors]) -> list[LoraFactors]:
    """`B_t <- B_t + U diag(al - 1) U^T B_t`, with `[B_1 | .. | B_n] = U S V^T`, `c_j = S_j^2 / sum S^2` and
    `al_j = 1 / (1 + (n - 1) c_j)`.

    Merge the result by any rule, then bring it back to scale with `at_mean_norm`.  It depends on how each
    update is split between its factors; the paper puts the LoRA scale into `B`, here its square root is
    there.
    """
    live = [factors[t].B.double() for t in nonzero(factors)]
    U, S, _ = torch.linalg.svd(torch.cat(live, dim=1), full_matrices=False)  # (d_out, q), (q,)
    energy = S.square()
    c = energy / energy.sum().clamp(min=torch.finfo(S.dtype).tiny)
    damping = 1 / (1 + (len(live) - 1) * c) - 1
    return [f._replace(B=f.B + ((U * damping) @ (U.mT @ f.B.double())).to(f.B.dtype)) for f in factors]


def at_mean_norm(update: LowRank | Dense, factors: Sequence[LoraFactors]) -> LowRank | Dense:
    """The merged update, scaled to the mean of the adapters' norms.

    What adapters that cancel leave behind is rounding noise, and stays as it is.
    """
    target = torch.stack([factors[t].norm() for t in nonzero(factors)]).mean()
    norm = update.norm()
    return update.scaled((target / norm).item()) if norm > 1e-6 * target else update
