"""Weight matching and rotations against published outputs, and against what defines them."""

from itertools import permutations

import pytest
import torch
from safetensors.torch import load_file

from mergekit_tspa.base.geometry import AttentionGeometry
from mergekit_tspa.symmetry.align import align_attention, align_mlp
from mergekit_tspa.symmetry.blocks import Block
from mergekit_tspa.symmetry.head_rotation import commuting_rotation
from mergekit_tspa.symmetry.permutation import assign, head_likeness, match_heads, weight_matching
from tests.conftest import FIXTURES, relative_error


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turns(*shape, seed=0):
    return torch.linalg.qr(draw(*shape, seed=seed)).Q


AXES = {
    "mlp": {"up.W": ("P_0", None), "up.b": ("P_0",), "down.W": (None, "P_0"), "down.b": (None,)},
    "gated": {"gate.W": ("P", None), "up.W": ("P", None), "down.W": (None, "P")},
    "mlp2": {
        "fc0.W": ("P_0", None),
        "fc0.b": ("P_0",),
        "fc1.W": ("P_1", "P_0"),
        "fc1.b": ("P_1",),
        "fc2.W": (None, "P_1"),
    },
}


@pytest.mark.parametrize("case", AXES)
def test_weight_matching_equals_published_output(case):
    tensors = load_file(FIXTURES / f"gitrebasin_{case}_planted.mlp.safetensors")
    a, b = ({W: tensors[f"in.{side}.{W}"] for W in AXES[case]} for side in "ab")
    found = weight_matching(b, a, AXES[case])
    assert found.keys() == {P for of in AXES[case].values() for P in of if P}
    for P, p in found.items():
        assert torch.equal(p, tensors[f"out.{P}.perm"])
    for W, of in AXES[case].items():
        for i, P in enumerate(of):
            b[W] = b[W].index_select(i, found[P]) if P else b[W]
        assert torch.equal(b[W], tensors[f"out.{W}"])


def test_units_of_an_mlp_equal_published_output():
    tensors = load_file(FIXTURES / "rotation_ffn_perm.safetensors")

    def rows(side):
        up = torch.cat([tensors[f"{side}.W_I"], tensors[f"{side}.B_I"][:, None]], 1)
        return {"up": up, "down": tensors[f"{side}.W_O_FFN"].T}

    maps = align_mlp(rows("in.local"), rows("in.anchor"))
    for role, X in rows("in.local").items():
        assert torch.equal(maps[role](X), rows("out")[role])


def block(n, m, d, rotary_dim=0, lacks=None):
    return Block("attention", {}, AttentionGeometry(n, m, d, rotary_dim), lacks or {})


@pytest.mark.parametrize("scaling", [0, 1])
@pytest.mark.parametrize("case", ["other", "rotated", "rotscaled"])
def test_heads_equal_published_output(case, scaling):
    tensors = load_file(FIXTURES / f"rotation_{case}_scaling{scaling}.safetensors")

    def rows(side):
        W, b = ({x: tensors[f"{side}.{kind}_{x.upper()}"] for x in "qkvo"} for kind in "WB")
        return {x: W[x].T if x == "o" else torch.cat([W[x], b[x][:, None]], 1) for x in "qkvo"}

    kinds = ("rotation", "scale") if scaling else ("rotation",)
    maps = align_attention(rows("in.local"), rows("in.anchor"), block(4, 4, 8), kinds)
    for role, X in rows("in.local").items():
        assert relative_error(maps[role](X), rows("out")[role]) < 1e-5


def test_no_permutation_is_better():
    for seed in range(5):
        S = draw(5, 5, seed=seed)
        best = max(sum(S[i, j].item() for i, j in enumerate(p)) for p in permutations(range(5)))
        assert abs(S[torch.arange(5), assign(S)].sum().item() - best) < 1e-5
    p = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assign(torch.eye(50)[p]), p)


