"""Merging adapters of a loaded PEFT model, with PEFT's own arithmetic as the oracle."""

import re
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from mergekit_tspa import InputError, add_merged_adapter, merge_adapters
from tests.conftest import ROOT, relative_error, save_adapter, save_llama

TOKENS = torch.arange(20).view(2, 10)
WEIGHTS = [0.7, -0.4, 1.3]


def load(base: Path, adapters: list[Path], dtype: torch.dtype = torch.float32) -> PeftModel:
    """Adapters `a`, `b`, ..; the first is active."""
    names = "abc"[: len(adapters)]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = PeftModel.from_pretrained(model, adapters[0], names[0], autocast_adapter_dtype=False)
    for name, adapter in zip(names[1:], adapters[1:]):
        model.load_adapter(adapter, name, autocast_adapter_dtype=False)
    return model.eval()


@pytest.fixture
def model(llama, adapters) -> PeftModel:
    return load(llama, adapters)


@pytest.fixture(scope="session")
def equal_ranks(llama, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("equal")
    return [save_adapter(llama, folder / str(seed), seed=seed, lora_alpha=seed) for seed in (1, 2)]


@pytest.fixture(scope="session")
def conv1d(gpt2, tmp_path_factory) -> list[Path]:
    """On GPT-2's Conv1D layers and its embedding of positions."""
    folder = tmp_path_factory.mktemp("conv1d")
    kinds = [{"r": 2, "target_modules": ["c_attn", "wpe"]}, {"r": 3, "target_modules": ["c_attn", "c_proj"]}]
    return [
        save_adapter(gpt2, folder / str(i), seed=i, fan_in_fan_out=True, **kind)
        for i, kind in enumerate(kinds)
    ]


def layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    named = model.get_base_model().named_modules()
    return {
        n: m for n, m in named if isinstance(m, LoraLayer) and adapter in (*m.lora_A, *m.lora_embedding_A)
    }


def deltas(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return {name: layer.get_delta_weight(adapter).detach() for name, layer in layers(model, adapter).items()}


def weighted_sum(model: PeftModel, adapters: str, weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights):
        for name, delta in deltas(model, adapter).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-5):
    assert set(got) == set(want)
    for name in want:
        assert relative_error(got[name], want[name]) < tolerance, name


@torch.no_grad()
def outputs(model: PeftModel, adapter: str | None = None) -> torch.Tensor:
    if adapter:
        model.set_adapter(adapter)
    return model(TOKENS).logits


def state(model: PeftModel) -> tuple:
    """All that a refusal must leave alone."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return list(model.peft_config), model.active_adapters, trained, tensors


def assert_still(before: tuple, model: PeftModel, *added: str):
    names, active, trained, tensors = state(model)
    assert (names, active) == ([*before[0], *added], before[1])
    new = set(trained) - set(before[2])
    assert not any(trained[name] for name in new) and bool(new) == bool(added)
    assert {name: trained[name] for name in before[2]} == before[2]
    assert all(torch.equal(tensors[key], tensor) for key, tensor in before[3].items())


def test_task_arithmetic_is_the_weighted_sum_of_peft(model):
    model.set_adapter("b")  # trainable from now on
    before = state(model)
    add_merged_adapter(model, ["a", "b", "c"], "merged", WEIGHTS, "lora_task_arithmetic")
    assert_still(before, model, "merged")
    want = weighted_sum(model, "abc", WEIGHTS)
    assert_same(deltas(model, "merged"), want)
    config = model.peft_config["merged"]
    assert config.r == config.lora_alpha == 12 and not config.use_rslora and config.task_type == "CAUSAL_LM"
    assert {layer.scaling["merged"] for layer in layers(model, "merged").values()} == {1}
    assert {layer.lora_A["merged"].weight.shape[0] for layer in layers(model, "merged").values()} == {12}


def test_only_layers_of_the_adapters_that_take_part_change(model):
    add_merged_adapter(model, ["b", "a", "c"], "merged", [2, 0.5, 0], "lora_task_arithmetic")
    assert_same(deltas(model, "merged"), weighted_sum(model, "ba", [2, 0.5]))
    assert model.peft_config["merged"].r == 6


def test_scales_set_in_memory_count(model):
    for layer in layers(model, "a").values():
        layer.set_scale("a", 3.0)
    add_merged_adapter(model, ["a"], "merged", method="lora_task_arithmetic")
    assert_same(deltas(model, "merged"), deltas(model, "a"))


def test_factor_linear_is_peft_s_linear(llama, equal_ranks):
    model = load(llama, equal_ranks)
    add_merged_adapter(model, ["a", "b"], "ours", [0.6, -0.3], "factor_linear")
    model.base_model.add_weighted_adapter(["a", "b"], [0.6, -0.3], "theirs", combination_type="linear")
    assert_same(deltas(model, "ours"), deltas(model, "theirs"))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("core_tsv", {}),
        ("lora_ties", {"rank": 3}),
        ("lora_ties", {"rank": 64}),  # of the smaller weights all directions
        ("tspa", {"attention_steps": 3, "lora_steps": 3}),
    ],
)
def test_methods_do_what_they_do_on_the_directories(model, llama, adapters, method, parameters):
    add_merged_adapter(model, ["a", "b", "c"], "merged", [1, 0.5, 0.8], method, **parameters)
    want = merge_adapters(method, adapters, [1, 0.5, 0.8], base=llama, **parameters)
    assert_same(deltas(model, "merged"), {name: update.dense() for name, update in want.items()}, 1e-4)


def test_conv1d_and_embeddings(gpt2, conv1d):
    model = load(gpt2, conv1d)
    add_merged_adapter(model, ["a", "b"], "merged", [1.0, 0.5], "lora_task_arithmetic")
    assert_same(deltas(model, "merged"), weighted_sum(model, "ab", [1.0, 0.5]))
    assert model.peft_config["merged"].fan_in_fan_out
    steps = {"attention_steps": 3, "lora_steps": 3}
    add_merged_adapter(model, ["a", "b"], "tspa", method="tspa", **steps)
    want = merge_adapters("tspa", conv1d, base=gpt2, **steps)
    assert_same(deltas(model, "tspa"), {name: update.dense() for name, update in want.items()}, 1e-4)


def test_convolutions_in_a_model_without_configuration():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Flatten(), torch.nn.Linear(96, 4))
    config = {"target_modules": ["0", "2"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(r=2, **config), "a")
    model.add_adapter("b", LoraConfig(r=3, **config))
    add_merged_adapter(model, ["a", "b"], "merged", [0.5, 2], "lora_task_arithmetic")
    assert_same(deltas(model, "merged"), weighted_sum(model, "ab", [0.5, 2]))
    model.set_adapter("merged")
    x = torch.randn(2, 3, 6, 6)
    want = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    with pytest.raises(InputError, match="names no number of attention heads"):
        add_merged_adapter(model, ["a", "b"], "tspa", method="tspa")


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_forward_save_and_load(base, tmp_path, request):
    path, given = (
        request.getfixturevalue(base),
        request.getfixturevalue({"llama": "adapters", "gpt2": "conv1d"}[base]),
    )
    model = load(path, given)
    alone = outputs(model)
    names = ["a", "b", "c"][: len(given)]
    add_merged_adapter(model, names, "merged")
    torch.testing.assert_close(outputs(model), alone, rtol=0, atol=0)
    want = outputs(model, "merged")
    assert not torch.allclose(want, alone, atol=1e-2)

    dense = AutoModelForCausalLM.from_pretrained(path)
    for name, delta in deltas(model, "merged").items():
        dense.get_submodule(name).weight.data += delta
    torch.testing.assert_close(want, dense(TOKENS).logits, rtol=1e-3, atol=1e-3)

    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    torch.testing.assert_close(outputs(load(path, [tmp_path / "merged"])), want)


def test_head_on_tied_embeddings_and_half_precision(llama, tmp_path):
    """Layers are adapted one by one, so a tie of the base does not matter here."""
    targets = ["lm_head", "embed_tokens", "k_proj"]
    given = [save_adapter(llama, tmp_path / str(seed), seed=seed, target_modules=targets) for seed in (1, 2)]
    model = load(llama, given, torch.bfloat16)
    add_merged_adapter(model, ["a", "b"], "merged", [0.5, 0.5], "tspa_lora", lora_steps=2)
    assert {p.dtype for name, p in model.named_parameters() if ".merged" in name} == {torch.bfloat16}
    add_merged_adapter(model, ["a", "b"], "attention", [0.5, 0.5], "tspa", lora_steps=2, attention_steps=2)
    assert set(layers(model, "attention")) == set(layers(model, "a"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_altered_the_base(tmp_path, init, caplog):
    """Their part of the base is not taken out once more, and is back with the merged adapter."""
    base = save_llama(tmp_path / "base", tie_word_embeddings=False)
    given = [
        save_adapter(base, tmp_path / "plain"),
        save_adapter(base, tmp_path / init, init_lora_weights=init),
    ]
    model = load(base, given)
    before = state(model)
    add_merged_adapter(model, ["a", "b"], "merged", method="lora_task_arithmetic")
    assert_still(before, model, "merged")
    assert "not to the original checkpoint" in caplog.text
    original = AutoModelForCausalLM.from_pretrained(base)
    updates = merge_adapters("lora_task_arithmetic", given, base=base)
    merged = deltas(model, "merged")
    for name, update in updates.items():
        here = model.get_base_model().get_submodule(name).base_layer.weight + merged[name]
        there = update.apply_to(original.get_submodule(name).weight)
        assert relative_error(here, there) < 1e-5


def test_refusals(model):
    """One sentence each, and the model is as it was."""
    before = state(model)
    for arguments, message in [
        ((["a", "z"], "new"), "no adapter 'z' is loaded; loaded are a, b, c"),
        ((["a", "b"], "c"), "already an adapter 'c'"),
        ((["a", "b"], "x.y"), "'x.y' cannot name an adapter"),
        ((["a", "b"], "new", None, "core_tvs"), "no method 'core_tvs'"),
        ((["a", "b"], "new", None, "lora_ties"), "give rank="),
        ((["a", "b"], "new", None, "factor_ties"), "equal rank"),
        ((["a", "b"], "new", [1]), "one weight per adapter"),
        ((["a", "b"], "new", [0, 0]), "nothing to merge"),
        (([], "new"), "no adapters to merge"),
        ((["a", "b"], 3), "3 cannot name an adapter"),
        ((None, "new"), "list of different names, not None"),
        (([["a"]], "new"), "list of different names"),
        (({"a": 0.5, "b": 1}, "new"), "list of different names"),
        ((["a", "b"], "new", None, ["core_tsv"]), "no method"),
    ]:
        with pytest.raises(InputError, match=message):
            add_merged_adapter(model, *arguments)
    with pytest.raises(InputError, match="no parameter 'rang'"):
        add_merged_adapter(model, ["a", "b"], "new", rang=3)
    with pytest.raises(InputError, match="device: it is that of the model"):
        add_merged_adapter(model, ["a", "b"], "new", device="cpu")
    with pytest.raises(InputError, match="geometry: it is that of the model"):
        add_merged_adapter(model, ["a", "b"], "new", method="tspa", geometry=3)
    assert_still(before, model)
    model.merge_adapter(["c"])
    with pytest.raises(InputError, match="unmerge_adapter"):
        add_merged_adapter(model, ["a", "b"], "new")
    model.unmerge_adapter()
    add_merged_adapter(model, (name for name in "ab"), "new")


def test_models_without_lora(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    for other in (model, get_peft_model(model, ia3)):
        with pytest.raises(InputError, match="no PeftModel with LoRA adapters"):
            add_merged_adapter(other, ["default"], "new")


@pytest.mark.parametrize(
    "extra",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["ln_f"]},
        {"trainable_token_indices": [1, 2]},
        {"use_dora": True, "modules_to_save": ["ln_f"]},
    ],
)
def test_adapters_that_are_more_than_factors(gpt2, extra):
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    plain = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(model, plain, "plain")
    model.add_adapter("more", LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, **extra))
    before = state(model)
    with pytest.raises(InputError, match=f"adapter 'more' has {' and '.join(extra)}, which"):
        add_merged_adapter(model, ["plain", "more"], "new")
    assert_still(before, model)


def test_the_example_of_the_docs(llama, equal_ranks, tmp_path, monkeypatch):
    (example,) = re.findall(
        r"```python\n([^`]*add_merged_adapter[^`]*)```", (ROOT / "docs/recipes.md").read_text()
    )
    (tmp_path / "adapters").mkdir()
    for name, adapter in zip(("math", "code"), equal_ranks):
        (tmp_path / "adapters" / name).symlink_to(adapter)
    (tmp_path / "base").symlink_to(llama)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert (tmp_path / "merged" / "both" / "adapter_model.safetensors").exists()
