"""Full models among the inputs of a recipe, and of the Python entry."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mergekit_tspa import InputError, merge_adapters
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
from tests.plugin.test_kinds import EXPERTS, moe  # noqa: F401

NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


def save_full(base, path, adapter=None, changes=None, **options):
    """A full model: the base with an adapter merged, and `{tensor: what is added to it}`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = peft_merged(base, adapter) if adapter else model.state_dict()
    for name, change in (changes or {}).items():
        tensors[name] = tensors[name] + change
    model.load_state_dict(tensors)
    model.save_pretrained(path, **options)
    return path


def with_full(base, adapters, models, parameters=None, method="lora_task_arithmetic", weights=None):
    config = recipe(method, base, adapters, parameters=parameters or {})
    config["models"] += [{"model": {"model": {"path": str(model)}}} for model in models]
    for model, weight in zip(config["models"], weights or []):
        model["parameters"] = {"weight": weight}
    return config


def check(got, target, tolerance=1e-5):
    for name, tensor in got.items():
        assert relative_error(tensor, target[name]) < tolerance, name


@pytest.fixture(scope="module")
def full(llama, adapters, tmp_path_factory):
    """The base with adapter three (rank 6 on all linear layers) merged, and norm and embedding trained."""
    torch.manual_seed(5)
    changes = {NORM: torch.randn(64), EMBED: torch.randn(96, 64)}
    return save_full(llama, tmp_path_factory.mktemp("full") / "full", adapters[2], changes)


@pytest.mark.parametrize(
    "method", ["lora_task_arithmetic", "tspa_lora", "tspa", "knots_mean", "factor_linear"]
)
def test_one_full_model_comes_back(method, llama, full, tmp_path):
    config = with_full(llama, [], [full], {"extract_rank": 6}, method)
    got = merged_tensors(config, tmp_path / "out")
    check(got, base_tensors(full), 1e-5 if method == "lora_task_arithmetic" else 1e-4)


def test_many_shards(llama, adapters, tmp_path):
    full = save_full(llama, tmp_path / "full", adapters[2], max_shard_size="20KB")
    got = merged_tensors(
        with_full(llama, [], [full]), tmp_path / "out", "--out-shard-size", "20K", "--lazy-unpickle"
    )
    check(got, base_tensors(full))


def test_conv1d_beside_dora(gpt2, tmp_path):
    """GPT-2 stores the transpose, which the factors of a full model are made of and DoRA's magnitudes have to know."""
    config = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    lora = save_adapter(gpt2, tmp_path / "lora", **config)
    dora = save_adapter(gpt2, tmp_path / "dora", seed=3, use_dora=True, **config)
    full = save_full(gpt2, tmp_path / "full", lora)
    check(merged_tensors(with_full(gpt2, [], [full], method="tspa"), tmp_path / "one"), base_tensors(full))
    config = with_full(gpt2, [dora], [full])
    config["models"].reverse()
    target = merged_tensors(recipe("lora_task_arithmetic", gpt2, [lora, dora]), tmp_path / "adapters")
    check(merged_tensors(config, tmp_path / "both"), target)


def test_experts(moe, tmp_path):  # noqa: F811
    """Apart on disk (Mixtral), and fused there (gpt-oss)."""
    for name, config in {
        "mixtral": {"target_modules": ["q_proj", "w1", "w2", "w3", "gate"]},
        "gpt_oss": {"target_parameters": EXPERTS},
    }.items():
        full = save_full(
            moe / name, tmp_path / name, save_adapter(moe / name, tmp_path / f"{name}-lora", **config)
        )
        got = merged_tensors(with_full(moe / name, [], [full]), tmp_path / f"{name}-out")
        check(got, base_tensors(full))


def test_mixed_inputs(llama, adapters, full, tmp_path):
    """Linear weights by their weights; norm and embedding as the weighted mean over the models that changed them."""
    other = save_full(llama, tmp_path / "other", adapters[1], {NORM: torch.ones(64)})
    weights = [0.5, 1.5, 0.25]
    got = merged_tensors(with_full(llama, adapters[:1], [full, other], weights=weights), tmp_path / "out")
    W = base_tensors(llama)
    models = [peft_merged(llama, adapters[0]), base_tensors(full), base_tensors(other)]
    target = {name: W[name] + sum(a * (m[name] - W[name]) for a, m in zip(weights, models)) for name in W}
    target[NORM] = W[NORM] + (1.5 * (models[1][NORM] - W[NORM]) + 0.25) / 1.75
    target[EMBED] = models[1][EMBED]
    check(got, target)

    updates = merge_adapters("lora_task_arithmetic", [adapters[0], full, str(other)], weights, base=llama)
    for name, tensor in got.items():
        update = updates.pop(name.removesuffix(".weight"), None)
        assert relative_error(update.apply_to(W[name]) if update else W[name], tensor) < 1e-6, name
    assert not updates


