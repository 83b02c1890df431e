"""The stock commands as subprocesses, and our own."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from mergekit_tspa.commands import method_table
from mergekit_tspa.commands.main import main
from tests.conftest import ROOT, merge, peft_merged, recipe, relative_error, run, write_recipe
from tests.plugin.test_merge import check, weighted_target


def test_mergekit_yaml(llama, adapters, tmp_path):
    """The stock command; nothing is left behind but its output."""
    home = tmp_path / "home"
    home.mkdir()
    file = write_recipe(tmp_path / "r.yml", recipe("lora_task_arithmetic", llama, adapters, [1.0, 0.5, 0.25]))
    before = {p: p.stat().st_mtime_ns for p in llama.parent.rglob("*")}
    result = run(
        "mergekit-yaml", file, tmp_path / "out", "--no-copy-tokenizer", HF_HOME=str(home), HOME=str(home)
    )
    assert result.returncode == 0, result.stderr
    check(load_file(tmp_path / "out/model.safetensors"), weighted_target(llama, adapters, [1.0, 0.5, 0.25]))
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"README.md", "config.json", "mergekit_config.yml", "model.safetensors"}
    assert before == {p: p.stat().st_mtime_ns for p in llama.parent.rglob("*")}
    assert not [p for p in home.rglob("*") if p.is_file() and p.stat().st_size > 10_000]
    card = (tmp_path / "out/README.md").read_text()
    assert "[Task arithmetic](https://arxiv.org/abs/2212.04089)" in card


def test_mergekit_multi(llama, adapters, tmp_path):
    """Two LoRA merges feed a third, which adds an adapter to the first and is averaged with the second."""
    ref = lambda base, a: {"model": {"path": str(base)}, "lora": {"path": str(a)}}  # noqa: E731
    first = recipe("lora_task_arithmetic", llama, adapters[:2], [1.0, 0.5], name="first")
    second = recipe("factor_linear", llama, [adapters[2]], name="second")
    third = {
        "name": "third",
        "merge_method": "lora_task_arithmetic",
        "base_model": "first",
        "models": [{"model": ref("first", adapters[2])}],
    }
    final = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("third", "second")],
    }
    file = write_recipe(tmp_path / "r.yml", [first, second, third, final])
    command = (
        "mergekit-multi",
        file,
        "-I",
        tmp_path / "parts",
        "--out-path",
        tmp_path / "out",
        "--no-copy-tokenizer",
    )
    result = run(*command)
    assert result.returncode == 0, result.stderr
    target = weighted_target(llama, adapters, [0.5, 0.25, 1.0])
    check(load_file(tmp_path / "out/model.safetensors"), target)


def test_stock_methods_are_untouched(llama, adapters, tmp_path):
    """A stock merge of `base+lora` writes the same bytes with the plugin and without it."""
    file = write_recipe(tmp_path / "r.yml", recipe("task_arithmetic", llama, adapters[:2], [1.0, 0.5]))
    hashes = []
    for autoload in "10":
        out = tmp_path / f"out{autoload}"
        options = ("--lora-merge-cache", tmp_path / f"cache{autoload}", "--no-copy-tokenizer")
        result = run("mergekit-yaml", file, out, *options, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
        assert result.returncode == 0, result.stderr
        assert len(list((tmp_path / f"cache{autoload}").iterdir())) == 2
        hashes.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]


def test_bad_input_of_the_stock_command(llama, adapters, tmp_path):
    """One sentence on the terminal, exit code 1, no output directory, no traceback."""
    adapter = shutil.copytree(adapters[0], tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    file = write_recipe(tmp_path / "r.yml", recipe("tspa_lora", llama, [adapter]))
    result = run("mergekit-yaml", file, tmp_path / "out")
    assert result.returncode == 1
    assert "Error: " in result.stderr and "DoRA" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_fallback_command_without_the_entry_point(llama, adapters, tmp_path):
    """With torch's autoload off the stock command lacks the method; `mergekit-tspa yaml` still has it."""
    file = write_recipe(tmp_path / "r.yml", recipe("lora_task_arithmetic", llama, adapters[:1]))
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    stock = run("mergekit-yaml", file, tmp_path / "stock", "--no-copy-tokenizer", **off)
    assert stock.returncode != 0 and "Need to specify cache dir to merge adapters" in stock.stderr
    result = run("mergekit-tspa", "yaml", file, tmp_path / "out", "--no-copy-tokenizer", **off)
    assert result.returncode == 0, result.stderr
    want = peft_merged(llama, adapters[0])
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert relative_error(tensor, want[name]) < 1e-6


def test_misspelt_method(llama, adapters, tmp_path):
    result = merge(recipe("core_tvs", llama, adapters), tmp_path / "out")
    assert result.exit_code == 1 and "do you mean core_tsv?" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["adapter", "check", "inspect"])
def test_help_explains_only_what_matters(command):
    """Every option of mergekit is still accepted; those without effect stand together below."""
    text = CliRunner().invoke(main, [command, "--help"], env={"COLUMNS": "80"}).output
    explained, others = text.split("Accepted as by mergekit-yaml, without effect here:")
    options = set(re.findall(r"^  (?:-j, |-v, )?(--[a-z-]+|-v)", explained, re.M))
    assert "--trust-remote-code" in options and not options & {
        "--clone-tensors",
        "--write-threads",
        "--copy-tokenizer",
    }
    assert ("--out-shard-size" in options) == (command == "check") != ("--out-shard-size" in others)
    assert ("--device" in options) == (command != "check")
    every = [option for parameter in main.get_command(None, command).params for option in parameter.opts[:1]]
    assert all(option in text for option in every if option.startswith("-")) and len(every) > 24


