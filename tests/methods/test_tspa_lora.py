"""Stage 2 of TSPA: the Gram objective against a dense evaluation, its identities, and its bound."""

import torch

from mergekit_tspa import LoraFactors, merge_adapters
from mergekit_tspa.methods import METHODS
from mergekit_tspa.methods.factor_linear import factor_linear
from mergekit_tspa.methods.inputs import TensorInputs
from mergekit_tspa.methods.tspa import sum_aligned
from mergekit_tspa.spaces.factor import encode
from tests.conftest import relative_error
from tests.methods.test_closed_forms import random_factors

ROW = METHODS["tspa_lora"]


def solve(inputs):
    return ROW.merge(inputs, (), lambda stage, done, left: None).updates


def merge(factors, weights=None, **parameters):
    (update,) = solve([TensorInputs("w", factors, weights or [1.0] * len(factors), ROW.bind(parameters))])
    return update


def loss(update, factors) -> float:
    """Distance to the mean of the adapters' updates, evaluated densely."""
    mean = sum(f.dense() for f in factors) / len(factors)
    return (update.dense() - mean).norm().item() ** 2


def test_between_the_factor_sum_and_the_svd_bound():
    factors = random_factors([4, 4, 4], d_out=24, d_in=20)
    mean = sum(f.dense() for f in factors) / 3
    bound = torch.linalg.svdvals(mean)[4:].square().sum().item()
    start = loss(factor_linear(factors, [1.0] * 3), factors)
    end = loss(merge(factors, lora_steps=1000), factors)
    assert bound <= end * (1 + 1e-9)
    assert end < 0.5 * start


def test_no_steps_is_the_factor_sum():
    factors = random_factors([4, 2])
    update = merge(factors, lora_steps=0)
    assert update.rank == 4
    assert relative_error(update.dense(), factor_linear(factors, [1.0, 1.0]).dense()) < 1e-12


def test_rotations_undo_an_orthogonal_gauge():
    """`(B Q, Q^T A)` with rotation `Q^T R` is `(B, A)` with rotation `R`: both gauges have the same optimum."""
    B, A = encode(random_factors([3, 3]))
    Q, R = (torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64)).Q for _ in range(2))
    a, s = B.new_tensor([1.0, 0.5]), B.new_tensor([1.1, 0.9])
    torch.testing.assert_close(sum_aligned(B @ Q, Q.mT @ A, a, Q.mT @ R, s), sum_aligned(B, A, a, R, s))


def test_weights_of_equal_shape_do_not_disturb_each_other():
    """A batch gives what each weight gives alone."""
    one, two = random_factors([3, 3], seed=1), random_factors([3, 3], seed=2)
    two = [LoraFactors(100 * f.B, f.A) for f in two]
    parameters = ROW.bind({"lora_steps": 200})
    inputs = [TensorInputs(str(i), f, [1.0, 1.0], parameters) for i, f in enumerate((one, two))]
    for batched, factors in zip(solve(inputs), (one, two)):
        assert relative_error(batched.dense(), merge(factors, lora_steps=200).dense()) < 1e-9


def test_mixed_ranks_modules_and_parameters_come_back_in_order():
    f, g = random_factors([4, 2])
    small, big = ROW.bind({"lora_steps": 10}), ROW.bind({"lora_steps": 300})
    inputs = [
        TensorInputs("a", [f, g], [1.0, 1.0], big),
        TensorInputs("b", [g], [1.0], small),
        TensorInputs("c", [f, g], [1.0, 0.5], small),
    ]
    a, b, c = solve(inputs)
    assert loss(a, [f, g]) < loss(merge([f, g], lora_steps=10), [f, g])
    assert relative_error(b.dense(), g.dense()) < 1e-9
    assert relative_error(c.dense(), merge([f, g], [1.0, 0.5], lora_steps=10).dense()) < 1e-9


def test_same_seed_same_bits():
    f, g = ({"m": (x.B, x.A)} for x in random_factors([3, 3]))
    first, second = (merge_adapters("tspa_lora", [f, g], lora_steps=50)["m"] for _ in range(2))
    assert torch.equal(first.B, second.B) and torch.equal(first.A, second.A)
