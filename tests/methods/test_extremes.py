"""Every closed formula on adapters that leave it little to go by: finite, of the right shape and rank."""

import pytest
import torch

from mergekit_tspa import METHODS, LoraFactors
from mergekit_tspa.methods.base import OneByOneParameters, WeightInputs
from tests.conftest import relative_error
from tests.methods.test_closed_forms import WHOLE, random_factors

CLOSED = [name for name, method in METHODS.items() if issubclass(method.parameters, OneByOneParameters)]
VARIANTS = [
    *((name, {}) for name in CLOSED),
    ("lora_lego", {"gauge": "raw"}),
    ("lora_lego", {"clusters": 1}),
    ("rotation", {"scale": True}),
    ("svd_cur", {"k": 0, "select": "leverage"}),
    ("svd_cur", {"combine": "interpolate", "shared": "sum", "select": "norm"}),
]
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
    row = METHODS[method]
    inputs = WeightInputs("w", factors, weights or [1.0] * len(factors), row.bind(parameters))
    (update,) = row.merge([inputs], (), lambda stage, done: None).updates
    return update


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method, options", VARIANTS)
def test_finite(method, options, case):
    factors = CASES[case]
    r, n = factors[0].rank, len(factors)
    bound = {"largest rank": r, "sum of ranks": n * r, "clusters": r, "k + n c": r + n * max(1, r // 2)}
    for modifiers in MODIFIERS:
        update = merge(method, factors, **options, **modifiers)
        assert update.shape == factors[0].shape
        assert update.B.dtype == update.A.dtype == torch.float32
        assert all(torch.isfinite(x).all() for x in update)
        assert 1 <= update.rank <= bound[METHODS[method].output]


@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize("method", CLOSED)
def test_one_adapter_comes_back_by_its_weight(method, modifiers):
    for case in ("one", "rank 1", "narrow", "tiny"):
        only = CASES[case][0]
        update = merge(method, [only], [-0.5], **modifiers, **WHOLE.get(method, {}))
        size = only.norm()
        assert relative_error(update.dense() / size, -0.5 * only.dense() / size) < 1e-5


@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize("method", [name for name in CLOSED if name != "factor_linear"])  # which has cross terms
def test_adapters_without_an_update_add_nothing(method, modifiers):
    options = {"shared": "sum"} if method == "svd_cur" else {}  # a mean counts them
    few = merge(method, [f, g], [1.0, 0.5], **options, **modifiers)
    more = merge(method, [no_B, f, no_A, g], [1.0, 1.0, 1.0, 0.5], **options, **modifiers)
    assert relative_error(more.dense(), few.dense()) < 1e-4