def test_own_commands():
    help_text = run("mergekit-tspa", "--help").stdout
    for command in ("yaml", "multi", "adapter", "batch", "check", "inspect", "methods", "emr-task"):
        assert command in help_text
    table = run("mergekit-tspa", "methods", COLUMNS="250").stdout
    from mergekit_tspa import METHODS
    from mergekit_tspa.methods.table import sections

    for section in sections():
        for row in section.rows:
            assert re.search(rf"{row[0].strip('`')}\b", table)
    for name, method in METHODS.items():
        described = CliRunner().invoke(main, ["methods", name])
        assert described.exit_code == 0
        for parameter in method.parameter_fields():
            assert re.search(rf"\b{parameter} ", described.output)
    unknown = CliRunner().invoke(main, ["methods", "core_tvs"])
    assert unknown.exit_code == 1 and "core_tsv" in unknown.output


@pytest.mark.parametrize("command", ["yaml", "check", "adapter", "batch", "inspect"])
@pytest.mark.parametrize(
    "option, value, said",
    [
        ("--out-shard-size", "1.5K", "'1.5K' is no number of parameters; write 500000, 500K"),
        ("--out-shard-size", "", "'' is no number of parameters"),
        ("--num-threads", "0", "0 is not in the range 1<=x"),
        ("--num-threads", "1000000", "1000000 is not in the range"),
        ("--random-seed", "-1", "-1 is not in the range 0<=x"),
        ("--random-seed", str(2**32), "is not in the range"),
    ],
)
def test_values_of_options(command, option, value, said, llama, adapters, tmp_path):
    file = write_recipe(tmp_path / "r.yml", recipe("core_tsv", llama, adapters))
    out = {"yaml": [tmp_path / "out"], "adapter": [tmp_path / "out"], "inspect": ["--out", tmp_path / "out"]}
    out["batch"] = out["inspect"]
    arguments = [command, tmp_path if command == "batch" else file, *out.get(command, []), option, value]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "1000"})
    assert result.exit_code == 2 and said in result.output and not (tmp_path / "out").exists()


def test_what_the_system_refuses(tmp_path):
    """In one sentence, where mergekit's own command shows a traceback."""
    name = "a" * 300
    for arguments in (["yaml", "none.yml", "out"], ["adapter", name, "out"], ["inspect", "a", "--out", name]):
        result = CliRunner().invoke(main, arguments, env={"COLUMNS": "1000"})
        assert isinstance(result.exception, SystemExit)
        assert re.search("Error: .*(No such file|File name too long|does not exist)", result.output)


def test_a_terminal_of_no_width():
    assert "core_" in CliRunner().invoke(main, ["methods"], env={"COLUMNS": "0"}).output


def test_kept_table():
    """After a change of the method table: `python -m mergekit_tspa.commands.method_table`."""
    assert method_table.kept() == method_table.made()


def test_light_commands_import_no_library():
    """The table and the help take no second."""
    code = (
        "import sys; from mergekit_tspa.commands.main import main\n"
        "main(['methods'], standalone_mode=False); main(['--help'], standalone_mode=False)\n"
        "heavy = {'mergekit', 'peft', 'pydantic', 'torch', 'transformers'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "core_" in result.stdout


def test_a_report_needs_its_extra(adapters, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("page", "pictures"):
        monkeypatch.delitem(sys.modules, f"mergekit_tspa.insight.{name}", raising=False)
    result = CliRunner().invoke(main, ["inspect", str(adapters[0]), "--out", str(tmp_path / "report")])
    assert result.exit_code == 1
    assert "matplotlib" in result.output
    assert "pip install 'mergekit-tspa[report]'" in result.output
    assert not (tmp_path / "report").exists()


def test_every_method_is_in_the_table_and_the_docs_have_it():
    """To renew the table of docs/methods.md: `make tables`."""
    from mergekit_tspa import METHODS
    from mergekit_tspa.methods.table import markdown, sections

    own, rules, spaces = sections()
    names = {row[0].strip("`") for row in own.rows}
    for rule in rules.rows:
        for space in spaces.rows:
            if rule[2] == "all" or space[0] != "`factor_`":
                names.add(space[0].strip("`") + rule[0].strip("`").removeprefix("_"))
    assert names == METHODS.keys()
    assert markdown() in (ROOT / "docs/methods.md").read_text()


@pytest.mark.parametrize("file", sorted((ROOT / "yaml_examples").glob("*.yml")), ids=lambda p: p.stem)
def test_example_recipes_are_valid(file):
    """mergekit reads each document, and ours pass the check of parameters; test_real_model runs them."""
    import yaml
    from mergekit.config import MergeConfiguration

    from mergekit_tspa import METHODS
    from mergekit_tspa.plugin.merge_method import AdapterMergeMethod
    from mergekit_tspa.plugin.recipe import check_parameters

    for document in yaml.safe_load_all(file.read_text()):
        document.pop("name", None)
        config = MergeConfiguration.model_validate(document)
        if method := METHODS.get(config.merge_method):
            spec = AdapterMergeMethod(method).spec
            assert not list(check_parameters(config, spec, method.unknown_parameter))
