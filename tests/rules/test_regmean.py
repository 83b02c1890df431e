"""RegMean against published outputs, against the formula on full matrices, and its properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_tspa.rules.regmean import (
    DenseMetric,
    LowRankMetric,
    low_rank_moment,
    regmean,
    regmean_in_rows,
    regmean_low_rank,
    second_moment,
)
from tests.conftest import relative_error
from tests.rules.cases import (
    CASES,
    ELEMENTWISE,
    LAYERS,
    ROUNDING,
    dense,
    draw,
    drawer,
    factors,
    of_tasks,
    published,
    regauged,
    weigh,
)

ONES = weigh(1.0, 1.0, 1.0)
MIXED = weigh(1.0, -0.5, 0.7)


def product(factored):
    Q, X = factored
    return Q @ X


def moments(n=3, d=14, inputs=40, seed=1):
    """Second moments of inputs that differ between tasks and between features."""
    normal = drawer(seed)
    return [second_moment(normal(inputs, d) @ normal(d, d) * (1 + t)) for t in range(n)]


def low_rank_moments(n=3, d=14, k=4, seed=2):
    """`U`, `l` and `rest` of each task, and the matrices that they stand for."""
    U, values, rest = zip(*(low_rank_moment(C, k) for C in moments(n, d, seed=seed)))
    whole = [(u * v) @ u.mT + torch.diag(e) for u, v, e in zip(U, values, rest)]
    return U, values, rest, whole


def on_full_matrices(D, C, weights, ridge=0.0, off_diagonal=1.0):
    """The formula, literally."""
    numerator = denominator = 0
    for a, D_t, C_t in zip(weights.double(), D, C):
        diagonal = torch.diag(C_t.diagonal())
        eye = torch.eye(len(C_t)).double()
        C_t = off_diagonal * (C_t - diagonal) + diagonal + ridge * C_t.diagonal().mean() * eye
        numerator = numerator + a * D_t @ C_t
        denominator = denominator + a.abs() * C_t
    return numerator @ torch.linalg.inv(denominator)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "file, key, off_diagonal",
    [
        ("regmean", "delta", 0.95),
        ("regmean", "delta_r0.9", 0.9),
        ("regmean", "delta_r1.0", 1.0),
        ("regmean", "delta_r0.1", 0.1),
        ("regmeanpp_core", "delta", 0.95),
        ("regmeanpp_core", "delta_r1.0", 1.0),
        ("actmat_regmean", "delta", 1.0),
    ],
)
def test_equals_published_output(file, key, off_diagonal, case, layer):
    tensors = published(f"{file}.{case}")
    C = [second_moment(X) for X in of_tasks(tensors, layer, "X")]
    merged = regmean(*factors(case, layer), C, torch.ones(4), ridge=0.0, off_diagonal=off_diagonal)
    assert relative_error(product(merged), tensors[f"out.{layer}.{key}"]) < ELEMENTWISE


@pytest.mark.parametrize("key, off_diagonal", [("delta", 0.95), ("delta_r1.0", 1.0)])
def test_a_chain_of_layers_gives_the_published_regmean_plus_plus(key, off_diagonal):
    """Three linear layers with tanh; the inputs of each come out of the merged layers below."""
    tensors = published("regmeanpp_chain_f64.mlp3")
    X = [tensors[f"in.{t}.X"].double() for t in range(4)]
    for layer in range(3):
        base = tensors[f"in.base.{layer}.W"].double()
        B = [tensors[f"in.{t}.{layer}.W"].double() - base for t in range(4)]
        A = [torch.eye(base.shape[1])] * 4
        C = [second_moment(x) for x in X]
        update = product(regmean(B, A, C, torch.ones(4), ridge=0.0, off_diagonal=off_diagonal))
        assert relative_error(update, tensors[f"out.{layer}.{key}"]) < ELEMENTWISE
        bias = torch.stack([tensors[f"in.{t}.{layer}.b"].double() for t in range(4)]).mean(0)
        X = [torch.tanh(x @ (base + update).mT + bias) for x in X]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_equals_the_formula_on_full_matrices(data, seed):
    n, d_out, d_in = (data.draw(st.integers(1, most)) for most in (4, 9, 9))
    B, A = draw([data.draw(st.integers(1, 5)) for _ in range(n)], d_out, d_in, seed)
    C = moments(n, d_in, inputs=12, seed=seed + 1)
    weights = weigh(*(data.draw(st.sampled_from([-1.0, 0.0, 0.3, 2.0])) for _ in range(n)))
    weights[data.draw(st.integers(0, n - 1))] = 1.0
    off_diagonal = data.draw(st.sampled_from([0.5, 0.95, 1.0]))
    Q, X = regmean(B, A, C, weights, ridge=0.02, off_diagonal=off_diagonal)
    want = on_full_matrices(dense(B, A), C, weights, 0.02, off_diagonal)
    torch.testing.assert_close(Q @ X, want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(Q.shape[1]).double())
    assert Q.shape[1] <= min(d_out, sum(len(A_t) for A_t in A))


@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("weights", [ONES, MIXED, weigh(0.0, 2.0, 1.0)])
def test_low_rank_statistics_equal_the_matrices_they_stand_for(off_diagonal, ridge, rank, weights):
    U, values, rest, C = low_rank_moments()
    options = {"rank": rank, "ridge": ridge, "off_diagonal": off_diagonal}
    merged = product(regmean_low_rank(*draw(), U, values, rest, weights, **options))
    assert relative_error(merged, product(regmean(*draw(), C, weights, **options))) < ROUNDING


def test_low_rank_statistics_of_full_rank_are_the_moments():
    C = moments()
    U, values, rest = zip(*(low_rank_moment(C_t, 14) for C_t in C))
    want = product(regmean(*draw(), C, ONES))
    assert relative_error(product(regmean_low_rank(*draw(), U, values, rest, ONES)), want) < ROUNDING


def test_low_rank_statistics_of_unequal_ranks_and_none():
    C = moments()
    U, values, rest = zip(*(low_rank_moment(C_t, k) for C_t, k in zip(C, (0, 2, 5))))
    whole = [(u * v) @ u.mT + torch.diag(e) for u, v, e in zip(U, values, rest)]
    assert torch.equal(whole[0], torch.diag(C[0].diagonal()))
    want = product(regmean(*draw(), whole, ONES))
    assert relative_error(product(regmean_low_rank(*draw(), U, values, rest, ONES)), want) < ROUNDING


def test_low_rank_moment_keeps_the_diagonal_and_the_largest_directions():
    C = moments()[0]
    U, values, rest = low_rank_moment(C, 4)
    approximation = (U * values) @ U.mT + torch.diag(rest)
    torch.testing.assert_close(approximation.diagonal(), C.diagonal())
    torch.testing.assert_close(values, torch.linalg.eigvalsh(C).flip(0)[:4])
    torch.testing.assert_close(C @ U, U * values)
    assert rest.min() >= 0


def test_inputs_that_low_rank_statistics_never_saw():
    """A feature that is always 0 has no rest and no ridge; it carries nothing and harms nothing."""
    U, values, rest, _ = low_rank_moments()
    alive = torch.ones(14).double()
    alive[3] = 0.0
    U, rest = [u * alive[:, None] for u in U], [e * alive for e in rest]
    C = [(u * v) @ u.mT + torch.diag(e) for u, v, e in zip(U, values, rest)]
    merged = product(regmean_low_rank(*draw(), U, values, rest, ONES, ridge=0.0))
    assert merged[:, 3].abs().max() < 1e-12
    assert relative_error(merged, product(regmean(*draw(), C, ONES, ridge=0.0))) < ROUNDING


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_an_adapter_alone_is_itself(rank, off_diagonal, ridge):
    B, A = draw()
    U, values, rest, _ = low_rank_moments()
    options = {"rank": rank, "ridge": ridge, "off_diagonal": off_diagonal}
    for t in range(3):
        own = B[t] @ A[t]
        for weight, sign in ((1.0, 1), (0.3, 1), (-2.0, -1)):
            a = weigh(weight)
            whole = regmean(B[t : t + 1], A[t : t + 1], moments()[:1], a, **options)
            thin = regmean_low_rank(B[t : t + 1], A[t : t + 1], U[:1], values[:1], rest[:1], a, **options)
            assert relative_error(product(whole), sign * own) < ROUNDING
            assert relative_error(product(thin), sign * own) < ROUNDING


@pytest.mark.parametrize("weights", [ONES, MIXED])
def test_equal_statistics_give_the_weighted_mean(weights):
    B, A = draw()
    mean = (weights.double()[:, None, None] * dense(B, A)).sum(0) / weights.double().abs().sum()
    assert relative_error(product(regmean(B, A, moments()[:1] * 3, weights)), mean) < ROUNDING
    U, values, rest, _ = low_rank_moments(1)
    thin = regmean_low_rank(B, A, U * 3, values * 3, rest * 3, weights)
    assert relative_error(product(thin), mean) < ROUNDING


@pytest.mark.parametrize("rank", [None, 4])
def test_order_gauge_and_the_unit_of_the_inputs_do_not_matter(rank):
    B, A = draw()
    C = moments()
    merged = product(regmean(B, A, C, MIXED, rank))
    turned = [2, 0, 1]
    B2, A2, C2 = ([given[t] for t in turned] for given in (B, A, C))
    assert relative_error(product(regmean(B2, A2, C2, MIXED[turned], rank)), merged) < ROUNDING
    assert relative_error(product(regmean(*regauged(B, A), C, MIXED, rank)), merged) < ROUNDING
    louder = regmean(B, A, [1e6 * C_t for C_t in C], 3 * MIXED, rank)
    assert relative_error(product(louder), merged) < ROUNDING


def test_an_adapter_of_weight_zero_takes_no_part():
    B, A = draw()
    C = moments()
    got = product(regmean(B, A, C, weigh(1.0, 0.0, 2.0)))
    want = product(regmean(B[::2], A[::2], C[::2], weigh(1.0, 2.0)))
    assert relative_error(got, want) < ROUNDING
    assert not product(regmean(B, A, C, torch.zeros(3))).any()


def test_updates_and_inputs_of_zero():
    B, A = draw()
    C = moments()
    silent = [torch.zeros_like(C_t) for C_t in C]
    assert not product(regmean([0 * B_t for B_t in B], A, C, ONES)).any()
    for ridge in (0.0, 0.01):
        assert not product(regmean(B, A, silent, ONES, ridge=ridge)).any()
        got = product(regmean(B, A, [*C[:2], silent[2]], ONES, ridge=ridge))
        assert relative_error(got, product(regmean(B[:2], A[:2], C[:2], ONES[:2], ridge=ridge))) < ROUNDING


def test_each_task_has_its_own_answer_where_inputs_do_not_meet():
    B, A = draw((2, 3), 20, 14)
    X = drawer(3)(30, 14)
    first, second = X.clone(), X.clone()
    first[:, 7:], second[:, :7] = 0, 0
    merged = product(regmean(B, A, [second_moment(first), second_moment(second)], ONES[:2], ridge=0.0))
    torch.testing.assert_close(first @ merged.mT, first @ (B[0] @ A[0]).mT)
    torch.testing.assert_close(second @ merged.mT, second @ (B[1] @ A[1]).mT)


def test_without_a_ridge_fewer_inputs_than_features_are_answered_in_the_least_squares_sense():
    normal = drawer(4)
    B, A = draw()
    X = [normal(3, 14) for _ in range(3)]
    merged = product(regmean(B, A, [second_moment(x) for x in X], ONES, ridge=0.0))
    answers = torch.cat([x @ (B_t @ A_t).mT for x, B_t, A_t in zip(X, B, A)])
    want = torch.linalg.pinv(torch.cat(X)) @ answers  # 9 inputs, 14 features
    assert relative_error(merged, want.mT) < 1e-8
    # Rounding of the statistics must not be taken for inputs.
    rounded = regmean(B, A, [second_moment(x).float() for x in X], ONES, ridge=0.0)
    assert relative_error(product(rounded), want.mT) < 1e-3


def test_a_few_huge_inputs_do_not_hide_the_others():
    """Hidden states have features a thousand times larger than the rest."""
    size = torch.ones(14).double()
    size[2] = 3e3
    C = [(size[:, None] * C_t * size).float() for C_t in moments()]
    want = on_full_matrices(dense(*draw()), [C_t.double() for C_t in C], ONES, ridge=1e-6)
    assert relative_error(product(regmean(*draw(), C, ONES, ridge=1e-6)), want) < 1e-6
    small = torch.arange(14) != 2
    got = product(regmean(*draw(), C, ONES, ridge=1e-6))
    assert relative_error(got[:, small], want[:, small]) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_answer_of_a_rank_is_the_best_of_that_rank_for_the_inputs(rank):
    B, A = draw()
    C = moments()
    S = sum(a.abs() * (C_t + 0.01 * C_t.diagonal().mean() * torch.eye(14)) for a, C_t in zip(MIXED, C))
    values, V = torch.linalg.eigh(S)
    L = V * values.sqrt() @ V.mT  # a root of S that is not the kernel's own
    exact = product(regmean(B, A, C, MIXED))
    cut = regmean(B, A, C, MIXED, rank)
    bound = torch.linalg.svdvals(exact @ L)[rank:].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.matrix_norm((product(cut) - exact) @ L), bound)
    assert cut[0].shape == (20, rank) and cut[1].shape == (rank, 14)
    U, s, Vh = torch.linalg.svd(exact)
    plain = (U[:, :rank] * s[:rank]) @ Vh[:rank]
    assert torch.linalg.matrix_norm((plain - exact) @ L) > 1.01 * bound


def test_metrics_are_roots_of_their_matrix():
    normal = drawer(5)
    V, E, X = normal(14, 4), normal(14).square() + 0.1, normal(6, 14)
    S = V @ V.mT + torch.diag(E)
    for metric in (DenseMetric(S), LowRankMetric(V.clone(), E)):
        torch.testing.assert_close(metric.color(X) @ metric.color(X).mT, X @ S @ X.mT)
        torch.testing.assert_close(metric.uncolor(metric.whiten(X)), X @ torch.linalg.inv(S))
        torch.testing.assert_close(metric.uncolor(metric.color(X)), X)
    singular = DenseMetric(V @ V.mT)
    torch.testing.assert_close(singular.color(X) @ singular.color(X).mT, X @ V @ V.mT @ X.mT)
    torch.testing.assert_close(singular.uncolor(singular.whiten(X)), X @ torch.linalg.pinv(V @ V.mT))


def bottlenecks(A, X):
    stacked = torch.cat(A)
    return [second_moment(x @ stacked.mT) for x in X]


def restricted(B, A, C, weights, ridge):
    """The best answer whose rows lie in the rows of the `A_t`, on full matrices."""
    V = torch.linalg.qr(torch.cat(A).mT).Q
    projected = [V.mT @ C_t @ V for C_t in C]
    return on_full_matrices(dense(B, A) @ V, projected, weights, ridge) @ V.mT


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("weights", [ONES, MIXED])
def test_bottlenecks_give_the_best_answer_in_the_adapters_rows(ridge, weights):
    normal = drawer(6)
    B, A = draw((2, 3, 1))
    X = [normal(30, 14) @ normal(14, 14) for _ in range(3)]
    C = [second_moment(x) for x in X]
    got = product(regmean_in_rows(B, A, bottlenecks(A, X), weights, ridge=ridge))
    assert relative_error(got, restricted(B, A, C, weights, ridge)) < ROUNDING
    assert relative_error(got, product(regmean(B, A, C, weights, ridge=ridge))) > 1e-3
    other_B, other_A = regauged(B, A)
    other = regmean_in_rows(other_B, other_A, bottlenecks(other_A, X), weights, ridge=ridge)
    assert relative_error(product(other), got) < ROUNDING


def test_bottlenecks_that_span_all_inputs_or_are_shared():
    normal = drawer(8)
    X = [normal(30, 6) for _ in range(3)]
    C = [second_moment(x) for x in X]
    B, A = draw((2, 2, 2), 20, 6)
    for rank in (None, 2):
        got = product(regmean_in_rows(B, A, bottlenecks(A, X), MIXED, rank))
        assert relative_error(got, product(regmean(B, A, C, MIXED, rank))) < ROUNDING
    shared = A[:1] * 3
    got = product(regmean_in_rows(B, shared, bottlenecks(shared, X), MIXED))
    V = torch.linalg.qr(A[0].mT).Q
    want = on_full_matrices(dense(B, shared) @ V, [V.mT @ C_t @ V for C_t in C], MIXED, 0.01) @ V.mT
    assert relative_error(got, want) < ROUNDING


def test_bottlenecks_of_zero():
    normal = drawer(9)
    X = [normal(30, 14) for _ in range(3)]
    B, A = draw((2, 2, 2))
    nothing = [0 * A_t for A_t in A]
    for rank in (None, 2):
        for left, right in ((B, nothing), ([0 * B_t for B_t in B], A)):
            merged = product(regmean_in_rows(left, right, bottlenecks(right, X), ONES, rank))
            assert merged.shape == (20, 14) and not merged.any()


def test_bottlenecks_that_are_nearly_shared():
    """What tells the rows apart is less than the rounding of the statistics."""
    normal = drawer(9)
    X = [normal(30, 14) for _ in range(3)]
    B, A = draw((2, 2, 2))
    shared = A[:1] * 3
    nearly = [A[0] + 1e-6 * A_t for A_t in A]
    want = product(regmean_in_rows(B, shared, bottlenecks(shared, X), ONES))
    K = [K_t.float() for K_t in bottlenecks(nearly, X)]
    assert relative_error(product(regmean_in_rows(B, nearly, K, ONES)), want) < 1e-4


def test_second_moment():
    X = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert torch.equal(second_moment(X), torch.tensor([[5.0, 1.0], [1.0, 2.0]]).double())
    assert not second_moment(X[:0]).any()
