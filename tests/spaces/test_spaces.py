"""Lossless spaces give every update back; Compress-then-Merge gives its best share of it."""

import pytest
import tensorly
import torch
from tensorly.decomposition import partial_tucker

from mergekit_tspa import LoraFactors
from mergekit_tspa.spaces.basis import FULL
from mergekit_tspa.spaces.core import balanced, core
from mergekit_tspa.spaces.cores import cores
from mergekit_tspa.spaces.ctm import ctm, shared_subspaces
from mergekit_tspa.spaces.factor import Factors
from mergekit_tspa.spaces.knots import knots
from tests.conftest import relative_error


def draw(ranks, d_out=24, d_in=18, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [
        LoraFactors(
            torch.randn(d_out, r, generator=g, dtype=dtype), torch.randn(r, d_in, generator=g, dtype=dtype)
        )
        for r in ranks
    ]


def dense(decoded):
    return decoded if isinstance(decoded, torch.Tensor) else decoded.dense()


def sides(basis):
    return [side.dense() for side in (basis.U, basis.V) if side is not None]


SHARED_A = [LoraFactors(f.B, draw([3])[0].A) for f in draw([3, 3, 3], seed=5)]
SPACES = {
    "full": lambda fs: FULL,
    "knots": knots,
    "core": core,
    "balanced core": lambda fs: core(fs, balance=True),
    "ctm of the sum of ranks": lambda fs: ctm(fs, sum(f.rank for f in fs)),
}


@pytest.mark.parametrize(
    "factors", [draw([3, 5, 2]), draw([1]), draw([16, 16], 24, 18), draw([4, 4]) * 2, SHARED_A]
)
@pytest.mark.parametrize("space", SPACES)
def test_lossless(space, factors):
    basis = SPACES[space](factors)
    for f, M in zip(factors, basis.encode(factors)):
        assert relative_error(dense(basis.decode(M.dense())), f.dense().double()) < 1e-6
    for side in sides(basis):
        torch.testing.assert_close(side.mT @ side, torch.eye(side.shape[1]).double(), atol=1e-9, rtol=0)


def test_knots_is_the_svd_of_the_updates_side_by_side():
    factors = draw([3, 5, 2])
    basis = knots(factors)
    _U, S, Vh = torch.linalg.svd(torch.cat([f.dense() for f in factors], dim=1).double(), full_matrices=False)
    got = torch.cat([M.dense() for M in basis.encode(factors)], dim=1)
    assert basis.U.shape == (24, 10)
    want = S[:10, None] * Vh[:10]
    signs = (got * want).sum(1).sign()[:, None]
    assert relative_error(signs * got, want) < 1e-5


def test_knots_drops_directions_relative_to_the_largest():
    """The published code cuts at an absolute 1e-5: small updates would vanish."""
    factors = draw([3, 2])
    small = [f.scaled(1e-12) for f in factors]
    assert knots(small).U.shape == knots(factors).U.shape == (24, 5)
    assert knots(factors * 2).U.shape == (24, 5)


def test_balance_makes_core_space_independent_of_the_gauge():
    factors = draw([3, 4], dtype=torch.float64)
    G = draw([3], 3, 3, seed=9, dtype=torch.float64)[0].B + 3 * torch.eye(3)
    moved = [LoraFactors(factors[0].B @ G, torch.linalg.inv(G) @ factors[0].A), factors[1]]
    apart = lambda a, b: a.U.project(b.U.dense()).abs() - torch.eye(a.U.shape[1]).double()  # noqa: E731
    assert apart(core(moved, balance=True), core(factors, balance=True)).abs().max() < 1e-8
    assert apart(core(moved), core(factors)).abs().max() > 0.1
    f = balanced(factors[0])
    torch.testing.assert_close(f.dense(), factors[0].dense())
    torch.testing.assert_close(f.B.mT @ f.B, f.A @ f.A.mT)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_ctm_equals_tensorly(rank):
    """The HOOI of an independent library, on the full stack of updates."""
    factors = draw([3, 5, 2], dtype=torch.float64)
    X = torch.stack([f.dense() for f in factors])
    X = X / torch.linalg.matrix_norm(X, keepdim=True) * torch.linalg.matrix_norm(X).mean()
    with tensorly.backend_context("pytorch"):
        (_, want_sides), _ = partial_tucker(
            X, rank=[rank, rank], modes=[1, 2], n_iter_max=1000, tol=1e-6, init="svd"
        )
    basis = ctm(factors, rank)
    for got, want in zip(sides(basis), want_sides):
        assert relative_error(got @ got.mT, want @ want.mT) < 1e-6


def test_ctm_weighs_adapters_alike_with_beta_0_and_by_norm_with_beta_1():
    loud, quiet = draw([2])[0], draw([2], seed=3)[0].scaled(1e-3)
    kept = lambda basis, f: basis.encode([f])[0].dense().norm() / f.dense().norm()  # noqa: E731
    assert kept(ctm([loud, quiet], 2, beta=1.0), quiet) < 0.5
    assert kept(ctm([loud, quiet], 2, beta=0.0), quiet) > kept(ctm([loud, quiet], 2, beta=1.0), quiet)
    assert ctm([loud], 1).U.shape == (24, 1)


def test_ctm_is_gauge_free_and_ignores_scale():
    factors = draw([3, 4], dtype=torch.float64)
    G = draw([3], 3, 3, seed=9, dtype=torch.float64)[0].B + 3 * torch.eye(3)
    moved = [LoraFactors(factors[0].B @ G, torch.linalg.inv(G) @ factors[0].A), factors[1].scaled(100.0)]
    for a, b in zip(sides(ctm(factors, 3)), sides(ctm(moved, 3))):
        assert relative_error(a @ a.mT, b @ b.mT) < 1e-5


@pytest.mark.parametrize("own", [15, 40])
@pytest.mark.parametrize("rank", [4, 24, 40])
@pytest.mark.parametrize("values", ["equal", "falling", "few"])
def test_subspaces_of_large_cores_hold_as_much_as_those_of_full_eigenvectors(own, rank, values, monkeypatch):
    """Whatever the singular values are, those that are zero among them."""
    c = cores(draw([own] * 8, 400, 360))
    B, A = torch.stack([*c.R_B]), torch.stack([R.mT for R in c.R_A])
    falling = torch.logspace(0, -4, own, dtype=torch.float64)
    sizes = {"equal": falling**0, "falling": falling, "few": (falling > 0.3).double()}
    B = B * sizes[values]
    held = lambda P, Q: ((P.mT @ B) @ (A @ Q)).square().sum().item()  # noqa: E731
    P, Q = shared_subspaces(B, A, rank)
    torch.testing.assert_close(P.mT @ P, torch.eye(rank).double())
    monkeypatch.setattr("mergekit_tspa.spaces.ctm._SMALL", 1000)
    # Where values differ, both stop at optima that are only local.
    least = 0.995 if values == "equal" else 0.99
    assert held(P, Q) > least * held(*shared_subspaces(B, A, rank))


def test_subspaces_of_nothing_are_orthonormal():
    P, Q = shared_subspaces(torch.zeros(2, 5, 2).double(), torch.zeros(2, 2, 4).double(), 3)
    torch.testing.assert_close(P.mT @ P, torch.eye(3).double())
    torch.testing.assert_close(Q.mT @ Q, torch.eye(3).double())


def test_cores():
    factors = draw([3, 5, 2], dtype=torch.float64)
    c = cores(factors)
    for f, C in zip(factors, c.C):
        torch.testing.assert_close(c.Q_B @ C @ c.Q_A.dense().mT, f.dense())


@pytest.mark.parametrize("space", SPACES)
def test_a_basis_has_one_part(space):
    factors = draw([3, 5, 2])
    basis = SPACES[space](factors)
    (part,) = basis.parts(factors, [1.0, 0.5, -2.0])
    assert part.name == "" and list(part.weights) == [1.0, 0.5, -2.0]
    for f, M in zip(factors, part.factors):
        assert relative_error(dense(basis.joined([M.dense()])), f.dense().double()) < 1e-6
    assert all(
        torch.equal(kept, side) for kept, side in zip(basis.sides().values(), sides(basis), strict=True)
    )


def test_factors_are_two_parts_whose_weights_multiply_to_an_adapters_weight():
    given, weights = draw([3, 5, 2]), [1.0, 0.25, -4.0]
    B, A = Factors().parts(given, weights)
    assert (B.name, A.name) == ("B", "A")
    for f, b, a, root, signed, weight in zip(given, B.factors, A.factors, B.weights, A.weights, weights):
        assert root * signed == weight and root > 0
        padded = f.padded(5)
        assert torch.equal(b.dense(), padded.B) and torch.equal(a.dense(), padded.A)
        update = Factors().joined([root * b.dense(), signed * a.dense()])
        assert relative_error(update.dense(), weight * f.dense()) < 1e-6
    assert Factors().sides() == {}
