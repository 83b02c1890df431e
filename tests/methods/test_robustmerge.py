"""RobustMerge against its code and against a re-implementation of its paper, and what both leave undefined."""

import pytest
import torch

from mergekit_tspa import InputError, LoraFactors, merge_adapters
from mergekit_tspa.methods.robustmerge import robustmerge, robustmerge_code
from tests.conftest import relative_error
from tests.methods.test_closed_forms import random_factors
from tests.methods.test_published import published_deltas


@pytest.mark.parametrize("density", [0.2, 0.8])
def test_paper_form_equals_published_output(density):
    factors, deltas = published_deltas(f"tara_robust_m{density}.hom8")
    for layer, delta in deltas.items():
        merged = robustmerge(factors[layer], [1.0] * 4, density=density).scaled(2.0)
        assert merged.rank == 32
        assert relative_error(merged.dense(), delta) < 1e-5


@pytest.mark.parametrize("density", [0.2, 0.5, 0.99])
def test_code_form_equals_published_output(density):
    factors, deltas = published_deltas(f"robustmerge_m{density}_a0.2.hom8")
    for layer, delta in deltas.items():
        merged = robustmerge_code(factors[layer], [1.0] * 4, density=density, att=0.2).scaled(4.0)
        assert merged.rank == 8
        assert relative_error(merged.dense(), delta) < 1e-5


def test_default_lambda_is_the_published_one():
    factors, deltas = published_deltas("robustmerge_m0.2_a0.2.hom8")
    paper, paper_deltas = published_deltas("tara_robust_m0.2.hom8")
    for layer in factors:
        code = merge_adapters("robustmerge_code", [{"m": f} for f in factors[layer]])["m"]
        assert relative_error(code.dense(), deltas[layer]) < 1e-5
        merged = merge_adapters("robustmerge", [{"m": f} for f in paper[layer]])["m"]
        assert relative_error(merged.dense(), paper_deltas[layer]) < 1e-5


def test_rows_without_survivors_have_no_share():
    """A row that is pruned away in one adapter keeps its full weight in the other."""
    B = torch.ones(3, 2)
    first = LoraFactors(B, torch.tensor([[5.0, 6.0, 7.0, 8.0], [0.1, 0.1, 0.1, 0.1]]))
    second = LoraFactors(B, torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    kept = torch.tensor([0.0, 6.0, 7.0, 8.0])
    merged = robustmerge([first, second], [1.0, 1.0], density=0.2)
    torch.testing.assert_close(merged.B, torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(3, 4))
    torch.testing.assert_close(merged.A, torch.stack([kept, 0 * kept, 0 * kept, kept]))
    merged = robustmerge_code([first, second], [1.0, 1.0], density=0.2)
    torch.testing.assert_close(merged.A, torch.stack([kept, kept]))
    assert torch.isfinite(merged.B).all()


@pytest.mark.parametrize("rule", [robustmerge, robustmerge_code])
def test_adapters_without_an_update_change_nothing(rule):
    f, g = random_factors([3, 3])
    untrained = LoraFactors(torch.zeros_like(f.B), f.A)
    other = LoraFactors(f.B, torch.zeros_like(f.A))
    merged = rule([untrained, f, other, g], [1.0, 0.5, 1.0, 1.0])
    torch.testing.assert_close(merged, rule([f, g], [0.5, 1.0]))
    assert not rule([untrained, other], [1.0, 1.0]).dense().any()


def test_unequal_ranks():
    f, g = random_factors([2, 4])
    merged = robustmerge([f, g], [1.0, 1.0], density=1.0)
    assert merged.rank == 6
    # nothing is lost, so all s are 1: rows that both have are halved, those of one adapter stay
    halves = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(merged.B, torch.cat([f.B, g.B], dim=1) * halves)
    message = r"m\.weight: .*needs adapters of equal rank, and these have \[2, 4\]"
    with pytest.raises(InputError, match=message):
        merge_adapters("robustmerge_code", [{"m": (f.B, f.A)}, {"m": (g.B, g.A)}])


def test_att_is_how_many_rows_have_a_weight_of_their_own():
    """With none, an adapter's rows share one value, and `B` is a plain weighted mean of the pruned `B_t`."""
    f, g = random_factors([4, 4])
    merge = lambda *factors, att: robustmerge_code(factors, [1.0] * len(factors), density=0.3, att=att).B  # noqa: E731
    pruned = torch.stack([merge(f, att=0.0).flatten(), merge(g, att=0.0).flatten()], dim=1)
    distances = []
    for att in (0.0, 1.0):
        merged = merge(f, g, att=att).flatten()
        shares = torch.linalg.lstsq(pruned, merged[:, None]).solution
        distances.append(relative_error(pruned @ shares, merged[:, None]))
        if att == 0.0:
            torch.testing.assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert distances[0] < 1e-12 and distances[1] > 1e-2


@pytest.mark.parametrize("rule", [robustmerge, robustmerge_code])
def test_scale_order_and_weights(rule):
    f, g, h = random_factors([3, 3, 3])
    full = rule([f, g, h], [1.0, 0.5, 2.0]).dense()
    tiny = [x.scaled(1e-12) for x in (f, g, h)]
    assert relative_error(rule(tiny, [1.0, 0.5, 2.0]).dense(), 1e-12 * full) < 1e-10
    assert relative_error(rule([h, f, g], [2.0, 1.0, 0.5]).dense(), full) < 1e-12
    weighted = [x.scaled(a) for x, a in zip((f, g, h), (1.0, 0.5, 2.0))]
    assert relative_error(rule(weighted, [1.0, 1.0, 1.0]).dense(), full) < 1e-12
