"""Rules in spaces: what holds for every combination, and what is asked of a merge as a whole."""

import json
import logging
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mergekit_tspa import METHODS, InputError, LoraFactors, merge_adapters
from mergekit_tspa.commands.main import main
from mergekit_tspa.methods.rules import RULES
from mergekit_tspa.methods.spaces import FACTOR_SPACE, UPDATE_SPACES
from mergekit_tspa.rules import stream
from mergekit_tspa.rules.breadcrumbs import breadcrumbs
from mergekit_tspa.rules.pcb import pcb
from mergekit_tspa.rules.prune import magnitude_prune
from mergekit_tspa.spaces.core import core
from tests.conftest import merge, recipe, relative_error, run, save_adapter, save_llama

LOSSLESS = ("lora", "knots", "core")
COMBINATIONS = [f"{space.name}_{rule.name}" for space in UPDATE_SPACES for rule in RULES]
FACTOR = [f"factor_{rule.name}" for rule in RULES if FACTOR_SPACE.takes(rule)]


def draw(ranks, seed=0, d_out=20, d_in=14):
    g = torch.Generator().manual_seed(seed)
    return [
        {"m": LoraFactors(torch.randn(d_out, r, generator=g), torch.randn(r, d_in, generator=g))}
        for r in ranks
    ]


def dense(method, adapters, weights=None, **parameters):
    return merge_adapters(method, adapters, weights, **parameters)["m"].dense().double()


def test_every_combination_is_a_method():
    assert {*COMBINATIONS, *FACTOR} <= METHODS.keys()
    assert FACTOR == ["factor_ties", "factor_magnitude_prune", "factor_dare_linear", "factor_dare_ties"]


@pytest.mark.parametrize("method", [*COMBINATIONS, *FACTOR])
def test_defined_for_one_equal_opposite_and_zero_updates(method):
    (f,) = draw([3])
    minus = {"m": f["m"].scaled(-1.0)}
    nothing = {"m": LoraFactors(torch.zeros(20, 3), torch.randn(3, 14))}
    for adapters in ([f], [f, f], [f, f, f, f], [f, minus], [f, f, minus], [f, nothing], [nothing, nothing]):
        assert dense(method, adapters).isfinite().all()
    for other in (1.0, 0.3):
        assert dense(method, [f, minus], [1.0, other]).isfinite().all()
    assert not dense(method, [nothing]).any() and not dense(method, [nothing, nothing]).any()


@pytest.mark.parametrize(
    "method", [m for m in [*COMBINATIONS, *FACTOR] if "seed" not in METHODS[m].parameter_fields()]
)
def test_a_zero_adapter_takes_no_part(method, caplog):
    f, g = draw([3, 3])
    nothing = {"m": LoraFactors(torch.zeros(20, 3), torch.randn(3, 14))}
    alone = dense(method, [f, g])
    assert "is zero" not in caplog.text
    torch.testing.assert_close(dense(method, [f, nothing, g]), alone)
    assert "adapter 1: its update of 1 weights is zero, m.weight among them" in caplog.text


@pytest.mark.parametrize("space", ["lora", "knots", "core", "ctm"])
@pytest.mark.parametrize("rule", ["mean", "ties", "emr", "tsv"])
def test_equal_adapters_give_that_adapter(space, rule):
    (f,) = draw([3])
    # In the three dimensions of Compress-then-Merge an equal share would be less than one triplet each.
    parameters = {"ties": {"density": 1.0}, "tsv": {"rank_per_task": 3} if space == "ctm" else {}}.get(
        rule, {}
    )
    assert relative_error(dense(f"{space}_{rule}", [f] * 4, **parameters), f["m"].dense()) < 1e-5


@pytest.mark.parametrize("rule", ["task_arithmetic", "mean", "tsv", "iso", "cart"])
def test_rules_that_do_not_depend_on_the_basis(rule):
    adapters = draw([3, 5, 2])
    want = dense(f"lora_{rule}", adapters, [1.0, 0.5, 0.7])
    for space in ("knots", "core"):
        assert relative_error(dense(f"{space}_{rule}", adapters, [1.0, 0.5, 0.7]), want) < 1e-5
    assert relative_error(dense(f"ctm_{rule}", adapters, [1.0, 0.5, 0.7], rank=10), want) < 1e-5


