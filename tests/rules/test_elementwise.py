"""Properties of the elementwise rules."""

import pytest
import torch
from mergekit.sparsify import della_magprune, magnitude, magnitude_outliers

from mergekit_tspa.rules.breadcrumbs import kept_range, trim_outliers
from mergekit_tspa.rules.dare import drop
from mergekit_tspa.rules.della import magnitude_drop
from mergekit_tspa.rules.emr import rescalers, unify
from mergekit_tspa.rules.pcb import pcb
from mergekit_tspa.rules.prune import kept_from, trim
from mergekit_tspa.rules.ties import elect_and_merge, ties

ONES = torch.ones(3)


@pytest.fixture
def M():
    return torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(0))


def at(M, positions):
    """Order statistics by sorting."""
    ordered = M.abs().flatten(1).sort().values
    return torch.stack([ordered[:, p] for p in positions(ordered.shape[1])], dim=1)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.55, 1.0])
def test_trim_keeps_as_many_as_mergekit(M, density):
    kept = trim(M, at(M, lambda n: [kept_from(density, n, "mergekit")]))
    assert torch.equal(kept, torch.stack([magnitude(m, density) for m in M]))
    assert (trim(M, at(M, lambda n: [kept_from(0.2, n)])) != 0).flatten(1).sum(1).tolist() == [49] * 3


@pytest.mark.parametrize("density, gamma", [(0.9, 0.01), (0.5, 0.1), (0.95, 0.3), (0.2, 0.05)])
def test_outliers_are_those_of_mergekit(M, density, gamma):
    low, high = at(M, lambda n: kept_range(density, gamma, n)).mT
    assert torch.equal(
        trim_outliers(M, low, high), torch.stack([magnitude_outliers(m, density, gamma=gamma) for m in M])
    )


def test_dropping_is_unbiased_and_follows_its_probabilities(M):
    draws = torch.rand(4000, *M.shape, generator=torch.Generator().manual_seed(1))
    for dropped, spread in (
        (torch.stack([drop(M, 0.4, u) for u in draws]), 0.6 / 0.4),
        (torch.stack([magnitude_drop(M, 0.5, 0.2, u) for u in draws]), 0.7 / 0.3),
    ):
        error = (dropped.mean(0) - M).abs() / M.abs()
        assert error.max() < 6 * (spread / 4000) ** 0.5
    kept = (torch.stack([magnitude_drop(M, 0.5, 0.2, u) for u in draws]) != 0).float().mean(0)
    order = M.abs().argsort(-1)
    rates = kept.gather(-1, order).mean((0, 1))
    torch.testing.assert_close(rates, torch.linspace(0.3, 0.7, 40), atol=0.02, rtol=0)


def test_magnitude_drop_uses_mergekits_probabilities(M):
    """With mergekit's own draws and without rescaling the two agree entry by entry."""
    torch.manual_seed(3)
    want = della_magprune(M[0], density=0.5, epsilon=0.2)
    torch.manual_seed(3)
    probabilities = 0.3 + 0.4 * M[:1].abs().argsort(-1).argsort(-1) / 39
    kept = torch.bernoulli(probabilities)
    torch.testing.assert_close(M[:1] * kept, want[None])
    torch.testing.assert_close(magnitude_drop(M[:1], 0.5, 0.2, 1 - kept, rescale=False), want[None])


def test_without_rescaling_kept_entries_stay(M):
    u = torch.rand(M.shape)
    for dropped in (drop(M, 0.4, u, rescale=False), magnitude_drop(M, 0.5, 0.1, u, rescale=False)):
        assert ((dropped == 0) | (dropped == M)).all()
    assert torch.equal(drop(M, 1.0, u), M)


@pytest.mark.parametrize("take", ["mean", "max"])
@pytest.mark.parametrize("elect", ["mass", "count"])
def test_election_is_odd_symmetric_and_scales(M, elect, take):
    merged = elect_and_merge(M, ONES, elect=elect, take=take)
    torch.testing.assert_close(elect_and_merge(-M, ONES, elect=elect, take=take), -merged)
    torch.testing.assert_close(elect_and_merge(M[[2, 0, 1]], ONES, elect=elect, take=take), merged)
    torch.testing.assert_close(elect_and_merge(3 * M, ONES, elect=elect, take=take), 3 * merged)


