"""Tiny models of many architectures, each with two adapters on all its linear layers.

PEFT's own merges are the oracle.  What the tests below find is the table "Architectures" of docs/adapters.md.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_tspa import InputError, merge_adapters, read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.geometry import in_attention
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.batches import Batch
from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.calibration.moments import input_statistics
from mergekit_tspa.calibration.score import answer_logits
from mergekit_tspa.calibration.singles import Singles
from tests.calibration.conftest import tiny_tokenizer
from tests.conftest import (
    base_tensors,
    load_model,
    merge,
    merged_tensors,
    peft_merged,
    recipe,
    relative_error,
    run,
    save_adapter,
    save_llama,
    write_lines,
    write_recipe,
)

WEIGHTS = [0.7, -0.4]
# Heads are wider than hidden_size / num_attention_heads where the architecture allows it, and no two sizes are
# equal.
ENCODER = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
ENCODER |= {"num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = ENCODER | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED |= {"tie_word_embeddings": False}
WIDE = GROUPED | {"head_dim": 12}
VISION = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 40,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
}

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LINEAR = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
MOE = ATTENTION | {"gate", "gate_up_proj", "down_proj"}
BERT = {"query", "key", "value", "dense"}
EXPERTS = {
    "target_modules": [*ATTENTION],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


class Architecture(NamedTuple):
    """A model, what `all-linear` adapts of it, and what differs from the plain case."""

    kind: str  # class of transformers
    config: dict[str, Any]
    adapted: set[str]  # last names of the modules or parameters
    task: str | None = None  # of PEFT
    second: Mapping[str, Any] = MappingProxyType({})  # settings of the second adapter
    saved: tuple[str, ...] = ()  # modules that PEFT saves whole
    no_adapter: str = ""  # why none is written


CLASSIFIER = {"task": "SEQ_CLS", "no_adapter": "an adapter trained it directly", "saved": ("classifier",)}
FUSED_EXPERTS = {"task": "CAUSAL_LM", "no_adapter": "it is a fused expert", "second": EXPERTS}
ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", WIDE, LINEAR, "CAUSAL_LM"),
    "Mistral": Architecture("MistralForCausalLM", WIDE, LINEAR, "CAUSAL_LM"),
    "Qwen2": Architecture("Qwen2ForCausalLM", GROUPED | {"tie_word_embeddings": True}, LINEAR, "CAUSAL_LM"),
    "Qwen3": Architecture("Qwen3ForCausalLM", WIDE, LINEAR, "CAUSAL_LM"),
    "Gemma 2": Architecture("Gemma2ForCausalLM", WIDE | {"tie_word_embeddings": True}, LINEAR, "CAUSAL_LM"),
    "Gemma 3, text": Architecture(
        "Gemma3ForCausalLM", WIDE | {"tie_word_embeddings": True}, LINEAR, "CAUSAL_LM"
    ),
    "Gemma 3, images": Architecture(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": WIDE | {"tie_word_embeddings": True, "model_type": "gemma3_text"},
            "vision_config": VISION
            | {
                "image_size": 16,
                "patch_size": 4,
                "vision_use_head": False,
                "model_type": "siglip_vision_model",
            },
            **IMAGES,
        },
        LINEAR | {"out_proj", "fc1", "fc2"},
        "CAUSAL_LM",
    ),
    "Phi-3": Architecture(
        "Phi3ForCausalLM", GROUPED, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, "CAUSAL_LM"
    ),
    "GPT-NeoX": Architecture(
        "GPTNeoXForCausalLM",
        ENCODER,
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        "CAUSAL_LM",
    ),
    "GPT-2": Architecture(
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 40}
        | {"bos_token_id": 1, "eos_token_id": 2},
        {"c_attn", "c_proj", "c_fc"},
        "CAUSAL_LM",
    ),
    "Mixtral": Architecture("MixtralForCausalLM", WIDE | {"num_local_experts": 3}, MOE, **FUSED_EXPERTS),
    "Qwen3-MoE": Architecture(
        "Qwen3MoeForCausalLM",
        WIDE | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        MOE,
        **FUSED_EXPERTS,
    ),
    "BERT": Architecture("BertModel", ENCODER, BERT),
    "BERT, masked words": Architecture("BertForMaskedLM", ENCODER, BERT),
    "BERT, classes": Architecture(
        "BertForSequenceClassification", ENCODER, BERT | {"classifier"}, **CLASSIFIER
    ),
    "RoBERTa": Architecture("RobertaModel", ENCODER, BERT),
    "RoBERTa, masked words": Architecture("RobertaForMaskedLM", ENCODER, BERT),
    "RoBERTa, classes": Architecture(
        "RobertaForSequenceClassification", ENCODER, BERT | {"out_proj"}, **CLASSIFIER
    ),
    "T5": Architecture("T5ForConditionalGeneration", T5, {*"qkvo", "wi", "wo"}, "SEQ_2_SEQ_LM"),
    "T5 1.1": Architecture(
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {*"qkvo", "wi_0", "wi_1", "wo"},
        "SEQ_2_SEQ_LM",
    ),
}


def save_model(path: Path, kind: str, **config) -> Path:
    """With norms and biases that are not all ones and zeros."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    model = model(model.config_class(**config))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


