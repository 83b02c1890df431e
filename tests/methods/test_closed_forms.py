"""Task arithmetic and the factor sum, and what every method has in common."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_tspa import METHODS, InputError, LoraFactors, merge_adapters
from mergekit_tspa.methods.factor_linear import factor_linear
from mergekit_tspa.methods.task_arithmetic import task_arithmetic
from tests.conftest import relative_error


def random_factors(ranks, seed=0, d_out=12, d_in=10):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [LoraFactors(draw(d_out, r), draw(r, d_in)) for r in ranks]


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_task_arithmetic_is_the_weighted_sum(ranks, seed, data):
    factors = random_factors(ranks, seed)
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=len(ranks), max_size=len(ranks)))
    merged = task_arithmetic(factors, weights)
    assert merged.rank == sum(ranks)
    torch.testing.assert_close(merged.dense(), sum(a * f.dense() for a, f in zip(weights, factors)))


def test_task_arithmetic_is_gauge_free():
    factors = random_factors([3, 2])
    G = random_factors([3], seed=5, d_out=3, d_in=3)[0].dense() + torch.eye(3)
    moved = [LoraFactors(factors[0].B @ G, torch.linalg.inv(G) @ factors[0].A), factors[1]]
    torch.testing.assert_close(
        task_arithmetic(moved, [1.0, 0.5]).dense(), task_arithmetic(factors, [1.0, 0.5]).dense()
    )


def test_factor_sum_pads_smaller_ranks():
    factors = random_factors([2, 4])
    merged = factor_linear(factors, [1.0, 1.0])
    assert merged.rank == 4
    B = factors[1].B.clone()
    B[:, :2] += factors[0].B
    torch.testing.assert_close(merged.B, B)


# Settings with which a method leaves a single adapter as it is; None where it does not by its nature.
KEEPS_ALL = {
    "ties": {"density": 1.0},
    "magnitude_prune": {"density": 1.0},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "della": None,
    "breadcrumbs": {"density": 1.0, "gamma": 0.0},
    "iso": None,
    "pcb": None,
    "dc_merge": {"smoothing": "none"},
    "robustmerge": {"density": 1.0, "lambda": 1.0},
    "robustmerge_code": {"density": 1.0, "lambda": 1.0},
}


def rule_of(method: str) -> str:
    return method if method in KEEPS_ALL else method.split("_", 1)[-1]


# Methods that need nothing but the factors; those that look at texts are in test_texts.py.
FROM_FACTORS = [name for name, method in METHODS.items() if not method.guided]


@pytest.mark.parametrize("method", [m for m in FROM_FACTORS if KEEPS_ALL.get(rule_of(m), {}) is not None])
def test_one_adapter_comes_back_as_itself(method):
    (f,) = random_factors([3])
    update = merge_adapters(method, [{"m": (f.B, f.A)}], **KEEPS_ALL.get(rule_of(method), {}))["m"]
    assert relative_error(update.dense(), f.dense()) < 1e-5


DETERMINISTIC = [m for m in FROM_FACTORS if "dare" not in m and "della" not in m]


@pytest.mark.parametrize("method", [m for m in FROM_FACTORS if not METHODS[m].equal_ranks])
def test_lambda_weight_and_order(method):
    f, g, h = ({"m": (x.B, x.A), "n": (x.B, x.A)} for x in random_factors([3, 3, 2]))
    h = {"m": h["m"]}
    merge = lambda adapters, weights, **p: merge_adapters(method, adapters, weights, **p)  # noqa: E731
    full = merge([f, g, h], [1.0, 0.5, 0.7], lambda_=1.0)
    assert set(full) == {"m", "n"}
    half = merge([f, g, h], [1.0, 0.5, 0.7], lambda_=0.5)
    for module in full:
        assert relative_error(half[module].dense(), 0.5 * full[module].dense()) < 1e-5
    if method not in DETERMINISTIC:
        return  # draws depend on the adapters' names, here their places
    turned = merge([h, f, g], [0.7, 1.0, 0.5], lambda_=1.0)
    for module in full:
        assert relative_error(turned[module].dense(), full[module].dense()) < 1e-3
    absent = merge([f, g], [1.0, 0.5])
    zero = merge([f, g, h], [1.0, 0.5, 0.0])
    assert relative_error(zero["m"].dense(), absent["m"].dense()) < 1e-5


def test_bad_calls():
    f = {"m": (torch.randn(4, 2), torch.randn(2, 3))}
    other = {"m": (torch.randn(5, 2), torch.randn(2, 3))}
    for call, message in [
        (lambda: merge_adapters("tspa_lore", [f]), "no method 'tspa_lore'"),
        (lambda: merge_adapters("tspa_lora", [f], lora_step=3), "did you mean lora_steps"),
        (lambda: merge_adapters("tspa_lora", [f], lora_steps=-3), "lora_steps: -3"),
        (lambda: merge_adapters("tspa_lora", [f], weights=[-1]), "of at least 0"),
        (lambda: merge_adapters("lora_task_arithmetic", [f], weights=[float("nan")]), "finite weights"),
        (lambda: merge_adapters("lora_task_arithmetic", [f], weights=[1, 2]), "one weight per adapter"),
        (lambda: merge_adapters("lora_task_arithmetic", []), "no adapters to merge"),
        (lambda: merge_adapters("lora_task_arithmetic", [f, other]), "different shapes"),
        (lambda: merge_adapters("lora_task_arithmetic", ["./nowhere"]), "no such adapter directory"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("method", [m for m in FROM_FACTORS if not m.startswith("tspa")])
def test_weight_does_what_the_table_says(method):
    """Of a single adapter: a linear weight scales what it brings, a share of a mean has no effect."""
    f = {"m": random_factors([3])[0]}
    once, twice = (merge_adapters(method, [f], [a])["m"].dense() for a in (1.0, 2.0))
    linear = METHODS[method].weight == "linear" or method == "factor_ties"  # whose convention is PEFT's
    assert relative_error(twice, 2 * once if linear else once) < 1e-5
    if "normalize" in METHODS[method].parameter_fields():
        once, twice = (merge_adapters(method, [f], [a], normalize=False)["m"].dense() for a in (1.0, 2.0))
        assert relative_error(twice, 2 * once) < 1e-5


def split_otherwise(factors):
    """The same updates; the first one's factors are `B G` and `G^-1 A`."""
    f, *others = factors
    G = torch.randn(f.rank, f.rank, generator=torch.Generator().manual_seed(3)).to(f.B) + 3 * torch.eye(
        f.rank
    )
    return [LoraFactors(f.B @ G, torch.linalg.inv(G) @ f.A), *others]


@pytest.mark.parametrize("method", [m for m in DETERMINISTIC if not m.startswith("tspa") or m == "tspa_lora"])
def test_results_depend_on_the_split_where_the_table_says_so(method):
    factors = random_factors([3, 3, 3])
    told = METHODS[method].split

    def change(**parameters):
        """By how much the result changes when the first adapter is split otherwise."""
        before, after = (
            merge_adapters(method, [{"m": f} for f in given], **parameters)["m"].dense()
            for given in (factors, split_otherwise(factors))
        )
        return relative_error(after, before)

    if method != "lora_lego":  # test_lora_lego has it in float64, where rounding decides nothing
        assert change() > 1e-3 if told.startswith("yes") else change() < 1e-4
    if "balance" in told:
        assert change(balance=True) < 1e-4
    if "gauge" in told:
        assert change(gauge="raw") > 1e-3
