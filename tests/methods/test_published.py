"""Every rule in every space against outputs of the published implementations."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_tspa import METHODS, LoraFactors, merge_adapters
from mergekit_tspa.linalg import Span
from mergekit_tspa.rules.dare import dare_linear, dare_ties
from mergekit_tspa.rules.linear import weighted_sum
from mergekit_tspa.rules.spectral import iso, tsv
from mergekit_tspa.spaces.basis import FULL, Basis
from mergekit_tspa.spaces.core import core
from mergekit_tspa.spaces.knots import knots
from tests.conftest import FIXTURES, ROOT, relative_error

LAYERS = ("l0", "l1")
ELEMENTWISE, WITH_SVD = 1e-5, 1e-4
WEIGHTS, SIGNED = [0.4, 0.3, 0.2, 0.1], [1.0, -0.5, 0.25, 0.8]


def published(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """A file's tensors and the options that were passed."""
    file = FIXTURES / f"{name}.safetensors"
    with safe_open(file, "pt") as opened:
        return load_file(file), json.loads(opened.metadata()["config"])


def adapters(case: str, scaling=(1.0,) * 4, dtype=torch.float32) -> list[dict]:
    """The four adapters of a case, scale folded in, as `merge_adapters` takes them."""
    tensors = load_file(FIXTURES / f"inputs.{case}.safetensors")
    return [
        {
            layer: LoraFactors(
                tensors[f"in.{layer}.{t}.B"].to(dtype), tensors[f"in.{layer}.{t}.A"].to(dtype)
            ).scaled(scaling[t])
            for layer in LAYERS
        }
        for t in range(4)
    ]


def factors(case: str, layer: str, dtype=torch.float32) -> list[LoraFactors]:
    return [adapter[layer] for adapter in adapters(case, dtype=dtype)]


def published_deltas(name: str):
    """Inputs and outputs of a file that has one update per layer: `{layer: [factors]}`, `{layer: delta}`."""
    outputs, _ = published(name)
    case = name.rsplit(".", 1)[1]
    return {layer: factors(case, layer) for layer in LAYERS}, {
        layer: outputs[f"out.{layer}.delta"] for layer in LAYERS
    }


