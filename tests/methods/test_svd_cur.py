"""SVD + CUR against a dense evaluation, DEIM against its textbook form, and the limits in which the method is known."""

import pytest
import torch

from mergekit_tspa import InputError, LoraFactors, merge_adapters
from mergekit_tspa.methods.svd_cur import choose, cur, svd_cur
from mergekit_tspa.methods.task_arithmetic import task_arithmetic
from tests.conftest import relative_error
from tests.methods.test_closed_forms import random_factors

WEIGHTS = [1.0, -0.5, 0.7]


def deim(U):
    """Sorensen and Embree's algorithm as they write it."""
    rows = [U[:, 0].abs().argmax().item()]
    for j in range(1, U.shape[1]):
        known = torch.linalg.solve(U[rows, :j], U[rows, j])
        rows.append((U[:, j] - U[:, :j] @ known).abs().argmax().item())
    return rows


def dense_cur(E, c, select):
    U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    c = min(c, int((S > 1e-10 * S[0]).sum()))
    if select == "deim":
        I, J = deim(U[:, :c]), deim(Vh[:c].mT)  # noqa: E741
    elif select == "leverage":
        I, J = (V.square().sum(1).topk(c).indices for V in (U[:, :c], Vh[:c].mT))  # noqa: E741
    else:
        I, J = E.norm(dim=1).topk(c).indices, E.norm(dim=0).topk(c).indices  # noqa: E741
    return E[:, J] @ torch.linalg.pinv(E[:, J]) @ E @ torch.linalg.pinv(E[I]) @ E[I]


def dense_svd_cur(factors, weights, k, c, gamma, select, combine, shared):
    D = [f.dense() for f in factors]
    L = torch.linalg.svd(torch.cat(D, dim=1)).U[:, :k]
    N = torch.linalg.svd(torch.cat([d.mT for d in D], dim=1)).U[:, :k]
    S = [L @ L.mT @ d @ N @ N.mT for d in D]
    share = 1 / len(D) if shared == "mean" else 1
    if combine == "residual":
        parts = [share * s + gamma * dense_cur(d - s, c, select) for s, d in zip(S, D)]
    else:
        parts = [share * ((1 - gamma) * s + gamma * dense_cur(d, c, select)) for s, d in zip(S, D)]
    return sum(a * part for a, part in zip(weights, parts))


@pytest.mark.parametrize("select", ["deim", "leverage", "norm"])
@pytest.mark.parametrize("combine", ["residual", "interpolate"])
@pytest.mark.parametrize("shared", ["mean", "sum"])
@pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 5, 3]])
def test_equals_the_dense_formula(select, combine, shared, ranks):
    factors = random_factors(ranks, d_out=20, d_in=17)
    options = {"k": 3, "c": 2, "gamma": 0.7, "select": select, "combine": combine, "shared": shared}
    merged = svd_cur(factors, WEIGHTS, **options)
    assert merged.rank <= 3 + 3 * 2
    assert relative_error(merged.dense(), dense_svd_cur(factors, WEIGHTS, **options)) < 1e-9


def test_deim_as_in_the_textbook():
    for seed in range(20):
        U = torch.linalg.qr(
            torch.randn(30, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ).Q
        assert choose(U, torch.ones(6), 6, "deim") == deim(U)


def test_gamma_0_is_the_shared_part_alone():
    factors = random_factors([3, 3, 2])
    D = torch.stack([f.dense() for f in factors])
    L = torch.linalg.svd(torch.cat([*D], dim=1)).U[:, :3]
    N = torch.linalg.svd(torch.cat([*D.mT], dim=1)).U[:, :3]
    want = L @ L.mT @ task_arithmetic(factors, WEIGHTS).dense() @ N @ N.mT
    for combine in ("residual", "interpolate"):
        assert (
            relative_error(svd_cur(factors, WEIGHTS, gamma=0.0, shared="sum", combine=combine).dense(), want)
            < 1e-12
        )


def test_k_0_is_cur_alone():
    factors = random_factors([3, 3, 2])
    want = sum(a * dense_cur(f.dense(), 2, "deim") for a, f in zip(WEIGHTS, factors))
    merged = svd_cur(factors, WEIGHTS, k=0, c=2)
    assert merged.rank <= 6 and relative_error(merged.dense(), want) < 1e-10
    assert relative_error(want, task_arithmetic(factors, WEIGHTS).dense()) > 1e-2  # it is no other sum


@pytest.mark.parametrize("select", ["deim", "leverage", "norm"])
@pytest.mark.parametrize("k", [0, 2, 3])
def test_enough_rows_and_columns_are_task_arithmetic(select, k):
    factors = random_factors([3, 3, 2])
    merged = svd_cur(factors, WEIGHTS, k=k, c=8, select=select, shared="sum")
    assert relative_error(merged.dense(), task_arithmetic(factors, WEIGHTS).dense()) < 1e-11


@pytest.mark.parametrize("select", ["deim", "leverage", "norm"])
def test_rows_are_chosen_for_the_update_not_for_rounding(select):
    """Two rows hold nothing but rounding, and more of the second basis vector than any row holds of the first."""
    Q = torch.zeros(12, 2, dtype=torch.float64)
    Q[:10, 0], Q[10:, 1] = 10**-0.5, 2**-0.5
    C = torch.tensor([[1.0, 0.0], [0.0, 1e-17]], dtype=torch.float64)
    torch.testing.assert_close(cur(C, Q, Q, 2, select, size=C.norm()), C)


def test_gauge_order_scale_and_sign():
    f, g, h = random_factors([3, 3, 2])
    options = {"k": 2, "c": 1}
    full = svd_cur([f, g, h], WEIGHTS, **options).dense()
    G = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moved = LoraFactors(f.B @ G, torch.linalg.inv(G) @ f.A)
    assert relative_error(svd_cur([moved, g, h], WEIGHTS, **options).dense(), full) < 1e-9
    a, b, c = WEIGHTS
    assert relative_error(svd_cur([h, f, g], [c, a, b], **options).dense(), full) < 1e-9
    tiny = [x.scaled(-1e-12) for x in (f, g, h)]
    assert relative_error(svd_cur(tiny, WEIGHTS, **options).dense(), -1e-12 * full) < 1e-9


def test_equal_adapters_share_everything():
    (f,) = random_factors([3])
    merged = svd_cur([f] * 4, [1.0] * 4)
    assert merged.rank <= 3 + 4 and relative_error(merged.dense(), f.dense()) < 1e-12


@pytest.mark.parametrize("name, what", [("k", "shared singular directions"), ("c", "rows and columns")])
def test_more_than_any_tensor_has_is_refused(name, what):
    f, g = random_factors([3, 2])
    adapters = [{"m": f, "n": f}, {"m": g}]
    assert merge_adapters("svd_cur", adapters, **{name: 5})["n"].rank == 3  # the other one has fewer
    with pytest.raises(InputError, match=f"{name} 5000: the adapters have 5 {what} for a tensor at most"):
        merge_adapters("svd_cur", adapters, **{name: 5000})
