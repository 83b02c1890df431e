"""TSPA through the Python entry: checkpoints of several architectures against the definition, evaluated densely."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mergekit_tspa import METHODS, AttentionGeometry, InputError, merge_adapters, read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from tests.conftest import merged_tensors, recipe, relative_error, save_adapter, save_llama

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def save(model, path):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return path


def make(architecture, path, gpt2):
    """`(checkpoint, heads, kv heads, head_dim, modules to adapt)`."""
    torch.manual_seed(0)
    if architecture == "llama":
        return save_llama(path), 4, 2, 16, ["q_proj", "k_proj", "v_proj", "o_proj"]
    if architecture == "gpt2":
        return gpt2, 4, 4, 8, ["c_attn", "attn.c_proj"]
    if architecture == "bert":
        config = BertConfig(**SMALL, intermediate_size=48)
        return save(BertModel(config), path), 4, 4, 8, ["query", "key", "value", "attention.output.dense"]
    if architecture == "opt":
        config = OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)
        return save(OPTForCausalLM(config), path), 4, 4, 8, ["q_proj", "k_proj", "v_proj", "out_proj"]
    if architecture == "neox":
        config = GPTNeoXConfig(**SMALL, intermediate_size=48)
        return save(GPTNeoXForCausalLM(config), path), 4, 4, 8, ["query_key_value", "attention.dense"]
    gqa = SMALL | {"num_key_value_heads": 2, "intermediate_size": 48}
    if architecture == "qwen2":
        return (
            save(Qwen2ForCausalLM(Qwen2Config(**gqa)), path),
            4,
            2,
            8,
            ["q_proj", "k_proj", "v_proj", "o_proj"],
        )
    return save(Phi3ForCausalLM(Phi3Config(**gqa, pad_token_id=0)), path), 4, 2, 8, ["qkv_proj", "o_proj"]


def roles(tensors, layer, n, n_kv, d):
    """Dense `Q, K, V` with their bias as a last column, and `O`, of one layer, sliced by hand."""
    part = {
        k: v.double() for k, v in tensors.items() if f".{layer}." in k and ("attn" in k or "attention." in k)
    }

    def find(*names):
        return next((v for k, v in part.items() if any(k.endswith(x) for x in names)), None)

    fused, bias = (
        find("qkv_proj.weight", "query_key_value.weight", "c_attn.weight"),
        find("query_key_value.bias", "c_attn.bias"),
    )
    out = find(
        "o_proj.weight",
        "out_proj.weight",
        "attention.dense.weight",
        "attn.c_proj.weight",
        "output.dense.weight",
    )
    if fused is None:
        names = [(f"{r[0]}_proj", f"self.{r}") for r in ("query", "key", "value")]
        weights = [find(*(f"{name}.weight" for name in pair)) for pair in names]
        biases = [find(*(f"{name}.bias" for name in pair)) for pair in names]
    else:
        if any("c_attn" in k for k in part):
            fused, out = fused.T, out.T
        if any("query_key_value" in k for k in part):
            rows = [[h * 3 * d + i * d + j for h in range(n) for j in range(d)] for i in range(3)]
        else:
            ends = [0, n * d, (n + n_kv) * d, (n + 2 * n_kv) * d]
            rows = [list(range(a, b)) for a, b in pairwise(ends)]
        weights = [fused[r] for r in rows]
        biases = [None if bias is None else bias[r] for r in rows]
    joined = [w if b is None else torch.cat([w, b[:, None]], 1) for w, b in zip(weights, biases)]
    return *joined, out


def products(tensors, layer, n, n_kv, d):
    """Every head's `W_Q^T W_K` and `W_O W_V`."""
    Q, K, V, out = roles(tensors, layer, n, n_kv, d)
    m = n // n_kv
    qk = [Q[h * d : (h + 1) * d].T @ K[h // m * d : (h // m + 1) * d] for h in range(n)]
    ov = [out[:, h * d : (h + 1) * d] @ V[h // m * d : (h // m + 1) * d] for h in range(n)]
    return torch.stack(qk), torch.stack(ov)


def distance(tensors, base, adapted, tau, layer, *shape):
    """`||Z - Z_b - tau mean_t (Z_t - Z_b)||^2` of both products; `adapted` holds each adapter's model."""
    merged, plain = (products(t, layer, *shape) for t in (tensors, base))
    singles = [products(a, layer, *shape) for a in adapted]
    means = [sum(s[i] for s in singles) / len(singles) for i in range(2)]
    goals = [plain[i] + tau * (means[i] - plain[i]) for i in range(2)]
    return [(merged[i] - goals[i]).square().sum().item() for i in range(2)]


def apply(base, updates):
    return base | {f"{m}.weight": u.apply_to(base[f"{m}.weight"].double()) for m, u in updates.items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gpt2", "neox", "phi3", "bert"])
@pytest.mark.parametrize(
    ("modules", "coefficients"), [("all", "linear"), ("all", "paper"), ("first", "linear")]
)
def test_reported_objective_is_the_distance_of_the_written_model(
    architecture, modules, coefficients, gpt2, tmp_path
):
    """The merged model is index 0 of Eq. 6-7, so its dense distance to the target is the reported end.

    The adapters are weighted ones, unless the paper is taken literally.

    All heads, groups, fused layouts, biases, mixed ranks and unequal weights go through here.
    """
    path, n, n_kv, d, targets = make(architecture, tmp_path / "base", gpt2)
    targets = targets if modules == "all" else targets[:1]
    options = {"gpt2": {"fan_in_fan_out": True}, "bert": {"task_type": None}}.get(architecture, {})
    adapters = [
        save_adapter(
            path,
            tmp_path / f"a{i}",
            seed=i,
            r=r,
            target_modules=targets[i % 2 * (len(targets) > 2) :],
            **options,
        )
        for i, r in enumerate((3, 2, 4))
    ]
    base = dict(Checkpoint(path))
    weights = [1.0, 0.6, 0.8]
    targets = weights if coefficients == "linear" else [1.0] * 3
    singles = [
        apply(base, merge_adapters("lora_task_arithmetic", [a], [w], base=path))
        for a, w in zip(adapters, targets)
    ]
    ends = {}
    for steps in (1, 40):
        tau = 1.0 if coefficients == "paper" else 1.5
        options = {"attention_steps": steps, "coefficients": coefficients, "target_scale": tau}
        updates = merge_adapters("tspa_attention", adapters, weights, base=path, **options)
        merged = apply(base, updates)
        for layer in range(2):
            for report in updates.reports:
                index = next((i for i, name in enumerate(report.names) if f".{layer}." in name), None)
                if index is None:
                    continue
                qk, ov = distance(merged, base, singles, tau, layer, n, n_kv, d)
                dense = qk if report.stage.startswith("query") else ov
                assert abs(report.end[index].item() - dense) < 2e-4 * dense, report.names[index]
                ends.setdefault(report.names[index], []).append(dense)
        assert updates.reports and all(report.orthogonality < 1e-5 for report in updates.reports)
    assert ends and all(later < 0.95 * first for first, later in ends.values())


@pytest.fixture(scope="module")
def three(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    targets = (["q_proj", "v_proj", "up_proj"], ["q_proj", "k_proj"], ["v_proj", "o_proj", "up_proj"])
    return [
        save_adapter(llama, folder / str(i), seed=i, r=4, target_modules=t) for i, t in enumerate(targets)
    ]


def test_ranks_stages_and_reports(llama, three):
    full = merge_adapters("tspa", three, base=llama, lora_steps=100, attention_steps=20)
    assert {u.rank for u in full.values()} == {4}
    assert [r.stage for r in full.reports].count("LoRA alignment") >= 1
    assert all((r.end <= r.start).all() for r in full.reports)
    attention = merge_adapters("tspa_attention", three, base=llama, attention_steps=20)
    same = merge_adapters("tspa", three, base=llama, lora_steps=0, attention_steps=20)
    lora = merge_adapters("tspa_lora", three, lora_steps=100)
    only = merge_adapters("tspa", three, lora_steps=100, attention_steps=0)
    for module in full:
        assert relative_error(same[module].dense(), attention[module].dense()) < 1e-6
        assert relative_error(only[module].dense(), lora[module].dense()) < 1e-4
    # a module outside attention is the plain factor sum after stage 1
    up = next(m for m in full if "up_proj" in m)
    B, A = (sum(read_adapter(three[i]).factors(up)[side] for i in (0, 2)) for side in (0, 1))
    assert relative_error(attention[up].dense(), B @ A) < 1e-6


def test_one_adapter_comes_back_as_itself(llama, three):
    for method in ("tspa", "tspa_attention", "tspa_pairwise"):
        updates = merge_adapters(method, three[:1], base=llama, attention_steps=10)
        for module, update in updates.items():
            assert relative_error(update.dense(), read_adapter(three[0]).factors(module).dense()) < 1e-5


@pytest.mark.parametrize("method", ["tspa", "tspa_attention", "tspa_lora", "tspa_pairwise"])
@pytest.mark.parametrize("weight", [0.3, 2.0])
def test_weight_is_linear(method, weight, llama, three):
    """One adapter of weight w comes back as w times itself; as the paper prints it, its factors carry w each."""
    steps = {"attention_steps": 10, "lora_steps": 20}
    steps = {name: steps[name] for name in steps if name in METHODS[method].parameter_fields()}
    for module, update in merge_adapters(method, three[:1], [weight], base=llama, **steps).items():
        own = read_adapter(three[0]).factors(module).dense()
        assert relative_error(update.dense(), weight * own) < 1e-5, module
    # The plain sum of factors, without a step that could turn them.
    steps = dict.fromkeys(steps, 0) | {"coefficients": "paper"}
    for module, update in merge_adapters(method, three[:1], [weight], base=llama, **steps).items():
        own = read_adapter(three[0]).factors(module).dense()
        assert relative_error(update.dense(), weight**2 * own) < 1e-5, module


def test_sides_of_a_pair_with_weights_of_their_own(llama, three, tmp_path):
    """A weight that a filter changes for one side of a pair is a multiple of the update there."""
    by_tensor = [{"filter": "q_proj", "value": 0.5}, {"filter": "v_proj", "value": 2.0}, {"value": 1.0}]
    config = recipe("tspa_attention", llama, three[:1], [by_tensor], parameters={"attention_steps": 5})
    merged = merged_tensors(config, tmp_path / "out")
    base = dict(Checkpoint(llama))
    for module in read_adapter(three[0]).modules:
        multiple = 0.5 if "q_proj" in module else 2.0 if "v_proj" in module else 1.0
        own = read_adapter(three[0]).factors(module).dense()
        difference = merged[f"{module}.weight"] - base[f"{module}.weight"]
        assert relative_error(difference, multiple * own) < 1e-4, module


def test_lora_target(llama, three):
    """Both targets are honoured: each result is the closer one to its own target."""
    attention = merge_adapters("tspa_attention", three, base=llama, attention_steps=50)
    results = {
        target: merge_adapters(
            "tspa", three, base=llama, attention_steps=50, lora_steps=300, lora_target=target
        )
        for target in ("original", "aligned")
    }
    module = "model.layers.0.self_attn.v_proj"
    mean = sum(read_adapter(three[i]).factors(module).dense() for i in (0, 2)) / 2
    gap = {t: (u[module].dense() - mean).norm() for t, u in results.items()}
    assert gap["original"] < gap["aligned"]
    assert (attention[module].dense() - mean).norm() > gap["original"]


def test_options_that_change_the_rotations(llama, three):
    plain = merge_adapters("tspa_attention", three, base=llama, attention_steps=20)
    q = "model.layers.0.self_attn.q_proj"
    for option in ({"rope_safe": True}, {"align_space": "input"}, {"attention_lr": 0.01}):
        other = merge_adapters("tspa_attention", three, base=llama, attention_steps=20, **option)
        assert relative_error(other[q].dense(), plain[q].dense()) > 1e-3
        assert all((r.end < r.start).all() for r in other.reports)
    reference = merge_adapters("tspa", three, base=llama, attention_steps=20, lora_steps=50, solver="geoopt")
    fast = merge_adapters("tspa", three, base=llama, attention_steps=20, lora_steps=50)
    for a, b in zip(fast.reports, reference.reports):
        torch.testing.assert_close(a.end, b.end, rtol=0.01, atol=0)
    stopped = merge_adapters("tspa_lora", three, lora_steps=2000, tolerance=0.01)
    assert max(r.steps for r in stopped.reports) < 2000


def test_pairwise_original_lowers_its_objective(llama, three):
    updates = merge_adapters("tspa_pairwise", three, base=llama, attention_steps=30)
    assert all((r.end < r.start).all() for r in updates.reports)


def test_identical_adapters_leave_the_saddle(llama, three):
    """The factor sum of two equal adapters is four times the adapter; their mean is reachable."""
    twins = [dict(read_adapter(three[0]).modules) for _ in range(2)]
    pair = [{m: read_adapter(three[0]).factors(m) for m in twins[0]} for _ in range(2)]
    updates = merge_adapters("tspa_lora", pair, lora_steps=500, target_scale=1)
    for module, update in updates.items():
        assert relative_error(update.dense(), pair[0][module].dense()) < 0.05


def test_the_target_is_at_most_the_sum(llama, three):
    """So that one adapter alone comes back as itself, whatever the target."""
    steps = {"attention_steps": 5, "lora_steps": 20}
    beyond, whole = (merge_adapters("tspa", three, base=llama, target_scale=t, **steps) for t in (9, 3))
    for module, update in beyond.items():
        assert torch.equal(update.dense(), whole[module].dense())


def test_same_seed_same_bits(llama, three):
    one, two = (merge_adapters("tspa", three, base=llama, attention_steps=5, lora_steps=20) for _ in range(2))
    assert all(torch.equal(one[m].B, two[m].B) and torch.equal(one[m].A, two[m].A) for m in one)


def test_rank(llama, three):
    updates = merge_adapters("lora_task_arithmetic", three, rank=3)
    exact = merge_adapters("lora_task_arithmetic", three)
    for module, update in updates.items():
        assert update.rank == 3
        S = torch.linalg.svdvals(exact[module].dense())
        lost = (update.dense() - exact[module].dense()).norm()
        assert abs(lost - S[3:].norm()) < 1e-4 * S[0]


def test_rank_leaves_smaller_updates_alone():
    draw = lambda r: (torch.randn(12, r), torch.randn(r, 10))  # noqa: E731
    updates = merge_adapters("lora_task_arithmetic", [{"x": draw(8), "y": draw(4)}, {"x": draw(2)}], rank=6)
    assert {name: update.rank for name, update in updates.items()} == {"x": 6, "y": 4}


def test_configuration_is_completed_with_its_model_types_defaults(llama, three, tmp_path):
    """Early Llama checkpoints do not name their rotary embedding; `rope_safe` must not go by its absence."""
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "rope" not in k}))
    ends = [
        merge_adapters("tspa_attention", three, base=base, rope_safe=True, attention_steps=20).reports[0].end
        for base in (llama, bare)
    ]
    assert torch.equal(*ends)


def test_without_a_default_device_and_without_gradients():
    factors = {"m": (torch.randn(6, 2, requires_grad=True), torch.randn(2, 5))}
    with torch.device("meta"):
        updates = merge_adapters("tspa_lora", [factors, factors], lora_steps=3)
    assert updates["m"].B.device.type == "cpu" and not updates["m"].B.requires_grad


def test_refusals(llama, three, tmp_path):
    q = {"model.layers.0.self_attn.q_proj": (torch.randn(64, 2), torch.randn(2, 64))}
    tensors = dict(Checkpoint(llama))
    wrong = AttentionGeometry(4, 2, 8)
    config = json.loads((llama / "config.json").read_text())

    def odd(**changes):
        path = save_llama(tmp_path / "-".join(map(str, changes.values())))
        (path / "config.json").write_text(json.dumps(config | changes))
        return path

    mla = {"model.layers.0.self_attn.q_a_proj": q["model.layers.0.self_attn.q_proj"]}
    unknown = tensors | {"model.layers.0.self_attn.q_a_proj.weight": torch.zeros(64, 64)}
    huge = {m: (B * 1e30, A * 1e30) for m, (B, A) in q.items()}
    large = {m: (B * 1e14, A * 1e14) for m, (B, A) in q.items()}
    for message, method, adapters, options in [
        ("give it the base model", "tspa", [q], {}),
        ("give the head counts", "tspa", [q], {"base": tensors}),
        ("64 wide.*4 heads of 8", "tspa", [q], {"base": tensors, "geometry": wrong}),
        ("no multiple of 3 kv heads", "tspa", three, {"base": odd(num_key_value_heads=3)}),
        ("no multiple of 3", "tspa", [q], {"base": tensors, "geometry": AttentionGeometry(4, 3, 16)}),
        ("names no number of attention heads", "tspa", three, {"base": odd(num_attention_heads=None)}),
        ("layout is not known.*q_proj.*attention_steps: 0", "tspa", [mla],
         {"base": unknown, "geometry": AttentionGeometry(4, 2, 16)}),
        ("interleaved", "tspa", three, {"base": odd(model_type="cohere"), "rope_safe": True}),
        ("layout is not known", "tspa", [{"model.layers.0.self_attn.q_proj": (torch.randn(64, 2), torch.randn(2, 64))}],
         {"base": {k: v for k, v in tensors.items() if "k_proj" not in k}, "geometry": AttentionGeometry(4, 2, 16)}),
        ("put the one adapter in a list", "tspa_lora", str(three[0]), {}),
        ("weights must be numbers", "tspa_lora", three, {"weights": ["x", 1, 1]}),
        (r"shapes \(4, 2\) and \(3, 5\)", "tspa_lora", [{"x": (torch.ones(4, 2), torch.ones(3, 5))}], {}),
        ("NaN", "tspa_lora", [{"x": (torch.ones(4, 2) / 0, torch.ones(2, 5))}], {}),
        ("seed: 18446744073709551616", "tspa_lora", three, {"seed": 2**64}),
        ("adapter 0: its update of .*q_proj, scale included, is too large", "tspa_lora", [huge, huge], {}),
        ("q_proj.weight: .*not finite; adapters adapter 0, adapter 1", "tspa_lora", [large, large], {}),
        ("self_attn.* not finite", "tspa", [large, large], {"base": tensors, "geometry": AttentionGeometry(4, 2, 16)}),
        ("rank 9.*carry rank 4 at most", "tspa_lora", three, {"rank": 9}),
        ("attention_steps: -1", "tspa", three, {"attention_steps": -1}),
        ("attention_lr: 0", "tspa", three, {"attention_lr": 0}),
        ("align_space", "tspa", three, {"align_space": "sideways"}),
        ("target_scale: -1", "tspa", three, {"target_scale": -1}),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            merge_adapters(method, adapters, **options)
    # going without attention alignment when asked to
    assert merge_adapters("tspa", [mla, mla], base=unknown, attention_steps=0)


def test_fused_weights_refuse_the_input_reading(gpt2, tmp_path):
    adapter = save_adapter(gpt2, tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(InputError, match="align_space: input cannot be written back"):
        merge_adapters("tspa", [adapter], base=gpt2, align_space="input")