PCB = {"variant": "v1", "clamp": 1e-4}
CASES = [  # file, method, parameters, tolerance
    ("ties_official_k20_dis-mean", "lora_ties", {"scope": "model"}, ELEMENTWISE),
    ("ties_official_k20_dis-sum", "lora_ties", {"scope": "model", "normalize": False}, ELEMENTWISE),
    ("ties_official_k20_dis-max", "lora_ties", {"scope": "model", "take": "max"}, ELEMENTWISE),
    ("ties_official_k20_dis-mean_perlayer", "lora_ties", {}, ELEMENTWISE),
    ("mergekit_ties_d0.2", "lora_ties", {"convention": "mergekit", "weights": WEIGHTS}, ELEMENTWISE),
    ("pcb_v1_r0.1", "lora_pcb", {"scope": "model", **PCB}, ELEMENTWISE),
    ("pcb_v1_r0.2.hom8", "lora_pcb", {"scope": "model", "ratio": 0.2, **PCB}, ELEMENTWISE),
    ("pcb_v1_perlayer_r0.1", "lora_pcb", PCB, ELEMENTWISE),
    ("emr", "lora_emr", {}, ELEMENTWISE),
    ("knots_ta", "knots_task_arithmetic", {"lambda": 0.3}, WITH_SVD),
    ("knots_ties_top20", "knots_ties", {"scope": "model", "lambda": 0.6}, WITH_SVD),
    ("knots_ties_top20_sum", "knots_ties", {"scope": "model", "normalize": False}, WITH_SVD),
    ("knots_ties_top100", "knots_ties", {"scope": "model", "density": 1.0}, WITH_SVD),
    ("corerepo_core_ta", "core_task_arithmetic", {"lambda": 0.5}, WITH_SVD),
    ("corerepo_core_ties_top20", "core_ties", {}, WITH_SVD),
    ("corerepo_core_cart", "core_cart", {"share": 0.25, "inner": 0.5}, WITH_SVD),
    ("corerepo_core_ta_iso", "core_iso", {}, WITH_SVD),
    ("corerepo_core_tsv.hom8", "core_tsv", {"lambda": 0.2}, WITH_SVD),
    ("tsv_rankred_f64", "lora_tsv", {"orthogonalize": False, "rank_per_task": 12}, WITH_SVD),
    ("iso_c_f64.het", "lora_iso", {}, WITH_SVD),
    ("iso_cts_f0.8_f64.het", "lora_iso", {"common_fraction": 0.8}, WITH_SVD),
    ("iso_cts_f0.5_f64.het", "lora_iso", {"common_fraction": 0.5}, WITH_SVD),
    ("peft_cat", "lora_task_arithmetic", {"weights": WEIGHTS}, ELEMENTWISE),
    ("peft_cat_negw.hom8", "lora_task_arithmetic", {"weights": SIGNED}, ELEMENTWISE),
    ("peft_linear.hom8", "factor_linear", {"weights": WEIGHTS}, ELEMENTWISE),
    ("peft_linear_negw.hom8", "factor_linear", {"weights": SIGNED}, ELEMENTWISE),
    ("peft_ties_d0.2.hom8", "factor_ties", {"weights": WEIGHTS}, ELEMENTWISE),
    ("peft_ties_d0.2_negw.hom8", "factor_ties", {"weights": SIGNED}, ELEMENTWISE),
    (
        "peft_ties_d0.5_freq.hom8",
        "factor_ties",
        {"weights": WEIGHTS, "density": 0.5, "elect": "count"},
        ELEMENTWISE,
    ),
    (
        "peft_magnitude_prune_d0.5.hom8",
        "factor_magnitude_prune",
        {"weights": WEIGHTS, "density": 0.5},
        ELEMENTWISE,
    ),
    ("peft_svd.hom8", "lora_task_arithmetic", {"weights": WEIGHTS, "rank": 8}, WITH_SVD),
    ("peft_svd.het", "lora_task_arithmetic", {"weights": WEIGHTS, "rank": 16}, WITH_SVD),
    ("peft_svd_negw.hom8", "lora_task_arithmetic", {"weights": SIGNED, "rank": 8}, WITH_SVD),
    ("peft_svd_r24.hom8", "lora_task_arithmetic", {"weights": WEIGHTS, "rank": 24}, WITH_SVD),
    ("peft_ties_svd_d0.2.hom8", "lora_ties", {"weights": WEIGHTS, "convention": "peft", "rank": 8}, WITH_SVD),
    ("peft_ties_svd_d0.2.het", "lora_ties", {"weights": WEIGHTS, "convention": "peft", "rank": 16}, WITH_SVD),
    ("peftfn_ties_full_d0.2", "lora_ties", {"weights": WEIGHTS, "convention": "peft"}, ELEMENTWISE),
]
KEYS = {"mergekit_ties_d0.2": "delta_norm", "emr": "unified"}


def both_cases(cases):
    for file, *rest in cases:
        for case in ("hom8", "het"):
            if re.search(r"\.(hom8|het)$", file) is None:
                yield f"{file}.{case}", *rest
            elif file.endswith(case):
                yield file, *rest


@pytest.mark.parametrize("file, method, parameters, tolerance", list(both_cases(CASES)))
def test_equals_published_output(file, method, parameters, tolerance):
    outputs, config = published(file)
    name, case = file.rsplit(".", 1)
    scaling = config.get("scaling", 1.0)
    scaling = scaling if isinstance(scaling, list) else [scaling] * 4
    merged = merge_adapters(method, adapters(case, scaling), **parameters)
    for layer in LAYERS:
        want = outputs[f"out.{layer}.{KEYS.get(name, 'delta')}"]
        assert relative_error(merged[layer].dense(), want) < tolerance


