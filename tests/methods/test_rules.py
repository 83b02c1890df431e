"""The table of rules: every row is a function of its own parameters, and its kind keeps what it promises."""

import inspect
import math

import pytest
import torch

from mergekit_tspa import METHODS, LoraFactors, merge_adapters
from mergekit_tspa.methods.rules import RULES
from mergekit_tspa.rules import stream
from mergekit_tspa.rules.emr import emr, task_scales, unify
from mergekit_tspa.rules.linear import weighted_sum
from mergekit_tspa.rules.rule_kinds import Entrywise, Linear, Spectral
from mergekit_tspa.rules.stream import Products, Stream, merge_rows
from mergekit_tspa.rules.update_statistics import Whole
from tests.conftest import relative_error

ROWS, COLUMNS = 20, 14
WEIGHTS = [1.0, 0.5, -2.0]
LINEAR, SPECTRAL, ENTRYWISE = (
    [rule for rule in RULES if isinstance(rule.kind, kind)] for kind in (Linear, Spectral, Entrywise)
)
# What is neither a sum nor a comparison nor one division of exact numbers rounds as the processor has it.
ROUNDED = {"della", "pcb"}


def by_name(rules):
    return pytest.mark.parametrize("rule", rules, ids=lambda rule: rule.name)


def defaults(rule):
    return rule.own(METHODS[f"lora_{rule.name}"].parameters())


def whole_numbers(largest, seed=0, ranks=(3, 4, 2)):
    """Factors of whole numbers, whose products are exact in float32 in whatever order they are summed."""
    g = torch.Generator().manual_seed(seed)
    entries = lambda *shape: torch.randint(-largest, largest + 1, shape, generator=g).float()  # noqa: E731
    return [LoraFactors(entries(ROWS, r), entries(r, COLUMNS)) for r in ranks]


def matrices(factors):
    return torch.stack([f.dense() for f in factors])


def drawing():
    return [torch.Generator().manual_seed(seed) for seed in range(3)]


def drawn(rule):
    """Draws for whole matrices, where the rule needs them."""
    if not getattr(rule.kind, "random", False):
        return {}
    return {"uniform": torch.stack([torch.rand(ROWS, COLUMNS, generator=g) for g in drawing()])}


@by_name(RULES)
def test_called_with_its_defaults_alone(rule):
    M = matrices(whole_numbers(3))
    merged = rule.kind.merge(M, torch.tensor(WEIGHTS), **defaults(rule), **drawn(rule))
    assert merged.shape == (ROWS, COLUMNS) and merged.isfinite().all() and merged.any()
    assert torch.equal(rule.kind.merge(M, torch.tensor(WEIGHTS), **drawn(rule)), merged)


@by_name(RULES)
def test_parameters_of_a_recipe_are_those_of_the_function(rule):
    given = {"M", "weights", "statistics", "uniform", "room", "triplets"}
    signature = inspect.signature(rule.kind.merge).parameters.values()
    assert {p.name: p.default for p in signature if p.name not in given} == defaults(rule)
    assert inspect.getdoc(rule.kind.merge)


@by_name([rule for rule in RULES if not getattr(rule.kind, "random", False)])
def test_the_method_in_the_full_space_is_the_rule_on_whole_matrices(rule):
    """Whatever way its kind goes: sums of factors, a small basis, blocks of rows."""
    g = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    factors = [LoraFactors(normal(ROWS, r), normal(r, COLUMNS)) for r in (3, 4, 2)]
    merged = merge_adapters(f"lora_{rule.name}", [{"m": f} for f in factors], WEIGHTS)["m"].dense()
    want = rule.kind.merge(matrices(factors), torch.tensor(WEIGHTS), **defaults(rule))
    assert relative_error(merged, want) < 1e-4


@by_name(LINEAR)
def test_linear_rules_are_weighted_sums(rule):
    M, weights = matrices(whole_numbers(3)), torch.tensor(WEIGHTS)
    want = weighted_sum(M, rule.kind.coefficients(weights))
    assert relative_error(rule.kind.merge(M, weights), want) < 1e-6


