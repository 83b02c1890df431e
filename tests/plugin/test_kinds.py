"""Every kind of adapter through `mergekit-yaml`'s own command, with PEFT's own merge as the oracle."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mergekit_tspa import InputError, merge_adapters, read_adapter
from mergekit_tspa.base.tensors import ModelTensors
from tests.conftest import (
    base_tensors,
    merge,
    merged_tensors,
    peft_merged,
    recipe,
    relative_error,
    save_adapter,
    save_llama,
)

BLOCKS = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAYER = "model.layers.0."
Q = f"{LAYER}self_attn.q_proj"
# base, what PEFT is given, and tensors that must differ from the base's
KINDS = {
    "embedding": ("untied", {"target_modules": ["embed_tokens", "q_proj"]}, ["model.embed_tokens.weight"]),
    "embedding of positions": ("gpt2", {"target_modules": ["wpe"]}, ["transformer.wpe.weight"]),
    "head": ("untied", {"target_modules": ["lm_head", "q_proj"]}, ["lm_head.weight"]),
    "DoRA": ("untied", {"use_dora": True}, [f"{Q}.weight"]),
    "DoRA on Conv1D": (
        "gpt2",
        {"use_dora": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        [],
    ),
    "DoRA on embedding and head": (
        "untied",
        {"use_dora": True, "target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
        ["model.embed_tokens.weight", "lm_head.weight"],
    ),
    "DoRA on PiSSA": ("untied", {"use_dora": True, "init_lora_weights": "pissa"}, [f"{Q}.weight"]),
    "PiSSA": ("untied", {"init_lora_weights": "pissa", "use_rslora": True}, [f"{Q}.weight"]),
    "PiSSA on Conv1D": (
        "gpt2",
        {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True},
        [],
    ),
    "OLoRA": ("untied", {"init_lora_weights": "olora"}, [f"{Q}.weight"]),
    "BD-LoRA": ("untied", {"use_bdlora": BLOCKS}, [f"{Q}.weight"]),
    "MiCA": ("untied", {"init_lora_weights": "mica"}, [f"{Q}.weight"]),
    "VeLoRA": ("untied", {"velora_config": VeloraConfig(num_groups=4)}, [f"{Q}.weight"]),
    "MonteCLoRA": ("untied", {"monteclora_config": MontecloraConfig()}, [f"{Q}.weight"]),
    "saved modules": (
        "untied",
        {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
        ["lm_head.weight", "model.embed_tokens.weight", f"{LAYER}input_layernorm.weight", f"{Q}.weight"],
    ),
    "saved block": ("untied", {"modules_to_save": ["mlp"]}, [f"{LAYER}mlp.down_proj.weight"]),
    "saved, tied": (
        "llama",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ["model.embed_tokens.weight"],
    ),
    "all biases": ("untied", {"bias": "all"}, [f"{Q}.bias", f"{LAYER}self_attn.k_proj.bias"]),
    "biases of LoRA layers": ("untied", {"bias": "lora_only"}, [f"{Q}.bias"]),
    "bias of lora_B": ("untied", {"lora_bias": True}, [f"{Q}.bias"]),
    "both biases": (
        "untied",
        {"lora_bias": True, "bias": "all"},
        [f"{Q}.bias", f"{LAYER}self_attn.k_proj.bias"],
    ),
    "tokens": ("untied", {"trainable_token_indices": [5, 1]}, ["model.embed_tokens.weight"]),
    "tokens, tied": ("llama", {"trainable_token_indices": [5, 1]}, ["model.embed_tokens.weight"]),
    "tokens of embedding and head": (
        "untied",
        {"trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [2]}},
        ["model.embed_tokens.weight", "lm_head.weight"],
    ),
    "experts": ("qwen3_moe", {"target_parameters": EXPERTS}, [f"{LAYER}{name}" for name in EXPERTS]),
    "experts, one parameter": ("qwen3_moe", {"target_parameters": EXPERTS[1:]}, [f"{LAYER}{EXPERTS[1]}"]),
    "experts by all-linear": (
        "qwen3_moe",
        {"target_modules": "all-linear"},
        [f"{LAYER}{name}" for name in (*EXPERTS, "mlp.gate.weight")],
    ),
    "experts, renamed": (
        "mixtral",
        {"target_modules": ["q_proj", "w1", "w2", "w3", "gate"]},
        [f"{LAYER}{name}" for name in (*EXPERTS, "mlp.gate.weight")],
    ),
    "experts, fused and transposed": (
        "gpt_oss",
        {"target_parameters": EXPERTS},
        [f"{LAYER}{name}" for name in EXPERTS],
    ),
    "experts, square and transposed": (
        "gpt_oss",
        {"target_parameters": EXPERTS[1:]},
        [f"{LAYER}{EXPERTS[1]}"],
    ),
}


def check(got, target, tolerance=1e-6):
    for name, tensor in got.items():
        assert relative_error(tensor, target[name]) < tolerance, name


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    """A Qwen2: untied, with biases, here not zero, of query, key and value."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=False, **shape)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path := tmp_path_factory.mktemp("base") / "untied")
    return path


