"""Stage 1 against a dense float64 reference, written straight from the definition."""

import pytest
import torch
from torch import Tensor

from mergekit_tspa.alignment.attention import (
    PairProblem,
    _any_rotation,
    _rope_rotation,
    align_attention,
    aligned_objective,
    free_scales,
    inner_to_A,
    inner_to_B,
    input_side,
    key_side,
    output_side,
    pair_objective,
    pair_problem,
    query_side,
    side_grams,
    value_side,
)

F64 = torch.float64


def lora(seed: int, n: int, d_out: int, r: int, d_in: int, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    B, A = torch.randn(n, d_out, r, generator=g, dtype=F64), torch.randn(n, r, d_in, generator=g, dtype=F64)
    return (0.2 * B).to(dtype), (0.2 * A).to(dtype)


def base(seed: int, *shape: int, dtype=F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def sides(pair: str, seed=0, n=3, heads=4, kv=2, d=6, width=10, r_x=3, r_y=2, biased=False, dtype=F64):
    """Two raw sides (W, outer, inner) of one layer."""
    if pair == "qk":
        W, V = base(seed, heads * d, width, dtype=dtype), base(seed + 1, kv * d, width, dtype=dtype)
        b, c = (base(seed + i, h * d, dtype=dtype) if biased else None for i, h in ((2, heads), (3, kv)))
        x = query_side(W, *lora(seed + 4, n, heads * d, r_x, width, dtype), heads, kv, b)
        return x, key_side(V, *lora(seed + 5, n, kv * d, r_y, width, dtype), kv, c)
    if pair == "vo":
        W, V = base(seed, width, heads * d, dtype=dtype), base(seed + 1, kv * d, width, dtype=dtype)
        x = output_side(W, *lora(seed + 4, n, width, r_x, heads * d, dtype), heads, kv)
        return x, value_side(V, *lora(seed + 5, n, kv * d, r_y, width, dtype), kv)
    # the input reading
    W, V = base(seed, heads * d, width, dtype=dtype), base(seed + 1, kv * d, width, dtype=dtype)
    x = input_side(W, *lora(seed + 4, n, heads * d, r_x, width, dtype))
    return x, input_side(V, *lora(seed + 5, n, kv * d, r_y, width, dtype))


def problem_of(*layers, weights: Tensor, target_scale: float = 1.0) -> PairProblem:
    x, y = zip(*layers)
    return pair_problem([side_grams(*s) for s in x], [side_grams(*s) for s in y], weights, target_scale)


def dense_pair_objective(x, y, weights, inner_x, inner_y) -> Tensor:
    """``sum_t ||Z_0 - Z_t||^2`` over heads and groups of one layer; ``inner_*`` the aligned factors."""
    (W, L_X, S_X), (V, L_Y, S_Y) = x, y
    n, G, m = S_X.shape[:3]
    outer_x, outer_y = ((weights[:, None, None] * L).sum(0) for L in (L_X, L_Y))
    total = W.new_zeros(())
    for g in range(G):
        for h in range(m):
            merged_x = W[g, h] + outer_x @ (weights[:, None, None] * inner_x[:, g, h]).sum(0)
            merged_y = V[g, 0] + outer_y @ (weights[:, None, None] * inner_y[:, g, 0]).sum(0)
            for t in range(n):
                target = (W[g, h] + L_X[t] @ S_X[t, g, h]) @ (V[g, 0] + L_Y[t] @ S_Y[t, g, 0]).T
                total = total + (merged_x @ merged_y.T - target).square().sum()
    return total


def spread_of_targets(x, y) -> Tensor:
    """``sum_t ||Z_t||^2 - n ||mean Z_t||^2``, the constant that the collapse to the mean drops."""
    (W, L_X, S_X), (V, L_Y, S_Y) = x, y
    adapted_x, adapted_y = W + L_X[:, None, None] @ S_X, V + L_Y[:, None, None] @ S_Y
    Z = adapted_x @ adapted_y.mT  # (n, G, m, p, q)
    return (Z - Z.mean(0)).square().sum()


CASES = {
    "grouped": dict(pair="qk"),
    "multi-head": dict(pair="qk", kv=4),
    "multi-query": dict(pair="qk", kv=1),
    "full rotations": dict(pair="qk", r_x=5, r_y=5),
    "bias": dict(pair="qk", biased=True),
    "no partner": dict(pair="qk", r_y=0),
    "value, output": dict(pair="vo"),
    "value only": dict(pair="vo", r_x=0),
    "input reading": dict(pair="input"),
    "many": dict(pair="qk", n=7),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rope", [False, True])
def test_gram_objective_is_the_dense_one(case, rope):
    layers = [sides(**CASES[case], seed=10 * i) for i in (1, 2)]
    n, d = layers[0][0][1].shape[0], layers[0][0][2].shape[-1]
    weights = 0.5 + torch.rand(2, n, generator=torch.Generator().manual_seed(5), dtype=F64)
    problem = problem_of(*layers, weights=weights)
    Z = torch.cat([problem.inner_x.flatten(3, 4), problem.inner_y.flatten(3, 4)], dim=-2).movedim(1, 2)
    rotation = _rope_rotation(Z, d - 2) if rope else _any_rotation(Z)
    objective, rotated = aligned_objective(problem, rotation, torch.ones_like(weights, dtype=torch.bool))
    start = rotation.start
    point = torch.linalg.qr((start + base(6, *start.shape)).mT)[0].mT.contiguous()
    log_s = 0.1 * base(7, *weights.shape)
    loss = objective(point, log_s)[0]
    S_X, S_Y = rotated(point, log_s).movedim(2, 1).split(list(problem.G_M.shape[-2:]), dim=-2)
    S_X, S_Y = S_X.reshape(problem.inner_x.shape), S_Y.reshape(problem.inner_y.shape)
    for i, (x, y) in enumerate(layers):
        dense = dense_pair_objective(x, y, weights[i], S_X[i], S_Y[i])
        torch.testing.assert_close(n * loss[i] + spread_of_targets(x, y), dense, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", ["grouped", "no partner", "value, output"])
def test_a_scaled_target_is_the_base_and_a_multiple_of_the_mean_change(case):
    (W, L_X, S_X), (V, L_Y, S_Y) = x, y = sides(**CASES[case])
    weights, tau = torch.tensor([1.0, 0.7, 0.4], dtype=F64), 2.5
    problem = problem_of((x, y), weights=weights[None], target_scale=tau)
    inner_x, inner_y = ((weights[:, None, None, None, None] * S).sum(0) for S in (S_X, S_Y))
    loss, *_ = pair_objective(problem)(inner_x.flatten(1, 2), inner_y.flatten(1, 2))
    outer_x, outer_y = ((weights[:, None, None] * L).sum(0) for L in (L_X, L_Y))
    base = W @ V.mT
    change = ((W + L_X[:, None, None] @ S_X) @ (V + L_Y[:, None, None] @ S_Y).mT - base).mean(0)
    merged = (W + outer_x @ inner_x) @ (V + outer_y @ inner_y).mT
    dense = (merged - base - tau * change).square().sum((1, 2, 3))
    torch.testing.assert_close(loss, dense, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", ["grouped", "full rotations", "no partner", "value, output"])
@pytest.mark.parametrize("rope", [False, True])
def test_gradients(case, rope):
    x, y = sides(**CASES[case])
    weights = torch.tensor([[1.0, 0.7, 0.4]], dtype=F64)
    problem = problem_of((x, y), weights=weights)
    Z = torch.cat([problem.inner_x.flatten(3, 4), problem.inner_y.flatten(3, 4)], dim=-2).movedim(1, 2)
    rotation = _rope_rotation(Z, 4) if rope else _any_rotation(Z)
    objective, _ = aligned_objective(problem, rotation, torch.ones_like(weights, dtype=torch.bool))
    point, log_s = rotation.start + 0.3 * base(1, *rotation.start.shape), 0.2 * base(2, *weights.shape)
    check_gradients(objective, point, log_s)


def check_gradients(objective, point, log_s):
    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, point, log_s):
            loss, *gradients = objective(point, log_s)
            ctx.save_for_backward(*(g.clone() for g in gradients))  # the objective reuses their memory
            return loss.sum()

        @staticmethod
        def backward(ctx, up):
            return tuple(up * g for g in ctx.saved_tensors)

    assert torch.autograd.gradcheck(Loss.apply, (point.requires_grad_(), log_s.requires_grad_()))


@pytest.mark.parametrize("case", CASES)
def test_alignment_lowers_the_objective_and_keeps_lora_products(case):
    x, y = sides(**CASES[case])
    n = x[1].shape[0]
    problem = problem_of((x, y), weights=torch.ones(1, n))
    S_X, S_Y, solution = align_attention(problem, steps=60)
    assert (solution.end < 0.9 * solution.start).all()
    assert solution.orthogonality.max() < 1e-12
    torch.testing.assert_close(S_X[0] @ S_Y[0].mT, x[2] @ y[2].mT)  # every head's LoRA x LoRA product
    dense = dense_pair_objective(x, y, torch.ones(n, dtype=F64), S_X[0], S_Y[0])
    torch.testing.assert_close(n * solution.end[0] + spread_of_targets(x, y), dense, rtol=1e-9, atol=0)
    if 0 in (x[1].shape[-1], y[1].shape[-1]):
        assert (solution.log_s == 0).all()


def test_zero_padding_the_rank_changes_nothing():
    x, y = sides("qk")
    pad = torch.nn.functional.pad
    padded = (x[0], pad(x[1], (0, 2)), pad(x[2], (0, 0, 0, 2)))
    ones = torch.ones(1, 3)
    plain, wide = problem_of((x, y), weights=ones), problem_of((padded, y), weights=ones)
    torch.testing.assert_close(plain.target, wide.target)
    starts = [align_attention(p, steps=0)[2].start for p in (plain, wide)]
    torch.testing.assert_close(*starts)
    S_X, _, solution = align_attention(wide, steps=40)
    assert (S_X[..., 3:, :] == 0).all() or S_X[..., 3:, :].abs().max() < 1e-12
    assert (solution.end < solution.start).all()


def test_scales_move_only_with_a_partner():
    x, y = sides("qk")
    y = (*y[:2], y[2] * torch.tensor([1.0, 0, 1.0], dtype=F64).view(3, 1, 1, 1, 1))
    problem = problem_of((x, y), weights=torch.ones(1, 3))
    assert free_scales(problem, True, False).tolist() == [[True, False, True]]
    _, S_Y, solution = align_attention(problem, steps=30)
    assert solution.log_s[0, 1] == 0 and (solution.log_s[0, ::2] != 0).all()
    assert S_Y[:, 1].abs().max() == 0
    assert (align_attention(problem, steps=30, scale=False)[2].log_s == 0).all()
    assert (align_attention(problem, steps=30, scale_without_partner=True)[2].log_s != 0).all()


def test_one_adapter_comes_back_unchanged():
    x, y = sides("qk", n=1)
    S_X, S_Y, solution = align_attention(problem_of((x, y), weights=torch.ones(1, 1)), steps=50)
    torch.testing.assert_close(S_X[0], x[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(S_Y[0], y[2], rtol=0, atol=1e-12)
    assert solution.end.abs().max() < 1e-9


def test_identical_adapters_leave_the_saddle():
    x, y = sides("qk", n=1)
    x, y = ((W, L.repeat(2, 1, 1), S.repeat(2, 1, 1, 1, 1)) for W, L, S in (x, y))
    solution = align_attention(problem_of((x, y), weights=torch.ones(1, 2)), steps=100)[2]
    assert (solution.end < 0.9 * solution.start).all()


def test_inner_factors_find_their_way_back():
    B, A = lora(3, 2, 24, 3, 10)
    torch.testing.assert_close(inner_to_B(query_side(base(1, 24, 10), B, A, 4, 2)[2]), B)
    B, A = lora(3, 2, 10, 3, 24)
    torch.testing.assert_close(inner_to_A(output_side(base(1, 10, 24), B, A, 4, 2)[2]), A)
    torch.testing.assert_close(inner_to_A(input_side(base(1, 10, 24), B, A)[2]), A)


def rope(positions: Tensor, q: Tensor, rotary_dim: int) -> Tensor:
    """Rotary embedding in the layout of transformers' rotate_half, on the last axis of q (positions, d)."""
    half = rotary_dim // 2
    angle = positions[:, None] * 10000 ** (-torch.arange(half, dtype=F64) / half)
    first, second, rest = q.split([half, half, q.shape[-1] - rotary_dim], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@pytest.mark.parametrize("rotary_dim", [6, 4])
def test_rope_safe_rotations_commute_with_rope(rotary_dim):
    x, y = sides("qk")
    problem = problem_of((x, y), weights=torch.ones(1, 3))
    S_X, S_Y, solution = align_attention(problem, steps=40, rope_safe=True, rotary_dim=rotary_dim)
    assert (solution.end < solution.start).all()
    positions = torch.arange(5, dtype=F64)
    tokens_q, tokens_k = base(30, 5, 3), base(31, 5, 2)  # in the coordinates of the outer factors

    def scores(S_X, S_Y):
        return rope(positions, tokens_q @ S_X, rotary_dim) @ rope(positions, tokens_k @ S_Y, rotary_dim).T

    torch.testing.assert_close(scores(S_X[0, 1, 1, 0], S_Y[0, 1, 1, 0]), scores(x[2][1, 1, 0], y[2][1, 1, 0]))
    free_X, free_Y, _ = align_attention(problem, steps=40)
    moved = scores(free_X[0, 1, 1, 0], free_Y[0, 1, 1, 0]) - scores(x[2][1, 1, 0], y[2][1, 1, 0])
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("case", ["grouped", "full rotations", "value only"])
def test_amsgrad_is_geoopt(case):
    problem = problem_of(sides(**CASES[case]), sides(**CASES[case], seed=40), weights=torch.ones(2, 3))
    ours, reference = (align_attention(problem, steps=30, solver=s) for s in ("amsgrad", "geoopt"))
    torch.testing.assert_close(ours[0], reference[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours[2].log_s, reference[2].log_s, rtol=1e-6, atol=1e-8)
    ours, reference = (align_attention(problem, steps=200, solver=s)[2].end for s in ("amsgrad", "geoopt"))
    torch.testing.assert_close(ours, reference, rtol=1e-2, atol=0)


def test_deterministic_and_independent_of_the_batch():
    layers = [sides("qk", seed=10 * i) for i in range(3)]
    problem = problem_of(*layers, weights=torch.ones(3, 3))
    first, again = (align_attention(problem, steps=20)[0] for _ in range(2))
    assert torch.equal(first, again)
    alone = align_attention(problem_of(layers[1], weights=torch.ones(1, 3)), steps=20)[0]
    torch.testing.assert_close(alone[0], first[1])


def test_float32_follows_float64():
    types = F64, torch.float32
    double, single = (problem_of(sides("qk", dtype=t), weights=torch.ones(1, 3)) for t in types)
    exact, rough = align_attention(double)[2], align_attention(single)[2]
    torch.testing.assert_close(rough.end.double(), exact.end, rtol=1e-2, atol=0)
    assert rough.orthogonality.max() < 1e-5
