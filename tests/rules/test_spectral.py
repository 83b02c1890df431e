"""Properties of the rules on singular values."""

import pytest
import torch

from mergekit_tspa.rules.spectral import cart, iso, polar, tsv
from tests.conftest import relative_error


def low_rank(n=3, p=20, q=16, r=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(n, p, r) @ draw(n, r, q)


ONES = torch.ones(3).double()


@pytest.mark.parametrize(
    "rule", [tsv, iso, cart, lambda M, a: iso(M, a, 0.5), lambda M, a: tsv(M, a, 2, False)]
)
def test_equivariant_odd_and_independent_of_order(rule):
    M = low_rank()
    P, Q = torch.linalg.qr(low_rank(1, 20, 20, 20, 1)[0]).Q, torch.linalg.qr(low_rank(1, 16, 16, 16, 2)[0]).Q
    merged = rule(M, ONES)
    assert relative_error(rule(P @ M @ Q, ONES), P @ merged @ Q) < 1e-10
    assert relative_error(rule(-3 * M, ONES), -3 * merged) < 1e-10
    assert relative_error(rule(M[[2, 0, 1]], ONES), merged) < 1e-10


def test_tsv_of_orthogonal_tasks_is_their_sum():
    M = torch.zeros(3, 12, 12).double()
    for t in range(3):
        M[t, 4 * t : 4 * t + 4, 4 * t : 4 * t + 4] = low_rank(1, 4, 4, 4, t)[0]
    assert relative_error(tsv(M, ONES), M.sum(0)) < 1e-10
    a = torch.tensor([1.0, 0.5, -2.0]).double()
    assert relative_error(tsv(M, a), (a[:, None, None] * M).sum(0)) < 1e-10


def test_tsv_of_equal_and_opposite_tasks():
    M = low_rank(1)[0]
    for n in (1, 2, 5):
        assert relative_error(tsv(M.expand(n, -1, -1), torch.ones(n).double()), M) < 1e-10
    assert tsv(torch.stack([M, -M]), ONES[:2]).norm() < 1e-10 * M.norm()
    assert not tsv(torch.zeros(3, 5, 4).double(), ONES).any()


def test_tsv_ignores_noise_below_the_numerical_rank():
    M = low_rank()
    noisy = M + 1e-9 * torch.randn(M.shape, generator=torch.Generator().manual_seed(5)).double()
    assert relative_error(tsv(noisy, ONES), tsv(M, ONES)) < 1e-6
    assert relative_error(iso(noisy[:1], ONES[:1]), iso(M[:1], ONES[:1])) < 1e-6


def test_tsv_keeps_as_many_triplets_as_asked():
    M = low_rank(r=4)
    for k in (1, 2, 4):
        assert torch.linalg.matrix_rank(tsv(M, ONES, rank_per_task=k)) == 3 * k
    # More than the sides hold: the polar factors make the best of it.
    assert torch.linalg.matrix_rank(tsv(low_rank(5, 8, 8, 4), torch.ones(5).double(), 4)) == 8


def test_iso_has_equal_singular_values_on_the_numerical_rank():
    M = low_rank()
    S = torch.linalg.svdvals(M.sum(0))
    got = torch.linalg.svdvals(iso(M, ONES))
    torch.testing.assert_close(got[:9], S[:9].mean().expand(9))
    assert got[9:].max() < 1e-10
    assert not iso(torch.stack([M[0], -M[0]]), ONES[:2]).any()


def test_iso_cts_takes_directions_of_each_task_beside_the_common_ones():
    M = torch.zeros(2, 12, 12).double()
    M[0, :6, :6], M[1, 6:, 6:] = torch.eye(6) * 5, torch.eye(6)
    S = torch.linalg.svdvals(iso(M, ONES[:2], 0.5))
    # 6 common directions, all of the loud task; 3 of each task's rest, and the loud one has none left.
    torch.testing.assert_close(S[:9], torch.full((9,), (6 * 5 + 3 * 1) / 9).double())
    assert S[9:].max() < 1e-10


def test_cart_of_one_task_and_of_full_share():
    M = low_rank()
    assert relative_error(cart(M[:1], ONES[:1]), M[0]) < 1e-12
    full = cart(M, ONES, share=1.0, inner=1.0)
    assert relative_error(full, M.mean(0) + (M - M.mean(0)).sum(0)) < 1e-10


def test_polar():
    M = low_rank(1)[0]
    isometry = polar(M)
    S = torch.linalg.svdvals(isometry)
    torch.testing.assert_close(S[:3], torch.ones(3).double())
    assert S[3:].max() < 1e-12
    assert relative_error(isometry @ isometry.mT @ M, M) < 1e-10