@pytest.mark.parametrize("case", ["hom8", "het"])
@pytest.mark.parametrize(
    "file, key, method, weights, parameters",
    [
        (
            "peftfn_ties_full_d0.2",
            "delta_freq",
            "lora_ties",
            WEIGHTS,
            {"elect": "count", "convention": "peft"},
        ),
        ("peftfn_ties_full_d0.2", "delta_negw", "lora_ties", [0.4, -0.3, 0.2, 0.1], {"convention": "peft"}),
        ("peftfn_ties_full_d0.2", "delta_magprune", "lora_magnitude_prune", WEIGHTS, {"convention": "peft"}),
        (
            "mergekit_ties_d0.2",
            "delta_nonorm",
            "lora_ties",
            WEIGHTS,
            {"convention": "mergekit", "normalize": False},
        ),
    ],
)
def test_equals_published_variants(file, key, method, weights, parameters, case):
    outputs, _ = published(f"{file}.{case}")
    merged = merge_adapters(method, adapters(case), weights, density=0.2, **parameters)
    for layer in LAYERS:
        assert relative_error(merged[layer].dense(), outputs[f"out.{layer}.{key}"]) < ELEMENTWISE


@pytest.mark.parametrize("case", ["hom8", "het"])
def test_dare_with_the_published_draws(case):
    outputs, _ = published(f"dare_mergelm_p0.5_sum.{case}")
    for layer in LAYERS:
        kept = torch.stack([outputs[f"aux.{layer}.keep{t}"] for t in range(4)])
        M = torch.stack([f.dense() for f in factors(case, layer)])
        uniform = (~kept).float()  # a draw of 0 keeps an entry, a draw of 1 does not
        merged = dare_linear(M, torch.ones(4), 0.5, uniform=uniform)
        assert relative_error(merged, outputs[f"out.{layer}.delta"]) < ELEMENTWISE


@pytest.mark.parametrize("case", ["hom8", "het"])
def test_knots_dare_ties_with_the_published_draws(case):
    outputs, _ = published(f"knots_dare_ties.{case}")
    for layer in LAYERS:
        kept = torch.stack([outputs[f"aux.{layer}.keep{t}"] for t in range(4)])
        basis = knots(factors(case, layer))
        # Draws belong to rows of the published basis, whose order and signs ours shares up to rounding.
        U = basis.U.dense()
        signs = (U.float() * outputs[f"out.{layer}.U"]).sum(0).sign()
        basis = Basis(Span(U * signs), None)
        M = torch.stack([f.dense() for f in basis.encode(factors(case, layer))]).float()
        merged = 0.7 * dare_ties(M, torch.ones(4), 0.9, uniform=(~kept).float())
        assert relative_error(basis.decode(merged).dense(), outputs[f"out.{layer}.delta"]) < WITH_SVD


@pytest.mark.parametrize("case", ["hom8", "het"])
def test_core_coordinates(case):
    outputs, _ = published(f"corerepo_core_ta.{case}")
    for layer in LAYERS:
        basis = core(factors(case, layer, torch.float64))
        for side, key in ((basis.U.dense(), "U_B"), (basis.V.dense(), "Vh_A")):
            want = outputs[f"out.{layer}.{key}"]
            want = want if key == "U_B" else want.mT
            torch.testing.assert_close(
                (side.mT @ want).abs(), torch.eye(want.shape[1]).double(), atol=1e-5, rtol=0
            )


def test_ties_then_iso_in_core_space():
    """A composition of two rules, as one implementation offers it.

    TIES leaves some directions empty; the published code gives them, too, the mean singular value, ours does not.
    So the two agree on the range of the merged update, up to the count over which the mean is taken.
    """
    outputs, _ = published("corerepo_core_ties_top20_iso.hom8")
    for layer in LAYERS:
        merged = merge_adapters("core_ties", adapters("hom8"))[layer].dense().double()
        U, S, Vh = torch.linalg.svd(merged)
        rank = int((S > 1e-4 * S[0]).sum())
        assert rank < 32
        flat = iso(merged[None], torch.ones(1).double())
        want = outputs[f"out.{layer}.delta"].double()
        on_range = U[:, :rank] @ (U[:, :rank].mT @ want @ Vh[:rank].mT) @ Vh[:rank]
        assert relative_error(flat, on_range * 32 / rank) < WITH_SVD


