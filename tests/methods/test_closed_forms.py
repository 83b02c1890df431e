"""Task arithmetic and the factor sum against published outputs and against their own definitions."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_tspa import METHODS, InputError, LoraFactors, merge_adapters
from mergekit_tspa.methods.factor_linear import factor_linear
from mergekit_tspa.methods.task_arithmetic import task_arithmetic
from tests.conftest import FIXTURES, relative_error


def published(name: str):
    """Inputs and outputs of a reference file: `{layer: [factors]}`, `{layer: delta}`, and the weights."""
    case = name.split(".")[-1]
    inputs = load_file(FIXTURES / f"inputs.{case}.safetensors")
    file = FIXTURES / f"{name}.safetensors"
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    scales = config.get("scaling", 1.0)
    factors = {
        layer: [
            LoraFactors(inputs[f"in.{layer}.{t}.B"], inputs[f"in.{layer}.{t}.A"]).scaled(
                scales[t] if isinstance(scales, list) else scales
            )
            for t in range(4)
        ]
        for layer in ("l0", "l1")
    }
    outputs = load_file(file)
    return factors, {layer: outputs[f"out.{layer}.delta"] for layer in factors}, config.get("weights", [1.0] * 4)


@pytest.mark.parametrize(
    "name, rule",
    [
        ("peft_linear.hom8", factor_linear),
        ("peft_linear_negw.hom8", factor_linear),
        ("peft_cat.het", task_arithmetic),
        ("peft_cat_negw.hom8", task_arithmetic),
    ],
)
def test_equals_published_output(name, rule):
    factors, deltas, weights = published(name)
    for layer, delta in deltas.items():
        assert relative_error(rule(factors[layer], weights).dense(), delta) < 1e-5


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
    torch.testing.assert_close(task_arithmetic(moved, [1.0, 0.5]).dense(), task_arithmetic(factors, [1.0, 0.5]).dense())


def test_factor_sum_pads_smaller_ranks():
    factors = random_factors([2, 4])
    merged = factor_linear(factors, [1.0, 1.0])
    assert merged.rank == 4
    B = factors[1].B.clone()
    B[:, :2] += factors[0].B
    torch.testing.assert_close(merged.B, B)


UNPRUNED = {"density": 1.0, "lambda": 1.0}
WHOLE = {"robustmerge": UNPRUNED, "robustmerge_code": UNPRUNED}  # nothing of the adapter is taken away


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_comes_back_as_itself(method):
    (f,) = random_factors([3])
    update = merge_adapters(method, [{"m": (f.B, f.A)}], **WHOLE.get(method, {}))["m"]
    assert relative_error(update.dense(), f.dense()) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_lambda_weight_and_order(method):
    ranks = [3, 3, 3 if method == "robustmerge_code" else 2]
    f, g, h = ({"m": (x.B, x.A), "n": (x.B, x.A)} for x in random_factors(ranks))
    h = {"m": h["m"]}
    merge = lambda adapters, weights, **p: merge_adapters(method, adapters, weights, **p)  # noqa: E731
    full = merge([f, g, h], [1.0, 0.5, 0.7], lambda_=1.0)
    assert set(full) == {"m", "n"}
    half = merge([f, g, h], [1.0, 0.5, 0.7], lambda_=0.5)
    turned = merge([h, f, g], [0.7, 1.0, 0.5], lambda_=1.0)
    for module in full:
        assert relative_error(half[module].dense(), 0.5 * full[module].dense()) < 1e-5
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
        (lambda: merge_adapters("lora_task_arithmetic", []), "0 adapters"),
        (lambda: merge_adapters("lora_task_arithmetic", [f, other]), "different shapes"),
        (lambda: merge_adapters("lora_task_arithmetic", ["./nowhere"]), "no such adapter directory"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
