"""Every closed formula on adapters that leave it little to go by: finite, of the right shape and rank."""

import pytest
import torch

from mergekit_tspa import METHODS, LoraFactors, merge_adapters
from mergekit_tspa.methods.inputs import OneByOneParameters
from tests.conftest import relative_error
from tests.methods.test_closed_forms import KEEPS_ALL, random_factors, rule_of

CLOSED = [name for name, method in METHODS.items() if issubclass(method.parameters, OneByOneParameters)]
VARIANTS = [
    *((name, {}) for name in CLOSED),
    ("lora_lego", {"gauge": "raw"}),
    ("lora_lego", {"clusters": 1}),
    ("rotation", {"scale": True}),
    ("svd_cur", {"k": 0, "select": "leverage"}),
    ("svd_cur", {"combine": "interpolate", "shared": "sum", "select": "norm"}),
]
DIVIDES_BY_WEIGHTS = ("mean", "ties", "dare_ties", "cart")  # one adapter's weight is without effect
MODIFIERS = [{}, {"pico": True}, {"svc": True}, {"pico": True, "svc": True}]


def float32(*args, **kwargs):
    return [f.to(torch.float32) for f in random_factors(*args, **kwargs)]


f, g, h = float32([3, 3, 3])
no_B, no_A = LoraFactors(0 * f.B, f.A), LoraFactors(f.B, 0 * f.A)
CASES = {
    "one": [f],
    "untrained": [f, no_B, g],
    "all untrained": [no_B, no_A],
    "equal": [f, f, f],
    "opposite": [f, LoraFactors(-f.B, f.A)],
    "opposite with another": [f, LoraFactors(f.B, -f.A), g],
    "equal in opposite factors": [f, LoraFactors(-f.B, -f.A)],
    "zero columns and rows": [f._replace(B=f.B * f.B.new_tensor([1, 1, 0])), g._replace(A=g.A.tril(-1))],
    "rank 1": float32([1, 1, 1]),
    "narrow": float32([3, 3, 3], d_out=2, d_in=5),
    "a single row": float32([4, 4], d_out=1, d_in=5),
    "tiny": [x.scaled(1e-20) for x in (f, g, h)],
    "huge": [x.scaled(1e20) for x in (f, g)],
    "of unlike size": [f.scaled(1e-12), g.scaled(1e12)],
}


def merge(method, factors, weights=None, **parameters):
    return merge_adapters(method, [{"w": f} for f in factors], weights, **parameters)["w"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method, options", VARIANTS)
def test_finite(method, options, case):
    factors = CASES[case]
    r, n = factors[0].rank, len(factors)
    bound = {"largest rank": r, "sum of ranks": n * r, "clusters": r, "k + n c": r + n * max(1, r // 2)}
    bound |= {"`rank`": r, "full (dense)": max(factors[0].shape)}
    for modifiers in MODIFIERS:
        if method.endswith("_iso") and "svc" in modifiers:
            continue  # refused: equal singular values leave nothing to calibrate
        update = merge(method, factors, **options, **modifiers)
        assert update.dense().shape == factors[0].shape
        assert all(x.isfinite().all() and x.dtype == torch.float32 for x in update)
        assert 1 <= update.rank <= bound[METHODS[method].result.label]


@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize("method", [m for m in CLOSED if KEEPS_ALL.get(rule_of(m), {}) is not None])
def test_one_adapter_comes_back_by_its_weight(method, modifiers):
    for case in ("one", "rank 1", "narrow", "tiny"):
        only = CASES[case][0]
        weight = 1.0 if rule_of(method) in DIVIDES_BY_WEIGHTS else -0.5
        update = merge(method, [only], [weight], **modifiers, **KEEPS_ALL.get(rule_of(method), {}))
        size = only.norm()
        assert relative_error(update.dense() / size, weight * only.dense() / size) < 1e-5


@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize(
    "method", [n for n in CLOSED if not any(part in n for part in ("dare", "della", "_iso"))]
)
def test_adapters_without_an_update_add_nothing(method, modifiers):
    few = merge(method, [f, g], [1.0, 0.5], **modifiers)
    more = merge(method, [no_B, f, no_A, g], [1.0, 1.0, 1.0, 0.5], **modifiers)
    assert relative_error(more.dense(), few.dense()) < 1e-4