def signs_are_certain(given):
    """Whether no update, and no sum of them, is so near to 0 that rounding in float32 could turn its sign.

    A product of rank r is off by `r 2^-24 |B| |A|` at most, in whatever order a processor sums it.
    """
    unit = 2.0**-24
    M = torch.stack([f.dense() for f in given])
    bound = torch.stack([f.rank * unit * (f.B.abs() @ f.A.abs()) for f in given])
    of_sum = bound.sum(0) + len(M) * unit * M.abs().sum(0)
    return bool((M.abs() > bound).all() and (M.sum(0).abs() > of_sum).all())


@pytest.mark.parametrize("case", ["hom8", "het"])
def test_emr_masks_and_scales(case):
    """The authors' scale is a ratio of sums over tensors, so it is the same for all of them."""
    from mergekit_tspa.methods.emr_records import task_update, unpack_bits
    from mergekit_tspa.methods.inputs import TensorInputs

    outputs, _ = published(f"emr.{case}")
    method = METHODS["lora_emr"]
    parameters = method.bind({"scope": "model"})
    names = [object() for _ in range(4)]
    inputs = [TensorInputs(layer, factors(case, layer), [1.0] * 4, parameters, names) for layer in LAYERS]
    survey = method.survey(lambda: iter(inputs))
    scales = torch.stack([survey[name][0] for name in names])
    assert relative_error(scales, outputs["out.rescalers"]) < ELEMENTWISE
    for w in inputs:
        assert signs_are_certain(factors(case, w.name, torch.float64))  # so masks can be compared bit by bit
        record = method.record(w._replace(survey=survey))
        for t in range(4):
            mask = outputs[f"out.{w.name}.mask{t}"].bool()
            assert torch.equal(unpack_bits(record["mask"][t], mask.shape[1]), mask)
            want = outputs[f"out.{w.name}.unified"] * mask * outputs["out.rescalers"][t]
            assert relative_error(task_update(record, t).dense(), want) < 1e-3


def test_full_space_tsv_is_undetermined_and_ours_is_not():
    """The literal rule uses singular vectors of zero singular values; noise of 1e-7 must not change ours."""
    given = factors("het", "l0", torch.float64)
    noisy = [LoraFactors(f.B * (1 + 1e-7 * torch.randn_like(f.B)), f.A) for f in given]
    stack = lambda fs: torch.stack([f.dense() for f in FULL.encode(fs)])  # noqa: E731
    ones = torch.ones(4).double()
    for orthogonalize in (True, False):
        a, b = (tsv(stack(fs), ones, rank_per_task=12, orthogonalize=orthogonalize) for fs in (given, noisy))
        assert relative_error(a, b) < 1e-4
    cut = sum((u[:, :12] * s[:12]) @ v[:12] for u, s, v in (torch.linalg.svd(M) for M in stack(given)))
    assert relative_error(tsv(stack(given), ones, 12, orthogonalize=False), cut) < 1e-10
    assert relative_error(weighted_sum(stack(given), ones), cut) > 1e-2


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties"])
def test_dare_of_factors_equals_the_installed_peft(combination, monkeypatch):
    """With PEFT's own draws.  It rescales from 0.19 on, which the parameter's description and the page say."""
    import peft
    from packaging.version import Version
    from peft.utils import merge_utils

    updates = [f.B for f in factors("hom8", "l0")]
    uniform = torch.rand(4, *updates[0].shape, generator=torch.Generator().manual_seed(0))
    kept = iter((uniform < 0.3).float())
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(kept))
    want = getattr(merge_utils, combination)(updates, torch.ones(4), 0.3)
    rule = {"dare_linear": dare_linear, "dare_ties": dare_ties}[combination]
    rescale = Version(peft.__version__) >= Version("0.19")
    merged = rule(torch.stack(updates), torch.ones(4), 0.3, rescale, uniform=uniform)
    assert relative_error(merged, want) < ELEMENTWISE

    described = METHODS[f"factor_{combination}"].parameter_fields()["rescale"].description
    assert "from 0.19 on" in described
    assert "0.19 and later" in (ROOT / "docs/pruning.md").read_text()
