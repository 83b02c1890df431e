"""Stage 1 of TSPA: align the adapters inside the products of attention.

Li et al., TSPA, Findings of ACL 2026, Eq. 5-7. Query and key, or output and value, are two *sides* of a
product ``X Y^T`` over an inner dimension d. Adapter t adds ``L_t S_t`` to a side; only the inner factor
``S_t`` is rotated (both sides by the same ``R_t``) and scaled (by ``s_t`` and ``1/s_t``). Everything the
objective needs of a base matrix is in small Gram matrices.

Letters of shapes: L layers, G kv groups, n adapters, m query heads per group, p outer dimension, d inner
dimension, r rank of a side (zero-padded to be common), rx = m r and ry = r the rows of the two sides, k = rx
+ ry.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.alignment.stiefel import Objective, Solution, in_parts, leave_saddle, minimise, part_size


class SideGrams(NamedTuple):
    """One side of one layer, without its base matrix."""

    K: Tensor  # (G, d, d)           X^T X, summed over the heads of a group
    H: Tensor  # (n, n, r, r)        L_t^T L_u
    C: Tensor  # (n, G, m, r, d)     L_t^T X_h
    inner: Tensor  # (n, G, m, r, d) S_t


class PairProblem(NamedTuple):
    """The objectives of L layers, all targets folded into ``G_*`` and ``target``."""

    K_X: Tensor  # (L, G, d, d)
    H_X: Tensor  # (L, G, rx, rx)  of the merged outer factor, as C_X
    C_X: Tensor  # (L, G, rx, d)
    K_Y: Tensor  # (L, G, d, d)
    H_Y: Tensor  # (L, G, ry, ry)
    C_Y: Tensor  # (L, G, ry, d)
    G_X: Tensor  # (L, G, rx, d)
    G_Y: Tensor  # (L, G, ry, d)
    G_M: Tensor  # (L, G, rx, ry)
    target: Tensor  # (L, G)  squared norm of the target
    inner_x: Tensor  # (L, n, G, m, r, d)
    inner_y: Tensor  # (L, n, G, 1, r, d)
    similarity: Tensor  # (L, 4, n, n)  inner products of the adapters, by inner factors and by C
    weights: Tensor  # (L, n)


# -- sides from raw tensors: W (d_out, d_in), B (n, d_out, r), A (n, r, d_in) -------------------------------

# Base X (G, m, p, d), outer L (n, p, r), inner S (n, G, m, r, d). The base enters the objective only through
# the other side's LoRA, so it may be None when there is none.
Side = tuple[Tensor | None, Tensor, Tensor]


def query_side(
    W: Tensor | None, B: Tensor, A: Tensor, n_heads: int, n_kv_heads: int, bias: Tensor | None = None
) -> Side:
    """``X_h = W_h^T``, ``L = A^T``, ``S_h = B_h^T``: heads (n_kv_heads, n_heads / n_kv_heads) of d_out.

    A bias is one more input coordinate, constant and untouched by LoRA: a last row of X and a zero row of L.
    """
    n, r = A.shape[:2]
    outer = A.mT
    if W is not None and bias is not None:
        W = torch.cat([W, bias[:, None]], dim=1)
        outer = torch.cat([outer, outer.new_zeros(n, 1, r)], dim=1)
    heads = n_kv_heads, n_heads // n_kv_heads, B.shape[1] // n_heads
    return W if W is None else W.unflatten(0, heads).mT, outer, B.unflatten(1, heads).mT


def key_side(W: Tensor | None, B: Tensor, A: Tensor, n_kv_heads: int, bias: Tensor | None = None) -> Side:
    """``Y = W_g^T``, ``L = A^T``, ``S = B_g^T``; the value side is the same."""
    return query_side(W, B, A, n_kv_heads, n_kv_heads, bias)


value_side = key_side


def output_side(W: Tensor | None, B: Tensor, A: Tensor, n_heads: int, n_kv_heads: int) -> Side:
    """``X_h = W[:, h]``, ``L = B``, ``S_h = A[:, h]``: heads of d_in."""
    heads = n_kv_heads, n_heads // n_kv_heads, A.shape[2] // n_heads
    X = W if W is None else W.unflatten(1, heads).permute(1, 2, 0, 3)
    return X, B, A.unflatten(2, heads).permute(0, 2, 3, 1, 4)


def input_side(W: Tensor | None, B: Tensor, A: Tensor) -> Side:
    """The reading in which rotations act on the model space: ``X = W``, ``L = B``, ``S = A``, one group."""
    return W if W is None else W[None, None], B, A[:, None, None]


def inner_to_B(inner: Tensor) -> Tensor:
    """``(..., G, m, r, d)`` back to ``B (..., d_out, r)``, for the query, key and value side."""
    return inner.mT.flatten(-4, -2)


def inner_to_A(inner: Tensor) -> Tensor:
    """``(..., G, m, r, d)`` back to ``A (..., r, d_in)``, for the output side and the input reading."""
    return inner.movedim(-2, -4).flatten(-3)


def side_grams(W: Tensor | None, outer: Tensor, inner: Tensor) -> SideGrams:
    """The Grams of ``W (G, m, p, d)``, ``outer (n, p, r)``, ``inner (n, G, m, r, d)``, in outer's dtype."""
    H = torch.einsum("tpi,upj->tuij", outer, outer)
    if W is None:
        _, G, *_, d = inner.shape
        return SideGrams(inner.new_zeros(G, d, d), H, torch.zeros_like(inner), inner)
    W = W.to(outer.dtype)
    return SideGrams((W.mT @ W).sum(1), H, torch.einsum("tpr,ghpd->tghrd", outer, W), inner)


