"""A mergekit that lacks a name, or has it in another form, is named in one sentence; its own merges go on."""

import ast
import dataclasses
import importlib.metadata
import inspect
import json
import re
import shutil
import subprocess
import sys
from enum import Enum
from pathlib import Path

import mergekit
import pytest
from click.testing import CliRunner

from mergekit_tspa.commands.main import main
from mergekit_tspa.errors import InputError
from mergekit_tspa.plugin import compat
from tests.conftest import ROOT, run, save_llama, write_recipe
from tests.plugin import damage

ALL = [*compat.NEEDED, *compat.STOCK_COMMANDS.values()]
PLACES = [pytest.param(needed, id=f"{needed.module}.{needed.name}") for needed in ALL]
FUNCTIONS = [param for param in PLACES if param.values[0].takes is not None]
ATTRIBUTES = [
    pytest.param(needed, attribute, id=f"{needed.module}.{needed.name}.{attribute}")
    for needed in ALL
    for attribute in needed.has.split()
]


def full(needed: compat.Needed) -> str:
    return f"{needed.module}.{needed.name}"


def said(needed: compat.Needed, name: str) -> bool:
    """Whether `name` is missing, and the sentence says it, the version that is there, and those tested."""
    missing = needed.missing()
    if not missing:
        return False
    sentence = compat.sentence(missing)
    version = importlib.metadata.version("mergekit")
    assert re.match(
        rf"mergekit {re.escape(version)} does not fit: \S+ is missing or has another signature", sentence
    )
    assert "tested with 0.1.5" in sentence and "mergekit's own methods are not affected" in sentence
    return name in missing


def test_this_mergekit_fits():
    assert importlib.metadata.version("mergekit") in compat.TESTED
    assert not [name for needed in ALL for name in needed.missing()]
    assert compat.look_everywhere()
    compat.require()


