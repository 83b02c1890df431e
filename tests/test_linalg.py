"""Bases that are not formed are as orthonormal as a QR's, also where columns nearly depend on each other."""

import pytest
import torch

from mergekit_tspa.linalg import gram, leading_left, span
from mergekit_tspa.updates import LowRank


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrices():
    tall = draw(60, 8)
    yield "well conditioned", tall
    yield "columns of other sizes", tall * torch.logspace(-12, 12, 8)
    yield "nearly dependent", torch.cat([tall, tall + 1e-5 * draw(60, 8, seed=1)], dim=1)
    yield "equal columns", torch.cat([tall, tall], dim=1)
    yield "a column of zeros", torch.cat([tall, torch.zeros(60, 1)], dim=1)
    yield "more columns than rows", draw(8, 20)
    yield "nothing", torch.zeros(10, 3)


@pytest.mark.parametrize("X", [pytest.param(X, id=name) for name, X in matrices()])
def test_a_span_is_a_qr(X):
    Q, R = span(X)
    q = min(X.shape)
    assert Q.shape == (len(X), q) and R.shape == (q, X.shape[1])
    torch.testing.assert_close(Q.dense().mT @ Q.dense(), torch.eye(q).double(), atol=1e-8, rtol=0)
    error = (Q @ R - X.double()).norm(dim=0)
    assert (error <= 1e-9 * X.double().norm(dim=0)).all()
    Y = draw(len(X), 5, seed=2)
    torch.testing.assert_close(Q.project(Y), Q.dense().mT @ Y.double(), atol=1e-9, rtol=1e-9)
    P = torch.linalg.qr(draw(q, 2, seed=3).double()).Q
    torch.testing.assert_close(Q.turned(P).dense(), Q @ P)


def test_only_dependent_columns_need_a_qr(monkeypatch):
    called = []
    monkeypatch.setattr(torch.linalg, "qr", lambda X: called.append(X.shape) or (X, X[:0]))
    for name, X in matrices():
        called.clear()
        span(X)
        assert bool(called) == (
            name in ("nearly dependent", "equal columns", "a column of zeros", "nothing")
        ), name


@pytest.mark.parametrize("X", [pytest.param(X, id=name) for name, X in matrices()])
def test_a_span_of_products_in_float32(X):
    Q, R = span(X, single=True)
    q = min(X.shape)
    torch.testing.assert_close(
        Q.dense().double().mT @ Q.dense().double(), torch.eye(q).double(), atol=3e-6, rtol=0
    )
    assert ((Q @ R - X.double()).norm(dim=0) <= 3e-6 * X.double().norm(dim=0)).all()
    Y = draw(len(X), 5, seed=2)
    torch.testing.assert_close(Q.project(Y), Q.dense().double().mT @ Y.double(), atol=1e-4, rtol=1e-4)


def test_products_are_in_float32_only_where_that_suffices():
    single = {name for name, X in matrices() if span(X, single=True)[0].X.dtype == torch.float32}
    assert single == {"well conditioned", "columns of other sizes"}
    tiny = next(X for _, X in matrices()) * 1e-20
    assert span(tiny, single=True)[0].X.dtype == torch.float64
    assert all(span(X)[0].X.dtype == torch.float64 for _, X in matrices())


def test_a_cut_of_products_in_float32_is_that_of_float64():
    update = LowRank(draw(5000, 24), draw(24, 3000, seed=1))
    cut, exact = update.truncated(6).dense().double(), LowRank(*update.to(torch.float64)).truncated(6).dense()
    assert (cut - exact).norm() <= 3e-6 * exact.norm()


@pytest.mark.parametrize("shape", [(30, 7), (7, 300), (5, 128), (5, 129)])
def test_gram(shape):
    X = draw(*shape).double()
    torch.testing.assert_close(gram(X), X.mT @ X)


def test_leading_left():
    R = draw(6, 9).double()
    U, S, _ = torch.linalg.svd(R)
    P, values = leading_left(R, 4)
    torch.testing.assert_close(values, S[:4])
    torch.testing.assert_close((P.mT @ U[:, :4]).abs(), torch.eye(4).double(), atol=1e-9, rtol=0)


def test_an_update_between_bases_is_the_update():
    update = LowRank(draw(30, 6), draw(6, 20, seed=1))
    spanned = update.spanned()
    assert spanned.rank == 6 and spanned.shape == (30, 20)
    torch.testing.assert_close(spanned.norm(), update.norm())
    for whole in (spanned.low_rank(), spanned.truncated(6), spanned.scaled(2.0).truncated(6).scaled(0.5)):
        torch.testing.assert_close(whole.dense(), update.dense(), atol=1e-4, rtol=1e-4)
    U, S, Vh = torch.linalg.svd(update.dense())
    torch.testing.assert_close(update.truncated(2).dense(), (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-4, rtol=1e-4)
    cut = update.truncated(2)
    torch.testing.assert_close(cut.B.mT @ cut.B, cut.A @ cut.A.mT, atol=1e-4, rtol=1e-4)  # balanced


def test_a_truncated_zero_is_zero():
    assert not LowRank(torch.zeros(9, 4), torch.zeros(4, 7)).truncated(2).dense().any()
