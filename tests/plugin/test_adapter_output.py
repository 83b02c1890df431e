"""The merge as one adapter: it loads in PEFT and gives the merged model, and its configuration suits every consumer."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mergekit_tspa.commands.main import main
from mergekit_tspa.merging import memory
from mergekit_tspa.merging import merge as merging
from tests.conftest import (
    merge,
    merged_tensors,
    peft_merged,
    recipe,
    relative_error,
    run,
    save_adapter,
    save_llama,
    write_recipe,
)

VLLM_READS = {"r", "lora_alpha", "target_modules", "use_rslora", "bias", "modules_to_save", "use_dora"}


def adapter_command(config, out, *options):
    file = write_recipe(out.parent / f"{out.name}.yml", config)
    return CliRunner().invoke(main, ["adapter", str(file), str(out), "--quiet", *options])


def check_config(folder, rank=None):
    """What vLLM, llama.cpp and old versions of PEFT ask for."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert config.keys() >= VLLM_READS and config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == (rank or config["r"])
    assert config["bias"] == "none" and not (
        config["use_dora"] or config["use_rslora"] or config["modules_to_save"]
    )
    assert not {"rank_pattern", "alpha_pattern"} & config.keys()
    assert isinstance(config["target_modules"], list)
    for key, tensor in tensors.items():
        assert key.startswith("base_model.model.") and key.endswith((".lora_A.weight", ".lora_B.weight"))
        assert key.split(".")[-3] in config["target_modules"]
        assert tensor.shape[0 if "lora_A" in key else 1] == config["r"]
    return config


@pytest.mark.parametrize(
    "method, parameters",
    [
        ("lora_task_arithmetic", {}),
        ("core_tsv", {"rank": 5}),
        ("ctm_ties", {"rank": 4}),
        ("tspa", {"attention_steps": 5, "lora_steps": 20}),
        ("lora_ties", {"rank": 6}),
        ("svd_cur", {}),
    ],
)
def test_adapter_beside_the_model_equals_it(method, parameters, llama, adapters, tmp_path):
    config = recipe(method, llama, adapters, [1.0, 0.5, 0.8], parameters={**parameters, "adapter": True})
    model = merged_tensors(config, tmp_path / "out")
    check_config(tmp_path / "out/adapter", parameters.get("rank"))
    loaded = peft_merged(llama, tmp_path / "out/adapter")
    for name, tensor in model.items():
        assert relative_error(loaded[name], tensor) < 1e-5
    alone = adapter_command(config, tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "out/adapter" / file).read_bytes()
    assert {f.name for f in (tmp_path / "alone").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }


def test_card_names_base_adapters_weights_method_and_recipe(llama, adapters, tmp_path):
    gradient = {"parameters": {"weight": [{"filter": "q_proj", "value": 0.5}, {"value": 0.7}]}}
    config = recipe("core_tsv", llama, adapters[:2])
    config["models"][0] |= gradient
    assert adapter_command(config, tmp_path / "out").exit_code == 0
    card = (tmp_path / "out/README.md").read_text()
    assert f"base_model: {llama}\n" in card and "https://arxiv.org/abs/2509.17786" in card
    assert f"| {adapters[0]} | 0.5 to 0.7 |" in card and f"| {adapters[1]} | 1 |" in card
    assert "merge_method: core_tsv" in card
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        llama
    )


def test_rank_is_the_best_of_its_size_and_what_it_loses_is_said(llama, adapters, tmp_path, caplog):
    full = merged_tensors(recipe("lora_task_arithmetic", llama, adapters), tmp_path / "full")
    cut = merged_tensors(
        recipe("lora_task_arithmetic", llama, adapters, parameters={"rank": 3}), tmp_path / "cut"
    )
    base, shares = load_file(llama / "model.safetensors"), []
    for name, W in base.items():
        U, S, Vh = torch.linalg.svd((full[name] - W).double()) if full[name].ndim == 2 else (None,) * 3
        if S is None or S[0] < 1e-3:
            continue
        best = (U[:, :3] * S[:3]) @ Vh[:3]
        assert relative_error(cut[name] - W, best) < 1e-4
        shares.append((S[:3].square().sum() / S.square().sum()).item())
    assert (
        f"keeps {sum(shares) / len(shares):.1%} of the energy of {len(shares)} merged updates" in caplog.text
    )
    assert f"{min(shares):.1%} of model.layers" in caplog.text