@pytest.fixture(scope="session")
def moe(tmp_path_factory):
    shape = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": False,
    }
    models = {
        "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(num_experts=3, moe_intermediate_size=12, **shape)),
        "mixtral": (MixtralForCausalLM, MixtralConfig(num_local_experts=3, intermediate_size=12, **shape)),
        "gpt_oss": (GptOssForCausalLM, GptOssConfig(num_local_experts=3, intermediate_size=16, **shape)),
    }
    folder = tmp_path_factory.mktemp("moe")
    for name, (kind, config) in models.items():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_is_peft_s_own_merge(kind, request, moe, tmp_path):
    base, config, changed = KINDS[kind]
    base = moe / base if (moe / base).exists() else request.getfixturevalue(base)
    adapter = save_adapter(base, tmp_path / "a", **config)
    got = merged_tensors(recipe("lora_task_arithmetic", base, [adapter]), tmp_path / "out")
    before = base_tensors(base)
    assert got.keys() <= before.keys() and before.keys() - got.keys() <= {"lm_head.weight"}
    for name in changed:
        assert relative_error(got[name], before[name]) > 0.1, name
    check(got, peft_merged(base, adapter))


@pytest.mark.parametrize(
    "method, parameters",
    [
        *(
            (method, {})
            for method in ("factor_linear", "tspa", "tspa_attention", "tspa_lora", "tspa_pairwise")
        ),
        ("knots_mean", {}),
        ("core_dare_linear", {"density": 1.0}),
        ("lora_ties", {"density": 1.0}),
    ],
)
def test_one_adapter_comes_back_from_every_family(method, parameters, untied, tmp_path):
    config = {"use_dora": True, "init_lora_weights": "pissa", "modules_to_save": ["lm_head"], "bias": "all"}
    adapter = save_adapter(untied, tmp_path / "a", target_modules=["q_proj", "k_proj", "down_proj"], **config)
    got = merged_tensors(recipe(method, untied, [adapter], parameters=parameters), tmp_path / "out")
    check(got, peft_merged(untied, adapter), 1e-5)


def test_records_of_emr_hold_low_rank_updates_only(untied, moe, tmp_path):
    kinds = [
        (untied, {"use_dora": True}),
        (untied, {"bias": "all"}),
        (moe / "gpt_oss", {"target_parameters": EXPERTS}),
    ]
    for i, (base, config) in enumerate(kinds):
        adapter = save_adapter(base, tmp_path / str(i), **config)
        result = merge(recipe("lora_emr", base, [adapter]), tmp_path / "out")
        assert result.exit_code == 1 and "use another method for such adapters" in result.output
        assert not (tmp_path / "out").exists()


def test_recipe_and_python_entry_agree(untied, tmp_path):
    """The updates of the Python entry, applied to the base, are what a recipe writes."""
    kinds = [
        {"use_dora": True, "bias": "all", "trainable_token_indices": [3]},
        {"modules_to_save": ["lm_head", "input_layernorm"], "init_lora_weights": "olora"},
    ]
    adapters = [save_adapter(untied, tmp_path / str(i), seed=i, **kind) for i, kind in enumerate(kinds)]
    parameters = {"lambda": 0.7, "lora_steps": 5}
    config = recipe("tspa_lora", untied, adapters, [1.0, 0.5], parameters=parameters)
    got = merged_tensors(config, tmp_path / "out")
    updates = merge_adapters("tspa_lora", adapters, [1.0, 0.5], base=untied, **parameters)
    for name, W in base_tensors(untied).items():
        update = updates.pop(name.removesuffix(".weight"), None)
        assert relative_error(got[name], update.apply_to(W) if update else W) < 1e-6, name
    assert not updates