class Case(NamedTuple):
    architecture: Architecture
    base: Path
    adapters: list[Path]
    before: dict[str, Tensor]
    changed: set[str]  # tensors that PEFT's merge of one of them changes
    target: dict[str, Tensor]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request, tmp_path_factory) -> Case:
    architecture = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp("architecture")
    base = save_model(folder / "base", architecture.kind, **architecture.config)
    common = {"target_modules": "all-linear", "task_type": architecture.task}
    common["fan_in_fan_out"] = architecture.kind == "GPT2LMHeadModel"
    adapters = [
        save_adapter(base, folder / "one", seed=1, **common),
        save_adapter(base, folder / "two", seed=2, **common | {"r": 2} | dict(architecture.second)),
    ]
    before, merged = base_tensors(base), [peft_merged(base, adapter) for adapter in adapters]
    changed, target = set(), {}
    for name, W in before.items():
        deltas = [m[name].double() - W.double() for m in merged]
        total = sum(w * delta for w, delta in zip(WEIGHTS, deltas))
        if any(module in name for module in architecture.saved):  # trained directly: the mean of the changes
            total /= sum(map(abs, WEIGHTS))
        target[name] = (W.double() + total).to(W.dtype)
        if any(delta.any() for delta in deltas):
            changed.add(name)
    return Case(architecture, base, adapters, before, changed, target)


def load_whole(path: Path):
    """A model of which transformers finds every tensor in its place, and no other."""
    model, loading = load_model(path, output_loading_info=True)
    assert not any(loading.values()), loading
    return model