@pytest.mark.parametrize(
    "dtypes, named, want",
    [
        (("bfloat16", "bfloat16"), None, torch.bfloat16),
        (("bfloat16", "float16"), None, torch.float32),  # neither holds the other's values
        (("float16", "float64"), None, torch.float32),
        (("float16", "float16"), "bfloat16", torch.bfloat16),
    ],
)
def test_the_dtype_is_the_adapters_own(dtypes, named, want, llama, tmp_path):
    """Unless the recipe names one; `check` says so before."""
    paths = []
    for name, dtype in zip("ab", dtypes):
        paths.append(save_adapter(llama, tmp_path / name, seed=ord(name)))
        file = paths[-1] / "adapter_model.safetensors"
        save_file({k: t.to(getattr(torch, dtype)) for k, t in load_file(file).items()}, file)
    config = recipe("core_tsv", llama, paths, **({"dtype": named} if named else {}))
    said = CliRunner().invoke(main, ["check", str(write_recipe(tmp_path / "r.yml", config))])
    assert f"can be written (adapter: true), rank 8, {str(want).removeprefix('torch.')}, " in said.stdout
    assert adapter_command(config, tmp_path / "out").exit_code == 0
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {want}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert f"{nbytes:,} bytes" in said.stdout


def test_a_factor_too_large_for_the_dtype(llama, adapters, tmp_path):
    big = shutil.copytree(adapters[0], tmp_path / "big")
    file = big / "adapter_model.safetensors"
    save_file({k: 1e5 * t for k, t in load_file(file).items()}, file)
    result = adapter_command(recipe("lora_task_arithmetic", llama, [big], dtype="float16"), tmp_path / "out")
    assert result.exit_code == 1 and "too large for torch.float16; take float32" in result.output
    assert not (tmp_path / "out/adapter_config.json").exists()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_only_the_adapter_by_the_command(llama, adapters, dtype, tmp_path):
    """The base's weights are not even there: only their headers are read."""
    bare = shutil.copytree(llama, tmp_path / "bare")
    size = (bare / "model.safetensors").stat().st_size
    with open(bare / "model.safetensors", "r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)  # zeros instead of weights
    extra = {"dtype": dtype} if dtype else {}
    for a in (both := [shutil.copytree(a, tmp_path / a.name) for a in adapters[:2]]):
        config = json.loads((a / "adapter_config.json").read_text())
        (a / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(bare)}))
    result = run(
        "mergekit-tspa",
        "adapter",
        write_recipe(tmp_path / "r.yml", recipe("ctm_tsv", bare, both, **extra)),
        tmp_path / "out",
    )
    assert result.returncode == 0, result.stderr
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16 if dtype else torch.float32}
    if not dtype:
        want = merged_tensors(recipe("ctm_tsv", llama, adapters[:2]), tmp_path / "model")
        loaded = peft_merged(llama, tmp_path / "out")
        for name, tensor in want.items():
            assert relative_error(loaded[name], tensor) < 1e-5


