"""Stage 2 against dense float64 products."""

import pytest
import torch

from mergekit_tspa.alignment import lora as stage
from mergekit_tspa.alignment.lora import align_lora, svd_bound
from tests.alignment.test_attention import F64, base, check_gradients, lora


def grams(P, Q=None):
    """Blocks P_t^T Q_u of stacks (n, d, r)."""
    return torch.einsum("tdi,udj->tuij", P, P if Q is None else Q)


def problem(layers):
    return (torch.stack([grams(B) for B, _ in layers]), torch.stack([grams(A.mT) for _, A in layers]))


def merged(B, A, weights, R, s):
    B = (weights * s)[:, None, None] * B @ R
    A = (weights / s)[:, None, None] * R.mT @ A
    return B.sum(0) @ A.sum(0)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("others", [False, True])
def test_loss_is_the_dense_one_and_falls(n, others):
    layers = [lora(i, n, 12, 3, 10) for i in range(3)]
    targets = [lora(i + 50, n, 12, 3, 10) for i in range(3)] if others else layers
    weights = 0.5 + torch.rand(3, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    extra = {}
    if others:
        extra = dict(
            T_B=torch.stack([grams(Bt, B) for (Bt, _), (B, _) in zip(targets, layers)]),
            T_A=torch.stack([grams(At.mT, A.mT) for (_, At), (_, A) in zip(targets, layers)]),
            target_norm2=torch.stack([(Bt @ At).sum(0).square().sum() for Bt, At in targets]),
        )
    G_B, G_A = problem(layers)
    R, s, solution = align_lora(G_B, G_A, weights, **extra, target_scale=1.5, steps=100)
    bound = svd_bound(*problem(targets), 3, target_scale=1.5)
    assert (solution.end <= solution.start).all() and (solution.end >= (1 - 1e-9) * bound).all()
    assert solution.orthogonality.max() < 1e-12
    eye, ones = torch.eye(3, dtype=F64).expand(n, 3, 3), torch.ones(n, dtype=F64)
    for i, ((B, A), (Bt, At)) in enumerate(zip(layers, targets)):
        goal = 1.5 * (Bt @ At).mean(0)
        for loss, where in ((solution.start[i], (eye, ones)), (solution.end[i], (R[i], s[i]))):
            dense = (merged(B, A, weights[i], *where) - goal).square().sum()
            torch.testing.assert_close(loss, dense, rtol=1e-9, atol=0)
        aligned = (s[i, :, None, None] * B @ R[i]) @ (R[i].mT @ A / s[i, :, None, None])
        torch.testing.assert_close(aligned, B @ A)
        tail = torch.linalg.svdvals(goal)[3:].square().sum()
        torch.testing.assert_close(bound[i], tail, rtol=1e-6, atol=0)


def test_gradients():
    F_B, F_A, cross = base(0, 2, 9, 9), base(1, 2, 9, 9), base(4, 2, 9, 9)
    left, right = torch.cat([F_B @ F_B.mT, cross.mT], 1), torch.cat([F_A @ F_A.mT, cross], 1)
    weights = torch.tensor([[1.0, 0.7, 0.4], [1, 1, 1]], dtype=F64)
    objective = stage._objective(left, right, weights, torch.ones(2, dtype=F64))
    check_gradients(objective, base(2, 2, 3, 3, 3), 0.2 * base(3, 2, 3))


def test_identical_adapters_reach_the_optimum():
    """Two copies with weight 1 start on a saddle; relative rotations by 120 degrees undo the doubling."""
    B, A = lora(0, 1, 12, 4, 10)
    G_B, G_A = problem([(B.repeat(2, 1, 1), A.repeat(2, 1, 1))])
    solution = align_lora(G_B, G_A, torch.ones(1, 2, dtype=F64), steps=500)[2]
    assert solution.end[0] < 1e-3 * solution.start[0]
    half = align_lora(G_B, G_A, torch.full((1, 2), 0.5, dtype=F64), steps=50)[2]
    assert half.end[0] < 1e-6 * solution.start[0]


def test_one_adapter_does_not_move():
    R, s, solution = align_lora(*problem([lora(0, 1, 12, 4, 10)]), torch.ones(1, 1, dtype=F64), steps=50)
    assert torch.equal(R[0, 0], torch.eye(4, dtype=F64)) and s.item() == 1
    assert solution.end.abs().item() < 1e-12


def test_orthogonal_gauge_changes_only_the_start():
    B, A = lora(0, 3, 12, 4, 10)
    Q = torch.linalg.qr(base(9, 3, 4, 4))[0]
    ends = [
        align_lora(*problem([factors]), torch.ones(1, 3, dtype=F64), steps=1500)[2].end
        for factors in ((B, A), (B @ Q, Q.mT @ A))
    ]
    torch.testing.assert_close(*ends, rtol=0.15, atol=0)


def test_amsgrad_is_geoopt():
    G_B, G_A = problem([lora(i, 3, 40, 4, 30) for i in range(3)])
    weights = torch.ones(3, 3, dtype=F64)
    ours, reference = (align_lora(G_B, G_A, weights, steps=40, solver=s) for s in ("amsgrad", "geoopt"))
    torch.testing.assert_close(ours[0], reference[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours[1], reference[1], rtol=1e-6, atol=1e-8)
    solvers = "amsgrad", "geoopt"
    ours, reference = (align_lora(G_B, G_A, weights, steps=500, solver=s)[2].end for s in solvers)
    torch.testing.assert_close(ours, reference, rtol=1e-2, atol=0)


def test_early_stop_loses_little():
    G_B, G_A = problem([lora(i, 4, 40, 4, 30) for i in range(3)])
    weights = torch.ones(3, 4, dtype=F64)
    full, early = (align_lora(G_B, G_A, weights, tolerance=t)[2] for t in (0, 1e-3))
    assert early.steps.max() < full.steps.min() == 2000
    assert early.end.sum() < 1.02 * full.end.sum()


def test_float32_follows_float64():
    G_B, G_A = problem([lora(i, 4, 40, 4, 30) for i in range(3)])
    weights = torch.ones(3, 4)
    exact = align_lora(G_B, G_A, weights, steps=500)[2]
    rough = align_lora(G_B.float(), G_A.float(), weights, steps=500)[2]
    torch.testing.assert_close(rough.end.double(), exact.end, rtol=1e-2, atol=0)
    assert rough.orthogonality.max() < 1e-5


def test_a_loss_that_is_not_finite_names_its_problem():
    G_B, G_A = problem([lora(i, 2, 12, 3, 10) for i in range(3)])
    G_B[1, 0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="problem 1"):
        align_lora(G_B, G_A, torch.ones(3, 2, dtype=F64), steps=5)