@torch.no_grad()
def outputs(model) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    inputs = {"input_ids": torch.arange(3, 15).view(2, 6)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.arange(5, 11).view(2, 3)
    if model.config.model_type == "gemma3":
        torch.manual_seed(0)
        inputs["input_ids"][:, 1:5] = IMAGES["image_token_index"]
        inputs |= {
            "pixel_values": torch.randn(2, 3, 16, 16),
            "token_type_ids": (inputs["input_ids"] == 90).long(),
        }
    return model.eval()(**inputs)[0]


def leaf(tensor: str) -> str:
    return tensor.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def test_a_merge_is_that_of_peft_as_a_model_and_as_an_adapter(case, tmp_path, caplog):
    config = recipe("lora_task_arithmetic", case.base, case.adapters, WEIGHTS, parameters={"adapter": True})
    result = merge(config, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {leaf(name) for name in case.changed} == case.architecture.adapted
    model = load_whole(tmp_path / "out")
    got = model.state_dict()
    assert got.keys() == case.target.keys()
    for name, tensor in got.items():
        if name in case.changed:
            assert relative_error(tensor, case.target[name]) < 1e-6, name
            assert relative_error(case.target[name], case.before[name]) > 0.05, name
        else:
            assert torch.equal(tensor, case.before[name]), name
    wanted = load_model(case.base)
    before = outputs(wanted)
    wanted.load_state_dict(case.target)
    assert (
        relative_error(outputs(model), outputs(wanted))
        < 1e-4
        < 0.01
        < relative_error(before, outputs(wanted))
    )

    if case.architecture.no_adapter:
        assert (
            "no adapter is written beside the model" in caplog.text
            and case.architecture.no_adapter in caplog.text
        )
        assert not (tmp_path / "out/adapter").exists()
        return
    adapted = PeftModel.from_pretrained(load_model(case.base), tmp_path / "out/adapter")
    assert relative_error(outputs(adapted), outputs(model)) < 1e-4
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        assert relative_error(tensor, got[name]) < 1e-5, name


def test_other_methods_change_adapted_tensors_only_and_stage_1_attention_only(case, tmp_path):
    lora, attention = {"lora_steps": 5}, {"attention_steps": 5}
    results = {}
    for method, parameters in {"core_tsv": {}, "tspa_lora": lora, "tspa": lora | attention}.items():
        config = recipe(method, case.base, case.adapters, [0.7, 0.4], parameters=parameters)
        assert (result := merge(config, tmp_path / method)).exit_code == 0, result.output
        results[method] = got = load_whole(tmp_path / method).state_dict()
        assert {name for name, W in case.before.items() if not torch.equal(got[name], W)} == case.changed
        assert all(tensor.isfinite().all() for tensor in got.values())
    aligned = {
        name for name, W in results["tspa_lora"].items() if relative_error(results["tspa"][name], W) > 1e-5
    }
    assert aligned == {name for name in case.changed if in_attention(name)}
    assert aligned


TEXTS = [{"text": "w1 w2 w3 w4 w5 w6 w7"}, {"prompt": "w9 w8", "completion": " w7 w6 w5 w4"}]
EXPERTS_INSIDE = ["Mixtral", "Qwen3-MoE"]
DECODERS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3, text", "Phi-3", "GPT-NeoX", "GPT-2"]


@pytest.mark.parametrize("case", DECODERS, indirect=True)
def test_texts_are_read_by_every_decoder(case):
    """One adapter comes back as itself on the inputs that its layers see, fused projections included."""
    options = {
        "base": case.base,
        "model": load_model(case.base, dtype=torch.float32),
        "tokenizer": tiny_tokenizer(),
        "lambda_": 1.0,
    }
    one = merge_adapters("regmean", case.adapters[:1], examples=[TEXTS], **options)
    plain = merge_adapters("lora_task_arithmetic", case.adapters[:1], base=case.base)
    assert one.keys() == plain.keys()
    for module, update in one.items():
        assert relative_error(update.dense(), plain[module].dense()) < 1e-3
    both = merge_adapters("regmean_plus", case.adapters, examples=[TEXTS, TEXTS[::-1]], **options)
    assert both.keys() == merge_adapters("core_tsv", case.adapters, base=case.base).keys()


@pytest.mark.parametrize("case", EXPERTS_INSIDE, indirect=True)
def test_texts_are_read_by_experts(case):
    """An expert's inputs are the tokens that the router sends to it, also where all are one parameter."""
    model = load_model(case.base, dtype=torch.float32)
    chosen = model.config._experts_implementation
    options = {"base": case.base, "model": model, "tokenizer": tiny_tokenizer(), "lambda_": 1.0}
    one = merge_adapters("regmean", case.adapters[1:], examples=[TEXTS], **options)
    plain = merge_adapters("lora_task_arithmetic", case.adapters[1:], base=case.base)
    assert one.keys() == plain.keys() and any("experts" in module for module in one)
    for module, update in one.items():
        assert relative_error(update.dense(), plain[module].dense()) < 1e-3
    both = merge_adapters("regmean", case.adapters, examples=[TEXTS, TEXTS], **options | {"lambda_": "auto"})
    assert both.keys() == merge_adapters("core_tsv", case.adapters, base=case.base).keys()
    assert model.config._experts_implementation == chosen
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="use regmean"):
        merge_adapters("regmean_plus", case.adapters, examples=[TEXTS, TEXTS], **options)


@pytest.mark.parametrize("case", EXPERTS_INSIDE, indirect=True)
def test_a_recipe_with_texts_knows_tensors_by_other_names(case, tmp_path):
    """mergekit and transformers call a router by another name than the checkpoint."""
    tiny_tokenizer().save_pretrained(case.base)
    texts = write_lines(tmp_path / "texts", TEXTS)
    config = recipe("regmean", case.base, case.adapters[:1])
    config["models"][0]["parameters"] = {"examples": str(texts)}
    config["parameters"] = {"lambda": "auto"}
    assert (result := merge(config, tmp_path / "auto")).exit_code == 0, result.output
    config["parameters"] = {"lambda": 1.0}
    got = merged_tensors(config, tmp_path / "out")
    plain = merged_tensors(recipe("lora_task_arithmetic", case.base, case.adapters[:1]), tmp_path / "plain")
    assert got.keys() == plain.keys()
    for name, W in case.before.items():
        change = plain[name] - W.to(plain[name])
        assert (got[name] - plain[name]).norm() <= 1e-3 * change.norm(), name


@pytest.mark.parametrize("case", EXPERTS_INSIDE, indirect=True)
def test_a_model_with_experts_answers_with_an_adapter_beside_it(case):
    """As PEFT's merged model does, and its experts' moments are those of the tokens that reach them."""
    tensors = ModelTensors.of(str(case.base), Checkpoint(case.base))
    singles = Singles(
        load_model(case.base, dtype=torch.float32), tensors, [read_adapter(case.adapters[1], "a")]
    )
    example = Example((), (1, 2, 3, 4, 5, 6, 7, 8))
    batch = Batch.of([("a", example)])
    with torch.no_grad(), singles.alone(batch.parts):
        got = answer_logits(singles, batch)
    merged = PeftModel.from_pretrained(load_model(case.base, dtype=torch.float32), case.adapters[1])
    want = merged(input_ids=torch.tensor([example.tokens])).logits[0, :-1]
    assert relative_error(got, want) < 1e-4
    found = input_statistics(singles, {"a": [example]})["a"]
    routed = {
        name: own.tokens
        for name, own in found.items()
        if ("experts" in name and "0.mlp" in name) or "0.block" in name
    }
    assert routed and max(routed.values()) <= 8
    per_expert = case.architecture.config.get("num_experts_per_tok", 2)
    first = {name: n for name, n in routed.items() if name.endswith((".w1.weight", ".gate_proj.weight"))}
    assert sum(first.values()) == per_expert * 8 * len({name.split("layers.")[1][0] for name in first})


def test_attention_of_an_unknown_layout_is_named_and_can_be_left_out(tmp_path):
    """The pooling head that a vision tower can have keeps query, key and value in one parameter."""
    kind, config, *_ = ARCHITECTURES["Gemma 3, images"]
    vision = config["vision_config"] | {"vision_use_head": True}
    base = save_model(tmp_path / "base", kind, **config | {"vision_config": vision})
    adapters = [save_adapter(base, tmp_path / str(i), seed=i, target_modules="all-linear") for i in (1, 2)]
    result = merge(recipe("tspa_attention", base, adapters), tmp_path / "refused")
    assert result.exit_code == 1 and not (tmp_path / "refused").exists()
    assert (
        "Error: vision_tower.head.attention.out_proj.weight: its attention layout is not known"
        in result.output
    )
    steps = [{"filter": "vision_tower.head", "value": 0}, {"value": 2}]
    config = recipe("tspa_attention", base, adapters, parameters={"attention_steps": steps})
    assert merge(config, tmp_path / "out").exit_code == 0
    load_whole(tmp_path / "out")


@pytest.mark.parametrize("case", ["Gemma 3, images", "Qwen3-MoE", "RoBERTa, classes", "T5"], indirect=True)
def test_the_stock_command_line_writes_it(case, tmp_path):
    config = recipe("lora_task_arithmetic", case.base, case.adapters, WEIGHTS)
    result = run(
        "mergekit-yaml", write_recipe(tmp_path / "r.yml", config), tmp_path / "out", "--no-copy-tokenizer"
    )
    assert result.returncode == 0, result.stderr
    for name, tensor in load_whole(tmp_path / "out").state_dict().items():
        assert relative_error(tensor, case.target[name]) < 1e-6, name


# Where mergekit's definition does not fit the base, its own tensors are taken.
MISFITS = ["Gemma 3, images", "GPT-NeoX", "BERT", "BERT, masked words", "RoBERTa", "T5"]


@pytest.mark.parametrize("case", MISFITS, indirect=True)
def test_mergekit_itself_fails_on_these(case, tmp_path):
    """When it does not any more, `plugin/architecture.py` can go."""
    other = shutil.copytree(case.base, tmp_path / "other")
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (case.base, other)]
    result = merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    assert isinstance(result.exception, RuntimeError | TypeError)


