"""Wrong and odd inputs are answered by one sentence that says what to do."""

import json
import shutil

import pytest
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.scripts.run_yaml import main as mergekit_yaml
from pydantic import ValidationError

from mergekit_tspa.commands.main import main
from mergekit_tspa.errors import nearest
from tests.conftest import merge, recipe, run, save_llama, write_recipe


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


UNREADABLE = {
    "a mapping of models": ({"models": {"a": "b+c"}}, "models: {'a': 'b+c'} is no list; write each item"),
    "models that are no mappings": ({"models": ["b+c"]}, "models.0: 'b+c' is no mapping; write `key: value`"),
    "no model": ({"models": [{"model": None}]}, "models.0.model: None is no name of a model"),
    "a model without name": ({"models": [{"parameters": {}}]}, "models.0.model: Field required"),
    "no models": ({"models": []}, "Exactly one of 'models', 'slices', or 'modules' must be present"),
    "a list of parameters": ({"parameters": [{"rank": 4}]}, "parameters: [{'rank': 4}] is no mapping"),
    "a name of numbers": ({"parameters": {3: 4}}, "parameters: 3 is no name; write it in quotes"),
    "no value": ({"parameters": {"lambda": None}}, "parameters.lambda: None is no value; give a number"),
    "a number as dtype": ({"dtype": 16}, "dtype: 16 is no text"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_recipes_that_mergekit_cannot_read(case, llama, adapters, tmp_path):
    """Its own command says it in one sentence too, where it would show a traceback; a program gets the error."""
    changes, said = UNREADABLE[case]
    config = recipe("core_tsv", llama, adapters[:2]) | changes
    for text in (
        answer("check", write_recipe(tmp_path / "r.yml", config)),
        merge(config, tmp_path / "o").output,
    ):
        assert said in text and "Traceback" not in text
    assert merge(config, tmp_path / "o").exit_code == 1 and not (tmp_path / "o").exists()
    with pytest.raises((ValidationError, RuntimeError)) as error:
        MergeConfiguration.model_validate(config)
    assert error.type in (ValidationError, RuntimeError)
    stock = merge(config | {"merge_method": "linear"}, tmp_path / "o")
    assert isinstance(stock.exception, error.type)


def test_a_key_that_is_there_twice(llama, adapters, tmp_path):
    text = yaml.safe_dump(recipe("core_tsv", llama, adapters[:2]), sort_keys=False)
    file = tmp_path / "r.yml"
    file.write_text(f"{text}parameters: {{lambda: 1}}\nparameters:\n  lambda: 2\n")
    last = len(file.read_text().splitlines()) - 1
    said = f"parameters is there twice, in lines {last - 1} and {last}, and only the last would count"
    assert said in answer("check", file) and said in answer("adapter", file, tmp_path / "out")
    result = CliRunner().invoke(mergekit_yaml, [str(file), str(tmp_path / "out")])
    assert result.exit_code == 1 and said in result.output and not (tmp_path / "out").exists()
    file.write_text(f"{text}parameters: &p {{lambda: 1}}\nx: &x {{<<: *p, lambda: 2}}\ny: {{<<: [*p, *x]}}\n")
    assert CliRunner().invoke(main, ["check", str(file)]).exit_code == 0


def test_keys_that_have_no_effect(llama, adapters, tmp_path, caplog):
    """In the fields of a model, and in filters."""
    config = recipe("core_tsv", llama, adapters[:2], [[{"fliter": "q_proj", "value": 2}], 1])
    config["models"][1]["model"]["lroa"] = 3
    said = warnings_of(config, tmp_path, caplog)
    start = "mergekit knows no such key, so it has no effect; did you mean"
    assert f"models.0.parameters.weight.0.fliter: {start} filter?" in said
    assert f"models.1.model.lroa: {start} lora?" in said


def sliced(llama, *sources, **more):
    return {"merge_method": "core_tsv", "base_model": str(llama), "slices": [{"sources": [*sources]} | more]}


def test_odd_recipes(llama, adapters, tmp_path):
    good = recipe("core_tsv", llama, adapters[:2])
    one, two, base = (*(model["model"] for model in good["models"]), str(llama))
    deep = save_llama(tmp_path / "deep", num_hidden_layers=3)
    of = lambda model, *layers: {"model": model, "layer_range": layers}  # noqa: E731
    cases = [
        (good | {"out_dtype": "int64"}, "out_dtype: int64 has whole numbers only"),
        (good | {"base_model": ""}, "base_model: the name is empty"),
        (good | {"models": [*good["models"], {"model": "a\0b"}]}, "cannot hold the character NUL"),
        (good | {"models": [*good["models"], {"model": "a" * 5000}]}, "neither an adapter nor a model"),
        (
            good | {"models": [{"model": base}, {"model": base}, *good["models"]]},
            f"{base}: listed twice; list it",
        ),
        (
            good | {"models": [*good["models"], {"model": str(deep)}]},
            f"{deep}: it has 3 layers, and its base",
        ),
        (sliced(llama, of(one, 2, 0)), "has 2 layers; the second number is the first layer that is left out"),
        (sliced(llama, of(one, 0, 2), of(base, 0, 1)), "a slice takes 1 and 2 layers of its inputs"),
        (
            sliced(llama, of(one, 0, 2), base_model=str(deep)),
            f"a slice has base_model {deep}, but this merge",
        ),
    ]
    for config, said in cases:
        file = write_recipe(tmp_path / "r.yml", config)
        checked = CliRunner().invoke(main, ["check", str(file)])
        assert checked.exit_code == 1 and said in checked.output
        assert said in answer("adapter", file, tmp_path / "out")
        result = merge(config, tmp_path / "out")
        assert result.exit_code == 1 and said in result.output and not (tmp_path / "out").exists()
    shutil.copytree(llama, tmp_path / "odd")
    settings = json.loads((llama / "config.json").read_text()) | {"num_hidden_layers": "2"}
    (tmp_path / "odd/config.json").write_text(json.dumps(settings))
    config = recipe("core_tsv", tmp_path / "odd", adapters[:2])
    said = answer("adapter", write_recipe(tmp_path / "r.yml", config), tmp_path / "out")
    assert "Validation error for field 'num_hidden_layers': " in said and "int" in said
    config = sliced(llama, of(one, 0, 2), of(two, 0, 2), base_model=f"{llama}/.")  # the same base
    assert merge(config, tmp_path / "out").exit_code == 0


def test_methods_in_capitals(llama, adapters, tmp_path):
    for name in ("Core_TSV", "core-tsv", "CORE_TVS"):
        config = recipe(name, llama, adapters[:2])
        result = merge(config, tmp_path / "out")
        assert result.exit_code == 1 and "do you mean core_tsv?" in result.output
        assert "do you mean core_tsv" in answer("check", write_recipe(tmp_path / "r.yml", config))
    for name, hint in {"tsap": "do you mean tspa?", "qqq": "`mergekit-tspa methods` lists"}.items():
        result = merge(recipe(name, llama, adapters[:2]), tmp_path / "out")
        assert result.exit_code == 1 and f"there is no merge_method '{name}'; {hint}" in result.output
    assert not (tmp_path / "out").exists()
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
    for command in ("check", "inspect"):
        assert "No such file or directory; name a file with" in answer(command, tmp_path / "none.yml")
    several = write_recipe(tmp_path / "several.yml", [{"name": "a"}, {"name": "b"}])
    line = answer("adapter", several, tmp_path / "out")
    assert "holds 2 recipes, which is for mergekit-multi" in line


@pytest.mark.parametrize(
    "first, second, said",
    [
        ({}, {}, "there are several merges without a name"),
        ({"name": "a"}, {"name": "a"}, "there are several merges of the name 'a'"),
        ({"name": 3}, {}, "name 3: it names a directory, so write text there"),
        ({"name": ["a"]}, {}, "name ['a']: it names a directory"),
        ({"name": "a", "base_model": "b"}, {"name": "b", "base_model": "a"}, "each other in a circle: "),
    ],
)
def test_merges_that_cannot_be_ordered(first, second, said, llama, adapters, tmp_path):
    """mergekit-multi stops with a traceback; `check` says it."""
    merges = [recipe("core_tsv", m.get("base_model", llama), adapters[:1]) | m for m in (first, second)]
    assert said in answer("check", write_recipe(tmp_path / "r.yml", merges))


def test_an_output_without_a_name(llama, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_recipe(tmp_path / "r.yml", recipe("core_tsv", llama, adapters[:2]))
    for command in (["adapter", "r.yml", ""], ["inspect", "r.yml", "--out", ""]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2 and "the name is empty" in result.output
    result = CliRunner().invoke(mergekit_yaml, [str(file), ""])
    assert result.exit_code == 1 and "the output directory has no name" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["r.yml"]


def test_a_terminal_that_knows_ascii_only():
    result = run("mergekit-tspa", "methods", PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "core_" in result.stdout, result.stderr
