"""Pico and SVC against dense evaluations, and how methods apply them."""

import pytest
import torch

from mergekit_tspa import LoraFactors, merge_adapters
from mergekit_tspa.methods.pico import at_mean_norm, pico
from mergekit_tspa.methods.svc import svc
from mergekit_tspa.methods.task_arithmetic import task_arithmetic
from mergekit_tspa.updates import LowRank
from tests.conftest import relative_error
from tests.methods.test_closed_forms import random_factors


def apart(ranks, seed=0):
    """Adapters in orthogonal rows and columns of one weight."""
    factors = random_factors(ranks, seed, d_out=20, d_in=17)
    B = torch.linalg.qr(torch.cat([f.B for f in factors], dim=1)).Q.split(ranks, dim=1)
    A = torch.linalg.qr(torch.cat([f.A.mT for f in factors], dim=1)).Q.split(ranks, dim=1)
    scales = [torch.arange(1.0, r + 1, dtype=torch.float64) + seed for r in ranks]
    return [LoraFactors(b * s, a.mT) for b, a, s in zip(B, A, scales)]


def total(factors):
    return LowRank(*task_arithmetic(factors, [1.0] * len(factors)))


def dense_svc(D, adapters, floor):
    """Column by column, as the formula reads."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    S = S.clone()
    for j in range(int((S > 1e-10 * S[0]).sum())):
        shares = []
        for D_t in adapters:
            response = U[:, j] @ D_t
            shares.append(max(((U[:, j] @ D) @ response / response.square().sum()).item(), floor))
        S[j] /= sum(shares) / len(shares)
    return U @ torch.diag(S) @ Vh


@pytest.mark.parametrize("floor", [1.0, 1 / 3, 0.01])
@pytest.mark.parametrize("d_out, d_in, ranks", [(20, 17, [3, 3, 2]), (4, 5, [2, 3, 4])])
def test_svc_equals_the_dense_formula(floor, d_out, d_in, ranks):
    factors = random_factors(ranks, d_out=d_out, d_in=d_in)
    merged = total(factors)
    calibrated = svc(merged, factors, floor)
    assert calibrated.rank == min(merged.rank, d_out, d_in)
    want = dense_svc(merged.dense(), [f.dense() for f in factors], floor)
    assert relative_error(calibrated.dense(), want) < 1e-9
    assert relative_error(want, merged.dense()) > 1e-2


def test_svc_leaves_orthogonal_adapters_and_merges_equal_ones():
    factors = apart([3, 2, 4])
    assert relative_error(svc(total(factors), factors).dense(), total(factors).dense()) < 1e-12
    (f,) = random_factors([3])
    assert relative_error(svc(total([f] * 4), [f] * 4).dense(), f.dense()) < 1e-12
    assert relative_error(svc(LowRank(*f), [f]).dense(), f.dense()) < 1e-12


def test_svc_does_not_depend_on_scale_where_the_floor_does_not_bind():
    factors = random_factors([3, 3, 2])
    merged = total(factors)
    free = svc(merged, factors, floor=1e-9)
    shrunk = svc(merged.scaled(0.5), factors, floor=0.5e-9)
    assert relative_error(shrunk.dense(), free.dense()) < 1e-12


def test_svc_ignores_adapters_without_an_update():
    factors = random_factors([3, 2])
    untrained = LoraFactors(torch.zeros_like(factors[0].B), factors[0].A)
    want = svc(total(factors), factors).dense()
    assert relative_error(svc(total(factors), [*factors, untrained]).dense(), want) < 1e-12
    zero = LowRank(*untrained)
    assert not svc(zero, [untrained]).dense().any()


def test_svc_of_adapters_that_cancel():
    (f,) = random_factors([3])
    opposite = LoraFactors(-f.B, f.A)
    assert svc(total([f, opposite]), [f, opposite]).dense().norm() < 1e-12 * f.dense().norm()


@pytest.mark.parametrize("d_out, ranks", [(20, [3, 3, 2]), (4, [2, 3, 4])])
def test_pico_equals_the_dense_formula(d_out, ranks):
    factors = random_factors(ranks, d_out=d_out)
    U, S, _ = torch.linalg.svd(torch.cat([f.B for f in factors], dim=1))
    c = torch.zeros(d_out, dtype=torch.float64)
    c[: len(S)] = S.square() / S.square().sum()
    alpha = 1 / (1 + (len(factors) - 1) * c)
    for before, after in zip(factors, pico(factors)):
        torch.testing.assert_close(after.B, U @ torch.diag(alpha) @ U.mT @ before.B)
        assert torch.equal(after.A, before.A)


def test_pico_of_one_adapter_or_of_none_that_does_anything():
    f, g = random_factors([3, 2])
    torch.testing.assert_close(pico([f])[0].B, f.B)
    untrained = LoraFactors(torch.zeros_like(f.B), f.A)
    torch.testing.assert_close(pico([f, untrained, g])[2].B, pico([f, g])[1].B)
    assert not pico([untrained])[0].B.any()


def test_at_mean_norm():
    f, g = random_factors([3, 2])
    merged = at_mean_norm(task_arithmetic([f, g], [1.0, 1.0]), [f, g])
    torch.testing.assert_close(merged.norm(), (f.dense().norm() + g.dense().norm()) / 2)
    opposite = LoraFactors(-f.B, f.A)
    assert at_mean_norm(task_arithmetic([f, opposite], [1.0, 1.0]), [f, opposite]).dense().norm() < 1e-12


def test_methods_apply_both():
    """Pico, the rule, the mean norm of the weighted adapters, SVC with the weighted adapters, lambda."""
    weights = [1.0, -0.5, 0.7]
    factors = random_factors([3, 3, 2])
    adapters = [{"m": (f.B, f.A)} for f in factors]
    weighted = [f.scaled(a) for f, a in zip(factors, weights)]
    update = LowRank(*task_arithmetic(pico(factors), weights))
    scaled = update.dense() * sum(f.dense().norm() for f in weighted) / 3 / update.dense().norm()
    calibrated = dense_svc(scaled, [f.dense() for f in weighted], 1.0)

    merge = lambda **p: merge_adapters("lora_task_arithmetic", adapters, weights, **p)["m"].dense()  # noqa: E731
    assert relative_error(merge(pico=True), scaled) < 1e-5
    assert relative_error(merge(pico=True, svc=True, lambda_=0.5), 0.5 * calibrated) < 1e-4
    exact = task_arithmetic(factors, weights).dense()
    assert relative_error(merge(svc=True), dense_svc(exact, [f.dense() for f in weighted], 1.0)) < 1e-4
    assert relative_error(merge(), exact) < 1e-5
    assert relative_error(merge(pico=True), exact) > 1e-2 and relative_error(merge(svc=True), exact) > 1e-2
