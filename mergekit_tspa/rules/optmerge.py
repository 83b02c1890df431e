"""OptMerge: descent on WUDI's loss from the mean, with every adapter cut to its share of directions."""

import torch
from torch import Tensor

from mergekit_tspa.rules.grams import descending, normal_equations, weighted
from mergekit_tspa.rules.wudi import filtered


def optmerge(
    M: Tensor,
    weights: Tensor,
    steps: int = 300,
    rate: float = 1e-4,
    momentum: float = 0.9,
    room: int | None = None,
) -> Tensor:
    """Descent with momentum on `sum_t ||(M - K_t) K_t^T||^2 / ||P_t||^2` from the mean of the `P_t`.

    `P_t = a_t M_t`, and `K_t = svd_k(P_t)` with `k = int(room / n)`.  The gradient `2 (M S - E)` is linear
    in `M`, so that along an eigenvector of `S` all entries go the same way, and the steps are taken once for
    each eigenvalue: exact, the same in every orthonormal basis, and to be run on cores.

    It starts from a mean: updates that share no direction come out between `1/n` of themselves and
    themselves, with the published settings close to the former.  An adapter alone is itself.

    Wei et al., OptMerge: Unifying Multimodal LLM Capabilities and Modalities via Model Merging, 2025 (arXiv
    2505.19892).

    Args:
        M: updates in orthonormal coordinates  # (n, p, q)
        weights: of any sign.  An adapter of weight `a` counts as `a` times its update would  # (n,)
        steps: of the descent
        rate: its learning rate, for eigenvalues of `S` between 0 and `n`
        momentum: 0 is plain descent
        room: the smaller side of the updates in full size; by default that of M

    Returns:
        (p, q), in M's precision
    """
    P = weighted(M, weights)
    if not len(P):
        return torch.zeros_like(M[0])
    U, s, Vh = torch.linalg.svd(P, full_matrices=False)
    k = max(1, (room or min(M.shape[1:])) // len(P))
    cut = (U[..., :k] * s[:, None, :k]) @ Vh[:, :k]
    E, S = normal_equations(cut, cut / torch.linalg.matrix_norm(P, keepdim=True))
    e, V = descending(S)
    gains, velocity = torch.zeros_like(e), torch.zeros_like(e)
    for _ in range(steps):
        velocity = momentum * velocity + 2 * (1 - e * gains)
        gains = gains + rate * velocity
    return filtered(P.mean(0), E, S, V, gains).to(M.dtype)