def test_names_are_typed():
    """What type checkers read is what is imported at run time, and what is looked at."""
    (block,) = (
        node
        for node in ast.parse(Path(compat.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    typed = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    exported = {name: needed.module for name, needed in compat.EXPORTS.items()}
    assert typed == exported
    for name in exported:
        assert getattr(compat, name) is compat.EXPORTS[name].find()
    with pytest.raises(AttributeError):
        compat.NoSuchName  # noqa: B018


@pytest.mark.parametrize("needed", PLACES)
def test_a_missing_name(needed, monkeypatch):
    owners, name = damage.owners(needed)
    for owner in owners:
        monkeypatch.delattr(owner, name)
    assert said(needed, full(needed))
    if needed is compat.EXPORTS.get(needed.name):
        with pytest.raises(InputError, match=f"{full(needed)} is missing"):
            getattr(compat, needed.name)


@pytest.mark.parametrize("needed", FUNCTIONS)
def test_another_signature(needed, monkeypatch):
    """A parameter that is given is gone, or a new one must be given."""
    old = list(inspect.signature(damage.function(needed)).parameters.values())
    more = inspect.Parameter("another", inspect.Parameter.KEYWORD_ONLY)
    kept = [parameter for parameter in old if parameter.kind != parameter.VAR_KEYWORD]
    changes = [[*kept, more]]
    if needed.takes:
        changes.append([parameter for parameter in old if parameter.name != needed.takes.split()[-1]])
    for parameters in changes:
        monkeypatch.setattr(
            damage.function(needed), "__signature__", inspect.Signature(parameters), raising=False
        )
        assert said(needed, full(needed))


@pytest.mark.parametrize("needed, attribute", ATTRIBUTES)
def test_a_missing_attribute(needed, attribute, monkeypatch):
    kind = needed.find()
    if issubclass(kind, Enum):
        monkeypatch.setattr(
            compat, "dir", lambda value: [name for name in dir(value) if name != attribute], raising=False
        )
    for base in kind.__mro__:
        if attribute in inspect.get_annotations(base):
            monkeypatch.delitem(base.__annotations__, attribute)
        if attribute in vars(base) and not issubclass(kind, Enum):
            monkeypatch.delattr(base, attribute)
    assert said(needed, f"{full(needed)}.{attribute}")


@pytest.mark.parametrize("needed", [p for p in PLACES if p.values[0].calls or p.values[0].test])
def test_another_body(needed, monkeypatch):
    """A function that does not pass by our hooks any more, or a constant of another form."""
    (owner, *_), name = damage.owners(needed)
    if needed.calls:
        same = ", ".join(needed.takes.split())
        monkeypatch.setattr(owner, name, eval(f"lambda {'self, ' if '.' in needed.name else ''}{same}: None"))
    else:
        monkeypatch.setattr(owner, name, "another")
    assert said(needed, full(needed))


def test_own_commands_say_it_and_stop(monkeypatch):
    monkeypatch.setattr(compat, "_missing", ["mergekit.plan.MergePlanner._plan"])
    result = CliRunner().invoke(main, ["check", "recipe.yml"])
    assert result.exit_code == 1
    assert result.output == f"Error: {compat.sentence()}\n"
    monkeypatch.setattr(compat, "_missing", ["mergekit.a", "mergekit.b", "mergekit.c"])
    assert "mergekit.a is missing or has another signature (and 2 more);" in compat.sentence()
    monkeypatch.delattr("mergekit.scripts.run_yaml.main")
    result = CliRunner().invoke(main, ["yaml", "recipe.yml", "out"])
    assert result.exit_code == 1
    assert "mergekit.scripts.run_yaml.main is missing" in result.output


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_llama(folder / str(seed), seed=seed, num_hidden_layers=1) for seed in (0, 1)]


def test_each_name_broken_in_turn(models, tmp_path):
    """The hooks stay out, say so once, and a stock merge writes the same bytes; in one process per name."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.plugin.damage", *map(str, models), str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = dict(map(json.loads, run.stdout.splitlines()))
    stock, whole = found.pop("stock"), found.pop("whole")
    assert stock["merged"] and stock == {"merged": stock["merged"], "said": [], "ours": False}
    assert whole == {"merged": stock["merged"], "said": [], "ours": True}
    assert found.keys() == {full(needed) for needed in damage.BREAKABLE}
    for name, outcome in found.items():
        (sentence,) = outcome["said"]
        assert re.search(rf"does not fit: {re.escape(name)}(\.\w+)? is missing", sentence), sentence
        assert outcome["merged"] == stock["merged"], name
        assert not outcome["ours"], name


def test_another_mergekit(models, tmp_path):
    """A mergekit that works and has renamed what a hook needs, under the stock command.

    Our methods are registered already when `mergekit.plan` turns out to be another one.
    """
    other = tmp_path / "other"
    shutil.copytree(
        Path(mergekit.__file__).parent, other / "mergekit", ignore=shutil.ignore_patterns("__pycache__")
    )
    for file in (other / "mergekit").rglob("*.py"):
        text = file.read_text()
        if "_plan(" in text:
            file.write_text(re.sub(r"\b_plan\(", "_plan_all(", text))
    information = other / "mergekit-0.1.9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mergekit\nVersion: 0.1.9\n")
    stock = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in models],
    }
    file = write_recipe(tmp_path / "r.yml", stock)
    written = []
    for autoload in "01":
        out = tmp_path / autoload / "out"
        environment = {
            "PYTHONPATH": f"{other}:{ROOT}",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload,
        }
        result = run("mergekit-yaml", file, out, "--no-copy-tokenizer", "--quiet", **environment)
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stderr.splitlines() if "does not fit" in line]
        assert len(lines) == int(autoload)
        if lines:
            assert (
                lines[0].startswith("mergekit 0.1.9 does not fit: ")
                and "MergePlanner._plan is missing" in lines[0]
            )
        files = {file.name: file.read_bytes() for file in out.iterdir()}
        files["README.md"] = sorted(files["README.md"].splitlines())  # mergekit's card lists a set
        written.append(files)
    assert written[0] == written[1]


def test_seen_at_the_first_use(monkeypatch, caplog):
    """In a program that does not import `mergekit.merge`: our methods leave when one of them is asked for."""
    from mergekit_tspa import METHODS
    from mergekit_tspa.plugin import hooks
    from mergekit_tspa.plugin.merge_method import AdapterMergeMethod

    name = "core_tsv_once_more"
    method = AdapterMergeMethod(dataclasses.replace(METHODS["core_tsv"], name=name))
    monkeypatch.setattr(hooks, "METHODS", {name: method.method})
    monkeypatch.setattr(hooks, "_registered", [method])
    monkeypatch.setattr(hooks, "_said", False)
    compat.register(method)
    assert hooks._ours(name)
    monkeypatch.setattr(compat, "_unseen", {compat.PLAN: None})
    monkeypatch.setattr(compat, "_missing", [])
    monkeypatch.delattr("mergekit.plan.MergePlanner._plan")
    assert not hooks._ours(name)
    assert not hooks._ours(name)
    assert name not in {known.spec.name for known in compat.registered_methods()}
    hooks._refuse_unknown(name[:-1])
    assert caplog.messages == [compat.sentence(["mergekit.plan.MergePlanner._plan"])]
