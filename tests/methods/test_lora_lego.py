"""LoRA-LEGO against a published re-implementation, its exact limit, and the two gauges."""

import pytest
import torch
from safetensors.torch import load_file

from mergekit_tspa import InputError, LoraFactors, merge_adapters
from mergekit_tspa.methods.lora_lego import k_means, lora_lego
from tests.conftest import FIXTURES, relative_error
from tests.methods.test_closed_forms import random_factors
from tests.methods.test_published import published_deltas


def merge(factors, weights=None, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    return lora_lego(factors, weights or [1.0] * len(factors), generator=generator, **options)


@pytest.mark.parametrize("name, clusters", [("Kr", None), ("K16", 16), ("K32", 32)])
def test_equals_published_output(name, clusters):
    factors, deltas = published_deltas(f"tara_legoperlayer_{name}_seed1.hom8")
    for layer, delta in deltas.items():
        merged = merge(factors[layer], [1.0] * 4, clusters=clusters, gauge="raw")
        assert merged.rank == (clusters or 8)
        assert relative_error(merged.dense(), delta) < 1e-5


@pytest.mark.parametrize("name, clusters", [("Kr", 8), ("K16", 16)])
def test_clusters_are_the_published_ones(name, clusters):
    factors, deltas = published_deltas(f"tara_legoperlayer_{name}_seed1.hom8")
    labels = load_file(FIXTURES / f"tara_legoperlayer_{name}_seed1.hom8.safetensors")
    for layer in deltas:
        halves = [torch.cat([f.A for f in factors[layer]]), torch.cat([f.B.mT for f in factors[layer]])]
        features = torch.cat([half / half.norm(dim=1, keepdim=True) for half in halves], dim=1)
        start = torch.randperm(32, generator=torch.Generator().manual_seed(1))[:clusters]
        assert torch.equal(k_means(features, start), labels[f"aux.{layer}.labels"])


def test_k_means_finds_separate_groups_and_keeps_an_empty_centre():
    groups = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]], dtype=torch.float64)
    assert k_means(groups, torch.tensor([0, 1])).tolist() == [0, 0, 1, 1]
    twins = groups[[0, 0, 2]]
    assert k_means(twins, torch.tensor([0, 1, 2])).tolist() == [0, 0, 2]


@pytest.mark.parametrize("gauge", ["balanced", "raw"])
@pytest.mark.parametrize("ranks", [[3, 3], [2, 4, 1]])
def test_a_cluster_per_unit_is_the_scaled_sum(gauge, ranks):
    factors, total = random_factors(ranks), sum(ranks)
    weights = [1.0, -0.5, 2.0][: len(ranks)]
    merged = merge(factors, weights, clusters=total, gauge=gauge)
    want = (max(ranks) / total) ** 0.5 * sum(a * f.dense() for a, f in zip(weights, factors))
    assert merged.rank == total and relative_error(merged.dense(), want) < 1e-12


def test_balanced_units_are_gauge_free_and_raw_ones_are_not():
    f, g = random_factors([3, 2])
    for seed in range(10):
        G = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        moved = LoraFactors(f.B @ G, torch.linalg.inv(G) @ f.A)
        change = {
            gauge: relative_error(merge([moved, g], gauge=gauge).dense(), merge([f, g], gauge=gauge).dense())
            for gauge in ("balanced", "raw")
        }
        assert change["balanced"] < 1e-9 and change["raw"] > 1e-2


def test_balanced_units_are_as_many_as_the_rank_of_the_update():
    f, g = random_factors([2, 2])
    twice = LoraFactors(torch.cat([f.B, f.B / 2], dim=1), torch.cat([f.A, f.A], dim=0))
    assert twice.rank == 4
    assert relative_error(merge([twice, g]).dense(), merge([f.scaled(1.5), g]).dense()) < 1e-10


def test_order_scale_and_seed():
    f, g, h = random_factors([3, 3, 2])
    full = merge([f, g, h])
    assert full.rank <= 3
    assert relative_error(merge([h, f, g]).dense(), full.dense()) < 1e-12
    assert relative_error(merge([x.scaled(1e-6) for x in (f, g, h)]).dense(), 1e-6 * full.dense()) < 1e-10
    assert relative_error(merge([f, g, h], [-1.0] * 3).dense(), -full.dense()) < 1e-12
    assert torch.equal(merge([f, g, h]).B, full.B)
    assert relative_error(merge([f, g, h], seed=2).dense(), full.dense()) > 1e-2


def test_units_that_cancel_leave_nothing():
    """One cluster of a unit and its opposite: their mean is rounding noise, not to be blown up to their size."""
    (f,) = random_factors([1])
    opposite = LoraFactors(-f.B * (1 + 1e-15), -f.A * (1 + 1e-15))
    merged = merge([f, opposite], clusters=1, gauge="raw")
    assert torch.isfinite(merged.dense()).all() and merged.dense().norm() < 1e-9 * f.dense().norm()


def test_untrained_adapters_have_no_units():
    f, g = random_factors([3, 2])
    untrained = LoraFactors(torch.zeros_like(f.B), f.A)
    for gauge in ("balanced", "raw"):
        assert (
            relative_error(merge([f, untrained, g], gauge=gauge).dense(), merge([f, g], gauge=gauge).dense())
            < 1e-12
        )
        assert not merge([untrained, untrained], gauge=gauge).dense().any()


def test_a_draw_per_weight_and_no_more_clusters_than_units():
    f, g = random_factors([3, 2])
    adapters = [{"m": (x.B, x.A), "n": (x.B, x.A)} for x in (f, g)]
    updates = merge_adapters("lora_lego", adapters, clusters=2)
    assert relative_error(updates["m"].dense(), updates["n"].dense()) > 1e-2
    assert merge_adapters("lora_lego", [*adapters, {"m": (f.B, f.A)}], clusters=8)["n"].rank == 5
    with pytest.raises(InputError, match="clusters 6: the adapters have 5 rank-one units"):
        merge_adapters("lora_lego", adapters, clusters=6)