def test_conv1d_and_embeddings(gpt2, tmp_path):
    """Orientation and kind are those that PEFT expects for the base's layers."""
    base = save_llama(tmp_path / "untied", tie_word_embeddings=False)
    for model, modules, options in (
        (gpt2, ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
        (base, ["embed_tokens", "q_proj"], {}),
    ):
        pair = [
            save_adapter(
                model, tmp_path / f"{model.name}{seed}", seed=seed, target_modules=modules, **options
            )
            for seed in (1, 2)
        ]
        out = tmp_path / f"{model.name}_out"
        merged = merged_tensors(recipe("core_tsv", model, pair, parameters={"adapter": True}), out)
        loaded = peft_merged(model, out / "adapter")
        for name, tensor in merged.items():
            found = next(v for k, v in loaded.items() if k.endswith(name))
            assert relative_error(found, tensor) < 1e-5


def test_a_full_model_comes_back_as_an_adapter(llama, adapters, tmp_path):
    """Its norms and embeddings are the base's, so that its difference is low-rank; a trained norm is named."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    full = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama), adapters[0]
    ).merge_and_unload()
    full.save_pretrained(tmp_path / "full")
    config = {
        "merge_method": "lora_task_arithmetic",
        "base_model": str(llama),
        "models": [{"model": str(tmp_path / "full")}],
        "parameters": {"extract_rank": 4},
    }
    result = adapter_command(config, tmp_path / "out")
    assert result.exit_code == 0, result.output
    check_config(tmp_path / "out", 4)
    loaded = peft_merged(llama, tmp_path / "out")
    for name, tensor in full.state_dict().items():
        assert relative_error(loaded[name], tensor) < 1e-5
    full.model.norm.weight.data += 1
    full.save_pretrained(tmp_path / "full")
    result = adapter_command(config, tmp_path / "out2")
    assert (
        result.exit_code == 1 and "model.norm.weight" in result.output and "full model's own" in result.output
    )


def test_what_cannot_be_an_adapter(llama, adapters, tmp_path, caplog):
    dense = recipe("lora_ties", llama, adapters, parameters={"adapter": True})
    result = adapter_command(dense, tmp_path / "a")
    assert result.exit_code == 1 and "lora_ties gives a dense update; set `rank`" in result.output
    assert not (tmp_path / "a").exists()
    assert merge(dense, tmp_path / "b").exit_code == 0
    assert "no adapter is written beside the model" in caplog.text and "dense update" in caplog.text
    assert not (tmp_path / "b/adapter").exists() and (tmp_path / "b/model.safetensors").exists()

    dora = save_adapter(llama, tmp_path / "dora", use_dora=True)
    result = adapter_command(recipe("core_tsv", llama, [dora, adapters[0]]), tmp_path / "c")
    assert result.exit_code == 1 and "DoRA" in result.output
    biased = save_adapter(llama, tmp_path / "saved", modules_to_save=["model.norm"])
    result = adapter_command(recipe("core_tsv", llama, [biased]), tmp_path / "d")
    assert result.exit_code == 1 and "model.norm.weight: an adapter trained it directly" in result.output


def test_bad_use(llama, adapters, tmp_path):
    assert merge(recipe("core_tsv", llama, adapters), tmp_path / "model").exit_code == 0
    result = adapter_command(recipe("core_tsv", llama, adapters), tmp_path / "model")
    assert result.exit_code == 1 and "holds a model" in result.output
    assert not (tmp_path / "model/adapter_config.json").exists()
    stock = recipe("linear", llama, adapters)
    result = adapter_command(stock, tmp_path / "x")
    assert result.exit_code == 1 and "linear is not a method on adapters" in result.output
    misplaced = recipe("core_tsv", llama, adapters)
    misplaced["models"][0]["parameters"] = {"adapter": True}
    result = merge(misplaced, tmp_path / "y")
    assert result.exit_code == 1 and "adapter applies to the whole merge" in result.output
    sliced = {
        "merge_method": "core_tsv",
        "base_model": str(llama),
        "slices": [
            {"sources": [{"model": f"{llama}+{adapters[0]}", "layer_range": r}]} for r in ([0, 2], [1, 2])
        ],
    }
    result = adapter_command(sliced, tmp_path / "z")
    assert result.exit_code == 1 and "rearranges" in result.output
    sliced["slices"] = sliced["slices"][1:]
    sliced["slices"][0]["sources"][0]["layer_range"] = [0, 1]
    result = adapter_command(sliced, tmp_path / "z")
    assert result.exit_code == 1 and "leaves out model.layers.1 of the base" in result.output
    for bad, message in (
        ({"merge_method": "core_tsv"}, "no recipe that mergekit can read"),
        ({"models": [3]}, "no recipe that mergekit can read"),
        (recipe("core_tsv", llama, adapters, tokenizer_source="base"), "has no tokenizer of its own"),
        (
            recipe("core_tsv", llama, adapters, parameters={"adapter": [{"value": False}]}),
            "give true or false",
        ),
    ):
        result = adapter_command(bad, tmp_path / "w")
        assert result.exit_code == 1 and message in result.output


def test_directories_that_hold_something_else(llama, adapters, tmp_path):
    assert adapter_command(recipe("core_tsv", llama, adapters), tmp_path / "a").exit_code == 0
    result = merge(recipe("core_tsv", llama, adapters), tmp_path / "a")
    assert result.exit_code == 1 and "holds an adapter" in result.output
    both = recipe("core_tsv", llama, adapters, parameters={"adapter": True})
    assert merge(both, tmp_path / "b").exit_code == merge(both, tmp_path / "b").exit_code == 0
    result = merge(recipe("core_tsv", llama, adapters), tmp_path / "b")
    assert result.exit_code == 1 and "holds adapter of an earlier merge" in result.output


def test_adapters_that_name_their_modules_differently(llama, adapters, tmp_path):
    """The written adapter has the names of the whole model, whichever adapter comes first."""
    short = shutil.copytree(adapters[0], tmp_path / "short")
    tensors = load_file(short / "adapter_model.safetensors")
    renamed = {key.replace("base_model.model.model.", "base_model.model."): t for key, t in tensors.items()}
    save_file(renamed, short / "adapter_model.safetensors")
    config = recipe("core_tsv", llama, [short, adapters[1]], parameters={"adapter": True})
    merged = merged_tensors(config, tmp_path / "out")
    loaded = peft_merged(llama, tmp_path / "out/adapter")
    for name, tensor in merged.items():
        assert relative_error(loaded[name], tensor) < 1e-5


def test_a_rank_above_a_narrow_weight(llama, adapters, tmp_path):
    """`lora_ties` cut to a rank that some weights do not have: those stay whole."""
    config = recipe("lora_ties", llama, adapters, parameters={"rank": 40, "adapter": True})
    merged = merged_tensors(config, tmp_path / "out")
    loaded = peft_merged(llama, tmp_path / "out/adapter")
    for name, tensor in merged.items():
        assert relative_error(loaded[name], tensor) < 1e-5


def test_an_adapter_without_what_it_cannot_hold(llama, adapters, tmp_path, caplog):
    """By name; what is written is the rest of the merge, and the share of the change that is lost is said."""
    dora = save_adapter(llama, tmp_path / "dora", use_dora=True)
    saved = save_adapter(llama, tmp_path / "saved", modules_to_save=["model.norm"])
    config = recipe("lora_task_arithmetic", llama, [dora, saved], parameters={"adapter": True})
    model = merged_tensors(config, tmp_path / "model")
    assert not (tmp_path / "model/adapter").exists()
    base = load_file(llama / "model.safetensors")
    for given, missing in (("norms", "magnitudes"), (["magnitudes"], "norms")):
        config["parameters"] = {"adapter_leaves_out": given}
        result = adapter_command(config, tmp_path / "none")
        assert result.exit_code == 1 and f"adapter_leaves_out: {missing} would" in result.output
    caplog.clear()
    config["parameters"] = {"adapter_leaves_out": "norms, magnitudes"}
    result = adapter_command(config, tmp_path / "alone")
    assert result.exit_code == 0, result.output
    check_config(tmp_path / "alone")
    written = peft_merged(llama, tmp_path / "alone")
    assert torch.equal(written["model.norm.weight"], base["model.norm.weight"])
    lost, total = (
        sum((model[name] - side[name]).double().square().sum().item() for name in model)
        for side in (written, base)
    )
    (line,) = [message for message in caplog.messages if "leaves out" in message]
    assert "magnitudes of 4 tensors" in line and "norms of 1 tensors" in line
    assert float(line.split("lacks ")[1].split("%")[0]) == pytest.approx(100 * lost / total, abs=0.1)

    config["parameters"] = {"adapter_leaves_out": "norm"}
    result = adapter_command(config, tmp_path / "none")
    assert result.exit_code == 1 and "did you mean norms?" in result.output
    only = recipe("lora_task_arithmetic", llama, [saved], parameters={"adapter_leaves_out": "norms"})
    assert adapter_command(only, tmp_path / "only").exit_code == 0


def test_memory_bounds_how_many_tensors_are_merged_at_once(llama, adapters, tmp_path, monkeypatch):
    """It changes no more than rounding, and other merges of the process have the machine's budget again."""
    asked = []
    shared = merging.in_threads
    monkeypatch.setattr(
        merging,
        "in_threads",
        lambda work, items, at_once, done: asked.append(at_once) or shared(work, items, at_once, done),
    )
    config = recipe("core_tsv", llama, adapters)
    before = memory.budget()
    assert before >= memory.GIB
    for out, options in (("free", ()), ("little", ("--memory", "0.1"))):
        result = adapter_command(config, tmp_path / out, *options)
        assert result.exit_code == 0, result.output
    assert memory.budget() == before and len(asked) == 2 and asked[0] > asked[1] >= 1
    free, little = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("free", "little"))
    for key, tensor in free.items():
        torch.testing.assert_close(little[key], tensor)
    for wrong in ("0", "nan", "inf", "1e300"):
        result = adapter_command(config, tmp_path / "none", "--memory", wrong)
        assert result.exit_code == 2 and "--memory" in result.output, result.output


def test_a_base_whose_names_have_the_prefix_twice(llama, adapters, tmp_path):
    """transformers takes the second away when it loads the base, and PEFT looks for modules by their names then."""
    twice = tmp_path / "twice"
    shutil.copytree(llama, twice)
    tensors = load_file(llama / "model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, twice / "model.safetensors")
    for base in (llama, twice):
        result = adapter_command(recipe("lora_task_arithmetic", base, adapters), tmp_path / f"of_{base.name}")
        assert result.exit_code == 0, result.output
    target = peft_merged(llama, tmp_path / "of_llama")
    for name, tensor in peft_merged(twice, tmp_path / "of_twice").items():
        assert relative_error(tensor, target[name]) < 1e-6, name
