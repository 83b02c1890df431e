import torch

from mergekit_tspa.alignment import pairwise
from mergekit_tspa.alignment.attention import side_grams
from mergekit_tspa.alignment.pairwise import align_pairwise
from tests.alignment.test_attention import F64, base, sides


def adapted(side, inner):
    W, outer, _ = side
    return W + outer[:, None, None] @ inner  # (n, G, m, p, d)


def dense_loss(sides, R):
    """sum_{i<j} of both sides; R (n, G, d, d)."""
    total = 0
    for side in sides:
        X = adapted(side, side[2]) @ R[:, :, None]
        total = total + sum((X[i] - X[j]).square().sum() for i in range(len(X)) for j in range(i))
    return total


def test_loss_and_gradient_are_the_dense_ones():
    layer = sides("qk")
    N = sum(pairwise._cross_grams(side_grams(*side)) for side in layer)[None]
    objective, _ = pairwise._objective(N)
    R = torch.linalg.qr(base(3, 1, 2, 3, 6, 6))[0].contiguous()
    loss, gradient, _ = objective(R, torch.zeros(1, 3, dtype=F64))
    variable = R[0].transpose(0, 1).clone().requires_grad_()
    dense = dense_loss(layer, variable)
    torch.testing.assert_close(loss[0], dense.detach(), rtol=1e-9, atol=0)
    riemannian = torch.autograd.grad(dense, variable)[0].transpose(0, 1) - gradient[0]
    # they differ by the constant norms' gradient, symmetric at R: zero on the tangent space
    skew = riemannian @ R[0].mT
    torch.testing.assert_close(skew, skew.mT)


def test_two_adapters_reach_procrustes():
    layer = sides("qk", n=2)
    solution = align_pairwise([side_grams(*layer[0])], [side_grams(*layer[1])], steps=400, lr=0.02)[2]
    X, Y = (adapted(side, side[2]) for side in layer)
    N = sum((Z[1].mT @ Z[0]).sum(1) for Z in (X, Y))  # (G, d, d)
    U, _, Vh = torch.linalg.svd(N)
    best = dense_loss(layer, torch.stack([(U @ Vh).mT, torch.eye(6, dtype=F64).expand(2, 6, 6)]))
    assert best - 1e-9 <= solution.end[0] <= 1.01 * best < solution.start[0]


def test_factors_come_back_rotated():
    layers = [sides("vo", seed=s) for s in (0, 20)]
    x, y = ([side_grams(*layer[i]) for layer in layers] for i in (0, 1))
    S_X, S_Y, solution = align_pairwise(x, y, steps=30)
    assert (solution.end < solution.start).all()
    torch.testing.assert_close(S_X[1] @ S_Y[1].mT, x[1].inner @ y[1].inner.mT)
    geoopt = align_pairwise(x, y, steps=30, solver="geoopt")[0]
    torch.testing.assert_close(S_X, geoopt, rtol=1e-6, atol=1e-8)
