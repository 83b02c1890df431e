"""DC-Merge: even out each adapter's singular values, merge in a basis in which no two share a direction."""

import torch
from torch import Tensor

from mergekit_tspa.linalg import numerical_rank
from mergekit_tspa.rules.grams import weighted
from mergekit_tspa.rules.spectral import polar
from mergekit_tspa.rules.ties import elect_and_merge


def dc_merge(
    M: Tensor,
    weights: Tensor,
    smoothing: str = "average",
    ratio: float = 5.0,
    keep: float | None = None,
    rank_per_task: int | None = None,
    room: int | None = None,
) -> Tensor:
    """Smooth each spectrum, merge in the orthogonalised singular vectors of all, keep the diagonal blocks.

    `P_t = a_t M_t = U_t s_t V_t^T` over its leading `r_t` triplets, `s_t` smoothed with its sum kept.
    `U = polar([U_1|..|U_n])`, `V = polar([V_1|..|V_n])` and `N_t = U^T U_t s_t V_t^T V`.  Of each `N_t` the
    largest entries stay, entries that agree with the sign of the sum are averaged, and the diagonal blocks
    of `r_1, .., r_n` directions go back as `U N V^T`.

    Entries at the level of rounding take no part, so that updates without a common direction are added.

    The same in every orthonormal basis: run it on cores.  An adapter alone comes back with its spectrum
    smoothed, and as itself with `smoothing` none; in either case `a` times its update gives `a` times that.

    Zhang et al., DC-Merge: Improving Model Merging with Directional Consistency, 2026 (arXiv 2603.06242).

    Args:
        M: updates in orthonormal coordinates  # (n, p, q)
        weights: of any sign.  An adapter of weight `a` counts as `a` times its update would  # (n,)
        smoothing: `average`, all singular values are their mean; `linear`, they fall in equal steps from the
            first to the last; `none`
        ratio: for `linear`, of the first to the last, if the spectrum's own is not less
        keep: share of the entries of each `N_t` that stay, at least one.  The authors' 1e-3 leaves 16 where
            eight adapters of rank 16 meet, and a single one in small cases.  None is robust: as many as the
            adapter has directions, which is what the share comes to where it was chosen
        rank_per_task: the most that `r_t` can be.  By default all of an update's numerical rank counts if
            all fit into `room`, and else an equal share of it
        room: the smaller side of the updates in full size; by default that of M

    Returns:
        (p, q), in M's precision

    Raises:
        ValueError: for another word in `smoothing`.
    """
    if smoothing not in ("average", "linear", "none"):
        raise ValueError(f"smoothing is {smoothing!r}; it can be 'average', 'linear' or 'none'.")
    P = weighted(M, weights)
    if not len(P):
        return torch.zeros_like(M[0])
    U, S, Vh = torch.linalg.svd(P, full_matrices=False)
    ranks = numerical_rank(S, P.shape)
    room = room or min(M.shape[1:])
    if rank_per_task is None:
        rank_per_task = S.shape[1] if ranks.sum() <= room else max(1, room // len(P))
    sizes = ranks.clamp(max=rank_per_task).tolist()
    cut = [(u[:, :r], _smoothed(s[:r], smoothing, ratio), vh[:r]) for u, s, vh, r in zip(U, S, Vh, sizes)]
    left = polar(torch.cat([u for u, _, _ in cut], dim=1))  # (p, R), R = sum of sizes
    right = polar(torch.cat([vh for _, _, vh in cut]))  # (R, q)
    N = torch.stack([(left.mT @ u * s) @ (vh @ right.mT) for u, s, vh in cut])  # (n, R, R)
    counts = sizes if keep is None else [max(1, int(keep * N[0].numel()))] * len(N)
    kept = torch.stack([_largest(matrix, count) for matrix, count in zip(N, counts)])
    merged = elect_and_merge(kept, torch.ones(len(N)).to(N))
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(N.device)
    return (left @ (merged * (owner[:, None] == owner)) @ right).to(M.dtype)


def _smoothed(s: Tensor, smoothing: str, ratio: float) -> Tensor:
    """The same sum, spread more evenly.  # (r,), descending -> (r,)"""
    if smoothing == "none":
        return s
    first = min(ratio, float(s[0] / s[-1])) if smoothing == "linear" else 1.0
    shares = torch.linspace(first, 1.0, len(s), dtype=s.dtype, device=s.device)
    return s.sum() * shares / shares.sum()


def _largest(matrix: Tensor, count: int) -> Tensor:
    """The entries of at least the `count`-th largest magnitude, but none that is rounding of the largest."""
    ordered = matrix.abs().flatten().sort(descending=True).values
    least = torch.maximum(ordered[min(count, len(ordered)) - 1], torch.finfo(torch.float32).eps * ordered[0])
    return matrix * (matrix.abs() >= least)