def test_election_by_hand():
    M = torch.tensor([[3.0, 1.0, 1.0], [-1.0, -1.0, 2.0], [-1.0, 0.0, 0.0]])
    torch.testing.assert_close(elect_and_merge(M, ONES), torch.tensor([3.0, 0.0, 1.5]))
    torch.testing.assert_close(elect_and_merge(M, ONES, normalize=False), torch.tensor([3.0, 0.0, 3.0]))
    torch.testing.assert_close(elect_and_merge(M, ONES, take="max"), torch.tensor([3.0, 0.0, 2.0]))
    torch.testing.assert_close(elect_and_merge(M, ONES, elect="count"), torch.tensor([-1.0, 0.0, 1.5]))
    weighted = elect_and_merge(M, torch.tensor([1.0, 3.0, 2.0]))
    torch.testing.assert_close(weighted, torch.tensor([-1.0, -1.0, 1.75]))
    # A negative weight votes with the opposite, and no entry ends opposite to the elected sign.
    torch.testing.assert_close(
        elect_and_merge(M, torch.tensor([1.0, -1.0, 1.0])), torch.tensor([2.0, 1.0, -2.0])
    )


def ties_of_entries(M, weights, density):
    """TIES as the paper's algorithm reads, entry by entry."""
    n, entries = len(M), M.flatten(1)
    kept = int(density * entries.shape[1]) + 1
    trimmed = torch.zeros_like(entries)
    for t in range(n):
        largest = entries[t].abs().topk(kept).indices
        trimmed[t, largest] = entries[t, largest]
    merged = torch.zeros_like(entries[0])
    for i in range(entries.shape[1]):
        sign = sum(weights[t] * trimmed[t, i] for t in range(n)).sign()
        agree = [t for t in range(n) if trimmed[t, i] and (weights[t] * trimmed[t, i]).sign() == sign]
        if agree:
            merged[i] = sum(weights[t] * trimmed[t, i] for t in agree) / sum(abs(weights[t]) for t in agree)
    return merged.view(M[0].shape)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_ties_is_the_papers_algorithm(M, density):
    weights = torch.tensor([1.0, 0.5, -0.7])
    torch.testing.assert_close(ties(M, weights, density), ties_of_entries(M, weights, density))


def test_opposite_updates_cancel(M):
    pair = torch.stack([M[0], -M[0]])
    for elect in ("mass", "count"):
        assert not elect_and_merge(pair, ONES[:2], elect=elect).any()


def merged_by_pcb(M, ratio=0.3, variant="invariant", weights=None):
    return pcb(M, torch.ones(len(M)) if weights is None else weights, ratio, 0.01, variant)


def test_pcb_properties(M):
    merged = merged_by_pcb(M)
    assert 0.1 < (merged != 0).float().mean() < 0.8
    torch.testing.assert_close(merged_by_pcb(M[[1, 2, 0]]), merged)
    torch.testing.assert_close(merged_by_pcb(-M), -merged)
    torch.testing.assert_close(merged_by_pcb(100 * M), 100 * merged, rtol=1e-3, atol=1e-3)
    v1 = merged_by_pcb(M, variant="v1")
    assert (merged_by_pcb(100 * M, variant="v1") - 100 * v1).norm() > 0.05 * (100 * v1).norm()


def test_pcb_is_finite_where_scores_or_magnitudes_are_all_alike():
    for M in (torch.ones(2, 3, 4), torch.zeros(2, 3, 4), torch.randn(120, 2, 3), torch.randn(1, 1, 1)):
        for ratio in (0.01, 0.99):
            assert merged_by_pcb(M, ratio).isfinite().all()
    torch.testing.assert_close(merged_by_pcb(torch.ones(2, 3, 4)), torch.ones(3, 4))


def test_emr(M):
    uni, mask = unify(M, ONES)
    assert torch.equal(uni.sign(), torch.where(M.sum(0) > 0, 1.0, -1.0))
    assert torch.equal(mask, (M.sign() == uni.sign()))
    torch.testing.assert_close(uni.abs(), (M * mask).abs().amax(0))
    own, masked = M.abs().mean((1, 2)), (uni.abs() * mask).mean((1, 2))
    scales = rescalers(own, masked)
    torch.testing.assert_close((uni.abs() * mask).mean((1, 2)) * scales, own)
    alone, mask = unify(M[:1], ONES[:1])
    assert torch.equal(alone, M[0]) and mask.all()
    assert torch.equal(
        rescalers(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])), torch.tensor([1.0, 0.5])
    )
