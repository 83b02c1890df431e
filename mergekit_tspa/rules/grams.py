"""Regression on the updates themselves, for the rules that take `D_t^T D_t` for the inputs' moments."""

from collections.abc import Iterable

import torch
from torch import Tensor


def weighted(M: Tensor, weights: Tensor) -> Tensor:
    """`P_t = a_t M_t` in float64, without those that are 0.

    An adapter of weight `a` is to these rules what an adapter of `a` times the update would be.

    Args:
        M: updates in any orthonormal coordinates  # (n, p, q)
        weights: `a_t`, of any sign  # (n,)

    Returns:
        (n', p, q), n' at most n
    """
    P = weights.double().reshape(-1, 1, 1) * M.double()
    return P[P.flatten(1).any(dim=1)]


def unit(P: Tensor) -> Tensor:
    """`P_t / ||P_t||`; none may be 0.  # (n, p, q) -> (n, p, q)"""
    norms: Tensor = torch.linalg.matrix_norm(P, keepdim=True)
    return P / norms


def normal_equations(targets: Iterable[Tensor], inputs: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Both sides of `M S = E`, which the minimiser of `sum_t ||(M - D_t) X_t^T||^2` solves.

    `E = sum_t D_t X_t^T X_t` and `S = sum_t X_t^T X_t`; one more `q x q` matrix at a time is in memory.

    Args:
        targets: `D_t`, at least one  # (p, q) each
        inputs: `X_t`, whose rows stand for inputs of the weight  # (m, q) each

    Returns:
        E (p, q) and S (q, q)
    """
    pairs = iter(zip(targets, inputs))
    D, X = next(pairs)
    S = X.mT @ X
    E = D @ S
    for D, X in pairs:
        gram = X.mT @ X
        E = E + D @ gram
        S = S + gram
    return E, S


def descending(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix, the largest first.  # (q, q) -> (q,), (q, q)"""
    values, V = torch.linalg.eigh(S)
    return values.flip(0), V.flip(1)