@pytest.mark.parametrize("case", MISFITS, indirect=True)
def test_the_base_s_own_names_are_kept(case, tmp_path):
    got = merged_tensors(recipe("core_tsv", case.base, case.adapters), tmp_path / "out")
    assert got.keys() == load_file(case.base / "model.safetensors").keys()


def test_tensors_that_mergekit_s_definition_leaves_out_are_kept(tmp_path):
    """Biases of query, key, value and output of a Llama, which a merge of mergekit itself loses."""
    base = save_model(tmp_path / "base", "LlamaForCausalLM", **WIDE, attention_bias=True, mlp_bias=True)
    adapter = save_adapter(base, tmp_path / "a")
    assert merge(recipe("core_tsv", base, [adapter]), tmp_path / "out").exit_code == 0
    got, before = load_whole(tmp_path / "out").state_dict(), base_tensors(base)
    assert sum(name.endswith("bias") for name in got) == 14
    for name, tensor in got.items():
        assert torch.equal(tensor, before[name]) != name.endswith(("q_proj.weight", "v_proj.weight")), name


def test_a_head_that_has_another_name_on_disk(tmp_path):
    """`lm_head` of a GPT-NeoX is `embed_out` in its checkpoints."""
    base = save_model(tmp_path / "base", "GPTNeoXForCausalLM", **ENCODER, tie_word_embeddings=False)
    adapter = save_adapter(base, tmp_path / "a", target_modules=["lm_head"], save_embedding_layers=False)
    config = recipe("lora_task_arithmetic", base, [adapter], parameters={"adapter": True})
    assert merge(config, tmp_path / "out").exit_code == 0
    target = peft_merged(base, adapter)
    assert relative_error(base_tensors(base)["lm_head.weight"], target["lm_head.weight"]) > 0.1
    for got in (load_whole(tmp_path / "out").state_dict(), peft_merged(base, tmp_path / "out/adapter")):
        for name, tensor in got.items():
            assert relative_error(tensor, target[name]) < 1e-6, name