def products(base, adapter):
    """`{tensor: scale B A}` of an adapter's file."""
    read, tensors = read_adapter(adapter).fit(ModelTensors.of("base", base))
    return {tensor: read.factors(module, torch.float64).dense() for tensor, module in tensors.items()}, read


def norms(W):
    return W.norm(dim=1)


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_dora_adapters_and_a_plain_one(scale, untied, tmp_path):
    """`V = W + sum a_t D_t`; `m` moves by the mean of `a_t (m_t - m_0)`, the plain one with the norms of `W + D_t`."""
    adapters = [
        save_adapter(
            untied, tmp_path / str(i), seed=i, use_dora=i < 2, r=2 + i, target_modules=["q_proj", "up_proj"]
        )
        for i in range(3)
    ]
    weights = [0.8, -0.3, 0.5]
    config = recipe("lora_task_arithmetic", untied, adapters, weights, parameters={"lambda": scale})
    got = merged_tensors(config, tmp_path / "out")
    base = {name: W.double() for name, W in base_tensors(untied).items()}
    D = [products(base, adapter)[0] for adapter in adapters]
    assert len(D[0]) == 4
    for name in D[0]:
        W = base[name]
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"
        m = [load_file(a / "adapter_model.safetensors")[key] for a in adapters[:2]] + [norms(W + D[2][name])]
        V = W + scale * sum(a * D_t[name] for a, D_t in zip(weights, D))
        magnitude = norms(W) + scale * sum(a * (m_t - norms(W)) for a, m_t in zip(weights, m)) / 1.6
        assert relative_error(got[name], magnitude[:, None] * V / norms(V)[:, None]) < 1e-6, name


def test_tspa_merges_the_directions_of_dora_adapters(untied, tmp_path):
    """The method sees the factors as if there were no magnitudes."""
    adapters = [save_adapter(untied, tmp_path / str(i), seed=i, use_dora=True) for i in range(2)]
    got = merged_tensors(
        recipe("tspa_lora", untied, adapters, parameters={"lora_steps": 50}), tmp_path / "out"
    )
    base = base_tensors(untied)
    plain = []
    for adapter in adapters:
        read, tensors = read_adapter(adapter).fit(ModelTensors.of("base", base))
        plain.append({module: read.factors(module) for module in tensors.values()})
    updates = merge_adapters("tspa_lora", plain, lora_steps=50)
    for module, update in updates.items():
        W = base[f"{module}.weight"].double()
        key = f"base_model.model.{module}.lora_magnitude_vector"
        m = sum(load_file(a / "adapter_model.safetensors")[key] for a in adapters) / 2
        V = W + update.dense()
        assert relative_error(got[f"{module}.weight"], m[:, None] * V / norms(V)[:, None]) < 1e-5, module


