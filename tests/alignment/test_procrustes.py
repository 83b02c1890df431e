"""Rotation matching against the published head matching, and against what defines it."""

import pytest
import torch
from safetensors.torch import load_file

from mergekit_tspa.alignment.procrustes import best_scale, match, procrustes
from tests.conftest import FIXTURES, relative_error


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scaling", [0, 1])
@pytest.mark.parametrize("case", ["other", "rotated", "rotscaled"])
def test_heads_equal_published_output(case, scaling):
    """Four heads of 8: query and key with their biases as a last column, value alike with the transposed output."""
    tensors = load_file(FIXTURES / f"rotation_{case}_scaling{scaling}.safetensors")

    def rows(side, letter):
        weight, bias = (tensors[f"{side}.{kind}_{letter}"] for kind in "WB")
        joined = weight.T if letter == "O" else torch.cat([weight, bias[:, None]], dim=1)
        return joined.unflatten(0, (4, 8)).double()

    for x, y in ("QK", "VO"):
        sides = [rows(side, letter) for side in ("in.local", "in.anchor") for letter in (x, y)]
        X, Y = match(*sides, scale=bool(scaling))
        assert relative_error(X, rows("out", x)) < 1e-5
        assert relative_error(Y, rows("out", y)) < 1e-5
        torch.testing.assert_close(X.mT @ Y, sides[0].mT @ sides[1])


def test_rotated_heads_are_recovered():
    X, Y, R = draw(5, 3, 7), draw(5, 3, 4, seed=1), torch.linalg.qr(draw(5, 3, 3, seed=2)).Q
    torch.testing.assert_close(procrustes(R @ X, X), R.mT)
    back = match(1.7 * R @ X, R @ Y / 1.7, X, Y, scale=True)
    torch.testing.assert_close(back, (X, Y))
    turned = match(1.7 * R @ X, R @ Y / 1.7, X, Y)
    assert relative_error(turned[0], X) > 0.1


def test_no_rotation_is_nearer():
    X, Y = draw(3, 6), draw(3, 6, seed=1)
    R = procrustes(X, Y)
    torch.testing.assert_close(R.mT @ R, torch.eye(3, dtype=R.dtype))
    best = (R @ X - Y).norm()
    for seed in range(20):
        other = torch.linalg.qr(draw(3, 3, seed=seed)).Q
        assert (other @ X - Y).norm() > best
        near = torch.linalg.matrix_exp(0.05 * (other - other.mT))
        assert (near @ R @ X - Y).norm() > best


def test_no_scale_is_better():
    X, Y, X_0, Y_0 = draw(50, 3, 6), draw(50, 3, 4, seed=1), draw(50, 3, 6, seed=2), draw(50, 3, 4, seed=3)
    Y = Y * torch.linspace(0.1, 10, 50)[:, None, None]

    def cost(k):
        k = k[..., None, None]
        return (k * X - X_0).square().sum((-2, -1)) + (Y / k - Y_0).square().sum((-2, -1))

    best = best_scale(X, Y, X_0, Y_0)
    assert (best > 0).all()
    for k in torch.linspace(-3, 3, 400, dtype=torch.float64).exp():
        assert (cost(best) <= cost(k.expand(50)) * (1 + 1e-9)).all()


def test_directions_that_are_not_shared_stay():
    X, Y = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    X[0, 0], X[1, 1], Y[0, 2], Y[1, 3] = 1, 2, 3, 4  # orthogonal: no rotation is better than another
    torch.testing.assert_close(procrustes(X, Y), torch.eye(2, dtype=X.dtype))
    torch.testing.assert_close(procrustes(0 * X, Y), torch.eye(2, dtype=X.dtype))
    # the same but for rounding, which must not decide
    Q = torch.linalg.qr(draw(4, 4)).Q
    torch.testing.assert_close(procrustes(X @ Q, Y @ Q), torch.eye(2, dtype=X.dtype), rtol=0, atol=1e-3)
    # b = c = 0: the roots are k, -k, ik and -ik
    torch.testing.assert_close(best_scale(X, Y, Y, X), (Y.norm() / X.norm()).sqrt())
    assert best_scale(0 * X, Y, X, Y) == 1 and best_scale(X, 0 * Y, X, Y) == 1
