"""The stock commands' features and options as subprocesses on our methods, against targets made by hand."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.merge import _model_out_config, get_architecture_info
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import (
    merge,
    merged_tensors,
    recipe,
    relative_error,
    run,
    save_adapter,
    save_llama,
    write_recipe,
)
from tests.plugin.test_merge import check, save_tokenizer, weighted_target

WEIGHTS = [0.7, -0.4]


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A base with a head and a tokenizer of its own, whose embeddings have more rows than the tokenizer has words."""
    base = save_llama(tmp_path_factory.mktemp("untied") / "base", tie_word_embeddings=False, vocab_size=104)
    save_tokenizer(base)
    return base


@pytest.fixture(scope="module")
def two(untied) -> list[Path]:
    save = lambda name, **config: save_adapter(untied, untied.parent / name, **config)  # noqa: E731
    return [save("one", seed=1), save("two", seed=2, r=6, target_modules="all-linear")]


def command(
    tmp_path: Path, config: dict | list, *options: str, program: str = "mergekit-yaml", **env: str
) -> Path:
    """Run the stock command as a user would, and return where it wrote."""
    out = tmp_path / "out"
    file = write_recipe(tmp_path / "recipe.yml", config)
    target = ["--out-path", out, "-I", tmp_path / "parts"] if program == "mergekit-multi" else [out]
    result = run(program, file, *target, *options, **env)
    assert result.returncode == 0, result.stderr
    return out


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(out.glob("model*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def target(base: Path, adapters: list[Path], weights=WEIGHTS, **of) -> dict[str, torch.Tensor]:
    """As `weighted_target`, with the head."""
    return weighted_target(base, adapters, weights, head=True, **of)


OPTIONS = {
    "lazy": ["--lazy-unpickle"],
    "shards": ["--out-shard-size", "20K"],
    "asynchronous": ["--async-write", "--write-threads", "2", "--out-shard-size", "20K"],
    "clones": ["--clone-tensors"],
    "on the device": ["--low-cpu-memory", "--read-to-gpu", "--device", "cpu"],
    "one thread": ["--num-threads", "1", "--allow-crimes"],
    "quiet": ["--quiet"],
    "no card": ["--no-write-model-card", "--no-copy-tokenizer"],
    "pickles": ["--no-safe-serialization"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, untied, two, tmp_path):
    out = command(tmp_path, recipe("lora_task_arithmetic", untied, two, WEIGHTS), *options)
    files = {file.name for file in out.iterdir()}
    got = tensors(out)
    if "--no-safe-serialization" in options:
        got = torch.load(out / "pytorch_model.bin", weights_only=True)
    check(got, target(untied, two))
    assert ("model-00002-of" in " ".join(files)) == ("--out-shard-size" in options)
    assert ("README.md" in files) == ("--no-write-model-card" not in options)
    assert ("tokenizer.json" in files) == ("--no-copy-tokenizer" not in options)


@pytest.mark.parametrize("options", [[], ["--lazy-unpickle"]], ids=["pickle", "lazy"])
def test_base_in_pickles(options, untied, two, tmp_path):
    base = shutil.copytree(untied, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(untied / "model.safetensors"), base / "pytorch_model.bin")
    out = command(tmp_path, recipe("lora_task_arithmetic", base, two, WEIGHTS), *options)
    check(tensors(out), target(untied, two))


def test_quiet_says_nothing(untied, two, tmp_path):
    file = write_recipe(tmp_path / "r.yml", recipe("tspa", untied, two, parameters={"lora_steps": 5}))
    result = run("mergekit-yaml", file, tmp_path / "out", "--quiet")
    assert result.returncode == 0 and "alignment" not in result.stderr and "%" not in result.stderr
    assert "LoRA alignment" in run("mergekit-yaml", file, tmp_path / "loud").stderr


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_dtypes(key, name, untied, two, tmp_path):
    """The sum is made in float32 and rounded once, whichever of the two asks for a dtype."""
    got = tensors(command(tmp_path, recipe("lora_task_arithmetic", untied, two, WEIGHTS, **{key: name})))
    dtype = getattr(torch, name)
    for tensor, want in target(untied, two).items():
        assert got[tensor].dtype == dtype
        assert (got[tensor] != want.to(dtype)).float().mean() < 0.002, tensor
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == name


@pytest.mark.parametrize("source", ["base", "union"])
def test_tokenizer(source, untied, two, tmp_path):
    """mergekit rebuilds embeddings and head for the tokenizer; the rows of its words stay, and the rest is ours."""
    config = recipe("lora_task_arithmetic", untied, two, WEIGHTS, tokenizer={"source": source})
    out = command(tmp_path, config)
    got, want = tensors(out), target(untied, two)
    words = len(AutoTokenizer.from_pretrained(out))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(got[name][:words], want[name][:words].float())
        want[name] = want[name][: len(got[name])]
    check(got, want)
    logits = AutoModelForCausalLM.from_pretrained(out)(torch.arange(words)[None]).logits
    assert logits.isfinite().all()


def test_tied_embeddings(llama, adapters, tmp_path):
    out = command(tmp_path, recipe("lora_task_arithmetic", llama, adapters, [1, 0.5, 0.2]))
    check(tensors(out), weighted_target(llama, adapters, [1, 0.5, 0.2]))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_gradients_filters_and_slices(untied, two, tmp_path):
    """Layers 0, 1, 1: the first slice with a gradient and a filter, the second with one adapter only."""
    first, second = (model["model"] for model in recipe("x", untied, two)["models"])
    filtered = [{"filter": "self_attn", "value": [0.0, 1.0]}, {"value": 0.5}]
    slices = [
        {
            "sources": [
                {"model": first, "layer_range": [0, 2], "parameters": {"weight": filtered}},
                {"model": second, "layer_range": [0, 2], "parameters": {"weight": [1.0, 0.2]}},
            ]
        },
        {
            "sources": [
                {"model": first, "layer_range": [1, 2], "parameters": {"weight": 2.0}},
                {"model": second, "layer_range": [1, 2], "parameters": {"weight": 0.0}},
            ]
        },
    ]
    config = {"merge_method": "lora_task_arithmetic", "base_model": str(untied), "slices": slices}
    got = tensors(command(tmp_path, config, "--clone-tensors"))

    def of(name, adapter):
        layer = 1 if "layers.1." in name else 0
        if adapter == 0:
            return float(layer) if "self_attn" in name else 0.5
        return (1.0, 0.2)[layer] if "layers" in name else 0.0

    want = target(untied, two, [0, 1], of=of)
    alone = target(untied, two[:1], [2.0])
    want |= {name.replace("layers.1.", "layers.2."): W for name, W in alone.items() if "layers.1." in name}
    check(got, want)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3
    card = (tmp_path / "out/README.md").read_text()
    assert f"| {two[0]} | 0 to 2 |" in card and f"| {two[1]} | 0 to 1 |" in card


def test_vision_language_model(tmp_path):
    """`modules:` with weights of their own; adapters touch the language model and the vision tower."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    base = tmp_path / "base"
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(base)
    load = lambda: Qwen2_5_VLForConditionalGeneration.from_pretrained(base)  # noqa: E731
    merged = []
    for seed in (1, 2):
        adapted = get_peft_model(
            load(), LoraConfig(r=3 + seed, target_modules=["q_proj", "down_proj", "qkv", "gate_proj"])
        )
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(tmp_path / f"a{seed}")
        merged.append(
            PeftModel.from_pretrained(load(), tmp_path / f"a{seed}").merge_and_unload().state_dict()
        )

    def models(*weights):
        pairs = zip(recipe("x", base, [tmp_path / "a1", tmp_path / "a2"])["models"], weights)
        return {"models": [model | {"parameters": {"weight": weight}} for model, weight in pairs]}

    modules = {"text_decoder": models(1.0, 0.5), "vision_tower": models(-0.3, 2.0)}
    config = {
        "merge_method": "lora_task_arithmetic",
        "base_model": str(base),
        "modules": modules,
    }  # and the base's merger
    out = command(tmp_path, config, "--no-copy-tokenizer")
    got = Qwen2_5_VLForConditionalGeneration.from_pretrained(out).state_dict()
    touched = set()
    for name, W in load().state_dict().items():
        weights = (-0.3, 2.0) if "visual" in name else (1.0, 0.5)
        want = W + sum(w * (m[name].double() - W) for w, m in zip(weights, merged))
        assert relative_error(got[name], want) < 1e-6, name
        if not torch.equal(want.float(), W):
            touched.add(name.split(".")[-2])
    assert touched == {"q_proj", "down_proj", "qkv", "gate_proj"}


def test_random_seed(untied, two, tmp_path):
    """`--random-seed` is the seed of the draws; a recipe's own seed comes first, and it is said."""
    dare = lambda **parameters: recipe("lora_dare_linear", untied, two, parameters=parameters)  # noqa: E731
    seven = tensors(command(tmp_path, dare(), "--random-seed", "7"))
    assert "seed 7" in (tmp_path / "out/README.md").read_text()
    check(seven, merged_tensors(dare(seed=7), tmp_path / "own"), 1e-9)
    other = merged_tensors(dare(), tmp_path / "default")
    assert any(not torch.equal(other[name], seven[name]) for name in seven)
    both = merge(dare(seed=7), tmp_path / "both", "--random-seed", "8")
    assert both.exit_code == 0
    check(tensors(tmp_path / "both"), seven, 1e-9)


def test_multi_both_ways_and_again(untied, two, tmp_path):
    """A stock merge feeds a LoRA merge, which feeds a stock merge; only what was lost is made again."""
    other = save_llama(tmp_path / "other", seed=5, tie_word_embeddings=False, vocab_size=104)
    halves = [{"model": str(base), "parameters": {"weight": 0.5}} for base in (untied, other)]
    mixed = {"name": "mixed", "merge_method": "linear", "models": halves}
    lora = recipe("lora_task_arithmetic", "mixed", two, WEIGHTS, name="lora")
    final = {
        "merge_method": "linear",
        "models": [halves[0] | {"model": "lora"}, halves[1] | {"model": "mixed"}],
    }
    documents = [final, lora, mixed]
    stages = lambda: command(  # noqa: E731
        tmp_path, copy.deepcopy(documents), "--no-copy-tokenizer", program="mergekit-multi"
    )
    got = tensors(stages())
    plain, ours = (load_file(path / "model.safetensors") for path in (untied, other))
    delta = {name: W - plain[name] for name, W in target(untied, two).items()}
    check(got, {name: (plain[name].double() + ours[name]) / 2 + delta[name] / 2 for name in plain})

    kept = (tmp_path / "parts/mixed/model.safetensors").stat().st_mtime_ns
    (tmp_path / "parts/lora/config.json").unlink()  # as if killed while writing it
    shutil.rmtree(tmp_path / "out")
    check(tensors(stages()), got, 1e-9)
    assert (tmp_path / "parts/mixed/model.safetensors").stat().st_mtime_ns == kept


GENOMES = {
    "core_tsv": {"layer_granularity": 1},
    "lora_ties": {"filters": ["self_attn"], "normalize": True},
    "tspa_lora": {"smooth": True},
}


@pytest.mark.parametrize("method", GENOMES)
def test_evolve(method, untied, two, tmp_path):
    """mergekit-evolve's configuration takes our methods and its recipes merge, by `run_merge` and in memory."""
    from mergekit.evo.config import EvolMergeConfiguration
    from mergekit.evo.genome import ModelGenome

    genome = {
        "merge_method": method,
        "base_model": str(untied),
        "models": [model["model"] for model in recipe("x", untied, two)["models"]],
    }
    config = EvolMergeConfiguration.model_validate(
        {"genome": genome | GENOMES[method], "tasks": ["anything"]}
    )
    search = ModelGenome(config.genome)
    genotype = search.initial_genotype(random=True)
    made = search.genotype_merge_config(genotype)
    got = merged_tensors(made.model_dump(mode="json", exclude_none=True), tmp_path / "out")
    assert any(
        not torch.equal(W.bfloat16(), got[name])
        for name, W in load_file(untied / "model.safetensors").items()
    )

    made, options = search.genotype_merge_config(genotype), MergeOptions(quiet=True)
    architecture = get_architecture_info(MergeConfiguration.model_validate(made.model_dump()), options)
    planner = MergePlanner(
        made, architecture, options=options, out_model_config=_model_out_config(made, architecture)
    )
    in_memory = {
        task.weight_info.name: value for task, value in Executor(planner.plan_in_memory()).run(quiet=True)
    }
    check(in_memory, got, 1e-9)