def test_changes_merge_as_weighted_means(untied, tmp_path):
    """Heads of two adapters, one with LoRA on it besides, and tokens of which one is trained by both."""
    adapters = [
        save_adapter(
            untied, tmp_path / "0", seed=0, modules_to_save=["lm_head"], trainable_token_indices=[5, 1]
        ),
        save_adapter(
            untied, tmp_path / "1", seed=1, modules_to_save=["lm_head"], trainable_token_indices=[7, 5]
        ),
        save_adapter(untied, tmp_path / "2", seed=2, target_modules=["lm_head"], save_embedding_layers=False),
    ]
    weights, scale = [0.75, -0.25, 0.5], 0.9
    config = recipe("lora_task_arithmetic", untied, adapters, weights, parameters={"lambda": scale})
    got = merged_tensors(config, tmp_path / "out")
    base = {name: W.double() for name, W in base_tensors(untied).items()}
    files = [load_file(a / "adapter_model.safetensors") for a in adapters]
    W = base["lm_head.weight"]
    head = [f["base_model.model.lm_head.weight"] - W for f in files[:2]]
    D = products(base, adapters[2])[0]["lm_head.weight"]
    target = W + scale * (0.5 * D + (0.75 * head[0] - 0.25 * head[1]) / (0.75 + 0.25))
    assert relative_error(got["lm_head.weight"], target) < 1e-6
    target = base["model.embed_tokens.weight"].clone()
    rows = [f["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] for f in files[:2]]
    change = {1: rows[0][1] - target[1], 7: -(rows[1][0] - target[7])}
    change[5] = 0.75 * (rows[0][0] - target[5]) - 0.25 * (rows[1][1] - target[5])
    for row, delta in change.items():
        target[row] += scale * delta
    assert relative_error(got["model.embed_tokens.weight"], target) < 1e-6


def test_experts_of_two_adapters_by_recipe_and_python(moe, tmp_path):
    """Ranks 4 and 2, one of them on one parameter only; `name[expert]` or the checkpoint's own names."""
    for base in (moe / "qwen3_moe", moe / "gpt_oss"):
        adapters = [
            save_adapter(base, tmp_path / base.name / "0", seed=0, target_parameters=EXPERTS),
            save_adapter(base, tmp_path / base.name / "1", seed=1, target_parameters=EXPERTS[1:], r=2),
        ]
        config = recipe("tspa_lora", base, adapters, [1, 0.5], parameters={"lora_steps": 5})
        got = merged_tensors(config, tmp_path / base.name / "out")
        updates = merge_adapters("tspa_lora", adapters, [1, 0.5], base=base, lora_steps=5)
        before = base_tensors(base)
        down = before[LAYER + EXPERTS[1]]
        for expert in range(3):
            name = LAYER + (
                f"mlp.experts.{expert}.down_proj" if "qwen" in base.name else f"{EXPERTS[1]}[{expert}]"
            )
            assert (
                relative_error(got[LAYER + EXPERTS[1]][expert], updates[name].apply_to(down[expert])) < 1e-6
            )
        exact = merged_tensors(
            recipe("lora_task_arithmetic", base, adapters, [1, 0.5]), tmp_path / base.name / "exact"
        )
        merged = [peft_merged(base, adapter) for adapter in adapters]
        for name, W in before.items():
            target = W + sum(a * (m[name].double() - W.double()) for a, m in zip([1, 0.5], merged))
            assert relative_error(exact[name], target) < 1e-6, name


def test_the_loader_serves_adapted_tensors(untied, moe, tmp_path):
    """For stock tasks that want a dense tensor."""
    from mergekit.common import ModelPath

    from mergekit_tspa.plugin.references import AdapterReference

    kinds = {untied: {"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]}}
    for base, config in (kinds | {moe / "gpt_oss": {"target_parameters": EXPERTS}}).items():
        adapter = save_adapter(base, tmp_path / base.name, **config)
        paths = (ModelPath(path=str(path)) for path in (base, adapter))
        loader = AdapterReference(**dict(zip(("model", "lora"), paths))).lazy_loader()
        check(
            {name: loader.get_tensor(name) for name in loader.index.tensor_paths}, peft_merged(base, adapter)
        )


def test_experts_trained_apart(moe, tmp_path):
    """Per-expert names of transformers 4, which PEFT fuses when it loads them."""
    base, adapter = moe / "qwen3_moe", tmp_path / "a"
    save_adapter(base, adapter)
    torch.manual_seed(3)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for expert in range(3):
        for projection, d_out, d_in in (("gate", 12, 16), ("up", 12, 16), ("down", 16, 12)):
            module = f"base_model.model.{LAYER}mlp.experts.{expert}.{projection}_proj"
            tensors |= {
                f"{module}.lora_A.weight": torch.randn(4, d_in),
                f"{module}.lora_B.weight": torch.randn(d_out, 4),
            }
    save_file(tensors, adapter / "adapter_model.safetensors")
    edit_config(adapter, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    got = merged_tensors(recipe("lora_task_arithmetic", base, [adapter]), tmp_path / "out")
    check(got, peft_merged(base, adapter))
    assert relative_error(got[LAYER + EXPERTS[0]], base_tensors(base)[LAYER + EXPERTS[0]]) > 0.1


def test_unsloth_s_layout_of_experts(moe, tmp_path):
    """`lora_B_layout: grouped_by_expert` keeps the columns of an expert together."""
    base, adapter = moe / "qwen3_moe", tmp_path / "a"
    save_adapter(base, adapter, target_parameters=EXPERTS)
    target = peft_merged(base, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, B in tensors.items():
        if "experts" in name and "lora_B" in name:
            tensors[name] = B.view(-1, 4, 3).mT.flatten(1).contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    edit_config(adapter, lora_B_layout="grouped_by_expert")
    check(merged_tensors(recipe("lora_task_arithmetic", base, [adapter]), tmp_path / "out"), target)


@pytest.mark.parametrize("dora", [False, True])
def test_mlx(dora, untied, tmp_path):
    """`W + scale (a b)^T`, with DoRA rescaled to rows of length `m`."""
    adapter = tmp_path / "mlx"
    adapter.mkdir()
    config = {"fine_tune_type": "dora" if dora else "lora", "lora_parameters": {"rank": 4, "scale": 20.0}}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"model": str(untied)}))
    torch.manual_seed(4)
    parts = {"lora_a": torch.randn(32, 4), "lora_b": torch.randn(4, 32)} | (
        {"m": torch.rand(32)} if dora else {}
    )
    save_file({f"{Q}.{part}": tensor for part, tensor in parts.items()}, adapter / "adapters.safetensors")
    got = merged_tensors({"merge_method": "tspa_lora", "models": [{"model": f"{adapter}"}]}, tmp_path / "out")
    V = base_tensors(untied)[f"{Q}.weight"] + 20 * (parts["lora_a"] @ parts["lora_b"]).T
    target = parts["m"][:, None] * V / norms(V)[:, None] if dora else V
    assert relative_error(got[f"{Q}.weight"], target) < 1e-6


@pytest.mark.parametrize("kernel, dora", [(1, False), (3, False), (3, True)])
def test_convolutions(kernel, dora, tmp_path):
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Conv2d(6, 8, kernel))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], use_dora=dora))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    (update,) = merge_adapters("lora_task_arithmetic", [tmp_path], base=before).values()
    target = model.merge_and_unload().state_dict()["0.weight"]
    assert relative_error(update.apply_to(before["0.weight"]), target) < 1e-6


