"""Every kind of adapter through `mergekit-yaml`'s own command, with PEFT's own merge as the oracle."""

import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
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

from tests.conftest import (
    base_tensors,
    merged_tensors,
    peft_merged,
    recipe,
    relative_error,
    save_adapter,
)

BLOCKS = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAYER = "model.layers.0."
Q = f"{LAYER}self_attn.q_proj"
# base, what PEFT is given, and tensors that must differ from the base's
KINDS = {
    "embedding": ("untied", {"target_modules": ["embed_tokens", "q_proj"]}, ["model.embed_tokens.weight"]),
    "head": ("untied", {"target_modules": ["lm_head", "q_proj"]}, ["lm_head.weight"]),
    "DoRA": ("untied", {"use_dora": True}, [f"{Q}.weight"]),
    "DoRA on Conv1D": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, []),
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
    "both biases": ("untied", {"lora_bias": True, "bias": "all"}, [f"{Q}.bias", f"{LAYER}self_attn.k_proj.bias"]),
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
    "experts, square and transposed": ("gpt_oss", {"target_parameters": EXPERTS[1:]}, [f"{LAYER}{EXPERTS[1]}"]),
}


def check(got, target, tolerance=1e-6):
    for name, tensor in got.items():
        assert relative_error(tensor, target[name]) < tolerance, name


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    """A Qwen2: untied, with biases, here not zero, of query, key and value."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=False, **shape))
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
