"""`aligned_mean`, `align:` on full models of a recipe, and adapters that turn with their model."""

import re

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from mergekit_tspa import InputError, merge_adapters
from mergekit_tspa.commands.main import main
from tests.conftest import (
    load_model,
    merge,
    merged_tensors,
    peft_merged,
    relative_error,
    save_adapter,
    save_llama,
    write_recipe,
)
from tests.plugin.test_architectures import ARCHITECTURES, outputs, save_model
from tests.symmetry.planted import plant, tensors_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base, a fine-tune of it, the same with units and heads elsewhere, and an adapter on that one."""
    folder = tmp_path_factory.mktemp("models")
    base = save_llama(folder / "base")
    tuned = plant(base, folder / "tuned", kinds=(), noise=0.05)
    moved = plant(base, folder / "moved", noise=0.05)
    lora = save_adapter(moved, folder / "lora", target_modules="all-linear")
    return base, tuned, moved, lora


def mean_of(base, models, weights=None, **top):
    config = {"merge_method": "aligned_mean", "models": [{"model": str(model)} for model in models]} | top
    if base is not None:
        config["base_model"] = str(base)
    for model, weight in zip(config["models"], weights or []):
        model["parameters"] = {"weight": weight}
    return config


def test_the_mean_of_aligned_models_is_that_of_the_models_before_they_were_moved(llama, tmp_path, caplog):
    base, tuned, moved, _ = llama
    caplog.set_level("INFO")
    config = mean_of(base, [base, moved], [1.0, 3.0], parameters={"align": "all"})
    got = merged_tensors(config, tmp_path / "out")
    W, W_tuned = tensors_of(base), tensors_of(tuned)
    for name, tensor in got.items():
        assert relative_error(tensor, (W[name] + 3 * W_tuned[name]) / 4) < 0.01, name
    assert "blocks were turned towards" in caplog.text
    # as stock `linear`, where there is nothing to align, bit for bit
    config = mean_of(base, [base, tuned], [0.3, 0.7])
    stock = config | {"merge_method": "linear"}
    once, again = merged_tensors(config, tmp_path / "mean"), merged_tensors(stock, tmp_path / "linear")
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)
    assert "alignment had nothing to do" in caplog.text


def test_a_base_that_is_not_listed_takes_no_part(llama, tmp_path):
    base, tuned, moved, _ = llama
    alone = merged_tensors(mean_of(base, [moved], parameters={"align": "all"}), tmp_path / "alone")
    for name, W in tensors_of(tuned).items():
        assert relative_error(alone[name], W) < 0.02
    first = merged_tensors(mean_of(None, [moved, tuned], parameters={"align": "all"}), tmp_path / "first")
    assert relative_error(outputs(load_model(tmp_path / "first")), outputs(load_model(moved))) < 0.02
    assert first.keys() == alone.keys()


@pytest.mark.parametrize("name", ["Mixtral", "GPT-NeoX", "Phi-3"])
def test_architectures_that_mergekit_knows_otherwise(name, tmp_path):
    base = save_model(tmp_path / "base", ARCHITECTURES[name].kind, **ARCHITECTURES[name].config)
    moved = plant(base, tmp_path / "moved")
    assert merge(mean_of(base, [base, moved], parameters={"align": "all"}), tmp_path / "out").exit_code == 0
    assert relative_error(outputs(load_model(tmp_path / "out")), outputs(load_model(base))) < 1e-5
    assert merge(recipe(base, [moved], align="all"), tmp_path / "factors").exit_code == 0
    assert relative_error(outputs(load_model(tmp_path / "factors")), outputs(load_model(base))) < 1e-4


def recipe(base, models, method="lora_task_arithmetic", **parameters):
    models = [{"model": {"model": {"path": str(m)}} if not isinstance(m, dict) else m} for m in models]
    return {"merge_method": method, "base_model": str(base), "models": models, "parameters": parameters}


@pytest.mark.parametrize("method", ["lora_task_arithmetic", "core_tsv"])
def test_full_models_are_aligned_before_they_become_factors(method, llama, tmp_path):
    base, tuned, moved, _ = llama
    got = merged_tensors(recipe(base, [moved], method, align="all", extract_rank=64), tmp_path / "out")
    for name, W in tensors_of(tuned).items():
        assert relative_error(got[name], W) < 0.02, name
    config = recipe(base, [moved, tuned], method, extract_rank=64)
    config["models"][0]["parameters"] = {"align": "permutation, rotation, scale", "weight": 0.5}
    config["models"][1]["parameters"] = {"weight": 0.5}
    if method == "lora_task_arithmetic":
        got = merged_tensors(config, tmp_path / "both")
        assert all(relative_error(got[name], W) < 0.02 for name, W in tensors_of(tuned).items())
    python = merge_adapters(method, [moved], base=base, align="all", extract_rank=64)
    for module, update in python.items():
        name = f"{module}.weight"
        W = tensors_of(base)[name]
        assert relative_error(update.apply_to(W), tensors_of(tuned)[name]) < 0.02


def test_a_fine_tune_that_did_not_move_merges_as_without(llama, tmp_path, caplog):
    base, tuned, *_ = llama
    one, other = (
        merged_tensors(recipe(base, [tuned], extract_rank=8, **more), tmp_path / name)
        for name, more in (("one", {}), ("other", {"align": "all"}))
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "alignment had nothing to do" in caplog.text


def test_an_adapter_turns_with_its_model(llama, tmp_path):
    """The aligned model with the turned adapter computes what the model with its adapter does."""
    base, _, moved, lora = llama
    on_moved = {"model": {"path": str(moved)}, "lora": {"path": str(lora)}}
    config = recipe(base, [moved, on_moved], align="all", extract_rank=64)
    merged_tensors(config, tmp_path / "out")
    want = load_model(moved)
    want.load_state_dict(peft_merged(moved, lora))
    assert relative_error(outputs(load_model(tmp_path / "out")), outputs(want)) < 1e-4
    # without align: it is on another base
    result = merge(recipe(base, [on_moved]), tmp_path / "refused")
    assert result.exit_code == 1 and "unless align: brings their models together" in result.output
    dora = save_adapter(moved, tmp_path / "dora", use_dora=True)
    result = merge(
        recipe(base, [on_moved | {"lora": {"path": str(dora)}}], align="all"), tmp_path / "refused"
    )
    assert result.exit_code == 1 and re.search("DoRA magnitudes of .* cannot turn", result.output)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Phi-3"])
def test_an_adapter_is_written_beside_the_aligned_model(name, tmp_path):
    base = save_model(tmp_path / "base", ARCHITECTURES[name].kind, **ARCHITECTURES[name].config)
    moved = plant(base, tmp_path / "moved")
    options = {"target_modules": "all-linear", "fan_in_fan_out": name == "GPT-2"}
    lora, out = save_adapter(moved, tmp_path / "lora", **options), tmp_path / "out"

    def align(*more):
        command = ["align", moved, "--to", base, "--by", "all", *more]
        return CliRunner().invoke(main, list(map(str, command)))

    result = align("--out", out, "--adapter", lora)
    assert result.exit_code == 0, result.output
    adapted = PeftModel.from_pretrained(load_model(out), out / "adapters/lora")
    want = PeftModel.from_pretrained(load_model(moved), lora)
    assert relative_error(outputs(adapted), outputs(want)) < 1e-4
    assert relative_error(outputs(want), outputs(load_model(out))) > 0.01
    if name == "Llama":
        assert "name a directory with --out" in align("--adapter", lora).output
        twice = align("--adapter", lora, "--adapter", lora, "--out", tmp_path / "no")
        assert "several adapters have one name" in twice.output
        saved = save_adapter(
            moved, tmp_path / "saved", **options | {"target_modules": ["q_proj"]}, modules_to_save=["lm_head"]
        )
        result = align("--adapter", saved, "--out", tmp_path / "no")
        assert result.exit_code == 1 and re.search(
            "lm_head.* is no low-rank update of one tensor", result.output
        )
        assert not (tmp_path / "no").exists()


def test_recipes_that_cannot_be(llama, tmp_path):
    base, tuned, moved, lora = llama
    wide = save_llama(tmp_path / "wide", intermediate_size=98)
    deep = save_llama(tmp_path / "deep", num_hidden_layers=3)
    larger = save_llama(tmp_path / "larger", vocab_size=100)
    untied = save_llama(tmp_path / "untied", tie_word_embeddings=False)
    sliced = {"merge_method": "aligned_mean", "base_model": str(base)}
    sliced["slices"] = [{"sources": [{"model": str(moved), "layer_range": [0, 2]}]}]
    cases = {
        "without slices and modules": sliced,
        r"has no parameter 'wieght'; did you mean weight": mean_of(base, [tuned], parameters={"wieght": 1.0}),
        "'turns' is no symmetry": mean_of(base, [tuned], parameters={"align": "turns"}),
        "align: name a symmetry, or use mergekit's linear": mean_of(base, [tuned], parameters={"align": ""}),
        "align: .* give one value per model, no": mean_of(
            base, [tuned], parameters={"align": ["all", "all"]}
        ),
        "weight: 'much': Input should be a valid number": mean_of(base, [tuned], ["much"]),
        "weight: an empty list": mean_of(base, [tuned], [[]]),
        r"up_proj.weight: the weights of the models add up to 0": mean_of(
            base, [tuned], [[{"filter": "up_proj", "value": 0.0}, {"value": 1.0}]]
        ),
        r"embed_tokens.weight has shape \(100, 64\), but \(96, 64\)": mean_of(base, [larger]),
        "only the base .* ties embedding and head": mean_of(base, [untied]),
        "normalize: 'maybe'": mean_of(base, [tuned], parameters={"normalize": "maybe"}),
        "normalize applies to the whole merge": mean_of(base, [])
        | {"models": [{"model": str(tuned), "parameters": {"normalize": False}}]},
        "dtype: 'bf16' is no dtype": mean_of(base, [tuned], dtype="bf16"),
        "tokenizer_source: .* has no tokenizer": mean_of(base, [tuned], tokenizer_source="base"),
        "cannot hold the character NUL": mean_of("a\0b", [tuned]),
        "takes full models": mean_of(base, [f"{moved}+{lora}"]),
        "listed twice": mean_of(base, [tuned, tuned]),
        "it has 3 layers": mean_of(base, [deep]),
        r"has shape \(98, 64\), but \(96, 64\)|has shape": mean_of(base, [wide]),
        "'turned' is no symmetry": recipe(base, [moved], align="turned"),
        "align: .* give one value per model": recipe(base, [moved], align=["rotation", "scale"]),
        "neither an adapter nor a model": mean_of(base, [tmp_path / "nowhere"]),
    }
    for message, config in cases.items():
        result = merge(config, tmp_path / "out")
        assert result.exit_code == 1 and re.search(message, result.output.splitlines()[-1]), (
            message,
            result.output,
        )
        assert not (tmp_path / "out").exists()
        result = CliRunner().invoke(main, ["check", str(tmp_path / "out.yml")])
        assert result.exit_code == 1 and re.search(f"Error: .*{message}", result.stderr), (
            message,
            result.output,
        )
    (tmp_path / "out").mkdir()
    (tmp_path / "out/adapter_config.json").write_text("{}")
    result = merge(mean_of(base, [tuned]), tmp_path / "out")
    assert result.exit_code == 1 and "holds an adapter" in result.output
    with pytest.raises(InputError, match="is no symmetry"):
        merge_adapters("lora_ties", [moved], base=base, align="turned")


def test_check_says_what_alignment_takes(llama, tmp_path):
    """From headers: nothing is aligned for it."""
    base, _, moved, lora = llama
    on_moved = {"model": {"path": str(moved)}, "lora": {"path": str(lora)}}
    file = write_recipe(tmp_path / "recipe.yml", recipe(base, [moved, on_moved], align="all"))
    result = CliRunner().invoke(main, ["check", str(file)])
    assert result.exit_code == 0, result.output
    assert "aligned" in result.output and re.search(r"aligning\s+a\s+block", result.output)


def test_check_plans_a_mean(llama, tmp_path):
    base, tuned, moved, _ = llama

    def check(config):
        file = write_recipe(tmp_path / "mean.yml", config)
        result = CliRunner().invoke(main, ["check", str(file)], env={"COLUMNS": "200"})
        return result.exit_code, re.sub(r"[ │]+", " ", result.output)

    config = mean_of(base, [moved, tuned], [0.5, [0.2, 0.4]], parameters={"align": "all"})
    code, output = check(config)
    assert code == 0, output
    for row in (
        "moved permutation, rotation, scale 4 0.5",
        "tuned permutation, rotation, scale 4 0.2 to 0.4",
    ):
        assert row in output
    assert "base - - 0 " in output and "aligning a block" in output
    assert not list(tmp_path.glob("out*"))
    nbytes = sum(W.nbytes for W in merged_tensors(config, tmp_path / "out").values())
    assert f"model.safetensors, {nbytes:,} bytes" in output
    # two things at once, and what cannot be turned
    wide = save_llama(tmp_path / "wide", intermediate_size=98)
    code, output = check(mean_of(base, [wide, tmp_path / "nowhere"]))
    assert code == 1 and "has shape (64, 98)" in output and "nowhere: there is neither" in output
    qwen = save_model(tmp_path / "qwen", ARCHITECTURES["Qwen3"].kind, **ARCHITECTURES["Qwen3"].config)
    code, output = check(mean_of(qwen, [plant(qwen, tmp_path / "other")]))
    assert code == 0 and "their norms have learned scales" in output


def test_check_of_stages(llama, tmp_path):
    """What another stage makes is not there yet."""
    base, _, moved, _ = llama
    first = mean_of(base, [moved]) | {"name": "first"}
    second = mean_of(base, ["first", moved])
    file = tmp_path / "stages.yml"
    file.write_text("---\n".join(write_recipe(tmp_path / "one.yml", c).read_text() for c in (first, second)))
    result = CliRunner().invoke(main, ["check", str(file)])
    assert result.exit_code == 0, result.output
    assert "first is the result of another stage" in result.output.replace("\n", " ")


def test_inspect_says_how_far_models_were(llama, tmp_path):
    base, tuned, moved, _ = llama
    inspect = lambda *arguments: CliRunner().invoke(main, ["inspect", *map(str, arguments)])  # noqa: E731
    file = write_recipe(tmp_path / "recipe.yml", recipe(base, [moved, tuned], align="all"))
    result = inspect(file, "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert re.search("moved: 4 of 4 blocks were turned towards", result.output)
    assert re.search("tuned: alignment had nothing to do", result.output)
    page = (tmp_path / "report/inspect.html").read_text()
    assert "after alignment" in page and page.count("model.layers.1</t") >= 4
    result = inspect(moved, "--base", base, "--align", "all", "--out", tmp_path / "one")
    assert "4 of 4 blocks were turned" in result.output
    for arguments in ((file, "--align", "all"), (moved, "--base", base, "--align", "turns")):
        result = inspect(*arguments, "--out", tmp_path / "none")
        assert result.exit_code == 1 and "align" in result.output and not (tmp_path / "none").exists()