@pytest.mark.parametrize("method", [m for m in COMBINATIONS if "seed" not in METHODS[m].parameter_fields()])
def test_independent_of_the_gauge(method):
    """`(B G, G^-1 A)` is the same update; Core Space sees only its balanced form alike."""
    adapters = draw([3, 4])
    G = draw([3], 7, 3, 3)[0]["m"].B + 3 * torch.eye(3)
    f = adapters[0]["m"]
    moved = [{"m": LoraFactors(f.B @ G, torch.linalg.inv(G) @ f.A)}, adapters[1]]
    parameters = {"balance": True} if method.startswith("core") else {}
    assert relative_error(dense(method, moved, **parameters), dense(method, adapters, **parameters)) < 1e-3


@pytest.mark.parametrize("method", COMBINATIONS)
def test_output_rank_is_the_promised_one(method):
    update = merge_adapters(method, draw([3, 4]))["m"]
    promised = {"full (dense)": 14, "sum of ranks": 7, "`rank`": 4}[METHODS[method].result.label]
    assert update.rank <= promised
    assert (type(update).__name__ == "Dense") == METHODS[method].result.dense
    if not METHODS[method].record or method.startswith("ctm"):
        assert merge_adapters(method, draw([3, 4]), rank=2)["m"].rank <= 2


def whole_numbers(ranks):
    """Adapters whose updates are whole numbers, exact in float32 in whatever order their products are summed."""
    return [{"m": LoraFactors(a["m"].B.round(), a["m"].A.round())} for a in draw(ranks)]


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("method", ["lora_ties", "lora_pcb", "knots_ties", "lora_emr", "lora_breadcrumbs"])
def test_blocks_change_nothing(method, rows, monkeypatch):
    """Many entries are equal to a threshold.  PCB's tanh and exp, and the coordinates of KnOTS, are rounded."""
    exact = method in ("lora_ties", "lora_emr", "lora_breadcrumbs")
    adapters = draw([3, 4, 2]) if method == "knots_ties" else whole_numbers([3, 4, 2])
    whole = dense(method, adapters)
    monkeypatch.setitem(stream.BLOCK, "cpu", rows * 14)
    blocks = dense(method, adapters)
    assert torch.equal(blocks, whole) if exact else relative_error(blocks, whole) < 1e-5


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_an_entry_at_a_threshold_is_kept_whatever_the_blocks(rows, scope, monkeypatch):
    """Products round by the shape of their block; the pass that counts and the pass that merges see the same."""
    monkeypatch.setitem(stream.BLOCK, "cpu", rows * 14)
    for seed in range(10):
        (adapter,) = draw([9], seed)
        for density in (0.1, 0.5, 0.77):
            merged = dense("lora_magnitude_prune", [adapter], density=density, scope=scope)
            # More are kept where magnitudes are equal, never fewer.
            assert (merged != 0).sum() >= int(density * 280) + 1


