"""Directories with spaces, `+`, `@`, `~` and letters of other scripts in their names, through all commands."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file

from mergekit_tspa.commands.main import main
from tests.conftest import relative_error, write_recipe


def invoke(command, *arguments):
    result = CliRunner().invoke(command, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def odd(llama, adapters, tmp_path, monkeypatch):
    """Bases and adapters of odd names below the working directory, which is also the home directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my base", "base+one", "b@se", "базис"):
        shutil.copytree(llama, tmp_path / name)
    for name, source in (("my adapters/a1", 0), ("ad+apters@x/a2", 1), ("ad@pter", 2), ("适配器", 0)):
        shutil.copytree(adapters[source], tmp_path / name)
    return tmp_path


RECIPES = {
    "spaces": ("my base", ["my base+my adapters/a1", "my base + ad@pter"]),
    "bare": ("my base", ["my adapters/a1", "ad+apters@x/a2"]),
    "plus": ("base+one", ["base+one+ad+apters@x/a2", "base+one+my adapters/a1"]),
    "at": ("b@se", ["b@se+ad@pter", "b@se+适配器"]),
    "home": ("~/базис", ["~/базис+~/my adapters/a1", "~/ad@pter"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_command(name, odd):
    from mergekit.scripts.multimerge import main as multi
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    base, models = RECIPES[name]
    config = {
        "merge_method": "lora_task_arithmetic",
        "base_model": base,
        "models": [{"model": model} for model in models],
        "parameters": {"adapter": True},
    }
    file = write_recipe(odd / "my recipe.yml", config)
    checked = invoke(main, "check", file)
    assert checked.exit_code == 0, checked.output
    for command in (
        [mergekit_yaml, file, odd / "my out", "--quiet", "--no-copy-tokenizer"],
        [main, "adapter", file, odd / "my adapter", "--quiet"],
        [main, "inspect", file, "--out", odd / "my report", "--quiet"],
    ):
        result = invoke(*command)
        assert result.exit_code == 0, result.output
    final = config | {"base_model": "first", "models": [{"model": {"model": "first", "lora": "ad@pter"}}]}
    stages = write_recipe(odd / "stages.yml", [config | {"name": "first"}, final])
    result = invoke(multi, stages, "-I", "the parts", "--out-path", "end", "--quiet", "--no-copy-tokenizer")
    assert result.exit_code == 0, result.output
    merged = load_file(odd / "my out/model.safetensors")
    staged = load_file(odd / "the parts/first/model.safetensors")
    for tensor, value in merged.items():
        assert relative_error(staged[tensor], value) == 0
    alone, beside = (odd / d / "adapter_model.safetensors" for d in ("my adapter", "my out/adapter"))
    assert alone.read_bytes() == beside.read_bytes()


def test_what_is_written_is_read_back(odd):
    """And what mergekit writes well stays as it was."""
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "core_tsv",
            "base_model": "someone/model@main",
            "models": [{"model": model} for model in ("a+b", "someone/model@r+else/lora@s", "my base+b@se")],
            "tokenizer_source": "my base",
        }
    )
    assert MergeConfiguration.model_validate(config.model_dump()) == config
    text = config.to_yaml()
    assert "base_model: someone/model@main\n" in text and "- model: a+b\n" in text
    assert "- model: someone/model@r+else/lora@s\n" in text


def test_what_cannot_be_told_is_one_sentence(odd):
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    for reference, said in (("a+b+c", "of several +"), ("a@b@c", "one @ at most")):
        file = write_recipe(
            odd / "r.yml",
            {"merge_method": "core_tsv", "base_model": "my base", "models": [{"model": reference}]},
        )
        for command in ([mergekit_yaml], [main, "adapter"], [main, "check"]):
            result = invoke(*command, file, *(["out"] if command != [main, "check"] else []))
            lines = result.output.strip().splitlines()
            assert result.exit_code == 1 and len(lines) == 1 and said in lines[0], result.output
            assert lines[0].startswith("Error: ")
    assert not Path("out").exists()
