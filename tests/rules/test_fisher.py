"""Fisher merging against published outputs, and its rank-one form against the entrywise one."""

import pytest
import torch

from mergekit_tspa.rules.fisher import fisher, fisher_rank_one
from tests.conftest import relative_error
from tests.rules.cases import (
    CASES,
    ELEMENTWISE,
    LAYERS,
    ROUNDING,
    dense,
    draw,
    drawer,
    of_tasks,
    published,
    regauged,
    updates,
)

MIXED = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)


def positive(*shape, seed=1):
    return drawer(seed)(*shape).square()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "key, weights, normalised",
    [
        ("delta", [0.25] * 4, True),
        ("delta_nonorm", [0.25] * 4, False),
        ("delta_coef", [0.4, 0.3, 0.2, 0.1], True),
    ],
)
def test_equals_published_output_with_a_floor(key, weights, normalised, case, layer):
    tensors = published(f"fisher.{case}")
    norms = None
    if normalised:  # over both layers
        squares = [[F.square().sum() for F in of_tasks(tensors, each, "fisher")] for each in LAYERS]
        norms = torch.tensor(squares).sum(0).sqrt()
    F = torch.stack(of_tasks(tensors, layer, "fisher"))
    merged = fisher(updates(case, layer).float(), F, torch.tensor(weights), norms=norms)
    assert relative_error(merged, tensors[f"out.{layer}.{key}"]) < ELEMENTWISE


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", LAYERS)
def test_equals_published_output_with_a_cutoff(case, layer):
    tensors = published(f"actmat_fisher.{case}")
    F = torch.stack(of_tasks(tensors, layer, "fisher"))
    merged = fisher(updates(case, layer).float(), F, torch.ones(4), floor=0.0, cutoff=1e-8)
    assert relative_error(merged, tensors[f"out.{layer}.delta"]) < ELEMENTWISE


def test_where_nothing_depends_on_an_entry():
    """With a cutoff it is 0, with a floor the plain mean."""
    M, F = drawer(0)(3, 5, 4), positive(3, 5, 4)
    F[:, 1, 2] = 0.0
    F[:, 3, 3] = 1e-9
    cut = fisher(M, F, torch.ones(3), floor=0.0, cutoff=1e-8)
    assert cut[1, 2] == 0 and cut[3, 3] == 0 and (cut == 0).sum() == 2
    assert fisher(M, F, torch.ones(3), floor=0.0)[1, 2] == 0
    torch.testing.assert_close(fisher(M, F, torch.ones(3))[1, 2], M[:, 1, 2].mean())
    torch.testing.assert_close(fisher(M, F, torch.ones(3), floor=0.0)[3, 3], M[:, 3, 3].mean())


def test_is_a_weighted_mean():
    M, F = drawer(0)(3, 5, 4), positive(3, 5, 4)
    merged = fisher(M, F, torch.tensor([1.0, 0.5, 2.0]))
    assert (merged <= M.amax(0)).all() and (merged >= M.amin(0)).all()
    mean = (MIXED[:, None, None] * M).sum(0) / MIXED.abs().sum()
    torch.testing.assert_close(fisher(M, F[:1].expand(3, -1, -1), MIXED), mean)
    assert (fisher(M, F, MIXED).abs() <= M.abs().amax(0)).all()
    for weight, sign in ((1.0, 1), (0.2, 1), (-3.0, -1)):
        torch.testing.assert_close(fisher(M[:1], F[:1], torch.tensor([weight])), sign * M[0])
    got = fisher(M, F, torch.tensor([1.0, 0.0, 2.0]))
    torch.testing.assert_close(got, fisher(M[::2], F[::2], torch.tensor([1.0, 2.0])))
    assert not fisher(M, F, torch.zeros(3)).any()


def test_order_does_not_matter_and_norms_weigh():
    M, F = drawer(0)(3, 5, 4), positive(3, 5, 4)
    turned = [2, 0, 1]
    torch.testing.assert_close(fisher(M[turned], F[turned], MIXED[turned]), fisher(M, F, MIXED))
    norms = torch.tensor([1.0, 2.0, 4.0])
    want = fisher(M, F, MIXED / (norms + 1e-6))
    torch.testing.assert_close(fisher(M, F, MIXED, norms=norms), want)


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("cutoff", [0.0, 0.5])
@pytest.mark.parametrize("weights", [torch.ones(3), MIXED, torch.tensor([0.0, 1.0, 2.0])])
def test_rank_one_form_equals_the_entrywise_rule(floor, cutoff, weights):
    B, A = draw()
    g, x = positive(3, 20, seed=2), positive(3, 14, seed=3)
    got = fisher_rank_one(B, A, g, x, weights, floor, cutoff)
    want = fisher(dense(B, A), g[:, :, None] * x[:, None], weights, floor, cutoff)
    assert relative_error(got, want) < ROUNDING
    assert (got == 0).any() == (cutoff > 0.1)


def test_rank_one_form_has_the_properties_of_the_rule():
    B, A = draw()
    g, x = positive(3, 20, seed=2), positive(3, 14, seed=3)
    merged = fisher_rank_one(B, A, g, x, MIXED)
    assert relative_error(fisher_rank_one(*regauged(B, A), g, x, MIXED), merged) < ROUNDING
    turned = [1, 2, 0]
    B2, A2 = ([given[t] for t in turned] for given in (B, A))
    other = fisher_rank_one(B2, A2, g[turned], x[turned], MIXED[turned])
    assert relative_error(other, merged) < ROUNDING
    alone = fisher_rank_one(B[:1], A[:1], g[:1], x[:1], torch.tensor([0.3]))
    assert relative_error(alone, B[0] @ A[0]) < ROUNDING
    equal = fisher_rank_one(B, A, g[:1].expand(3, -1), x[:1].expand(3, -1), MIXED)
    mean = (MIXED[:, None, None] * dense(B, A)).sum(0) / MIXED.abs().sum()
    assert relative_error(equal, mean) < ROUNDING
    g[:, 4] = 0.0  # an output on which no loss depends
    assert not fisher_rank_one(B, A, g, x, MIXED)[4].any()