@pytest.mark.parametrize(
    "method", ["lora_dare_linear", "core_dare_ties", "knots_della", "factor_dare_linear"]
)
def test_draws_depend_on_seed_and_names_only(method):
    adapters = draw([3, 3])
    once, again = (dense(method, adapters) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(dense(method, adapters, seed=7), once)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    dense(method, adapters)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert relative_error(dense(method, [{**a, "a": a["m"]} for a in adapters]), once) == 0


def test_dare_is_unbiased():
    adapters = draw([3, 3])
    merged = sum(dense("lora_dare_linear", adapters, density=0.5, seed=s) for s in range(300)) / 300
    want = dense("lora_task_arithmetic", adapters)
    assert (merged - want).abs().max() < 5 * want.abs().max() / 300**0.5


def flat_ties(adapters, names, density):
    """TIES of whole flattened models, by sorting."""
    M = torch.stack([torch.cat([a[n].dense().flatten() for n in names]) for a in adapters])
    kept = M.abs() >= M.abs().sort(1).values[:, [M.shape[1] - int(density * M.shape[1]) - 1]]
    P = M * kept
    agree = P.sign() == P.sum(0).sign()
    merged = (P * agree).sum(0) / (agree & (P != 0)).sum(0).clamp(min=1)
    parts = merged.split([a.shape[0] * a.shape[1] for a in adapters[0].values()])
    return {n: part.view(adapters[0][n].shape) for n, part in zip(names, parts)}


def test_scope_model_takes_thresholds_over_all_weights():
    names = ["m", "n"]
    small = draw([3, 3, 3], 1, 6, 8)
    adapters = [{"m": a["m"], "n": b["m"].scaled(0.2)} for a, b in zip(draw([3, 3, 3]), small)]
    want = flat_ties(adapters, names, 0.3)
    got = merge_adapters("lora_ties", adapters, density=0.3, scope="model")
    for n in names:
        assert relative_error(got[n].dense(), want[n]) < 1e-6
    tensorwise = merge_adapters("lora_ties", adapters, density=0.3)
    assert relative_error(tensorwise["n"].dense(), want["n"]) > 0.1


@pytest.mark.parametrize("method", [m for m in COMBINATIONS if METHODS[m].survey])
def test_scope_model_with_adapters_of_different_modules(method):
    a, b, c = draw([3, 3, 2])
    merged = merge_adapters(method, [{"m": a["m"], "n": b["m"]}, {"n": c["m"]}, {"m": c["m"]}], scope="model")
    assert all(update.dense().isfinite().all() and update.dense().any() for update in merged.values())
    single = merge_adapters(method, [{"m": a["m"]}, {"m": b["m"]}], scope="model")
    assert relative_error(single["m"].dense(), dense(method, [a, b])) < 1e-6


def test_shares_of_directions_do_not_depend_on_the_basis():
    """Adapters that share their `A`, or all of it: the small bases shrink, the result does not."""
    shared = draw([3])[0]["m"].A
    adapters = [{"m": LoraFactors(a["m"].B, shared)} for a in draw([3, 3, 3], 4)]
    for rule in ("tsv", "cart", "iso"):
        want = dense(f"lora_{rule}", adapters)
        for space in ("knots", "core"):
            assert relative_error(dense(f"{space}_{rule}", adapters), want) < 1e-5
    (f,) = draw([3])
    for n in (1, 2, 4):
        assert relative_error(dense("core_tsv", [f] * n), f["m"].dense()) < 1e-5


@pytest.mark.parametrize("method", [m for m in COMBINATIONS if METHODS[m].survey and not METHODS[m].record])
def test_scope_model_sees_what_is_merged(method):
    """One weight is the whole model, with Pico before as without; and no update at all is no failure."""
    adapters = draw([3, 4, 2])
    for pico in (False, True):
        tensor, model = (dense(method, adapters, scope=scope, pico=pico) for scope in ("tensor", "model"))
        assert relative_error(model, tensor) < 1e-6
    nothing = {"m": LoraFactors(torch.zeros(20, 3), torch.randn(3, 14))}
    assert not dense(method, [nothing], scope="model").any()


def test_bad_input():
    f, g = draw([3, 2])
    for call, message in [
        (lambda: merge_adapters("lora_mean", [f, f, g], [0.1, 0.2, -0.3]), "add up to 0"),
        (lambda: merge_adapters("core_iso", [f, g], svc=True), "svc after iso"),
        (lambda: merge_adapters("knots_emr", [f, g], rank=2), "masks of the tasks"),
        (lambda: merge_adapters("factor_ties", [f, g]), "needs adapters of equal rank"),
        (lambda: merge_adapters("lora_ties", [f], density=0.0), "density: 0.0"),
        (lambda: merge_adapters("lora_ties", [f], density=1.5), "density: 1.5"),
        (lambda: merge_adapters("lora_della", [f], density=0.95), "must lie inside"),
        (
            lambda: merge_adapters("ctm_ties", [f, g], rank=6),
            "rank 6: the merged updates carry rank 5 at most",
        ),
        (lambda: merge_adapters("core_tsv", [f, g], rank=6), "carry rank 5"),
        (lambda: merge_adapters("lora_ties", [f, g], rank=15), "carry rank 14"),
        (lambda: merge_adapters("core_mean", [f, g], [1.0, -1.0]), "add up to 0"),
        (lambda: merge_adapters("lora_tie", [f]), "no method 'lora_tie'"),
        (lambda: merge_adapters("core_ties", [f], rank_per_task=3), "no parameter 'rank_per_task'"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize(
    "method, name, hint",
    [
        ("core_tsv", "normalize", "normalize is a parameter of core_ties, core_dare_ties, core_della"),
        ("core_tsv", "normalise", "normalize is a parameter of core_ties, core_dare_ties, core_della"),
        ("core_tsv", "orthogonalise", "did you mean orthogonalize?"),
        ("knots_ties", "lamda", "did you mean lambda?"),
        ("rotation", "clusters", "clusters is a parameter of lora_lego"),
        ("rotation", "density", "density is a parameter of robustmerge, robustmerge_code, tact, lora_ties"),
        ("lora_mean", "zzz", "it has weight, lambda"),
    ],
)
def test_a_hint_is_a_misspelling_or_names_the_methods_that_have_it(method, name, hint):
    with pytest.raises(InputError, match=re.escape(f"{method} has no parameter {name!r}; {hint}")):
        merge_adapters(method, draw([3]), **{name: 1})


def test_weights_of_both_signs_are_explained(caplog):
    f, g = draw([3, 2])
    merge_adapters("lora_ties", [f, g], [1.0, -0.5])
    assert "weights of both signs (m.weight: 1, -0.5)" in caplog.text
    caplog.clear()
    merge_adapters("lora_task_arithmetic", [f, g], [1.0, -0.5])
    merge_adapters("lora_ties", [f, g], [-1.0, -0.5])
    assert not caplog.text


def adapter_updates(folder):
    """`{base tensor: dense update}` of a saved adapter, by hand."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        f"{name.removeprefix('base_model.model.')}.weight": 2.0
        * tensors[f"{name}.lora_B.weight"]
        @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


def rebuild(*arguments):
    return CliRunner().invoke(main, ["emr-task", *map(str, arguments)])


@pytest.mark.parametrize(
    "space, scope, dtype",
    [("lora", "tensor", "float32"), ("lora", "model", "float32"), ("lora", "model", "bfloat16")],
)
def test_emr_writes_masks_from_which_every_task_comes_back(space, scope, dtype, llama, adapters, tmp_path):
    """`uni * mask * scale`, by the stock command and the rebuilding command; to 1e-3 of the paper's formula."""
    zero = save_adapter(llama, tmp_path / "zero", seed=8)
    tensors = load_file(zero / "adapter_model.safetensors")
    key = next(k for k in tensors if "layers.0" in k and "q_proj.lora_B" in k)
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, zero / "adapter_model.safetensors")
    both = [adapters[0], zero]
    settings = {"parameters": {"scope": scope, "lambda": 0.5}, "dtype": dtype}
    result = merge(recipe(f"{space}_emr", llama, both, **settings), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/emr_masks.safetensors").is_file()
    rebuilt = rebuild(tmp_path / "out", "zero")
    assert rebuilt.exit_code == 0, rebuilt.output
    base = load_file(llama / "model.safetensors")
    got = load_file(tmp_path / "out-zero/model.safetensors")
    updates = [adapter_updates(a) for a in both]
    own, masked, unified = {}, {}, {}
    for name in updates[0]:
        M = torch.stack([u[name] for u in updates if u[name].any()])
        g = torch.where(M.sum(0) > 0, 1.0, -1.0)
        mask = M * g > 0
        unified[name] = g * (M * mask).abs().amax(0), mask[-1]
        own[name], masked[name] = M[-1].abs().mean(), (unified[name][0] * mask[-1]).abs().mean()
    second = {name for name in updates[1] if updates[1][name].any()}
    assert len(second) == len(updates[1]) - 1
    for name in got:
        if name not in second:
            assert torch.equal(got[name].float(), base[name].to(got[name].dtype).float())
            continue
        uni, mask = unified[name]
        within = second if scope == "model" else [name]
        scale = sum(own[n] for n in within) / sum(masked[n] for n in within)
        want = base[name] + 0.5 * uni * mask * scale
        assert relative_error(got[name], want.to(got[name].dtype)) < 1e-3
        if dtype == "float32":
            assert relative_error(got[name] - base[name], want - base[name]) < 1e-3


def test_damaged_emr_merges_are_refused_in_one_sentence(llama, adapters, tmp_path):
    whole = tmp_path / "whole"
    assert merge(recipe("knots_emr", llama, adapters[:2]), whole).exit_code == 0
    masks = load_file(whole / "emr_masks.safetensors")
    key = next(key for key in masks if "q_proj" in key and key.endswith(".unified"))
    other = save_llama(tmp_path / "other", hidden_size=32)
    described = json.loads((whole / "emr_tasks.json").read_text())
    damages = {
        "not readable as JSON": lambda d: (d / "emr_tasks.json").write_text("{"),
        "emr_tasks.json: weights: Field required": lambda d: (d / "emr_tasks.json").write_text(
            '{"base_model": "x"}'
        ),
        "it lacks unified of": lambda d: save_file(
            {k: v for k, v in masks.items() if k != key}, d / "emr_masks.safetensors"
        ),
        "no model.safetensors or": lambda d: (d / "model.safetensors").unlink(),
        "model.safetensors: damaged": lambda d: (d / "model.safetensors").write_bytes(b"0"),
        "put the base of the merge there again": lambda d: (d / "emr_tasks.json").write_text(
            json.dumps(described | {"base_model": str(other)})
        ),
    }
    for i, (said, damage) in enumerate(damages.items()):
        damage(shutil.copytree(whole, tmp_path / str(i)))
        result = rebuild(tmp_path / str(i), "one")
        assert isinstance(result.exception, SystemExit) and said in result.output, (said, result.exception)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith((f"{i}-", f".{i}-"))]


@pytest.mark.parametrize("space", ["knots", "core", "ctm"])
def test_emr_in_small_coordinates(space, llama, adapters, tmp_path):
    """By the commands as a user has them; the tasks come back closer than the unified model is to them."""
    result = merge(recipe(f"{space}_emr", llama, adapters[:2]), tmp_path / "out")
    assert result.exit_code == 0, result.output
    if space == "core":
        result = run(
            "mergekit-tspa", "emr-task", tmp_path / "out", adapters[0], "--out", tmp_path / "out-one"
        )
        assert result.returncode == 0, result.stderr
    else:
        assert rebuild(tmp_path / "out", "one").exit_code == 0
    base, unified, task = (
        load_file(f / "model.safetensors") for f in (llama, tmp_path / "out", tmp_path / "out-one")
    )
    distance = {"task": 0.0, "unified": 0.0}
    for name, update in adapter_updates(adapters[0]).items():
        distance["task"] += (task[name] - base[name] - update).square().sum()
        distance["unified"] += (unified[name] - base[name] - update).square().sum()
    assert distance["task"] < distance["unified"]
    assert not (tmp_path / "out-one/emr_masks.safetensors").exists()


def test_emr_task_refuses_what_it_cannot_rebuild(llama, adapters, tmp_path):
    assert merge(recipe("lora_ties", llama, adapters[:1]), tmp_path / "plain").exit_code == 0
    result = rebuild(tmp_path / "plain", "one")
    assert result.exit_code == 1 and "no emr_tasks.json there" in result.output
    assert merge(recipe("knots_emr", llama, adapters[:2]), tmp_path / "emr").exit_code == 0
    result = rebuild(tmp_path / "emr", "three")
    assert result.exit_code == 1 and "no task is called so" in result.output
    (tmp_path / "emr-one").mkdir()
    result = rebuild(tmp_path / "emr", "one")
    assert result.exit_code == 1 and "is there already" in result.output


@pytest.mark.parametrize("method", ["lora_ties", "knots_pcb", "core_emr", "lora_dare_ties"])
def test_recipe_and_python_agree(method, llama, adapters, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    parameters = {"scope": "model"} if METHODS[method].survey else {"seed": 5}
    merged = merge(recipe(method, llama, adapters, parameters=parameters), tmp_path / "out")
    assert merged.exit_code == 0, merged.output
    got, base = load_file(tmp_path / "out/model.safetensors"), load_file(llama / "model.safetensors")
    for module, update in merge_adapters(method, adapters, base=llama, **parameters).items():
        name = f"{module}.weight"
        torch.testing.assert_close(got[name], update.apply_to(base[name]), atol=1e-6, rtol=1e-5)


def test_scope_model_refuses_parameters_that_vary(llama, adapters, tmp_path):
    varying = {"scope": "model", "density": [{"filter": "q_proj", "value": 0.5}, {"value": 0.2}]}
    result = merge(recipe("lora_ties", llama, adapters, parameters=varying), tmp_path / "out")
    assert result.exit_code == 1 and "needs the same parameters for all tensors" in result.output


def half_shared(n=3, rank=4, d_out=20, d_in=14):
    """Adapters that share half of their row spaces and half of their column spaces."""
    common, own = draw([rank // 2], 50, d_out, d_in)[0]["m"], draw([rank - rank // 2] * n, 51, d_out, d_in)
    mixed = draw([rank] * 2 * n, 52, rank, rank)
    return [
        LoraFactors(
            torch.cat([common.B, f["m"].B], dim=1) @ mixed[2 * t]["m"].B,
            mixed[2 * t + 1]["m"].A @ torch.cat([common.A, f["m"].A]),
        )
        for t, f in enumerate(own)
    ]


def published_core_space(factors):
    """`(U, [U^T B_t A_t V], V^T)` with all `min(d, R)` singular vectors of each side, as the authors' code takes them."""
    U = torch.linalg.svd(torch.cat([f.B for f in factors], dim=1).double(), full_matrices=False).U
    Vh = torch.linalg.svd(torch.cat([f.A for f in factors]).double(), full_matrices=False).Vh
    return U, torch.stack([U.mT @ f.B.double() @ f.A.double() @ Vh.mT for f in factors]), Vh


def published_knots(factors):
    """`(U, [S V_t^T], 1)` without the directions whose singular value is not above 1e-5, as the authors' code has it."""
    wide = torch.cat([f.dense() for f in factors], dim=1).double()
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    kept = S > 1e-5
    M = (S[kept, None] * Vh[kept]).chunk(len(factors), dim=1)
    return U[:, kept], torch.stack(M), torch.eye(factors[0].shape[1]).double()


def published_ties(M, density):
    """Thresholds by `kthvalue` of the flattened entries, signs of the sums, means of what agrees."""
    flat = M.flatten(1)
    d = flat.shape[1]
    kept = flat * (flat.abs() >= flat.abs().kthvalue(d - int(d * density), dim=1, keepdim=True).values)
    sign = kept.sum(0).sign()
    chosen = kept * ((kept.sign() == sign) & (kept != 0))
    return (chosen.sum(0) / (chosen != 0).sum(0).clamp(min=1)).view_as(M[0])


@pytest.mark.parametrize("d_out, d_in", [(20, 14), (11, 30)])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("space", ["core", "knots"])
def test_density_counts_what_the_published_code_counts(space, scope, d_out, d_in):
    """Zeros count in Core Space, up to the smaller of a side and the summed rank (12), and not in KnOTS."""
    factors = half_shared(d_out=d_out, d_in=d_in)
    U, M, Vh = {"core": published_core_space, "knots": published_knots}[space](factors)
    for density in (0.1, 0.2, 0.4):
        want = U @ published_ties(M, density) @ Vh
        got = dense(f"{space}_ties", [{"m": f} for f in factors], density=density, scope=scope)
        assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize("rule", ["magnitude_prune", "breadcrumbs", "pcb"])
def test_statistics_of_core_space_count_zeros(rule):
    """Every rule that takes shares of the entries takes them of `12 x 12`, where the updates fill `8 x 8`."""
    factors = half_shared()
    basis = core(factors)
    M = torch.stack([f.dense() for f in basis.encode(factors)]).float()
    assert M.shape == (3, 8, 8)
    merge = {"magnitude_prune": magnitude_prune, "breadcrumbs": breadcrumbs, "pcb": pcb}[rule]
    merged = merge(torch.nn.functional.pad(M, (0, 4, 0, 4)), torch.ones(3))[:8, :8]
    got = dense(f"core_{rule}", [{"m": f} for f in factors])
    assert relative_error(got, basis.decode(merged).dense()) < 1e-5
    assert relative_error(got, basis.decode(merge(M, torch.ones(3))).dense()) > 1e-2


def test_adapters_in_general_position_have_no_zeros_to_count():
    adapters = draw([3, 5, 2])
    factors = [a["m"] for a in adapters]
    basis = core(factors)
    M = torch.stack([f.dense() for f in basis.encode(factors)]).float()
    merged = magnitude_prune(M, torch.ones(3), 0.3)
    assert (
        relative_error(dense("core_magnitude_prune", adapters, density=0.3), basis.decode(merged).dense())
        < 1e-6
    )
