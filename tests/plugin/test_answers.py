"""Wrong and odd inputs are answered by one sentence that says what to do."""

import pytest
from click.testing import CliRunner

from mergekit_tspa.commands.main import main
from mergekit_tspa.errors import nearest
from tests.conftest import merge, recipe, run, write_recipe


def answer(command, file, *arguments):
    """The one line that a command of ours fails with."""
    result = CliRunner().invoke(main, [command, str(file), *map(str, arguments)], env={"COLUMNS": "1000"})
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return line


def warnings_of(config, folder, caplog):
    """What a merge warns of, which `check` says too, once."""
    caplog.clear()
    result = merge(config, folder / "out")
    assert result.exit_code == 0, result.output
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    checked = CliRunner().invoke(
        main, ["check", str(write_recipe(folder / "c.yml", config))], env={"COLUMNS": "1000"}
    )
    assert checked.exit_code == 0, checked.output
    for sentence in said:
        assert checked.output.count(f"Warning: {sentence}") == 1, (sentence, checked.output)
    return said


@pytest.mark.parametrize(
    "parameters, said",
    [
        ({"rank": [4, 8]}, "rank: [4, 8]: a whole number has no gradient"),
        ({"rank": [{"filter": "q_proj", "value": [2, 4]}, {"value": 4}]}, "a whole number has no gradient"),
        ({"rank": True}, "parameter rank: True: true and yes are no numbers"),
        ({"weight": True}, "parameter weight: True: true and yes are no numbers"),
    ],
)
def test_values(parameters, said, llama, adapters, tmp_path):
    config = recipe("core_tsv", llama, adapters[:2], parameters=parameters)
    assert said in answer("check", write_recipe(tmp_path / "r.yml", config))
    result = merge(config, tmp_path / "out")
    assert result.exit_code == 1 and said in result.output and not (tmp_path / "out").exists()


def test_a_gradient_of_one_value_is_a_value(llama, adapters, tmp_path):
    assert (
        merge(recipe("core_tsv", llama, adapters[:2], parameters={"rank": [3, 3]}), tmp_path / "o").exit_code
        == 0
    )


def test_an_empty_value(llama, adapters, tmp_path):
    """One sentence, and not one for each kind of value that pydantic has tried."""
    config = recipe("core_tsv", llama, adapters[:2])
    config["models"][0]["parameters"] = {"weight": None}
    file = write_recipe(tmp_path / "r.yml", config)
    for command in (("check",), ("adapter", tmp_path / "out")):
        line = answer(command[0], file, *command[1:])
        assert line.count("models.0.parameters.weight: None is no value; give a number") == 1
        assert "ConditionalParameter" not in line


def test_methods_in_capitals(llama, adapters, tmp_path):
    for name in ("Core_TSV", "core-tsv", "CORE_TVS"):
        config = recipe(name, llama, adapters[:2])
        result = merge(config, tmp_path / "out")
        assert result.exit_code == 1 and "do you mean core_tsv?" in result.output
        assert "do you mean core_tsv" in answer("check", write_recipe(tmp_path / "r.yml", config))
    assert nearest("Weight", ["weight"]) == ["weight"]


@pytest.mark.parametrize("options", [{"tokenizer_source": "union"}, {"tokenizer": {"source": "base"}}])
def test_a_tokenizer_that_is_not_there(options, llama, adapters, tmp_path):
    config = recipe("core_tsv", llama, adapters[:2], **options)
    said = f"{min(options)}: {llama} has no tokenizer that transformers can load"
    assert said in answer("check", write_recipe(tmp_path / "r.yml", config))
    result = merge(config, tmp_path / "out")
    assert result.exit_code == 1 and said in result.output and not (tmp_path / "out").exists()


def test_a_parameter_beside_its_model(llama, adapters, tmp_path, caplog):
    config = recipe("core_tsv", llama, adapters[:2], rank=3)
    config["models"][0]["weight"] = 2
    said = warnings_of(config, tmp_path, caplog)
    assert (
        "models.0.weight: mergekit knows no such key, so it has no effect; write it under `parameters:` there"
        in said
    )
    assert any(line.startswith("rank: ") and line.endswith("under `parameters:` there") for line in said)


def test_filters_that_never_match(llama, adapters, tmp_path, caplog):
    weight = [{"filter": "nothing", "value": 3}, {"value": 1}, {"filter": "q_proj", "value": 2}, {"value": 4}]
    said = warnings_of(recipe("core_tsv", llama, adapters[:2], [weight, 1]), tmp_path, caplog)
    assert "filter 'nothing' is in the name of no tensor" in said
    assert any("weight: filter 'q_proj' never has an effect" in line for line in said)
    assert any("weight: the value 4 never has an effect" in line for line in said)
    assert len(said) == 3


def test_names_left_empty(llama, adapters, tmp_path):
    for reference, said in (
        (f"{llama}+", "no adapter after the +"),
        (f"+{adapters[0]}", "no base model before"),
    ):
        file = write_recipe(
            tmp_path / "r.yml", {"merge_method": "core_tsv", "models": [{"model": reference}]}
        )
        assert said in answer("check", file) and said in answer("adapter", file, tmp_path / "out")


def test_files_that_are_no_recipe(tmp_path):
    assert answer("check", tmp_path).endswith("Is a directory; name a file with a recipe")
    assert "No such file" in answer("check", tmp_path / "none.yml")
    several = write_recipe(tmp_path / "several.yml", [{"name": "a"}, {"name": "b"}])
    line = answer("adapter", several, tmp_path / "out")
    assert "holds 2 recipes, which is for mergekit-multi" in line


def test_an_output_without_a_name(llama, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_recipe(tmp_path / "r.yml", recipe("core_tsv", llama, adapters[:2]))
    for command in (["adapter", "r.yml", ""], ["inspect", "r.yml", "--out", ""]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2 and "the name is empty" in result.output
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    result = CliRunner().invoke(mergekit_yaml, [str(file), ""])
    assert result.exit_code == 1 and "the output directory has no name" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["r.yml"]


def test_a_terminal_that_knows_ascii_only():
    result = run("mergekit-tspa", "methods", PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "core_" in result.stdout, result.stderr