def test_parameters_per_model(llama, adapters, tmp_path):
    """What stands nearest to the model decides; two slices."""
    full = save_full(llama, tmp_path / "full", adapters[2])

    def rank(layer, got, projection="mlp.up_proj"):
        name = f"model.layers.{layer}.{projection}.weight"
        S = torch.linalg.svdvals(got[name] - base_tensors(llama)[name])
        return int((S > 1e-4 * S[0]).sum())

    sources = [{"model": str(full), "layer_range": [i, i + 1]} for i in range(2)]
    sources[1]["parameters"] = {"extract_rank": 3}
    config = {
        "merge_method": "lora_task_arithmetic",
        "base_model": str(llama),
        "slices": [{"sources": [source]} for source in sources],
        "parameters": {"extract_rank": 5},
    }
    got = merged_tensors(config, tmp_path / "ranks")
    assert [rank(i, got) for i in range(2)] == [5, 3]
    got = merged_tensors(with_full(llama, [], [full], {"extract_energy": 0.5}), tmp_path / "energy")
    assert 1 <= rank(0, got) < 6
    got = merged_tensors(with_full(llama, [], [full], {"extract_energy": 0.9999}), tmp_path / "more")
    assert rank(0, got) == 6


def test_same_result_twice(llama, full, tmp_path):
    once, again = (
        merged_tensors(with_full(llama, [], [full]), tmp_path / name) for name in ("once", "again")
    )
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_what_is_lost_is_said(llama, tmp_path, caplog):
    name = "model.layers.0.mlp.up_proj.weight"
    full = save_full(llama, tmp_path / "full", changes={name: torch.randn(96, 64)})
    merged_tensors(with_full(llama, [], [full], {"extract_rank": 4}), tmp_path / "out")
    lines = [
        r.message for r in caplog.records if r.name.startswith("mergekit_tspa") and r.levelname == "WARNING"
    ]
    (line,) = lines
    assert re.search(rf"of 14 weights 1 differ .* rank 4 keep .* {re.escape(name)}; the rest is lost", line)


def test_bad_full_models(llama, full, adapters, tmp_path):
    (tmp_path / "empty").mkdir()
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 96, "num_hidden_layers": 2}
    qkv = save_llama(tmp_path / "biases", attention_bias=True)
    open_head = save_llama(tmp_path / "untied", tie_word_embeddings=False)
    other = tmp_path / "mistral"
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(other)
    text = (other / "config.json").read_text().replace('"llama"', '"mistral"')
    (other / "config.json").write_text(text.replace("LlamaForCausalLM", "MistralForCausalLM"))
    larger = save_llama(tmp_path / "larger", vocab_size=99)
    cases = {
        "neither an adapter nor a model": with_full(llama, [], [tmp_path / "empty"]),
        "its model_type is mistral": with_full(llama, [], [other]),
        "tensors of .*biases are not in": with_full(llama, [], [qkv]),
        "only the base .* ties": with_full(llama, [], [open_head]),
        "resize the base to 99 tokens": with_full(llama, adapters[:1], [larger]),
        "listed twice": with_full(llama, [], [full, full]),
        "extract_rank: 0": with_full(llama, [], [full], {"extract_rank": 0}),
        "extract_energy.*give one value": with_full(llama, [], [full], {"extract_energy": [0.5, 0.9]}),
        "extract_energy.*equal rank": with_full(llama, [], [full], {"extract_energy": 0.9}, "factor_ties"),
    }
    for message, config in cases.items():
        result = merge(config, tmp_path / "out")
        assert result.exit_code == 1 and re.search(message, result.output.splitlines()[-1]), (
            message,
            result.output,
        )
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="it is a full model; give the base"):
        merge_adapters("tspa_lora", [full])