@by_name(SPECTRAL)
def test_spectral_rules_commute_with_a_change_to_a_small_basis(rule):
    M, weights = matrices(whole_numbers(3)).double(), torch.tensor(WEIGHTS).double()
    U = torch.linalg.svd(torch.cat([*M], dim=1)).U[:, :9]
    V = torch.linalg.svd(torch.cat([*M.mT], dim=1)).U[:, :9]
    small = rule.kind.merge(U.mT @ M @ V, weights, room=COLUMNS, **defaults(rule))
    assert relative_error(U @ small @ V.mT, rule.kind.merge(M, weights, **defaults(rule))) < 1e-9
    assert rule.flat == (torch.linalg.svdvals(small)[:9].std() < 1e-6)


@pytest.mark.parametrize("rows", [1, 3, ROWS])
@pytest.mark.parametrize("largest", [2, 200])
@by_name(ENTRYWISE)
def test_whole_and_streamed_entrywise_rules_agree(rule, largest, rows, monkeypatch):
    """Small numbers leave many entries equal to a threshold, large ones few."""
    factors, own = whole_numbers(largest), defaults(rule)
    M = matrices(factors)
    if rule.name == "della":  # which of equal magnitudes has the higher rank is left open
        M = M + torch.arange(COLUMNS) / 64
        factors = [LoraFactors(m, torch.eye(COLUMNS)) for m in M]
    monkeypatch.setitem(stream.BLOCK, "cpu", rows * COLUMNS)
    products = Products(range(3), factors, WEIGHTS)
    statistics = rule.kind.statistics and rule.kind.statistics(Stream(lambda: [products]), **own)
    generators = drawing() if rule.kind.random else ()
    streamed = merge_rows(rule.kind, factors, WEIGHTS, own, statistics, generators)
    whole = rule.kind.merge(M, torch.tensor(WEIGHTS), **own, **drawn(rule))
    assert streamed.any()
    if rule.name in ROUNDED:
        torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
    else:
        assert torch.equal(streamed, whole)


@by_name([rule for rule in ENTRYWISE if rule.kind.statistics or rule.kind.recorded])
def test_statistics_of_a_stream_are_those_of_the_whole(rule):
    wanted = rule.kind.statistics or rule.kind.recorded
    factors, own = whole_numbers(200), defaults(rule)
    got = wanted(Stream(lambda: [Products(range(3), factors, WEIGHTS)]), **own)
    torch.testing.assert_close(got, wanted(Whole(matrices(factors), torch.tensor(WEIGHTS)), **own))


@by_name([rule for rule in ENTRYWISE if rule.kind.statistics])
def test_statistics_over_two_tensors_are_those_of_the_tensors_side_by_side(rule):
    """Adapters come in another order in the second tensor."""
    first, second = whole_numbers(200), whole_numbers(100, seed=1)
    both = [Products((0, 1, 2), first, WEIGHTS), Products((2, 0, 1), second, WEIGHTS)]
    side_by_side = torch.cat([matrices(first), matrices(second)[[1, 2, 0]]], dim=2)
    got = rule.kind.statistics(Stream(lambda: both), **defaults(rule))
    want = rule.kind.statistics(Whole(side_by_side, torch.ones(3)), **defaults(rule))
    torch.testing.assert_close(got, want)


def test_emr_brings_every_task_back_to_its_mean_magnitude():
    M, weights = matrices(whole_numbers(200)), torch.tensor(WEIGHTS)
    unified, mask = unify(M, weights)
    assert torch.equal(emr(M, weights), unified)
    tasks = unified * mask * task_scales(Whole(M, weights))[:, :, None]
    want = weights.abs() * M.abs().mean((1, 2))
    torch.testing.assert_close(tasks.abs().mean((1, 2)), want)
    assert math.isclose(unified.abs().max(), (weights[:, None, None] * M).abs().max())
