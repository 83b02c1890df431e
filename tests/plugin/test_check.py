"""The dry run: it promises what the merge then does, and names everything that is wrong."""

import json
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mergekit_tspa.adapters import ExtractedModule
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.commands.main import main
from tests.conftest import merged_tensors, peft_merged, recipe, run, save_adapter, save_llama, write_recipe
from tests.plugin.test_extracted_inputs import save_full, with_full
from tests.plugin.test_merge import save_tokenizer


def check(config, folder, *options):
    file = config if hasattr(config, "read_text") else write_recipe(folder / "check.yml", config)
    result = CliRunner().invoke(main, ["check", str(file), *options], env={"COLUMNS": "1000"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def errors(result):
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert lines and all(line.startswith("Error: ") for line in lines)
    return lines


def number(pattern, text):
    return int(re.search(pattern, text)[1].replace(",", ""))


def changed_copy(source, path, edit):
    """An adapter whose tensors went through `edit`."""
    file = shutil.copytree(source, path) / "adapter_model.safetensors"
    save_file({name: edit(name, tensor).contiguous() for name, tensor in load_file(file).items()}, file)
    return path


@pytest.mark.parametrize(
    "method, parameters, top",
    [
        ("core_tsv", {}, {}),
        ("ctm_ties", {"rank": 4}, {"out_dtype": "bfloat16"}),
        ("lora_ties", {"rank": 6}, {"dtype": "float16"}),
        ("tspa", {"attention_steps": 2, "lora_steps": 5}, {}),
    ],
)
def test_the_merge_does_what_was_promised(method, parameters, top, llama, adapters, tmp_path):
    config = recipe(
        method, llama, adapters, [1, 0.5, [0.25, 0.75]], parameters={**parameters, "adapter": True}, **top
    )
    result = check(config, tmp_path)
    assert result.exit_code == 0 and not result.stderr
    model, adapter = (
        next(x for x in result.stdout.splitlines() if x.startswith(w)) for w in ("model", "adapter:")
    )
    written = merged_tensors(config, tmp_path / "out")
    assert number(r"([\d,]+) bytes", model) == sum(t.nbytes for t in written.values())
    assert {str(t.dtype) for t in written.values()} == {f"torch.{re.search(r'b?float[0-9]+', model)[0]}"}
    assert f"of {len(written)} tensors" in model
    tensors = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert number(r"([\d,]+) bytes", adapter) == sum(t.nbytes for t in tensors.values())
    assert (
        number(r"rank (\d+)", adapter)
        == json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["r"]
    )


def test_the_table_is_readable_at_80_columns(llama, adapters, tmp_path):
    """Each adapter has one line of the table, and the modules stand below it."""
    file = write_recipe(tmp_path / "check.yml", recipe("core_tsv", llama, adapters, [1, 0.5, 0.8]))
    result = CliRunner().invoke(main, ["check", str(file)], env={"COLUMNS": "80"})
    lines = result.stdout.splitlines()
    rows = [line for line in lines if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["one", "two", "three"]
    assert all(len(row) <= 80 for row in rows)
    assert any(
        line.startswith("three: down_proj gate_proj k_proj o_proj q_proj up_proj v_proj; ") for line in lines
    )


def test_full_models(llama, adapters, tmp_path, monkeypatch):
    """Said like adapters, without reading their linear weights; the result has at most the rank that is promised."""
    full = save_full(llama, tmp_path / "full", adapters[2])
    config = with_full(llama, adapters[:1], [full], {"extract_rank": 5, "adapter": True})
    with monkeypatch.context() as patch:
        patch.setattr(ExtractedModule, "factors", lambda *args: pytest.fail("a linear weight is read"))
        result = check(config, tmp_path)
    assert result.exit_code == 0 and not result.stderr
    row = next(
        [c.strip() for c in x.split("│")[1:-1]] for x in result.stdout.splitlines() if "full model" in x
    )
    assert row[:3] == ["full", "full model", "5"] and row[5:7] == ["needs the base", "1"]
    merged_tensors(config, tmp_path / "out")
    written = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert number(r"adapter_model.safetensors, rank (\d+) at most", result.stdout) == written["r"]


def test_problems_of_full_models(llama, adapters, tmp_path):
    """Each once, however many slices there are, and without a base that can be read."""
    full, wide = (
        save_full(llama, tmp_path / "full", adapters[2]),
        save_llama(tmp_path / "wide", hidden_size=32),
    )
    sources = [{"model": str(m)} for m in (full, full, wide, tmp_path / "gone")]
    slices = [{"sources": [source | {"layer_range": [i, i + 1]} for source in sources]} for i in range(2)]
    config = {"merge_method": "core_tsv", "base_model": str(llama), "slices": slices}
    parameters = {"extract_rank": 0, "extract_energy": [0.5, 0.9], "adapter": "no"}
    found = errors(check(config | {"parameters": parameters}, tmp_path))
    named = [
        "extract_rank: 0",
        "extract_energy",
        "adapter: no",
        "full: listed twice",
        "gone: there is neither",
        "wide: ",
    ]
    for sentence in named:
        assert sum(sentence in line for line in found) == 1, (sentence, found)
    assert len(found) == len(named)
    (line,) = errors(check(with_full(tmp_path / "nowhere", [], [full]), tmp_path))
    assert "nowhere: there is no such model directory" in line


def test_output_directories_do_not_matter(llama, adapters, tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    assert check(recipe("core_tsv", llama, adapters), tmp_path).exit_code == 0


def test_what_is_said_of_adapters(llama, adapters, tmp_path):
    dora = save_adapter(llama, tmp_path / "dora", use_dora=True)
    result = check(recipe("core_tsv", llama, [*adapters, dora], [1, 0.5, [0.25, 0.75], 2]), tmp_path)
    rows = [
        [cell.strip() for cell in x.split("│")[1:-1]] for x in result.stdout.splitlines() if x.startswith("│")
    ]
    assert [row[0] for row in rows] == ["one", "two", "three", "dora"]
    assert [row[1] for row in rows] == ["LoRA", "LoRA", "rsLoRA", "DoRA"]
    assert [row[2] for row in rows] == ["4", "2", "6", "4"]
    assert rows[1][3] == "4" and rows[0][4] == "float32"
    assert [row[6] for row in rows] == ["1", "0.5", "0.25 to 0.75", "2"]
    assert f"two: q_proj up_proj; trained on {llama.name}" in result.stdout
    assert f"one, dora: q_proj v_proj; trained on {llama.name}" in result.stdout
    base, merged = load_file(llama / "model.safetensors"), peft_merged(llama, adapters[2])
    norm = torch.stack([(merged[name] - W).norm() for name, W in base.items()]).norm().item()
    assert float(rows[2][5].split()[0]) == pytest.approx(norm, rel=1e-3)
    assert "adapter: none can be written" in result.stdout and "is a DoRA" in result.stdout


def test_no_weight_of_the_base_is_read(llama, adapters, tmp_path, monkeypatch):
    """They are not even there; PiSSA's part of them is not asked for."""
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader

    bare = shutil.copytree(llama, tmp_path / llama.name)
    size = (bare / "model.safetensors").stat().st_size
    with open(bare / "model.safetensors", "r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)
    pissa = save_adapter(llama, tmp_path / "pissa", init_lora_weights="pissa")
    for reader, name in ((Checkpoint, "__getitem__"), (LazyTensorLoader, "get_tensor")):
        monkeypatch.setattr(reader, name, lambda *args, **kwargs: pytest.fail("a weight of the base is read"))
    result = check(recipe("tspa", bare, [*adapters, pissa]), tmp_path)
    assert result.exit_code == 0 and "needs the base" in result.stdout


def test_every_problem_is_named(llama, adapters, tmp_path):
    nan = changed_copy(adapters[0], tmp_path / "nan", lambda name, t: t * float("nan"))
    misfit = save_adapter(save_llama(tmp_path / "other", hidden_size=32), tmp_path / "misfit")
    config = recipe("tspa_lora", llama, [adapters[0], nan, misfit, adapters[0], tmp_path / "gone"])
    config |= {"parameters": {"lora_lr": -1, "wieght": 2, "lamda": 1}, "out_dtype": "bf16"}
    result = check(config, tmp_path)
    found = errors(result)
    named = [
        "out_dtype: 'bf16'",
        "lora_lr: -1",
        "wieght",
        "lamda",
        "listed twice",
        "NaN or Inf",
        "gone: there is no",
    ]
    named.append("misfit: the update")
    for sentence in named:
        assert sum(sentence in line for line in found) == 1, sentence
    assert len(found) == len(named)
    assert "one" in result.stdout and "model:" not in result.stdout


def test_problems_of_the_plan(llama, adapters, tmp_path):
    (line,) = errors(check(recipe("core_tsv", llama, adapters, parameters={"rank": 99}), tmp_path))
    assert "rank 99" in line
    (line,) = errors(check(recipe("tspa_lora", llama, adapters, [1, -1, 1]), tmp_path))
    assert "at least 0" in line
    sources = [{"model": f"{llama}+{adapters[i]}", "layer_range": [i, 1 + i]} for i in (0, 1)]
    sliced = {"merge_method": "core_tsv", "base_model": str(llama), "slices": [{"sources": sources}]}
    assert "the layers of the base are not clear" in errors(check(sliced, tmp_path))[0]


def test_what_cannot_be_read(llama, adapters, tmp_path):
    """One sentence each, from whomever it comes, and the adapters are looked at all the same."""
    blank = shutil.copytree(llama, tmp_path / "blank")
    (blank / "config.json").unlink()
    weightless = shutil.copytree(llama, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    for base, what in {
        tmp_path / "nowhere": "there is no such model directory",
        "someone/somewhere": "there is no such model directory, and it is not to be had from the hub",
        blank: "is not readable as a model: ",
        weightless: "is not readable as a model: ",
    }.items():
        config = recipe("core_tsv", base, [adapters[0], tmp_path / "gone"])
        first, second = errors(check(config, tmp_path))
        assert str(base) in first and what in first and "gone" in second
    for text, reason in {
        "a: [": "not readable as YAML",
        "- 1": "holds no recipe",
        "": "holds no recipe",
        "models: []": "merge_method: Field required",
        "merge_method: core_tsv": "Exactly one of",
        "{merge_method: core_tvs, models: [{model: a+b}]}": "do you mean core_tsv",
    }.items():
        (tmp_path / "r.yml").write_text(text)
        (line,) = errors(check(tmp_path / "r.yml", tmp_path))
        assert reason in line
    assert "No such file" in errors(check(tmp_path / "none.yml", tmp_path))[0]


def test_warnings(llama, adapters, tmp_path):
    zero = changed_copy(
        adapters[0], tmp_path / "zero", lambda name, t: t * ("0.self_attn.q_proj" not in name)
    )
    file = zero / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "meta/another"}))
    sources = [
        {"model": f"{llama}+{adapter}", "layer_range": [0, 1], "parameters": {"weight": weight}}
        for adapter, weight in ((zero, 1), (adapters[2], -1))
    ]
    config = {"merge_method": "core_ties", "slices": [{"sources": sources}], "parameters": {"rank": 1}}
    result = check(config, tmp_path)
    assert result.exit_code == 0, result.stderr
    warnings = [line for line in result.stdout.splitlines() if line.startswith("Warning: ")]
    for sentence in (
        "its update of 1 weights is zero",
        "trained on meta/another",
        "weights of both signs",
        "7 of its tensors are not part of the output",
        "2 of its tensors are not part of the output",
        "rank 1 cuts",
    ):
        assert sum(sentence in line for line in warnings) == 1, (sentence, warnings)


def test_methods_of_mergekit(llama, adapters, tmp_path):
    (line,) = errors(check(recipe("linear", llama, adapters), tmp_path))
    assert "linear is mergekit's own method" in line


def test_several_documents(llama, adapters, tmp_path):
    first = recipe("core_tsv", llama, adapters[:2], name="first")
    second = recipe("factor_linear", "first", [adapters[2]], name="second")
    final = {"merge_method": "linear", "models": [{"model": m} for m in ("first", "second")]}
    result = check([first, second, final], tmp_path)
    assert result.exit_code == 0 and not result.stderr
    assert "first is the result of another stage and taken as given" in result.stdout
    assert "final merge: linear is mergekit's own method" in result.stdout
    third = with_full(llama, adapters[:1], ["first"])
    result = check([first, third], tmp_path)
    assert result.exit_code == 0 and "first is the result of another stage" in result.stdout
    second["models"][0]["model"]["lora"]["path"] = str(tmp_path / "gone")
    (line,) = errors(check([first, second, final], tmp_path))
    assert line.startswith("Error: second: ") and "gone" in line


def test_the_command_writes_nothing(llama, adapters, tmp_path):
    file = write_recipe(tmp_path / "r.yml", recipe("core_tsv", llama, adapters[:2]))
    result = run("mergekit-tspa", "check", file, "--out-shard-size", "100K")
    assert result.returncode == 0 and not result.stderr
    assert "about 3 shards" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["r.yml"]


@pytest.mark.parametrize("source", ["base", "union"])
def test_tokenizer_options(source, llama, adapters, tmp_path):
    """mergekit plans embeddings in its own way then; they have no adapter here, and the merge starts."""
    base = shutil.copytree(llama, tmp_path / "base")
    save_tokenizer(base)
    config = recipe(
        "core_tsv", base, adapters[:2], tokenizer={"source": source}, parameters={"adapter": True}
    )
    result = check(config, tmp_path)
    assert result.exit_code == 0 and "before the vocabulary is aligned" in result.stdout
    assert "adapter: none can be written: an adapter has no tokenizer" in result.stdout
    assert merged_tensors(config, tmp_path / "out")
    assert not (tmp_path / "out/adapter").exists()


def test_devices_that_are_not_there(llama, adapters, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (error,) = errors(check(recipe("core_tsv", llama, adapters), tmp_path, "--cuda"))
    assert "--device cuda: not on this machine" in error


def test_what_has_no_effect(llama, adapters, tmp_path):
    weight = [{"filter": "qproj", "value": 2}, {"filter": "v_proj", "value": [0.5, 1]}, {"value": 1}]
    config = recipe("core_tsv", llama, adapters[:2], [1, weight])
    config["models"][0]["paramaters"] = {"weight": 0.5}
    result = check(config, tmp_path)
    assert (
        result.exit_code == 0 and "Warning: models.0.paramaters: mergekit knows no such key" in result.stdout
    )
    assert (
        "Warning: filter 'qproj' is in the name of no tensor" in result.stdout
        and "v_proj' is" not in result.stdout
    )