def test_groups_move_as_a_whole_and_heads_inside_them():
    S = draw(6, 6)
    groups, heads = match_heads(S, 3)
    best = max(
        sum(
            max(S[2 * i, 2 * g] + S[2 * i + 1, 2 * g + 1], S[2 * i, 2 * g + 1] + S[2 * i + 1, 2 * g]).item()
            for i, g in enumerate(p)
        )
        for p in permutations(range(3))
    )
    assert abs(S[torch.arange(6), heads].sum().item() - best) < 1e-5
    assert torch.equal(heads.view(3, 2) // 2, groups[:, None].expand(3, 2))


def test_likeness_does_not_depend_on_rotations():
    X, Y, X_0, Y_0 = draw(4, 3, 7), draw(2, 3, 5, seed=1), draw(4, 3, 7, seed=2), draw(2, 3, 5, seed=3)
    got = head_likeness(X, Y, X_0, Y_0)
    P, P_0 = (torch.stack([A[i].T @ B[i // 2] for i in range(4)]) for A, B in ((X, Y), (X_0, Y_0)))
    torch.testing.assert_close(got, P_0.flatten(1) @ P.flatten(1).T / (P.norm() * P_0.norm()))
    R = turns(2, 3, 3)
    torch.testing.assert_close(head_likeness(R.repeat_interleave(2, 0) @ X, R @ Y, X_0, Y_0), got)


def rope(d, rotary_dim, position):
    """The rotation of a rotary embedding, as transformers writes it."""
    angles = position / 100 ** (torch.arange(rotary_dim // 2) / (rotary_dim // 2))
    cos, sin = torch.cat([angles, angles]).cos().diag(), torch.cat([angles, angles]).sin().diag()
    half = torch.zeros(rotary_dim, rotary_dim)
    i = torch.arange(rotary_dim // 2)
    half[i, i + rotary_dim // 2], half[i + rotary_dim // 2, i] = -1.0, 1.0
    R = torch.eye(d)
    R[:rotary_dim, :rotary_dim] = cos + sin @ half
    return R


@pytest.mark.parametrize("rotary_dim", [0, 4, 8])
def test_rotations_commute_with_the_rotary_embedding(rotary_dim):
    X, X_0 = draw(3, 8, 20).double(), draw(3, 8, 20, seed=1).double()
    R = commuting_rotation(X, X_0, rotary_dim)
    torch.testing.assert_close(R @ R.mT, torch.eye(8).double().expand(3, 8, 8))
    for position in (1, 7):
        P = rope(8, rotary_dim, position).double()
        torch.testing.assert_close(R @ P, P @ R, atol=1e-6, rtol=0)
    # a planted one is found, and no other one is nearer
    planted = commuting_rotation(draw(3, 8, 20, seed=2).double(), X_0, rotary_dim)
    torch.testing.assert_close(commuting_rotation(planted @ X, X, rotary_dim), planted.mT)
    best = (R @ X - X_0).norm()
    for seed in range(10):
        other = commuting_rotation(draw(3, 8, 20, seed=10 + seed).double(), X_0, rotary_dim)
        assert (other @ X - X_0).norm() > best
        near = torch.linalg.matrix_exp(0.01 * (other - other.mT))
        assert (near @ R @ X - X_0).norm() > best


def test_a_head_of_zeros_stays():
    X = torch.zeros(2, 8, 5)
    torch.testing.assert_close(commuting_rotation(X, X, 4), torch.eye(8).expand(2, 8, 8))
    rows = {x: torch.zeros(16, 5) for x in "qkvo"}
    maps = align_attention(rows, rows, block(2, 2, 8, 8), ("permutation", "rotation", "scale"))
    assert all(map.still for map in maps.values())


@pytest.mark.parametrize("rotary_dim", [0, 6, 8])
def test_planted_heads_are_found(rotary_dim):
    """Groups and heads change places, are turned and scaled; what is not asked for is left."""
    n, m, d = 6, 3, 8
    anchor = {x: draw((n if x in "qo" else m) * d, 16, seed=i) for i, x in enumerate("qkvo")}
    groups = torch.tensor([2, 0, 1])
    heads = torch.tensor([5, 4, 0, 1, 3, 2])
    R = {
        "qk": commuting_rotation(draw(m, d, 9), draw(m, d, 9, seed=1), rotary_dim),
        "vo": turns(m, d, d, seed=3),
    }
    k = torch.tensor([0.5, 1.3, 2.0])[:, None, None]
    model = {}
    for x, power in (("q", 1), ("k", -1), ("v", 1), ("o", -1)):
        T = k**power * R["qk" if x in "qk" else "vo"]
        many = x in "qo"
        units = anchor[x].unflatten(0, (-1, d))[heads if many else groups]
        model[x] = ((T.repeat_interleave(2, 0) if many else T) @ units).flatten(0, 1)
    every = ("permutation", "rotation", "scale")
    maps = align_attention(model, anchor, block(n, m, d, rotary_dim), every)
    for x in "qkvo":
        assert relative_error(maps[x](model[x]), anchor[x]) < 1e-5
    assert torch.equal(maps["k"].p, groups.argsort()) and torch.equal(maps["q"].p, heads.argsort())
    fixed = block(n, m, d, rotary_dim, {"permutation": "", "rotation": "", "scale": ""})
    held = align_attention(model, anchor, fixed, every)
    assert held["q"].still and held["k"].still and held["v"].R is not None


def test_fine_tunes_are_left_as_they_are():
    """What is left between two fine-tunes fits a rotation by some degrees, by which nothing is turned."""
    anchor = {x: draw(32, 40, seed=i) for i, x in enumerate("qkvo")}
    model = {x: X + 0.5 * draw(32, 40, seed=9 + i) for i, (x, X) in enumerate(anchor.items())}
    for rotary_dim in (0, 8):
        maps = align_attention(
            model, anchor, block(4, 4, 8, rotary_dim), ("permutation", "rotation", "scale")
        )
        assert all(map.still for map in maps.values())
    other = {x: draw(32, 40, seed=20 + i) for i, x in enumerate("qkvo")}
    maps = align_attention(other, anchor, block(4, 4, 8), ("rotation",))
    assert not any(map.still for map in maps.values())
