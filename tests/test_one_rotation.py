"""The reading of TSPA in which one rotation serves both products of a block, and the one with a moment an entry."""

from unittest.mock import patch

import pytest
import torch

from benchmarks.one_rotation import align_both, sum_of, turns
from benchmarks.readings import amsgrad_per_entry
from mergekit_tspa.alignment import stiefel
from mergekit_tspa.alignment.attention import (
    align_attention,
    aligned_objective,
    free_scales,
    pair_objective,
)
from tests.alignment.test_attention import base, check_gradients, problem_of, sides

WEIGHTS = torch.tensor([[1.0, 0.7, 0.4]] * 2, dtype=torch.float64)


def both(**shapes):
    """Query and key, and output and value, of two layers."""
    return [
        problem_of(*(sides(pair, seed=seed + 10 * i, **shapes) for i in (1, 2)), weights=WEIGHTS)
        for pair, seed in (("qk", 0), ("vo", 50))
    ]


def factors_of(problem, x, y):
    """The merged inner factors, as `pair_objective` takes them."""
    merged = ((WEIGHTS[:, :, None, None, None, None] * S).sum(1) for S in (x, y))
    return [S.flatten(2, 3).flatten(0, 1) for S in merged]


@pytest.mark.parametrize("shapes", [{}, {"r_x": 5, "r_y": 5}], ids=["k < d", "k > d"])
def test_with_one_product_it_is_the_alignment_of_that_product(shapes):
    problem = both(**shapes)[0]
    usual = align_attention(problem, steps=40)
    [found], solution = align_both([problem], steps=40, lr=0.1, seed=42)
    for own, other in zip(found, usual):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(solution.end, usual[2].end / usual[2].start, rtol=1e-6, atol=0)


def test_the_loss_is_that_of_both_products_over_their_starts():
    problems = both()
    found, solution = align_both(problems, steps=40, lr=0.1, seed=42)
    left = torch.zeros(2, dtype=torch.float64)
    for problem, own in zip(problems, found):
        start, end = (
            pair_objective(problem)(*factors_of(problem, *S))[0].view(2, 2).sum(1)
            for S in ((problem.inner_x, problem.inner_y), own)
        )
        left += end / start
    torch.testing.assert_close(solution.start, torch.full_like(left, 2))
    torch.testing.assert_close(solution.end, left)
    assert (left < 1.5).all()


def test_one_rotation_turns_all_four_factors_and_leaves_the_adapters_products():
    problems = both(r_x=5, r_y=6)
    found, solution = align_both(problems, steps=20, lr=0.1, seed=42)
    R = solution.point.movedim(2, 1)[:, :, :, None]  # (L, n, G, 1, d, d)
    for problem, (x, y), log_s in zip(problems, found, solution.log_s.split(3, dim=1)):
        s = log_s.exp()[:, :, None, None, None, None]
        torch.testing.assert_close(x, s * (problem.inner_x @ R))
        torch.testing.assert_close(y, problem.inner_y @ R / s)
        torch.testing.assert_close(x @ y.mT, problem.inner_x @ problem.inner_y.mT)
    assert solution.orthogonality.max() < 1e-12 and (R - torch.eye(6)).abs().max() > 0.1


def test_gradients_of_the_sum():
    problems = [type(p)(*(part[:1] for part in p)) for p in both()]
    objectives = []
    for p in problems:
        Z = torch.cat([p.inner_x.flatten(3, 4), p.inner_y.flatten(3, 4)], dim=-2).movedim(1, 2)
        objectives.append(aligned_objective(p, turns(Z), free_scales(p, True, False))[0])
    point = torch.eye(6, dtype=torch.float64) + 0.3 * base(1, 1, 2, 3, 6, 6)
    check_gradients(sum_of(objectives, [torch.zeros(1, dtype=torch.float64)] * 2), point, 0.2 * base(2, 1, 6))


def test_a_product_that_is_nothing_counts_for_nothing():
    def quadratic(factor):
        return lambda point, log_s: (
            factor * point.square().flatten(1).sum(1),
            2 * factor * point,
            torch.zeros_like(log_s),
        )

    objective = sum_of([quadratic(1.0), quadratic(1e-30)], [torch.tensor([1e-3])] * 2)
    loss, d_point, _ = objective(torch.ones(1, 1, 1, 2, 2), torch.zeros(1, 2))
    assert loss.tolist() == [1.0] and torch.equal(d_point, torch.full((1, 1, 1, 2, 2), 0.5))


def test_a_moment_of_each_entry_goes_down_and_stays_on_the_manifold():
    target = torch.linalg.qr(base(3, 2, 5, 5).mT)[0].mT[:, :3].contiguous()

    def objective(point, log_s):
        return (point - target).square().sum((1, 2)), 2 * (point - target), torch.zeros_like(log_s)

    start = torch.eye(5, dtype=torch.float64)[:3].expand(2, 3, 5)
    with patch.object(stiefel, "_amsgrad", amsgrad_per_entry):
        found = stiefel.minimise(objective, start, torch.zeros(2, 1, dtype=torch.float64), steps=60, lr=0.05)
    usual = stiefel.minimise(objective, start, torch.zeros(2, 1, dtype=torch.float64), steps=60, lr=0.05)
    assert (found.end < 0.5 * found.start).all() and found.orthogonality.max() < 1e-10
    assert (found.point - usual.point).abs().max() > 1e-6