@pytest.mark.parametrize("case", ["Mixtral", "Qwen3-MoE"], indirect=True)
def test_adapters_of_attention_beside_experts_come_out_as_one(case, tmp_path):
    adapters = [
        save_adapter(case.base, tmp_path / str(i), seed=i, target_modules=[*ATTENTION]) for i in (3, 4)
    ]
    config = recipe("core_tsv", case.base, adapters, parameters={"adapter": True})
    assert merge(config, tmp_path / "out").exit_code == 0
    got, adapted = base_tensors(tmp_path / "out"), peft_merged(case.base, tmp_path / "out/adapter")
    for name, tensor in got.items():
        assert relative_error(adapted[name], tensor) < 1e-5, name


def test_indices_that_a_checkpoint_holds_stay_whole_numbers(tmp_path):
    """Of the age when positions were saved; bfloat16 knows them up to 256."""
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "a")
    tensors = load_file(base / "model.safetensors") | {"model.position_ids": torch.arange(1000)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    got = merged_tensors(recipe("core_tsv", base, [adapter], dtype="bfloat16"), tmp_path / "out")
    assert got.keys() == tensors.keys() and got["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(got["model.position_ids"], tensors["model.position_ids"])


def test_slices_of_a_base_whose_own_tensors_are_taken(tmp_path):
    """Layers 0, 1, 1 of a GPT-NeoX, the first two with weights along a gradient."""
    base = save_model(tmp_path / "base", "GPTNeoXForCausalLM", **ENCODER)
    adapter = save_adapter(base, tmp_path / "a", target_modules=["query_key_value"])
    source = recipe("x", base, [adapter])["models"][0]
    slices = [
        {"sources": [source | {"layer_range": [0, 2], "parameters": {"weight": [1.0, 0.5]}}]},
        {"sources": [source | {"layer_range": [1, 2], "parameters": {"weight": 2.0}}]},
    ]
    config = {"merge_method": "lora_task_arithmetic", "base_model": str(base), "slices": slices}
    got = merged_tensors(config, tmp_path / "out", "--clone-tensors")
    W, merged = load_file(base / "model.safetensors"), peft_merged(base, adapter)
    for layer, (source, weight) in enumerate([(0, 1.0), (1, 0.5), (1, 2.0)]):
        for name in (name for name in W if f"layers.{source}." in name):
            target = W[name] + weight * (merged[name] - W[name])
            assert relative_error(got[name.replace(f".{source}.", f".{layer}.")], target) < 1e-6, name
    assert sum(name.endswith("query_key_value.weight") for name in got) == 3


def test_modules_of_a_base_with_several_stacks(tmp_path):
    """Encoder and decoder of a T5 with weights of their own."""
    base = save_model(tmp_path / "base", "T5ForConditionalGeneration", **T5)
    adapter = save_adapter(base, tmp_path / "a", target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM")
    source = recipe("x", base, [adapter])["models"][0]
    weights = {"encoder.block": 0.5, "decoder.block": -2.0, "default": 1.0}
    modules = {
        name: {"models": [source | {"parameters": {"weight": weight}}]} for name, weight in weights.items()
    }
    config = {"merge_method": "lora_task_arithmetic", "base_model": str(base), "modules": modules}
    got = merged_tensors(config, tmp_path / "out")
    W, merged = load_file(base / "model.safetensors"), peft_merged(base, adapter)
    assert got.keys() == W.keys()
    for name, tensor in got.items():
        weight = next((weight for stack, weight in weights.items() if name.startswith(stack)), 1)
        assert relative_error(tensor, W[name] + weight * (merged[name] - W[name])) < 1e-6, name


def test_an_adapter_of_embeddings_on_a_base_without_the_prefix_model(tmp_path):
    base = save_llama(tmp_path / "base", tie_word_embeddings=False)
    adapter = save_adapter(base, tmp_path / "a", target_modules=["embed_tokens", "lm_head", "q_proj"])
    W, merged = load_file(base / "model.safetensors"), peft_merged(base, adapter)
    bare = {name.removeprefix("model."): tensor for name, tensor in W.items()}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    got = merged_tensors(recipe("lora_task_arithmetic", base, [adapter]), tmp_path / "out")
    assert got.keys() == bare.keys() and not torch.equal(
        got["embed_tokens.weight"], bare["embed_tokens.weight"]
    )
    for name, tensor in merged.items():
        assert relative_error(got[name.removeprefix("model.")], tensor) < 1e-6, name


def bad_bases(folder):
    """`{what is wrong: (recipe, what the message must say)}`."""
    llama = save_llama(folder / "llama")
    lora = save_adapter(llama, folder / "lora")
    copies = ("incomplete", "unnamed", "renamed")
    incomplete, unnamed, renamed = (shutil.copytree(llama, folder / name) for name in copies)
    tensors = load_file(llama / "model.safetensors")
    save_file({f"a.{n}": t for n, t in tensors.items()}, renamed / "model.safetensors", {"format": "pt"})
    del tensors["model.norm.weight"]
    save_file(tensors, incomplete / "model.safetensors", {"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    (unnamed / "config.json").write_text(json.dumps(config | {"architectures": None}))
    neox = save_model(folder / "neox", "GPTNeoXForCausalLM", **ENCODER)
    of_neox = save_adapter(neox, folder / "of_neox", target_modules=["query_key_value"])
    t5 = save_model(folder / "t5", "T5ForConditionalGeneration", **T5)
    of_t5 = save_adapter(t5, folder / "of_t5", target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    model = recipe("x", t5, [of_t5])["models"][0]
    sliced = {"slices": [{"sources": [model | {"layer_range": [0, 2]}]}]}
    modules = {"modules": {"encoder": {"models": [model]}}}
    of_t5 = {"merge_method": "core_tsv", "base_model": str(t5)}
    words = save_model(folder / "words", "BertForMaskedLM", **ENCODER)
    classes = save_model(folder / "classes", "BertForSequenceClassification", **ENCODER)
    head = save_adapter(classes, folder / "head", target_modules=["query"], task_type="SEQ_CLS")
    return {
        "incomplete": (
            recipe("core_tsv", incomplete, [lora]),
            "incomplete: its checkpoint lacks model.norm.weight;",
        ),
        "renamed": (
            recipe("core_tsv", renamed, [lora]),
            "has a.model.embed_tokens.weight, which transformers does not know",
        ),
        "no class": (recipe("core_tsv", unnamed, [lora]), "does not name the class of the model"),
        "vocabulary": (
            recipe("core_tsv", neox, [of_neox], tokenizer={"source": "base"}),
            "leave out the tokenizer",
        ),
        "slices": (of_t5 | sliced, "several stacks of layers; .* decoder.block, default, encoder.block"),
        "unknown module": (of_t5 | modules, "has no encoder; it has decoder.block, default, encoder.block"),
        "head of another class": (
            recipe("core_tsv", words, [head]),
            "classifier.bias.*save the base with that one",
        ),
    }


def test_bad_bases_are_one_sentence_and_write_nothing(tmp_path, subtests):
    for what, (config, message) in bad_bases(tmp_path).items():
        with subtests.test(what):
            result = merge(config, tmp_path / "out")
            assert result.exit_code == 1, result.exception
            error = result.output.strip().splitlines()[-1]
            assert error.startswith("Error: ") and re.search(message, error), error
            assert not (tmp_path / "out").exists()
