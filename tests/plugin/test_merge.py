"""Recipes through `mergekit-yaml`'s own command, against targets made with PEFT and by hand."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_tspa import merge_adapters
from mergekit_tspa.plugin.tasks import on_device
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


def weighted_target(base, adapters, weights, of=lambda name, w: w, head=False):
    """`W + sum_t w_t (merged_t - W)`, with PEFT's merges; `of` makes weights depend on the tensor."""
    before = base_tensors(base)
    merged = [peft_merged(base, a) for a in adapters]
    return {
        name: W + sum(of(name, w) * (m[name].double() - W.double()) for m, w in zip(merged, weights))
        for name, W in before.items()
        if head or name != "lm_head.weight"
    }


def check(got, target, tolerance=1e-6):
    assert got.keys() == target.keys()
    for name, tensor in target.items():
        assert relative_error(got[name], tensor) < tolerance, name


def test_task_arithmetic_equals_peft(llama, adapters, tmp_path):
    """Ranks 4, 2 and 6, different modules, rsLoRA, a negative weight; base_model left out."""
    config = recipe("lora_task_arithmetic", llama, adapters, [0.7, -0.4, 1.1], parameters={"lambda": 0.9})
    del config["base_model"]
    got = merged_tensors(config, tmp_path / "out")
    check(got, weighted_target(llama, adapters, [0.63, -0.36, 0.99]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.yml"]


@pytest.mark.parametrize("method", ["factor_linear", "tspa_lora"])
def test_recipe_and_python_entry_agree(method, llama, adapters, tmp_path):
    got = merged_tensors(recipe(method, llama, adapters, [1.0, 0.5, 0.8]), tmp_path / "out")
    updates = merge_adapters(method, adapters, [1.0, 0.5, 0.8])
    target = {
        name: updates[name.removesuffix(".weight")].apply_to(W)
        if name.removesuffix(".weight") in updates
        else W
        for name, W in base_tensors(llama).items()
        if name != "lm_head.weight"
    }
    check(got, target, 1e-5 if method == "tspa_lora" else 1e-6)


def test_gradients_and_filters(llama, adapters, tmp_path):
    config = recipe("lora_task_arithmetic", llama, adapters[:2], [[0.0, 1.0], None])
    config["models"][1]["parameters"] = {"weight": [{"filter": "q_proj", "value": 0.25}, {"value": 2}]}
    target = weighted_target(
        llama,
        adapters[:2],
        [0, 1],
        lambda name, t: (0.25 if "q_proj" in name else 2) if t else float("layers.1." in name),
    )
    check(merged_tensors(config, tmp_path / "out"), target)


def test_slices_get_the_base_and_the_right_layers(llama, adapters, tmp_path):
    """Three layers out of two: 0, 1, 1, the last without its adapter's weight."""
    ref = recipe("x", llama, adapters)["models"]
    source = lambda i, layers, weight: {  # noqa: E731
        "model": ref[i]["model"],
        "layer_range": layers,
        "parameters": {"weight": weight},
    }
    config = {
        "merge_method": "lora_task_arithmetic",
        "base_model": str(llama),
        "slices": [
            {"sources": [source(0, [0, 2], 1.0), source(2, [0, 2], 0.5)]},
            {"sources": [source(0, [1, 2], 2.0)]},
        ],
    }
    got = merged_tensors(config, tmp_path / "out", "--clone-tensors")
    both = weighted_target(llama, [adapters[0], adapters[2]], [1.0, 0.5])
    one = weighted_target(llama, [adapters[0]], [2.0])
    target = both | {
        name.replace("layers.1.", "layers.2."): tensor for name, tensor in one.items() if "layers.1." in name
    }
    check(got, target)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 3


def test_slices_of_different_inputs(llama, adapters, tmp_path):
    """The last slice has more inputs than the first one, and the base is spelled in another way."""
    ref = recipe("x", llama, adapters)["models"]
    source = lambda i, layers: {"model": ref[i]["model"], "layer_range": layers}  # noqa: E731
    other = {"model": f"{llama}/../{llama.name}/", "layer_range": [1, 2]}
    config = {
        "merge_method": "lora_task_arithmetic",
        "base_model": str(llama),
        "slices": [
            {"sources": [source(0, [0, 1])]},
            {"sources": [source(0, [1, 2]), source(2, [1, 2]), other]},
        ],
    }
    got = merged_tensors(config, tmp_path / "out")
    one, both = (weighted_target(llama, [adapters[i] for i in used], [1, 1]) for used in ((0,), (0, 2)))
    check(got, {name: (both if "layers.1." in name else one)[name] for name in got})


def test_bfloat16_base_is_rounded_once(llama, adapters, tmp_path):
    base = save_llama(tmp_path / "bf16", dtype=torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "a")
    exact = weighted_target(base, [adapter], [1.0])
    for options, dtype in [({}, torch.bfloat16), ({"out_dtype": "float32"}, torch.float32)]:
        config = recipe("lora_task_arithmetic", base, [adapter], **options)
        for name, tensor in merged_tensors(config, tmp_path / f"out{len(options)}").items():
            assert tensor.dtype == dtype
            if dtype == torch.bfloat16:  # the exact sum, rounded once
                assert (tensor != exact[name].to(dtype)).float().mean() < 0.002, name
            else:
                assert relative_error(tensor, exact[name]) < 1e-6, name


def test_dtype_does_not_round_the_base_first(llama, adapters, tmp_path):
    got = merged_tensors(
        recipe("lora_task_arithmetic", llama, adapters[:1], dtype="bfloat16"), tmp_path / "out"
    )
    for name, want in weighted_target(llama, adapters[:1], [1.0]).items():
        assert (got[name] != want.to(torch.bfloat16)).float().mean() < 0.002, name


def test_sharded_lazy_asynchronous(llama, adapters, tmp_path):
    options = "--lazy-unpickle --out-shard-size 20K --async-write --write-threads 2 --clone-tensors".split()
    got = merged_tensors(
        recipe("lora_task_arithmetic", llama, adapters, [1, 1, 1]), tmp_path / "out", *options
    )
    check(got, weighted_target(llama, adapters, [1, 1, 1]))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_architecture_that_mergekit_infers(tmp_path):
    """OPT has no definition in mergekit; its tensors are listed from the checkpoint."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    base = tmp_path / "opt"
    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    config.word_embed_proj_dim = 32
    OPTForCausalLM(config).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "a", target_modules=["q_proj", "fc1"])
    got = merged_tensors(recipe("lora_task_arithmetic", base, [adapter]), tmp_path / "out")
    for name, want in peft_merged(base, adapter).items():
        if name in got:
            assert relative_error(got[name], want) < 1e-6, name
    assert any("fc1" in name for name in got)


def test_all_weights_zero_warns_and_writes_the_base(llama, adapters, tmp_path, caplog):
    got = merged_tensors(recipe("tspa_lora", llama, adapters[:2], [0, 0.0]), tmp_path / "out")
    assert "all weights are zero" in caplog.text
    for name, tensor in got.items():
        assert torch.equal(tensor, base_tensors(llama)[name])


def change(folder, source, edit):
    """A copy of an adapter whose tensors went through `edit`."""
    adapter = shutil.copytree(source, folder / "changed")
    file = adapter / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in edit(load_file(file)).items()}, file)
    return adapter


def first(tensors, edit):
    name = min(tensors)
    return tensors | {name: edit(tensors[name])}


def save_tokenizer(path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)


def bad_recipes(llama, adapters, folder):
    """`{what is wrong: (recipe, what the message must say)}`."""
    one, two, _ = adapters
    other = save_llama(folder / "other", hidden_size=32)
    good = lambda **top: recipe("lora_task_arithmetic", llama, [one, two], **top)  # noqa: E731
    twice, bases, full = good(), good(), good()
    twice["models"].append(twice["models"][0])
    bases["models"][1]["model"] = {"model": {"path": str(other)}, "lora": {"path": str(two)}}
    unnamed = {k: v for k, v in bases.items() if k != "base_model"}
    full["models"][1]["model"] = str(other)
    below = good()
    below["models"][0]["parameters"] = {"wieght": 1}
    misplaced = recipe("tspa_lora", llama, [one, two])
    misplaced["models"][0]["parameters"] = {"lora_steps": 3}
    dotted = good()
    dotted["models"].append({"model": {"model": {"path": str(llama)}, "lora": {"path": f"{one}/."}}})
    open_base = save_llama(folder / "untied", tie_word_embeddings=False)
    head = save_adapter(open_base, folder / "head", target_modules=["lm_head"], save_embedding_layers=False)
    aligned = recipe("lora_task_arithmetic", open_base, [head], tokenizer={"source": "base"})
    save_tokenizer(open_base)
    modules = {key: value for key, value in good().items() if key != "models"}
    modules["modules"] = {"vision": {"models": good()["models"]}}
    beyond = {key: value for key, value in good().items() if key != "models"}
    beyond["slices"] = [{"sources": [good()["models"][0] | {"layer_range": [1, 9]}]}]
    nan = change(folder, one, lambda t: first(t, lambda x: x * float("nan")))
    return {
        "missing adapter": (
            recipe("lora_task_arithmetic", llama, [folder / "no"]),
            "no such adapter directory",
        ),
        "no files": (recipe("lora_task_arithmetic", llama, [llama]), "no adapter_config.json"),
        "other shapes": (recipe("lora_task_arithmetic", other, [one]), r"shape \(64, 64\).*\(32, 32\)"),
        "NaN": (recipe("lora_task_arithmetic", llama, [nan, two]), "NaN or Inf"),
        "twice": (twice, "listed twice"),
        "twice, spelled differently": (dotted, "listed twice"),
        "dense head": (aligned, "lm_head.weight.*dense tensor"),
        "dtype": (good(out_dtype="bf16"), "out_dtype: 'bf16'"),
        "different bases": (bases, "adapters of different bases"),
        "no common base": (unnamed, "name one as base_model"),
        "full model of other sizes": (full, r"embed_tokens.weight has shape \(96, 32\), but \(96, 64\)"),
        "no adapter": (good() | {"models": [{"model": str(llama)}]}, "has no adapter"),
        "unknown parameter": (good(parameters={"lamda": 1}), "did you mean lambda"),
        "unknown parameter of a model": (below, "did you mean weight"),
        "shared parameter on a model": (misplaced, "move it"),
        "out of range": (recipe("tspa_lora", llama, [one], parameters={"lora_lr": -1}), "lora_lr: -1"),
        "negative weight": (recipe("tspa_lora", llama, [one, two], [1, -1]), "at least 0"),
        "no base": (recipe("lora_task_arithmetic", folder / "none", [one]), "no such model directory"),
        "no config": (recipe("lora_task_arithmetic", one, [one, two]), "no model, here or on the hub"),
        "no weight": (recipe("lora_task_arithmetic", llama, [one, two], [1, []]), "weight: an empty list"),
        "layers beyond the base": (beyond, r"layer_range \[1, 9\] of .*/one: .* has 2 layers"),
        "module": (modules, "has no vision; it has default"),
        "base with adapter": (good(base_model={"model": str(llama), "lora": str(one)}), "adapter of its own"),
    }


def test_bad_recipes_are_one_sentence_and_write_nothing(llama, adapters, tmp_path, subtests):
    for what, (config, message) in bad_recipes(llama, adapters, tmp_path).items():
        with subtests.test(what):
            result = merge(config, tmp_path / "out")
            assert result.exit_code == 1, result.exception
            error = result.output.strip().splitlines()[-1]
            assert error.startswith("Error: ")
            assert re.search(message, error), error
            assert not (tmp_path / "out").exists()


def test_a_slice_of_the_base_alone(llama, adapters, tmp_path):
    """As frankenmerges have them."""
    source = {"model": recipe("x", llama, adapters)["models"][0]["model"], "layer_range": [0, 1]}
    slices = [{"sources": [source]}, {"sources": [{"model": str(llama), "layer_range": [1, 2]}]}]
    config = {"merge_method": "lora_task_arithmetic", "base_model": str(llama), "slices": slices}
    target = weighted_target(llama, adapters[:1], [1.0], lambda name, w: float("layers.0." in name))
    check(merged_tensors(config, tmp_path / "out"), target)


def test_weights_that_yaml_reads_as_text(llama, adapters, tmp_path):
    """YAML 1.1 takes `1e-1` for a string."""
    text = merged_tensors(
        recipe("lora_task_arithmetic", llama, adapters[:2], ["1e-1", ["0.5", 1]]), tmp_path / "text"
    )
    check(
        text,
        merged_tensors(
            recipe("lora_task_arithmetic", llama, adapters[:2], [0.1, [0.5, 1]]), tmp_path / "number"
        ),
    )
    card = (tmp_path / "text/README.md").read_text()
    assert f"{adapters[0]} | 0.1 |" in card and f"{adapters[1]} | 0.5 to 1 |" in card


def test_keys_that_mergekit_drops_are_named(llama, adapters, tmp_path, caplog):
    config = recipe("lora_task_arithmetic", llama, adapters[:2], base_modle="x", name="a merge")
    config["models"][1]["paramaters"] = {"weight": 0.5}
    assert merge(config, tmp_path / "out").exit_code == 0
    warnings = [record.message for record in caplog.records if "no such key" in record.message]
    assert len(warnings) == 2
    assert "base_modle: " in warnings[0] and "did you mean base_model?" in warnings[0]
    assert "models.1.paramaters: " in warnings[1] and "did you mean parameters?" in warnings[1]


def test_an_adapter_of_another_base_is_warned_of_once(llama, adapters, tmp_path, caplog):
    """By the merge, by the adapter alone, by check and in Python; of the base's own adapters nothing is said."""
    from click.testing import CliRunner

    from mergekit_tspa.commands.main import main
    from tests.conftest import write_recipe

    stray = shutil.copytree(adapters[0], tmp_path / "stray")
    file = stray / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "meta/another"}))
    config = recipe("core_tsv", llama, [stray, adapters[1]])
    path = write_recipe(tmp_path / "r.yml", config)

    def said():
        lines = [message for message in caplog.messages if "trained on" in message]
        caplog.clear()
        return lines

    sentence = f"{stray}: it says that it was trained on meta/another, and the merge is on {llama}"
    assert merge(config, tmp_path / "out").exit_code == 0
    assert said() == [sentence]
    assert CliRunner().invoke(main, ["adapter", str(path), str(tmp_path / "alone")]).exit_code == 0
    assert said() == [sentence]
    checked = CliRunner().invoke(main, ["check", str(path)], env={"COLUMNS": "1000"})
    assert checked.output.count("trained on meta/another") == 1
    said()
    merge_adapters("core_tsv", [stray, adapters[1]], base=llama)
    assert said() == [sentence]
    merge_adapters("core_tsv", [adapters[1], stray])
    assert said() == [f"{stray}: it says that it was trained on meta/another, and {adapters[1]} on {llama}"]


def test_names_at_run_time_are_not_looked_up_in_vain(llama, adapters, tmp_path, monkeypatch):
    """For them transformers builds a table of all its models, which takes as long as planning a small merge."""
    from transformers import conversion_mapping

    def refuse(kind):
        raise AssertionError(kind)

    with monkeypatch.context() as patched:
        patched.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", refuse)
        got = merged_tensors(recipe("lora_task_arithmetic", llama, adapters), tmp_path / "out")
    check(got, weighted_target(llama, adapters, [1.0, 1.0, 1.0]))


def test_tasks_on_the_cpu_have_no_device_context():
    """It would slow down every call of torch, and so the thousands of small steps of a solver."""
    with on_device(None) as device:
        assert device.type == "cpu" and torch._C._len_torch_function_stack() == 0
    with torch.device("meta"), on_device("cpu"):
        assert torch.zeros(2).device.type == "cpu"
