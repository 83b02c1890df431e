"""Every measure against the dense matrices it speaks of, and independent of how an update is split into factors."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from mergekit_tspa.insight.measures import (
    Measures,
    apart,
    cosines,
    effective_rank,
    interference,
    measure,
    principal_angles,
    projection,
    sample_rows,
    sign_conflict,
    stable_rank,
    svd,
)
from mergekit_tspa.updates import LoraFactors

M, D_OUT, D_IN = 3, 20, 14


def random_factors(ranks=(3, 5, 2), seed=0, m=M, shape=(D_OUT, D_IN)):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=g, dtype=torch.float64)  # noqa: E731
    return [LoraFactors(draw(m, shape[0], r), draw(m, r, shape[1])) for r in ranks]


def close(got, want, atol=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(got).double(), torch.as_tensor(want).double(), atol=atol, rtol=1e-6
    )


def test_single_updates_against_dense():
    factors = random_factors()
    got = measure(factors)
    for t, f in enumerate(factors):
        S = torch.linalg.svdvals(f.dense())
        close(got.norm[:, t], torch.linalg.matrix_norm(f.dense()))
        close(got.rank[:, t], torch.linalg.matrix_rank(f.dense()))
        p = (S / S.sum(1, keepdim=True)).numpy()[:, : f.B.shape[2]]
        close(got.effective_rank[:, t], np.exp(-(p * np.log(p)).sum(1)))
        close(got.stable_rank[:, t], S.square().sum(1) / S[:, 0] ** 2)


def test_pairs_against_dense_and_scipy():
    factors = random_factors()
    got = measure(factors)
    for t, f in enumerate(factors):
        for u, g in enumerate(factors):
            D, E = f.dense(), g.dense()
            close(got.inner[:, t, u], (D * E).sum((1, 2)))
            close(got.conflict[:, t, u], ((D > 0) != (E > 0)).double().mean((1, 2)), atol=1e-6)
            for i in range(M):
                for overlap, angle, X, Y in (
                    (got.overlap_out, got.angle_out, f.B[i], g.B[i]),
                    (got.overlap_in, got.angle_in, f.A[i].T, g.A[i].T),
                ):
                    want = subspace_angles(X.numpy(), Y.numpy())
                    close(overlap[i, t, u], np.mean(np.cos(want) ** 2))
                    close(angle[i, t, u], np.rad2deg(want.min()), atol=1e-4)
    close(
        cosines(got.inner)[0, 0, 1],
        torch.cosine_similarity(*(f.dense()[0].flatten() for f in factors[:2]), dim=0),
    )


def test_all_principal_angles_are_those_of_scipy():
    (f, g) = random_factors((3, 5))
    Q, P = svd(*f), svd(*g)
    angles = principal_angles(Q.U.mT @ P.U, torch.minimum(Q.rank, P.rank))
    for i in range(M):
        close(angles[i], np.sort(np.rad2deg(subspace_angles(f.B[i].numpy(), g.B[i].numpy()))))


def test_the_split_into_factors_does_not_matter():
    factors = random_factors()
    G = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q @ torch.diag(
        torch.logspace(-3, 3, 5).double()
    )
    turned = [*factors]
    turned[1] = LoraFactors(factors[1].B @ G, torch.linalg.inv(G) @ factors[1].A)
    for name, one, two in zip(Measures._fields, measure(factors), measure(turned)):
        if name != "apart":
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5, msg=name)


def test_idle_columns_of_a_factor_are_not_counted():
    """The row space of an update is not that of A where B is zero, as at the start of training."""
    (f, g) = random_factors((4, 4))
    f.B[:, :, 2:] = 0
    got = measure([f, g])
    close(got.rank[:, 0], torch.full((M,), 2))
    close(
        got.overlap_in[0, 0, 1], np.mean(np.cos(subspace_angles(f.A[0, :2].T.numpy(), g.A[0].T.numpy())) ** 2)
    )


def test_opposite_equal_and_zero_updates():
    (f, g) = random_factors((3, 3))
    got = measure([f, f.scaled(-1.0), f._replace(B=0 * f.B), g])
    close(got.conflict[:, 0, 1], torch.ones(M))
    close(got.conflict[:, 0, 0], torch.zeros(M))
    close(cosines(got.inner)[:, 0, 1], -torch.ones(M))
    close(got.overlap_in[:, 0, 1], torch.ones(M))
    close(got.angle_out[:, 0, 1], torch.zeros(M), atol=1e-5)
    for values in (got.conflict, got.overlap_in, got.overlap_out, got.angle_in, cosines(got.inner)):
        assert (
            values[:, 2].isnan().all() and values[:, :, 2].isnan().all() and not values[:, 0, 3].isnan().any()
        )
    assert not got.rank[:, 2].any()
    assert got.effective_rank[:, 2].isnan().all() and got.stable_rank[:, 2].isnan().all()


def test_ranks_of_known_spectra():
    flat, single = torch.tensor([2.0, 2, 2, 0]).double(), torch.tensor([5.0, 0, 0, 0]).double()
    close(effective_rank(torch.stack([flat, single])), torch.tensor([3.0, 1.0]))
    close(stable_rank(torch.stack([flat, single])), torch.tensor([3.0, 1.0]))
    close(stable_rank(torch.tensor([2.0, 1.0])), torch.tensor(1.25))


def test_interference():
    close(interference(torch.eye(4), torch.ones(4))[0], 0.5)  # orthogonal: 1 / sqrt(n)
    close(interference(torch.eye(4), torch.ones(4))[1], 0.0)
    close(interference(torch.ones(3, 3), torch.ones(3))[0], 1.0)  # the same
    close(interference(torch.ones(3, 3), torch.ones(3))[1], 2.0)
    close(interference(torch.ones(2, 2), torch.tensor([1.0, -1.0]))[0], 0.0)  # they cancel
    close(interference(torch.ones(2, 2), torch.tensor([1.0, -1.0]))[1], -1.0)
    assert all(v.isnan() for v in interference(torch.eye(2), torch.tensor([1.0, math.nan])))
    factors, a = random_factors(), torch.tensor([0.5, -2.0, 1.5]).double()
    ratio, cross = interference(measure(factors).inner, a.expand(M, 3))
    parts = torch.stack([x * f.dense() for x, f in zip(a, factors)])
    total, norms = torch.linalg.matrix_norm(parts.sum(0)), torch.linalg.matrix_norm(parts)
    close(ratio, total / norms.sum(0))
    close(cross, total**2 / norms.square().sum(0) - 1)


def test_factors_summed_apart():
    factors = random_factors((4, 4))
    B, A = (sum(sides) for sides in zip(*factors))
    close(apart(factors), torch.linalg.matrix_norm(B @ A))
    assert apart(random_factors((4, 3))).isnan().all()


@pytest.mark.parametrize("dense", [False, True])
def test_projection(dense):
    factors = [LoraFactors(*(side[0].float() for side in f)) for f in random_factors()]
    M = LoraFactors(torch.cat([f.B for f in factors], 1), torch.cat([f.A for f in factors]))
    inner, norm = projection(M.dense() if dense else M, factors)
    close(norm, M.dense().norm(), atol=1e-4)
    close(inner, torch.stack([(M.dense() * f.dense()).sum() for f in factors]), atol=1e-3)


def test_signs_are_compared_on_a_sample_that_a_seed_fixes():
    rows = sample_rows(4096, 4096)
    assert torch.equal(rows, sample_rows(4096, 4096)) and not torch.equal(
        rows, sample_rows(4096, 4096, seed=1)
    )
    assert len(rows.unique()) == len(rows) == 64 and len(sample_rows(20, 14)) == 20
    shape = (2048, 1024)
    factors = random_factors((2, 2), m=1, shape=shape)
    whole = torch.stack([f.dense().flatten(1) for f in factors], 1)
    assert measure(factors).conflict[0, 0, 1] == pytest.approx(sign_conflict(whole)[0, 0, 1].item(), abs=0.03)
