"""Which unit of one model is which unit of another: Git Re-Basin's weight matching, and the same for heads.

Ainsworth et al., Git Re-Basin: Merging Models modulo Permutation Symmetries, 2023 (arXiv 2209.04836).
"""

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(S: Tensor) -> Tensor:
    """The permutation p that maximises `sum_i S[i, p_i]`.

    No permutation gains more than the largest entry of every row, so where these are in different columns
    they are the answer.  That is so for models that are related, and saves the search.

    Args:
        S: (n, n)

    Returns:
        p (n,), on the CPU
    """
    largest = S.argmax(1).cpu()
    if len(largest.unique()) == len(S):
        return largest
    # To be minimised, because scipy copies a matrix that is to be maximised.
    _, columns = linear_sum_assignment(S.to("cpu", torch.float64, copy=True).neg_().numpy())
    return torch.from_numpy(columns)


def weight_matching(
    model: Mapping[str, Tensor], anchor: Mapping[str, Tensor], axes: Mapping[str, Sequence[str | None]]
) -> dict[str, Tensor]:
    """Permutations that bring the tensors of a model nearest to those of an anchor.

    They maximise `sum_W <W_anchor, P W Q^T>`, one permutation after the other by linear assignment with the
    others held, until none gains.  This is the authors' `weight_matching`.

    Args:
        model: tensors by name
        anchor: tensors of the same names and shapes
        axes: per tensor and dimension the name of the permutation that acts there; None: none does

    Returns:
        `{name: p (n,)}`; `p[i]` is the model's unit that comes to place i.  A permutation that gains no more
        than rounding stays the identity.
    """
    sizes = {P: model[W].shape[i] for W, of in axes.items() for i, P in enumerate(of) if P}
    found = {P: torch.arange(n) for P, n in sizes.items()}
    gained = True
    while gained:
        gained = False
        for P, n in sizes.items():
            S = next(iter(model.values())).new_zeros(n, n)
            for W, of in axes.items():
                if P in of:
                    S.addmm_(_rows(anchor[W], of, P, {}), _rows(model[W], of, P, found).T)
            better, rows = assign(S), torch.arange(n)
            new, old = (S[rows, p].double() for p in (better, found[P]))
            if (new - old).sum() > 4 * torch.finfo(S.dtype).eps * new.abs().sum():
                found[P], gained = better, len(sizes) > 1
    return found


def _rows(W: Tensor, of: Sequence[str | None], P: str, found: Mapping[str, Tensor]) -> Tensor:
    """The rows of the units that P permutes, the other permutations applied  # (n, m)"""
    for i, Q in enumerate(of):
        if Q is not None and Q in found and Q != P:
            W = W.index_select(i, found[Q].to(W.device))
    i = of.index(P)
    return W.movedim(i, 0).reshape(W.shape[i], -1)


def match_heads(S: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Which head of a model is which of an anchor, where heads share keys and values in groups.

    A group goes to a place as a whole, and its heads in the best order there.

    Args:
        S: (n_heads, n_heads) how alike head i of the anchor and head j of the model are
        n_groups: of `n_heads / n_groups` heads each, which lie side by side

    Returns:
        `(groups (n_groups,), heads (n_heads,))`: the model's group, and its head, that comes to each place;
        those of the identity where nothing is more alike.
    """
    n = len(S)
    size = n // n_groups
    blocks = S.double().cpu().view(n_groups, size, n_groups, size).transpose(1, 2)  # (g, g, size, size)
    inner = torch.stack([torch.stack([assign(block) for block in row]) for row in blocks])  # (g, g, size)
    gains = blocks.gather(3, inner[..., None]).sum((2, 3))  # (g, g)
    groups = assign(gains)
    places = torch.arange(n_groups)
    heads = (size * groups[:, None] + inner[places, groups]).flatten()  # (n,)
    identity = torch.arange(n)
    before, after = (S.double().cpu()[identity, p] for p in (identity, heads))
    if (after - before).sum() <= 4 * torch.finfo(S.dtype).eps * after.abs().sum():
        return places, identity
    return groups, heads


def head_likeness(X: Tensor, Y: Tensor, X_0: Tensor, Y_0: Tensor) -> Tensor:
    """`<X_0i^T Y_0i, X_j^T Y_j>` of all pairs of heads, whatever rotation each head has.

    Only the products `X^T Y` matter to a model, query with key or value with output, and a rotation of a
    head leaves them.

    Args:
        X: (n, d, p) of the model
        Y: (m, d, q) of the model; n / m heads side by side share one
        X_0: (n, d, p) of the anchor
        Y_0: (m, d, q) of the anchor

    Returns:
        (n, n), in the unit of the norms of all products
    """
    n, d, _ = X.shape
    m = len(Y)
    YY = (Y_0.flatten(0, 1) @ Y.flatten(0, 1).T).view(m, d, m, d)
    rows = []
    for i in range(n):  # not all at once: that would be a matrix of n d by n d
        XX = (X_0[i] @ X.flatten(0, 1).T).view(d, m, n // m, d)
        rows.append(torch.einsum("ambc,amc->mb", XX, YY[i * m // n]).flatten())
    norms = [_energy(*side).sqrt() for side in ((X, Y), (X_0, Y_0))]
    return torch.stack(rows) / (norms[0] * norms[1]).clamp_min(torch.finfo(X.dtype).tiny)


def _energy(X: Tensor, Y: Tensor) -> Tensor:
    """`sum_i ||X_i^T Y_i||^2`."""
    XX, YY = X @ X.mT, Y @ Y.mT  # (n, d, d), (m, d, d)
    grouped: Tensor = XX.unflatten(0, (len(YY), -1))
    return (grouped * YY[:, None]).sum()