# -- the objective ------------------------------------------------------------------------------------------


def pair_problem(
    x: Sequence[SideGrams], y: Sequence[SideGrams], weights: Tensor, target_scale: float = 1.0
) -> PairProblem:
    """Fold each layer's targets and stack the layers: sides ``x[l]``, ``y[l]`` and ``weights (L, n)``.

    ``y`` is the side with one head per group (key, value). The target is the product of the base plus
    ``target_scale`` times the mean of what the adapters change in it.
    """
    scales = [target_scale] * len(x)
    return PairProblem(*map(torch.stack, zip(*map(_fold_targets, x, y, weights.to(x[0].K), scales))))


def _fold_targets(x: SideGrams, y: SideGrams, weights: Tensor, target_scale: float) -> PairProblem:
    """One layer. Stacked over the adapters, the target has the merged product's own form:

    ``tau / n (L S_X Y^T + X S_Y^T L^T + L M L^T)`` with ``M`` block diagonal, `tau` the target's scale; and
    the merged outer factor is ``L_0 = L E``, ``E = a (x) I``. Hence ``G`` is ``-tau / n E^T`` times half the
    derivative of the squared norm of what stands in brackets.
    """
    n = len(weights)
    share = target_scale / n
    (H_X, C_X, S_X, E_X), (H_Y, C_Y, S_Y, E_Y) = (_stack_adapters(side, weights) for side in (x, y))
    owner_x, owner_y = (torch.arange(S.shape[1], device=S.device) * n // S.shape[1] for S in (S_X, S_Y))
    M = (S_X @ S_Y.mT) * (owner_x[:, None] == owner_y)
    h_X, h_Y, h_M = _half_derivative((x.K, H_X, C_X, y.K, H_Y, C_Y), S_X, S_Y, M)
    target = (_dot(S_X, h_X) + _dot(S_Y, h_Y) + _dot(M, h_M)) * share * share
    G, (rx, ry) = len(x.K), (E_X.shape[1], E_Y.shape[1])
    return PairProblem(
        K_X=x.K,
        H_X=(E_X.mT @ H_X @ E_X).expand(G, rx, rx),
        C_X=E_X.mT @ C_X,
        K_Y=y.K,
        H_Y=(E_Y.mT @ H_Y @ E_Y).expand(G, ry, ry),
        C_Y=E_Y.mT @ C_Y,
        G_X=-share * E_X.mT @ h_X,
        G_Y=-share * E_Y.mT @ h_Y,
        G_M=-share * E_X.mT @ h_M @ E_Y,
        target=target,
        inner_x=x.inner,
        inner_y=y.inner,
        similarity=torch.stack([v.flatten(1) @ v.flatten(1).mT for v in (x.inner, x.C, y.inner, y.C)]),
        weights=weights,
    )


def _stack_adapters(side: SideGrams, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H (n rx, n rx), C and S (G, n rx, d), E (n rx, rx), rows ordered adapter, head, rank; heads share L."""
    n, _, m, r, _ = side.inner.shape
    eye = torch.eye(m, dtype=side.H.dtype, device=side.H.device)
    H = torch.einsum("ab,tuij->taiubj", eye, side.H).reshape(n * m * r, n * m * r)
    C, S = (v.movedim(0, 1).flatten(1, 3) for v in (side.C, side.inner))
    return H, C, S, torch.kron(weights[:, None], torch.eye(m * r, dtype=weights.dtype, device=weights.device))


def _dot(P: Tensor, Q: Tensor) -> Tensor:
    return (P * Q).sum((-2, -1))


def _half_derivative(
    form: Sequence[Tensor], S_X: Tensor, S_Y: Tensor, M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Half the partial derivatives of ``||L_X S_X Y^T + X S_Y^T L_Y^T + L_X M L_Y^T||^2``.

    It is quadratic in its arguments, so its value is their inner product with ``(S_X, S_Y, M)``.
    """
    K_X, H_X, C_X, K_Y, H_Y, C_Y = form
    P = S_X @ C_Y.mT + M @ H_Y  # (rx, ry)
    Q = C_X @ S_Y.mT + H_X @ M  # (rx, ry)
    return H_X @ (S_X @ K_Y) + Q @ C_Y, H_Y @ (S_Y @ K_X) + P.mT @ C_X, H_X @ P + C_X @ S_Y.mT @ H_Y


def pair_objective(problem: PairProblem) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """``||X_0 Y_0^T - X Y^T - tau mean_t (X_t Y_t^T - X Y^T)||^2`` of the merged inner factors (Eq. 6-7).

    The function takes ``S_X (L G, rx, d)``, ``S_Y (L G, ry, d)``; it returns the loss ``(L G,)`` and both
    gradients.
    """
    *form, G_X, G_Y, G_M, target = (v.flatten(0, 1).contiguous() for v in problem[:10])

    def objective(S_X: Tensor, S_Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        M = S_X @ S_Y.mT
        h_X, h_Y, h_M = _half_derivative(form, S_X, S_Y, M)
        d_X, d_Y, d_M = h_X.add_(G_X), h_Y.add_(G_Y), h_M.add_(G_M)
        loss = _dot(S_X, d_X + G_X) + _dot(S_Y, d_Y + G_Y) + _dot(M, d_M + G_M) + target
        return loss, d_X.baddbmm_(d_M, S_Y).mul_(2), d_Y.baddbmm_(d_M.mT, S_X).mul_(2)

    return objective


# -- the rotations ------------------------------------------------------------------------------------------


class Rotation(NamedTuple):
    """How a point rotates the factors ``Z_t = [S_X; S_Y]`` (L, G, n, k, d) of all adapters."""

    start: Tensor  # the point at which nothing is rotated
    apply: Callable[[Tensor], Tensor]  # point -> Z_t R_t (L, G, n, k, d)
    merge: Callable[[Tensor, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]
    """point, row coefficients c_t (L, n, k) -> ``sum_t diag(c_t) Z_t R_t`` (L, G, k, d), and the function
    that takes the gradient in that sum to the gradient in the point"""


def _any_rotation(Z: Tensor) -> Rotation:
    """All of O(d). With ``k < d`` rows ``Z_t R_t = U_t^T V_t``, where ``V_t (k, d)`` has orthonormal rows."""
    L, G, n, k, d = Z.shape
    if k < d:
        Q, U = torch.linalg.qr(Z.mT)
        coordinates, start = U.mT, Q.mT
    else:
        coordinates, start = Z, torch.eye(d, dtype=Z.dtype, device=Z.device).expand(L, G, n, d, d)
    beside = coordinates.transpose(2, 3).contiguous()  # (L, G, k, n, q), q = min(k, d)
    d_point = torch.empty_like(start, memory_format=torch.contiguous_format)  # one memory for all gradients

    def merge(V: Tensor, coefficients: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        scaled = (coefficients.mT[:, None, :, :, None] * beside).flatten(3)  # (L, G, k, n q)
        return scaled @ V.flatten(2, 3), lambda d_sum: torch.matmul(
            scaled.mT, d_sum, out=d_point.flatten(2, 3)
        ).view(V.shape)

    return Rotation(start, lambda V: coordinates @ V, merge)


def _rope_rotation(Z: Tensor, rotary_dim: int) -> Rotation:
    """Rotations of the planes ``(j, j + rotary_dim/2)``, which commute with RoPE, as ``(cos, sin)``."""
    half = rotary_dim // 2
    first, second, rest = Z.split([half, half, Z.shape[-1] - rotary_dim], dim=-1)

    def apply(point: Tensor) -> Tensor:
        cos, sin = point.movedim(-3, -1).unbind(-2)  # (L, G, n, 1, half)
        return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)

    def merge(point: Tensor, coefficients: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        scale = coefficients[:, None, :, :, None]

        def pull(d_sum: Tensor) -> Tensor:
            d_first, d_second, _ = (scale * d_sum[:, :, None]).split([half, half, rest.shape[-1]], dim=-1)
            d_cos, d_sin = d_first * first + d_second * second, d_second * first - d_first * second
            return torch.stack([d_cos.sum(-2), d_sin.sum(-2)], dim=-1)[..., None, :]

        return (scale * apply(point)).sum(2), pull

    start = Z.new_tensor([1.0, 0.0]).expand(*Z.shape[:3], half, 1, 2)
    return Rotation(start, apply, merge)


# -- the solver ---------------------------------------------------------------------------------------------


def align_attention(
    problem: PairProblem,
    *,
    steps: int = 100,
    lr: float = 0.1,
    tolerance: float = 0.0,
    scale: bool = True,
    scale_without_partner: bool = False,
    rope_safe: bool = False,
    rotary_dim: int | None = None,
    seed: int = 42,
    solver: str = "amsgrad",
    on_progress: Callable[[float, float], None] | None = None,
) -> tuple[Tensor, Tensor, Solution]:
    """Align all layers; returns ``s_t S^X_t R_t`` and ``S^Y_t R_t / s_t``, shaped as the inner factors.

    One rotation per adapter, layer and kv group, the only sharing that leaves every head's LoRA x LoRA
    product as it is, and one scale per adapter and layer. ``s_t`` stays 1 where an adapter has LoRA on one
    side only: there it would be shrinkage, not a symmetry (``scale_without_partner`` frees it). ``rope_safe``
    keeps to rotations that commute with RoPE on the first ``rotary_dim`` (default: all) coordinates of a
    head.
    """
    L = len(problem.K_X)

    def solve(part: slice) -> tuple[Tensor, Tensor, Solution]:
        share = PairProblem(*(v[part] for v in problem))
        Z = torch.cat([share.inner_x.flatten(3, 4), share.inner_y.flatten(3, 4)], dim=-2).movedim(1, 2)
        rotation = _rope_rotation(Z, rotary_dim or Z.shape[-1]) if rope_safe else _any_rotation(Z)
        free = free_scales(share, scale, scale_without_partner)
        objective, rotated = aligned_objective(share, rotation, free)
        solution = minimise(
            objective,
            leave_saddle(rotation.start, share.similarity, seed if steps else None),
            torch.zeros_like(share.weights),
            steps=steps,
            lr=lr,
            tolerance=tolerance,
            floor=100 * torch.finfo(Z.dtype).eps * share.target.sum(1),
            solver=solver,
            on_progress=on_progress
            and (lambda done, left: on_progress((part.start + done * len(Z)) / L, left)),
            first=part.start,
        )
        aligned = rotated(solution.point, solution.log_s).movedim(2, 1)
        S_X, S_Y = aligned.split([share.G_M.shape[-2], share.G_M.shape[-1]], dim=-2)
        return S_X.reshape(share.inner_x.shape), S_Y.reshape(share.inner_y.shape), solution

    numbers = problem.inner_x[0].numel() + problem.inner_y[0].numel()
    return in_parts(solve, L, part_size(numbers, problem.K_X))


def free_scales(problem: PairProblem, scale: bool, without_partner: bool) -> Tensor:
    """Which ``s_t`` may move (L, n): those of adapters that have LoRA on both sides."""
    on_x, on_y = (v.flatten(2).any(2) for v in (problem.inner_x, problem.inner_y))
    return ((on_x | on_y) if without_partner else (on_x & on_y)) & scale


def aligned_objective(
    problem: PairProblem, rotation: Rotation, free: Tensor
) -> tuple[Objective, Callable[[Tensor, Tensor], Tensor]]:
    """The objective in terms of a point and log scales, and the function that gives the aligned ``Z_t``."""
    rx, ry = problem.G_M.shape[-2:]
    layers, groups = problem.target.shape
    merged = pair_objective(problem)
    sign = torch.cat([problem.K_X.new_ones(rx), -problem.K_X.new_ones(ry)])  # s_t on X, 1/s_t on Y
    any_free = bool(free.any())

    def scales(log_s: Tensor) -> Tensor:
        return torch.exp(log_s[:, :, None] * sign)  # (L, n, k)

    def objective(point: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        coefficients = problem.weights[:, :, None] * scales(log_s)
        S, pull = rotation.merge(point, coefficients)
        loss, *d_parts = merged(*S.flatten(0, 1).split([rx, ry], dim=1))
        d_S = torch.cat(d_parts, dim=1).view(S.shape)  # (L, G, k, d)
        d_log_s = torch.zeros_like(log_s)
        if any_free:
            per_row = (d_S[:, :, None] * rotation.apply(point)).sum((1, 4))  # (L, n, k)
            d_log_s = (per_row * coefficients * sign).sum(2) * free
        return loss.view(layers, groups).sum(1), pull(d_S), d_log_s

    return objective, lambda point, log_s: scales(log_s)[:, None, :, :, None] * rotation.apply(point)
