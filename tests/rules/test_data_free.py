"""The rules that take the updates themselves for statistics of inputs, and DC-Merge: what holds for all."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_tspa.rules.ace import ace
from mergekit_tspa.rules.actmat import actmat, tact
from mergekit_tspa.rules.dc_merge import dc_merge
from mergekit_tspa.rules.optmerge import optmerge
from mergekit_tspa.rules.wudi import swudi, swudi_a, wudi
from tests.conftest import relative_error
from tests.rules.cases import (
    CASES,
    ELEMENTWISE,
    IN_FLOAT64,
    LAYERS,
    ROUNDING,
    WITH_SVD,
    dense,
    draw,
    drawer,
    factors,
    orthonormal,
    published,
    regauged,
    updates,
    weigh,
)

ONES = weigh(1.0, 1.0, 1.0)
MIXED = weigh(1.0, -0.5, 0.7)


def merged_by_ace(B, A, weights, **options):
    Q, X = ace(B, A, weights, **options)
    return Q @ X


def ace_of_updates(M, weights, **options):
    """ACE of updates in full size, each its own left factor."""
    return merged_by_ace(list(M), [torch.eye(M.shape[2]).to(M)] * len(M), weights, **options)


linear = partial(dc_merge, smoothing="linear")
PUBLISHED = [  # file, rule, tolerance
    ("actmat_f64", actmat, IN_FLOAT64),
    ("actmat_tact_k0.5_f64", tact, IN_FLOAT64),
    ("wudi_adam300", wudi, ELEMENTWISE),
    ("swudi_t300_r0.65_f64", partial(swudi, share=0.65), IN_FLOAT64),
    ("swudi_t10_rnone", partial(swudi, time=10.0), WITH_SVD),
    ("aswudi_psqrt", swudi_a, WITH_SVD),
    ("aswudi_entropy", partial(swudi_a, select="entropy"), WITH_SVD),
    ("optmerge_sgd300", optmerge, WITH_SVD),
    ("dcmerge_lora_avg_f64", partial(dc_merge, keep=1e-3, rank_per_task=8), IN_FLOAT64),
    ("dcmerge_lora_avg_keep0.1", partial(dc_merge, keep=0.1, rank_per_task=8), WITH_SVD),
    ("dcmerge_lora_linear5_f64", partial(linear, keep=1e-3, rank_per_task=8), IN_FLOAT64),
    ("dcmerge_lora_linear5_keep1", partial(linear, keep=1.0, rank_per_task=8), WITH_SVD),
]
UNDETERMINED = ("actmat_f64", "het", "l0")  # by the inputs, so that there is no output
EVERYWHERE = {  # rules whose result does not depend on the basis
    "actmat": actmat,
    "actmat ridge": partial(actmat, ridge=0.1),
    "actmat ridge to zero": partial(actmat, ridge=0.1, shrink_to="zero"),
    "swudi": partial(swudi, time=20.0),
    "swudi mean": partial(swudi, start="mean"),
    "swudi_a": swudi_a,
    "swudi_a entropy": partial(swudi_a, select="entropy", start="mean"),
    "optmerge": optmerge,
    "dc_merge": dc_merge,
    "dc_merge linear": partial(dc_merge, smoothing="linear", keep=0.3),
    "dc_merge none": partial(dc_merge, smoothing="none"),
}
FULL_SIZE = {
    "tact": tact,
    "tact ridge": partial(tact, ridge=0.1),
    "wudi": partial(wudi, steps=30, rate=1e-2),
    "ace": ace_of_updates,
    "ace published": partial(ace_of_updates, published=True),
    "ace by traces": partial(ace_of_updates, spread=-1.0),
}
ALL = EVERYWHERE | FULL_SIZE
OTHER_ALONE = ("actmat ridge to zero", "tact", "ace published", "dc_merge", "dc_merge linear")
OWN_UNIT = ("wudi", "ace", "ace published", "ace by traces")  # steps, or a ridge, of a given size


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("file, rule, tolerance", PUBLISHED)
def test_equals_published_output(file, rule, tolerance, case, layer):
    outputs = published(f"{file}.{case}")
    want = outputs.get(f"out.{layer}.delta")
    assert (want is None) == ((file, case, layer) == UNDETERMINED)
    if want is None:
        return
    assert relative_error(rule(updates(case, layer), torch.ones(4)), want) < tolerance


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("file, scale", [("ace_f64", 1.0), ("ace_scale0.25_f64", 0.25)])
def test_ace_equals_published_output(file, scale, case, layer):
    want = published(f"{file}.{case}")[f"out.{layer}.delta"]
    B, A = factors(case, layer)
    merged = merged_by_ace([scale * B_t for B_t in B], A, torch.ones(4), published=True)
    assert relative_error(merged, want) < IN_FLOAT64


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "file, rule, start",
    [
        ("wudi_adam300", wudi, "sum"),
        ("optmerge_sgd300", optmerge, "mean"),
    ],
)
def test_the_way_from_the_start_equals_the_published_one(file, rule, start, case, layer):
    """These stay near the sum or the mean, which any result near it would equal to a few percent."""
    M = updates(case, layer)
    begin = M.sum(0) if start == "sum" else M.mean(0)
    want = published(f"{file}.{case}")[f"out.{layer}.delta"].double() - begin
    assert relative_error(rule(M, torch.ones(4)) - begin, want) < WITH_SVD
    assert 0.01 * begin.norm() < want.norm() < 0.5 * begin.norm()


def in_full_size(name, rule, shape):
    """What a rule must be told of the full size where updates come as coordinates."""
    if name.startswith("swudi_a"):
        return partial(rule, columns=shape[1])
    if name.startswith(("optmerge", "dc_merge")):
        return partial(rule, room=min(shape))
    return rule


@pytest.mark.parametrize("weights", [ONES, MIXED])
@pytest.mark.parametrize("name, rule", EVERYWHERE.items())
def test_cores_give_what_full_size_gives(name, rule, weights):
    """Also through bases that are larger than they need be."""
    B, A = draw((3, 5, 2), 40, 30)
    M = dense(B, A)
    merged = rule(M, weights)
    rule = in_full_size(name, rule, (40, 30))
    assert relative_error(rule(M, weights), merged) < ROUNDING
    for extra in (0, 4):
        left = torch.linalg.qr(torch.cat([*B, drawer(8)(40, extra)], dim=1)).Q
        right = torch.linalg.qr(torch.cat([*A, drawer(9)(extra, 30)]).mT).Q
        left = left @ orthonormal(left.shape[1], left.shape[1], 3)
        core = left.mT @ M @ right
        assert relative_error(left @ rule(core, weights) @ right.mT, merged) < ROUNDING


@pytest.mark.parametrize("name, rule", ALL.items())
def test_order_sign_and_precision(name, rule):
    M = dense(*draw())
    merged = rule(M, MIXED)
    turned = [2, 0, 1]
    assert relative_error(rule(M[turned], MIXED[turned]), merged) < ROUNDING
    assert relative_error(rule(-M, MIXED), -merged) < ROUNDING
    assert relative_error(rule(M, -MIXED), -merged) < ROUNDING
    assert relative_error(rule(M.float(), MIXED.float()), merged) < 1e-3
    if "ace" not in name:
        assert rule(M.float(), MIXED.float()).dtype == torch.float32
    if name not in OWN_UNIT:
        assert relative_error(rule(1e-3 * M, MIXED), 1e-3 * merged) < ROUNDING


@pytest.mark.parametrize("name, rule", ALL.items())
def test_a_weight_is_a_factor_of_the_update(name, rule):
    M = dense(*draw())
    assert relative_error(rule(M, MIXED), rule(MIXED[:, None, None] * M, ONES)) < ROUNDING
    if name in OWN_UNIT:
        return
    alone = rule(M[:1], ONES[:1])
    for weight in (0.3, 2.0, -1.0):
        assert relative_error(rule(M[:1], weigh(weight)), weight * alone) < ROUNDING


@pytest.mark.parametrize("name", [name for name in ALL if name not in OTHER_ALONE])
def test_an_adapter_alone_is_its_weight_times_itself(name):
    M = dense(*draw())
    for t in range(3):
        for weight in (1.0, 0.3, -2.0):
            merged = ALL[name](M[t : t + 1], weigh(weight))
            assert relative_error(merged, weight * M[t]) < 1e-9


@pytest.mark.parametrize("name, rule", ALL.items())
def test_updates_and_weights_of_zero_take_no_part(name, rule):
    M = dense(*draw())
    M[1] = 0.0
    want = rule(M[::2], MIXED[::2])
    assert relative_error(rule(M, MIXED), want) < ROUNDING
    other = dense(*draw(seed=5))
    other[::2] = M[::2]
    assert relative_error(rule(other, weigh(1.0, 0.0, 0.7)), want) < ROUNDING
    assert not rule(0 * M, ONES).any() and rule(0 * M, ONES).shape == M.shape[1:]
    assert not rule(M, 0 * ONES).any()


@pytest.mark.parametrize("name, rule", ALL.items())
def test_defined_for_equal_and_opposite_updates(name, rule):
    M = dense(*draw((3,)))[0]
    for several in ([M, M], [M, -M], [M, M, -M], [M, M, M, M]):
        several = torch.stack(several)
        merged = rule(several, torch.ones(len(several)))
        assert merged.isfinite().all()
        assert merged.norm() < 1.01 * len(several) * M.norm()


@pytest.mark.parametrize(
    "rule, word",
    [
        (partial(actmat, shrink_to="nothing"), "shrink_to"),
        (partial(tact, shrink_to="nothing"), "shrink_to"),
        (partial(swudi, start="zero"), "start"),
        (partial(swudi_a, start="zero"), "start"),
        (partial(swudi_a, select="all"), "select"),
        (partial(dc_merge, smoothing="all"), "smoothing"),
    ],
)
def test_unknown_words(rule, word):
    with pytest.raises(ValueError, match=word):
        rule(dense(*draw()), ONES)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_small_shapes_in_cores_and_in_full_size(data, seed):
    """The rules without a cut, which small shapes may put between equal values."""
    ranks = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    d_out, d_in = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    B, A = draw(ranks, d_out, d_in, seed)
    M, weights = dense(B, A), torch.linspace(-1, 2, len(ranks)).double()
    left, right = torch.linalg.qr(torch.cat(B, dim=1)).Q, torch.linalg.qr(torch.cat(A).mT).Q
    for name in ("actmat ridge", "swudi", "swudi mean", "optmerge"):
        rule = in_full_size(name, EVERYWHERE[name], (d_out, d_in))
        merged = rule(M, weights)
        assert merged.isfinite().all()
        core = left @ rule(left.mT @ M @ right, weights) @ right.mT
        torch.testing.assert_close(core, merged, rtol=1e-7, atol=1e-7 * float(M.abs().max()))


class TestActmat:
    @staticmethod
    def on_full_matrices(M, inputs, ridge=0.0, shrink_to="mean"):
        grams = [X.mT @ X for X in inputs]
        numerator, S = sum(D @ G for D, G in zip(M, grams)), sum(grams)
        values = torch.linalg.eigvalsh(S)
        size = ridge * values[values > 1e-10 * values.max()].mean()
        if shrink_to == "mean":
            numerator = numerator + size * M.mean(0)
        return numerator @ torch.linalg.pinv(S + size * torch.eye(len(S)).double(), rtol=1e-12)

    @pytest.mark.parametrize("ridge", [0.0, 0.1])
    @pytest.mark.parametrize("shrink_to", ["mean", "zero"])
    def test_equals_the_formula(self, ridge, shrink_to):
        M = dense(*draw())
        got = actmat(M, ONES, ridge, shrink_to)
        assert relative_error(got, self.on_full_matrices(M, M, ridge, shrink_to)) < ROUNDING
        trimmed = torch.stack([D * (D.abs() >= D.abs().flatten().sort().values[-84]) for D in M])
        got = tact(M, ONES, 0.3, ridge, shrink_to)  # 84 of 280
        assert relative_error(got, self.on_full_matrices(M, trimmed, ridge, shrink_to)) < ROUNDING
        whole = tact(M, ONES, 1.0, ridge, shrink_to)
        assert relative_error(whole, actmat(M, ONES, ridge, shrink_to)) < ROUNDING

    def test_adds_what_shares_no_input_and_averages_what_shares_all(self):
        left, right = orthonormal(20, 9, 1), orthonormal(14, 9, 2)
        M = torch.stack([left[:, t : t + 3] @ right[:, t : t + 3].mT for t in (0, 3, 6)])
        assert relative_error(actmat(M, MIXED), (MIXED[:, None, None] * M).sum(0)) < ROUNDING
        P = torch.stack([left[:, t : t + 3] @ right[:, :3].mT for t in (0, 3, 6)])
        assert relative_error(actmat(P, ONES), P.mean(0)) < ROUNDING

    def test_a_ridge_keeps_nearly_shared_inputs_in_bounds(self):
        normal = drawer(3)
        shared = normal(4, 14)
        M = torch.stack([normal(20, 4) @ (shared + 1e-3 * normal(4, 14)) for _ in range(4)])
        sizes = torch.linalg.matrix_norm(M)
        ones = torch.ones(4)
        assert actmat(M, ones).norm() > 2 * sizes.sum()
        for shrink_to in ("mean", "zero"):
            assert actmat(M, ones, 0.1, shrink_to).norm() < 1.2 * sizes.mean()


class TestWudi:
    def test_takes_the_steps_of_torch(self):
        M = dense(*draw())
        merged = torch.nn.Parameter(M.sum(0).clone())
        optimizer = torch.optim.Adam([merged], lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            ((merged - M) @ M.mT).square().sum((1, 2)).div(M.square().sum((1, 2))).sum().backward()
            optimizer.step()
        got = wudi(M, ONES, steps=40, rate=1e-2)
        assert relative_error(got - M.sum(0), merged.detach() - M.sum(0)) < 1e-8

    @staticmethod
    def disturbance(merged, M):
        return float((((merged - M) @ M.mT).square().sum((1, 2)) / M.square().sum((1, 2))).sum())

    def test_the_loss_falls_from_the_sum_to_the_solution(self):
        M = dense(*draw())
        solution = swudi(M, ONES, time=1e12)
        losses = [self.disturbance(x, M) for x in (M.sum(0), wudi(M, ONES), swudi(M, ONES, 3.0), solution)]
        assert losses == sorted(losses, reverse=True) and losses[3] < losses[0] - 1
        assert self.disturbance(solution + 1e-3 * drawer(4)(20, 14), M) > losses[3]
        assert relative_error(swudi(M, ONES, time=1e-12), M.sum(0)) < 1e-9
        assert relative_error(swudi(M, ONES, time=1e-12, start="mean"), M.mean(0)) < 1e-9

    @staticmethod
    def spectrum(M):
        U = M / torch.linalg.matrix_norm(M, keepdim=True)
        return torch.linalg.eigh((U.mT @ U).sum(0)), (M @ (U.mT @ U)).sum(0)

    @pytest.mark.parametrize("share, kept", [(0.2, 3), (0.5, 7), (None, 14)])
    @pytest.mark.parametrize("start", ["sum", "mean"])
    def test_swudi_equals_its_formula(self, share, kept, start):
        M = dense(*draw())
        (e, V), E = self.spectrum(M)
        e = e.clamp(min=1e-8)
        f = (1 - torch.exp(-30 * e)) * (torch.arange(14) >= 14 - kept)
        first = getattr(M, start)(0)
        want = first - (first @ V * f) @ V.mT + (E @ V * f / e) @ V.mT
        assert relative_error(swudi(M, ONES, 30.0, share, start=start), want) < ROUNDING

    def test_swudi_counts_the_columns_of_full_size(self):
        B, A = draw((3, 5, 2), 40, 30)
        M, right = dense(B, A), torch.linalg.qr(torch.cat(A).mT).Q
        core = M @ right
        want = swudi(M, ONES, share=0.2)  # 6 of 30
        assert relative_error(swudi(core, ONES, share=0.2, columns=30) @ right.mT, want) < ROUNDING
        assert relative_error(swudi(core, ONES, share=0.2) @ right.mT, want) > 1e-2

    @pytest.mark.parametrize("select", ["participation", "entropy"])
    @pytest.mark.parametrize("start", ["sum", "mean"])
    def test_swudi_a_equals_its_formula(self, select, start):
        M = dense(*draw())
        (e, V), E = self.spectrum(M)
        e = e.clamp(min=1e-8)
        if select == "participation":
            count = e.sqrt().sum().square() / e.sum()
        else:
            count = torch.special.entr(e / e.sum()).sum().exp()
        kept = int(count.ceil())
        assert 1 < kept < 10  # of 10 directions
        V, e = V[:, -kept:], e[-kept:]
        first = getattr(M, start)(0)
        want = first - first @ V @ V.mT + E @ V / e @ V.mT
        assert relative_error(swudi_a(M, ONES, select, start=start), want) < ROUNDING

    @pytest.mark.parametrize("select", ["participation", "entropy"])
    def test_swudi_a_counts_columns_that_no_update_reaches(self, select):
        B, A = draw((3, 5, 2), 40, 30)
        M, right = dense(B, A), torch.linalg.qr(torch.cat(A).mT).Q
        options = {"select": select, "floor": 3e-3}
        want = swudi_a(M, ONES, **options)
        assert relative_error(swudi_a(M @ right, ONES, columns=30, **options) @ right.mT, want) < ROUNDING
        assert relative_error(swudi_a(M @ right, ONES, **options) @ right.mT, want) > 1e-2


class TestOptmerge:
    @pytest.mark.parametrize("room, k", [(None, 4), (9, 3), (2, 1)])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_takes_the_steps_of_torch(self, room, k, momentum):
        M = dense(*draw())
        U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        cut = (U[..., :k] * s[:, None, :k]) @ Vh[:, :k]
        merged = torch.nn.Parameter(M.mean(0).clone())
        optimizer = torch.optim.SGD([merged], lr=1e-3, momentum=momentum)
        for _ in range(60):
            optimizer.zero_grad()
            ((merged - cut) @ cut.mT).square().sum((1, 2)).div(M.square().sum((1, 2))).sum().backward()
            optimizer.step()
        got = optmerge(M, ONES, steps=60, rate=1e-3, momentum=momentum, room=room)
        assert relative_error(got - M.mean(0), merged.detach() - M.mean(0)) < 1e-9

    def test_updates_that_share_nothing_come_out_between_a_share_and_the_whole(self):
        left, right = orthonormal(20, 6, 1), orthonormal(14, 6, 2)
        M = torch.stack([left[:, t : t + 3] @ right[:, t : t + 3].mT for t in (0, 3)])
        shares = [float((optmerge(M, ONES[:2], steps) * M[0]).sum() / 3) for steps in (0, 300, 100_000)]
        assert shares == sorted(shares)
        assert shares[0] == pytest.approx(0.5) and shares[1] < 0.7 and shares[2] == pytest.approx(1.0)


class TestDcMerge:
    @pytest.mark.parametrize("keep", [None, 0.1, 1.0])
    def test_adds_what_shares_no_direction(self, keep):
        left, right = orthonormal(20, 10, 1), orthonormal(14, 10, 2)
        sizes = torch.linspace(3, 1, 10).double()
        blocks = [slice(0, 3), slice(3, 8), slice(8, 10)]
        M = torch.stack([left[:, b] * sizes[b] @ right[:, b].mT for b in blocks])
        merged = dc_merge(M, MIXED, smoothing="none", keep=keep)
        assert relative_error(merged, (MIXED[:, None, None] * M).sum(0)) < ROUNDING

    def test_by_default_as_many_entries_stay_as_an_adapter_has_directions(self):
        M = dense(*draw((4, 4, 4), 14, 13))  # 144 entries each, and little room
        got = dc_merge(M, ONES, smoothing="none")
        assert relative_error(dc_merge(M, ONES, smoothing="none", keep=4.5 / 144), got) < ROUNDING
        for count in (3.5, 5.5):
            assert relative_error(dc_merge(M, ONES, smoothing="none", keep=count / 144), got) > 1e-2

    def test_smoothing_keeps_the_sum_of_singular_values(self):
        M = dense(*draw())[1:2]
        s = torch.linalg.svdvals(M[0])[:5]
        flat = torch.linalg.svdvals(dc_merge(M, ONES[:1]))
        torch.testing.assert_close(flat[:5], s.mean().expand(5))
        for ratio in (1.2, 100.0):
            got = torch.linalg.svdvals(dc_merge(M, ONES[:1], smoothing="linear", ratio=ratio))
            torch.testing.assert_close(got[:5].sum(), s.sum())
            torch.testing.assert_close(got[0] / got[4], (s[0] / s[4]).clamp(max=ratio))
            torch.testing.assert_close(got[:4] - got[1:5], (got[0] - got[1]).expand(4))
            assert got[5:].max() < 1e-12

    def test_ranks_are_cut_where_the_room_is_too_small(self):
        M = dense(*draw())
        assert torch.linalg.matrix_rank(dc_merge(M, ONES, keep=1.0)) == 10
        assert torch.linalg.matrix_rank(dc_merge(M, ONES, keep=1.0, rank_per_task=2)) == 6
        assert torch.linalg.matrix_rank(dc_merge(M, ONES, keep=1.0, room=9)) == 8  # 3, 3 and 2

    def test_what_agrees_is_averaged_and_the_rest_left_out(self):
        """Two directions a task, in which the other has a part of the same or of the opposite sign."""
        eye = torch.eye(6).double()
        first, second = eye[:, :1] @ eye[:1], eye[:, 1:2] @ eye[1:2]
        M = torch.stack([4 * first, 2 * second])
        assert relative_error(dc_merge(M, ONES[:2], smoothing="none", keep=1.0), M.sum(0)) < ROUNDING
        # Directions that meet at an angle: the polar basis lies between, and both updates have all entries.
        c, s = 0.8, 0.6
        v = (c * eye[0] + s * eye[1])[:, None]
        M = torch.stack([4 * first, 2 * v @ v.mT])
        polar = torch.linalg.svd(torch.cat([eye[:, :1], v], dim=1), full_matrices=False)
        basis = polar.U @ polar.Vh
        N = basis.mT @ M @ basis
        assert (N[:, :2, :2].flatten(1)[:, [0, 3]] > 0).all()
        mean = N.mean(0)
        want = basis @ torch.diag(mean.diagonal()) @ basis.mT
        assert relative_error(dc_merge(M, ONES[:2], smoothing="none", keep=1.0), want) < ROUNDING
        alone = basis @ torch.diag(torch.stack([N[0, 0, 0], N[1, 1, 1]])) @ basis.mT
        assert relative_error(dc_merge(M, ONES[:2], smoothing="none"), alone) < ROUNDING
        opposite = basis @ torch.diag(torch.stack([N[0, 0, 0], -N[1, 1, 1]])) @ basis.mT
        assert relative_error(dc_merge(M, weigh(1.0, -1.0), smoothing="none", keep=1.0), opposite) < ROUNDING


class TestAce:
    @staticmethod
    def on_full_matrices(M, ridge=1e-2, spread=0.3, isotropic=0.3, published=False):
        """The rule in its literal order on updates of full size."""
        n, d_out, d_in = M.shape
        eye = torch.eye(d_in).double()
        sizes = M.square().sum((1, 2))
        logs = torch.log(sizes + 1e-12)
        by_traces = bool(logs.var() > spread * logs.mean() ** 2)
        H = M - M.mean(dim=1, keepdim=True)
        Z = H.mT @ H
        scales = torch.diagonal(Z, dim1=1, dim2=2).sum(1) + 1e-12 if by_traces else torch.ones(n).double()
        Z = Z / scales[:, None, None]
        R = Z + ridge / scales[:, None, None] * eye
        inverse = R.sum(0)
        if published:
            prior = Z.sum(0).mean(dim=0, keepdim=True) / (sizes.mean() if by_traces else 1)
            inverse = inverse + prior.expand(d_in, d_in)
        first = ((H if published else M) @ R).sum(0) @ torch.linalg.inv(inverse)
        if not by_traces:
            return first
        U, s, Vh = torch.linalg.svd(first + (M @ (Z - R.mean(0))).sum(0), full_matrices=False)
        k = int(isotropic * min(d_out, d_in))
        return first + s[:k].mean() * U[:, :k] @ Vh[:k]

    @pytest.mark.parametrize("ridge", [1e-2, 0.5])
    @pytest.mark.parametrize("options", [{}, {"spread": -1.0}, {"spread": -1.0, "isotropic": 0.2}])
    @pytest.mark.parametrize("is_published", [False, True])
    @pytest.mark.parametrize("sides", [(20, 14), (9, 14), (40, 30)])
    def test_equals_the_rule_on_full_matrices(self, options, ridge, is_published, sides):
        B, A = draw((3, 5, 2), *sides)
        options = options | {"ridge": ridge}
        want = self.on_full_matrices(MIXED[:, None, None] * dense(B, A), published=is_published, **options)
        got = merged_by_ace(B, A, MIXED, published=is_published, **options)
        assert relative_error(got, want) < 1e-9
        other = merged_by_ace(*regauged(B, A), MIXED, published=is_published, **options)
        assert relative_error(other, got) < 1e-9

    def test_the_spread_of_sizes_decides(self):
        """Two adapters of equal size are never taken to differ, of very different size they are."""
        B, A = draw((3, 3))
        sizes = torch.linalg.matrix_norm(dense(B, A))
        equal = [B[0] / sizes[0], B[1] / sizes[1] * 2]
        never = merged_by_ace(equal, A, ONES[:2], spread=float("inf"))
        assert relative_error(merged_by_ace(equal, A, weigh(1.0, 0.5)), never) > 1e-3
        far = [3 * equal[0], equal[1] / 6]
        differ, same = (merged_by_ace(far, A, ONES[:2], spread=x) for x in (0.3, float("inf")))
        assert relative_error(differ, same) > 1e-2

    def test_factors_are_thin(self):
        B, A = draw((3, 5, 2), 40, 30)
        for is_published, most in ((False, 10), (True, 11)):
            Q, X = ace(B, A, ONES, published=is_published)
            assert Q.shape == (40, 10) and X.shape == (10, 30)
            assert torch.linalg.matrix_rank(Q @ X) <= most

    def test_isotropic_part_has_no_arbitrary_direction(self):
        """More directions are asked for than the updates have, and fewer are theirs than they have columns."""
        B, A = draw((2, 1), 40, 30)
        B, A = [*B, B[0]], [*A, A[0]]
        options = {"spread": -1.0, "isotropic": 1.0}
        merged = merged_by_ace(B, A, ONES, **options)
        noise = 1e-9 * drawer(5)(40, 2)
        noisy = merged_by_ace([B[0] + noise, *B[1:]], A, ONES, **options)
        assert torch.linalg.matrix_rank(merged, rtol=1e-7) == 3
        assert relative_error(noisy, merged) < 1e-6
