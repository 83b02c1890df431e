"""Rotation matching of LoRA factors: its symmetry, its limits, and the choice of the anchor."""

from itertools import permutations

import torch

from mergekit_tspa import LoraFactors
from mergekit_tspa.methods.factor_linear import factor_linear
from mergekit_tspa.methods.rotation import rotation
from tests.conftest import relative_error
from tests.methods.test_closed_forms import random_factors


def gauge(f, seed):
    """The same update in turned factors."""
    draw = torch.randn(f.rank, f.rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(draw).Q
    return LoraFactors(f.B @ Q, Q.mT @ f.A)


def test_an_orthogonal_gauge_changes_nothing():
    factors = random_factors([3, 3, 3])
    turned = [gauge(f, seed) for seed, f in enumerate(factors)]
    weights = [1.0, -0.5, 0.7]
    plain = factor_linear(factors, weights).dense()
    assert relative_error(factor_linear(turned, weights).dense(), plain) > 0.1
    for scale in (False, True):
        merged = rotation(factors, weights, scale=scale).dense()
        assert relative_error(rotation(turned, weights, scale=scale).dense(), merged) < 1e-10
        assert relative_error(merged, plain) > 0.1


def test_scale_undoes_a_split_between_the_factors():
    (f,) = random_factors([3])
    turned = gauge(f, 1)
    split = LoraFactors(3 * turned.B, turned.A / 3)
    assert relative_error(rotation([f, split], [0.5, 0.5], scale=True).dense(), 2 * f.dense()) < 1e-10
    assert relative_error(rotation([f, split], [0.5, 0.5]).dense(), 2 * f.dense()) > 0.1


def test_one_update_in_many_gauges_is_the_sum_of_equal_factors():
    (f,) = random_factors([4])
    merged = rotation([gauge(f, seed) for seed in range(3)], [1 / 3] * 3)
    assert relative_error(merged.dense(), 3 * f.dense()) < 1e-10


def test_anchor_is_nearest_to_the_mean():
    """Written out with the anchor found densely, in both orders."""
    factors = random_factors([3, 3, 3, 3], seed=4)
    mean = sum(f.dense() for f in factors) / 4
    anchor = min(factors, key=lambda f: (f.dense() - mean).norm())
    assert anchor is not factors[0]
    turned = []
    for f in factors:
        U, _, Vh = torch.linalg.svd(f.B.mT @ anchor.B + f.A @ anchor.A.mT)
        turned.append(LoraFactors(f.B @ (U @ Vh), (U @ Vh).mT @ f.A))
    want = factor_linear(turned, [1.0, 0.5, -0.7, 0.3]).dense()
    assert relative_error(rotation(factors, [1.0, 0.5, -0.7, 0.3]).dense(), want) < 1e-10
    assert relative_error(rotation(factors[::-1], [0.3, -0.7, 0.5, 1.0]).dense(), want) < 1e-10


def test_order_of_two():
    """Both are equally far from their mean; either may be the anchor."""
    for ranks in ([3, 3], [2, 4]):
        f, g = random_factors(ranks)
        merged = rotation([f, g], [1.0, 0.5])
        assert merged.rank == max(ranks)
        assert relative_error(rotation([g, f], [0.5, 1.0]).dense(), merged.dense()) < 1e-10


def test_order_of_equally_near_ones():
    """`m + e` and `m - e` are equally near to the mean m, which itself is no adapter."""
    m, e = (LoraFactors(x.B.round(), x.A.round()) for x in random_factors([2, 2]))
    factors = [
        LoraFactors(torch.cat([m.B, s * e.B], 1), torch.cat([m.A, e.A])) for s in (2.0, 1.0, -1.0, -2.0)
    ]
    merged = [rotation(order, [1.0] * 4).dense() for order in permutations(factors)]
    assert all(relative_error(other, merged[0]) < 1e-10 for other in merged)


def test_adapters_without_an_update_change_nothing():
    f, g = random_factors([3, 3])
    untrained = LoraFactors(torch.zeros_like(f.B), f.A)
    assert (
        relative_error(rotation([untrained, f, g], [1.0] * 3).dense(), rotation([f, g], [1.0] * 2).dense())
        < 1e-12
    )
    assert not rotation([untrained, untrained], [1.0] * 2).dense().any()