def bad_kinds(llama, untied, moe, folder):
    """`{what is wrong: (base, adapter, what the message must say)}`."""

    def saved(name, base, edit=lambda tensors: tensors, **config):
        adapter = save_adapter(base, folder / name, **config)
        file = adapter / "adapter_model.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in edit(load_file(file)).items()}, file)
        return adapter

    def longer(part):
        """One row, or column of an embedding's factor, more."""
        return lambda tensors: {
            key: torch.cat([t, t[:1]])
            if key.endswith(part)
            else torch.cat([t, t[:, :1]], 1)
            if "embedding_A" in key
            else t
            for key, t in tensors.items()
        }

    def without(part):
        return lambda tensors: {key: t for key, t in tensors.items() if part not in key}

    quantised = shutil.copytree(untied, folder / "quantised")
    edit_config(
        quantised, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    integers = shutil.copytree(untied, folder / "integers")
    tensors = load_file(integers / "model.safetensors")
    tensors[f"{Q}.weight"] = (100 * tensors[f"{Q}.weight"]).to(torch.int8)
    save_file(tensors, integers / "model.safetensors", {"format": "pt"})
    plain = save_adapter(untied, folder / "plain")
    tied = r"ties embedding and head to one tensor; untie"
    apart = "apart from the tensor .* ties it to; untie the base first, or train with ensure_weight_tying"
    both = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    no_bias = save_llama(folder / "no_bias", tie_word_embeddings=False)
    return {
        "LoRA on a tied embedding": (llama, saved("a", llama, target_modules=["embed_tokens"]), tied),
        "LoRA on a tied head": (llama, saved("b", llama, target_modules=["lm_head"]), f"(?s)lm_head.*{tied}"),
        "embedding saved alone": (llama, saved("c", llama, modules_to_save=["embed_tokens"]), apart),
        "head saved alone": (llama, saved("d", llama, without("embed_tokens"), **both), apart),
        "embedding and head saved": (
            llama,
            saved("e", llama, lambda t: t | {k: 2 * t[k] for k in t if "lm_head" in k}, **both),
            apart,
        ),
        "resized head": (
            untied,
            saved("f", untied, longer("lm_head.weight"), modules_to_save=["lm_head"]),
            "vocabulary has 65 tokens but lm_head.weight of .* has 64; resize the base to 65",
        ),
        "LoRA on a resized head": (
            untied,
            saved("g", untied, longer("lora_B.weight"), target_modules=["lm_head"]),
            "vocabulary has 65 tokens but lm_head.weight of .* has 64",
        ),
        "LoRA on a resized embedding": (
            untied,
            saved("h", untied, longer("base_layer.weight"), target_modules=["embed_tokens"]),
            "vocabulary has 65 tokens but model.embed_tokens.weight of .* has 64",
        ),
        "new tokens": (
            untied,
            edit_config(saved("i", untied, trainable_token_indices=[5, 1]), trainable_token_indices=[5, 64]),
            "vocabulary has 65 tokens but model.embed_tokens.weight of .* has 64",
        ),
        "other tokens": (
            untied,
            edit_config(saved("j", untied, trainable_token_indices=[5, 1]), trainable_token_indices=[5]),
            r"trainable_tokens_delta has shape \(2, 32\), but .* names 1 tokens",
        ),
        "magnitudes": (
            untied,
            saved("k", untied, longer("magnitude_vector"), use_dora=True),
            "q_proj has 33 magnitudes for 32 outputs",
        ),
        "no bias there": (
            no_bias,
            saved("l", no_bias, lora_bias=True),
            "self_attn.q_proj.bias.*a bias that the base does not have",
        ),
        "quantised base": (quantised, plain, "base model is quantised.*original full-precision checkpoint"),
        "base of integers": (integers, plain, "base model is quantised.*q_proj.weight"),
        "unknown nesting": (
            moe / "qwen3_moe",
            edit_config(
                saved("m", moe / "qwen3_moe", target_parameters=EXPERTS), target_parameters=EXPERTS[:1]
            ),
            "experts has 2 pairs of factors, but target_parameters",
        ),
        "rank of experts": (
            moe / "qwen3_moe",
            edit_config(
                saved("n", moe / "qwen3_moe", target_parameters=EXPERTS), rank_pattern={".*experts.*": 5}
            ),
            "hold 12 rows, no multiple of the rank 5",
        ),
        **{
            f"experts of {name}": (
                moe / name,
                edit_config(saved(f"r{name}", moe / name, target_modules=[], target_parameters=EXPERTS), r=6),
                r"factors for 2 experts of .*mlp.experts.*, but .* has 3 of them",
            )
            for name in ("qwen3_moe", "gpt_oss")
        },
        "rank": (untied, edit_config(saved("o", untied), r=8), "rank 4 but adapter_config.json says r = 8"),
        "NaN in a saved module": (
            untied,
            saved(
                "p",
                untied,
                lambda t: {k: x * float("nan") for k, x in t.items()},
                modules_to_save=["lm_head"],
            ),
            "contains NaN",
        ),
        "whole weights of mlx-lm": (
            untied,
            edit_config(saved("q", untied), peft_type=None, fine_tune_type="full"),
            "fine_tune_type 'full' holds no LoRA",
        ),
    }


def test_bad_kinds_are_one_sentence_and_write_nothing(llama, untied, moe, tmp_path, subtests):
    for what, (base, adapter, message) in bad_kinds(llama, untied, moe, tmp_path).items():
        with subtests.test(what):
            result = merge(recipe("lora_task_arithmetic", base, [adapter]), tmp_path / "out")
            assert result.exit_code == 1, result.exception
            error = result.output.strip().splitlines()[-1]
            assert error.startswith("Error: ") and re.search(message, error), error
            assert not (tmp_path / "out").exists()


def test_pissa_reads_the_base_only_for_its_factors(untied, tmp_path):
    adapter = read_adapter(save_adapter(untied, tmp_path / "a", init_lora_weights="pissa"))
    with pytest.raises(InputError, match="give the base model"):
        adapter.factors(Q)
    base, asked = base_tensors(untied), []
    shapes = {name: tuple(W.shape) for name, W in base.items()}
    fitted, _ = adapter.fit(ModelTensors("base", shapes, read=lambda name: asked.append(name) or base[name]))
    assert fitted.modules[Q].rank == 8 and not asked
    assert fitted.factors(Q).rank == 8 and asked == [f"{Q}.weight"]
    fitted.factors(Q)
    assert len(asked) == 1


def edit_config(directory, name="adapter_config.json", **changes):
    file = directory / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory
