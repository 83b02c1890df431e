"""The share of inputs that an adapter does not see."""

import pytest
import torch

from mergekit_tspa.rules.nsc import unseen_ratio
from tests.rules.cases import CASES, ELEMENTWISE, LAYERS, drawer, factors, of_tasks, published


@pytest.mark.parametrize("case", CASES)
def test_equals_published_output(case):
    tensors = published(f"nsc_ratio.{case}")
    ratios = []
    for layer in LAYERS:
        _, A = factors(case, layer)
        for t, X in enumerate(of_tasks(tensors, layer, "X")):
            ratios.append(unseen_ratio(A[t], X))
            want = tensors[f"out.{layer}.ratio{t}"].item()
            assert ratios[-1].item() == pytest.approx(want, rel=ELEMENTWISE)
    assert torch.stack(ratios).mean().item() == pytest.approx(tensors["out.loss"].item(), rel=ELEMENTWISE)


def test_equals_the_formula():
    A, X = drawer(0)(3, 12), drawer(1)(20, 12)
    Y = X @ A.mT
    seen = (Y @ torch.linalg.inv(A @ A.mT) * Y).sum(1) / X.square().sum(1)
    torch.testing.assert_close(unseen_ratio(A, X), (1 - seen).sqrt().mean())


def test_bounds_and_small_ratios():
    normal = drawer(0)
    A, X = normal(3, 12), normal(20, 12)
    inside, outside = normal(20, 3) @ A, X - X @ torch.linalg.pinv(A) @ A
    assert unseen_ratio(A, inside) < 1e-14
    torch.testing.assert_close(unseen_ratio(A, outside), torch.ones(()).double())
    sizes = outside.norm(dim=1, keepdim=True) / inside.norm(dim=1, keepdim=True)
    for small in (1e-3, 1e-9):
        got = unseen_ratio(A, sizes * inside + small * outside)
        assert got.item() == pytest.approx(small, rel=1e-4)


def test_depends_on_the_span_of_the_rows_alone():
    normal = drawer(0)
    A, X = normal(3, 12), normal(20, 12)
    ratio = unseen_ratio(A, X)
    torch.testing.assert_close(unseen_ratio(normal(3, 3) @ A, X), ratio)
    torch.testing.assert_close(unseen_ratio(normal(5, 3) @ A, X), ratio)  # five rows of rank three
    torch.testing.assert_close(unseen_ratio(A, 1e-6 * X), ratio)
    assert unseen_ratio(normal(14, 12), X) < 1e-12


def test_inputs_and_factors_of_zero():
    A, X = drawer(0)(3, 12), drawer(1)(20, 12)
    half = torch.cat([X, torch.zeros_like(X)])
    torch.testing.assert_close(unseen_ratio(A, half), (unseen_ratio(A, X) + 1) / 2)
    assert unseen_ratio(0 * A, X) == 1
