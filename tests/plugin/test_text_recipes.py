"""Recipes of methods that look at texts, through mergekit's commands and this package's own."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mergekit_tspa import merge_adapters
from mergekit_tspa.commands.main import main
from tests.conftest import (
    base_tensors,
    merge,
    merged_tensors,
    recipe,
    relative_error,
    run,
    save_adapter,
    write_lines,
    write_recipe,
)

OPTIONS = {"regmean": {}, "regmean_plus": {}, "fisher": {}, "distill": {"steps": 4}}


def with_texts(method, setting, key="examples", values=None, **top):
    base, adapters, texts = setting
    config = recipe(method, base, adapters, [1.0, 0.5], **top)
    for model, value in zip(config["models"], values or texts):
        if value is not None:
            model["parameters"][key] = str(value)
    return config


def own(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("method", OPTIONS)
def test_a_recipe_is_the_python_call(method, speaking, tmp_path):
    base, adapters, texts = speaking
    got = merged_tensors(with_texts(method, speaking, parameters=OPTIONS[method]), tmp_path / "out")
    updates = merge_adapters(method, adapters, [1.0, 0.5], base=base, examples=texts, **OPTIONS[method])
    assert len(got) == 20
    for name, W in base_tensors(base).items():
        if name not in got:  # the head, which is the embedding
            continue
        update = updates.get(name.removesuffix(".weight"))
        want = W if update is None else update.apply_to(W)
        assert torch.allclose(got[name], want, atol=1e-4), name
    for file in (tmp_path / "out").iterdir():  # texts never reach what is written
        assert b"w14 w15" not in file.read_bytes()


def test_an_adapter_comes_out(speaking, tmp_path):
    base, adapters, texts = speaking
    config = write_recipe(tmp_path / "recipe.yml", with_texts("regmean", speaking))
    result = own("adapter", config, tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    updates = merge_adapters("regmean", adapters, [1.0, 0.5], base=base, examples=texts)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    module = "model.layers.1.self_attn.v_proj"
    B, A = (written[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
    assert relative_error(B @ A, updates[module].dense()) < 1e-3


def test_mergekit_multi_and_texts_for_all_models_at_once(speaking, tmp_path):
    base, adapters, _ = speaking
    stages = [
        recipe("regmean", base, adapters, name="texts", parameters={"examples": "self", "new_tokens": 4}),
        recipe("core_tsv", base, adapters, name="none", parameters={"examples": "self"}),
    ]
    result = run("mergekit-multi", write_recipe(tmp_path / "multi.yml", stages), "-I", tmp_path / "parts")
    assert result.returncode == 0, result.stderr
    plain = merged_tensors(recipe("core_tsv", base, adapters), tmp_path / "plain")
    ignored = load_file(tmp_path / "parts" / "none" / "model.safetensors")
    assert all(torch.equal(ignored[name], plain[name]) for name in plain)


def test_calibrate_writes_statistics_that_merge_without_texts(speaking, tmp_path):
    config = write_recipe(tmp_path / "recipe.yml", with_texts("regmean", speaking))
    result = own("calibrate", config, "--out", tmp_path / "statistics", "--quiet")
    assert result.exit_code == 0, result.output
    files = [tmp_path / "statistics" / f"{name}.calibration.safetensors" for name in ("math", "code")]
    assert all(str(file) in result.output and file.is_file() for file in files)
    assert all(b"w14" not in file.read_bytes() for file in files)
    lambda_ = {"lambda": 1.0, "ridge": 1.0}
    by_files = with_texts("regmean", speaking, "calibration", files, parameters=lambda_)
    got = merged_tensors(by_files, tmp_path / "files")
    want = merged_tensors(with_texts("regmean", speaking, parameters=lambda_), tmp_path / "texts")
    base = base_tensors(speaking[0])
    for name, W in base.items():
        if name in got and not torch.equal(want[name], W):
            assert relative_error(got[name] - W, want[name] - W) < 0.02
    other = write_recipe(tmp_path / "other.yml", with_texts("regmean", speaking, "calibration", files[::-1]))
    result = own("adapter", other, tmp_path / "never")
    assert result.exit_code == 1 and "of another adapter" in result.output
    assert not (tmp_path / "never" / "adapter_model.safetensors").exists()
    plain = write_recipe(tmp_path / "plain.yml", with_texts("core_tsv", speaking))
    result = own("calibrate", plain, "--out", tmp_path / "never")
    assert (
        result.exit_code == 1 and "core_tsv looks at no texts; calibrate a recipe of regmean" in result.output
    )


def test_check_counts_texts_and_says_what_would_run(speaking, tmp_path):
    _, adapters, texts = speaking
    mixed = [texts[0], write_lines(tmp_path / "p.jsonl", [{"prompt": "w1 w2"}, {"prompt": "w3"}])]
    config = write_recipe(tmp_path / "recipe.yml", with_texts("regmean", speaking, values=mixed))
    result = own("check", config)
    assert result.exit_code == 0, result.output
    assert f"texts: {adapters[0]}: 4 texts, 43 tokens\n" in result.output
    assert "2 texts" in result.output and "2 of them prompts whose answers it writes itself" in result.output
    assert "the base reads them" in result.output and "held in memory" in result.output
    assert (
        "texts: what will be run: 2 answers of at most 110 tokens are written; then one pass over all texts; "
        "then a search for lambda on up to 4 texts of each adapter\n"
    ) in result.output
    assert re.search("memory: .*the base that reads texts .*texts on their way through it", result.output)
    assert "w14" not in result.output


def test_check_says_what_each_method_reads_and_tells_of_few_texts(speaking, tmp_path):
    _, adapters, texts = speaking
    said = {
        "regmean_plus": "one pass over all texts, which are in memory together",
        "fisher": "one pass over all texts, forwards and backwards",
        "distill": "regmean as a start; then at most 96 steps of training on 2 texts of each adapter",
    }
    for method, runs in said.items():
        result = own("check", write_recipe(tmp_path / "recipe.yml", with_texts(method, speaking)))
        assert result.exit_code == 0 and f"what will be run: {runs}" in result.output, result.output
        assert f"Warning: {adapters[0]}: its 4 texts have 43 tokens together" in result.output
    one = [write_lines(tmp_path / "one.jsonl", [{"text": "w1 w2"}]), texts[1]]
    config = write_recipe(tmp_path / "one.yml", with_texts("distill", speaking, values=one))
    for command in (["check", config], ["adapter", config, tmp_path / "out"]):
        result = own(*command)
        assert result.exit_code == 1 and "distillation needs at least two texts of it" in result.output
    assert not (tmp_path / "out").exists()
    self_written = write_recipe(tmp_path / "s.yml", with_texts("regmean", speaking, values=["self", "self"]))
    assert "64 answers of at most 110 tokens are written" in own("check", self_written).output
    assert "search" not in own("check", self_written).output


def test_wrong_recipes(speaking, tmp_path):
    base, adapters, texts = speaking
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "w1 w2"}\n[1]\n')
    mapped = with_texts("regmean", speaking)
    mapped["models"][0]["parameters"]["examples"] = [str(texts[0]), str(texts[1])]
    rows = with_texts("regmean", speaking)
    rows["models"][0]["parameters"]["examples"] = [{"text": "w14 w15"}]
    number = with_texts("regmean", speaking)
    number["models"][0]["parameters"]["examples"] = 3
    moved = recipe("regmean", base, adapters, parameters={"examples": str(texts[0])})
    models = moved.pop("models")
    moved["slices"] = [{"sources": [model | {"layer_range": [1, 2]} for model in models]}]
    varied = with_texts("regmean", speaking)
    varied["parameters"] = {"ridge": [{"filter": "q_proj", "value": 0.5}, {"value": 0.1}]}
    cases = [
        (recipe("regmean", base, adapters), "looks at texts of each adapter, and it has none"),
        (with_texts("regmean", speaking, values=[texts[0], None]), "code: regmean looks at texts"),
        (with_texts("regmean", speaking, values=[texts[0], tmp_path / "no"]), "no: there is no such file"),
        (with_texts("regmean", speaking, values=[texts[0], broken]), "broken.jsonl, line 2: is a list"),
        (mapped, "examples: give one file per model"),
        (rows, "models.0.parameters.examples: is no name of a file; write texts into one"),
        (number, "examples: 3"),
        (moved, "it is model.layers.1.* of the base, and regmean reads texts with the base as it is"),
        (varied, "regmean: it needs the same parameters for all tensors"),
        (
            with_texts("distill", speaking, parameters={"start": "nothing"}),
            "start: nothing: give the name of a method",
        ),
    ]
    for config, message in cases:
        result = merge(config, tmp_path / "out")
        assert result.exit_code == 1
        assert re.search(message, result.output) and "w14" not in result.output, result.output
        assert not list((tmp_path / "out").glob("*.safetensors")) if (tmp_path / "out").exists() else True


def test_check_reads_files_of_statistics_and_knows_the_keys(speaking, tmp_path):
    texts = speaking[2]
    config = write_recipe(tmp_path / "recipe.yml", with_texts("regmean", speaking, "calibration", texts))
    result = own("check", config)
    assert result.exit_code == 1 and f"{texts[0]}: damaged" in result.output
    misspelt = with_texts("core_tsv", speaking, "exmples", texts)
    result = own("check", write_recipe(tmp_path / "recipe.yml", misspelt))
    assert result.exit_code == 1 and "no parameter 'exmples'; did you mean examples?" in result.output
    result = own(
        "adapter", write_recipe(tmp_path / "r.yml", with_texts("fisher", speaking)), tmp_path / "out"
    )
    assert "fisher gives a dense update; set `rank`, so the merge cannot" in result.output


def test_a_base_without_tokenizer(llama, adapters, tmp_path):
    texts = write_lines(tmp_path / "texts.jsonl")
    result = merge(with_texts("regmean", (llama, adapters[:2], [texts, texts])), tmp_path / "out")
    assert result.exit_code == 1 and "has no tokenizer, which examples need" in result.output


def test_a_streamed_base_gives_the_same(speaking, tmp_path):
    base, adapters, texts = speaking
    whole = merge_adapters("regmean", adapters, base=base, examples=texts)
    streamed = merge_adapters("regmean", adapters, base=base, examples=texts, memory=1e-4)
    for module in whole:
        assert relative_error(streamed[module].dense(), whole[module].dense()) < 1e-3


def test_other_kinds_of_adapters(speaking, tmp_path):
    """DoRA, and a head that was trained itself, beside a plain one."""
    base, adapters, texts = speaking
    more = [
        save_adapter(base, tmp_path / "dora", seed=7, use_dora=True, target_modules=["q_proj"]),
        adapters[1],
    ]
    got = merged_tensors(with_texts("regmean", (base, more, texts)), tmp_path / "out")
    W = base_tensors(base)
    assert any(not torch.equal(got[name], W[name]) for name in got)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
