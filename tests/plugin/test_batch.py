"""`mergekit-tspa batch`: what each recipe's own command would write, failures beside it, and going on."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mergekit_tspa.commands.main import main
from mergekit_tspa.plugin import batch
from tests.conftest import load_model, recipe, write_recipe
from tests.kills import adapter_complete, contents


@pytest.fixture
def recipes(llama, adapters, tmp_path, monkeypatch):
    """Three recipes whose paths begin in the current directory; that of `broken` names no adapter."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "base")
    for adapter in adapters:
        shutil.copytree(adapter, adapter.name)
    folder = tmp_path / "recipes"
    folder.mkdir()
    write_recipe(folder / "alike.yml", recipe("core_tsv", "base", ["one", "two"]))
    write_recipe(folder / "broken.yaml", recipe("core_tsv", "base", ["one", "none"]))
    write_recipe(
        folder / "random.yml", recipe("lora_dare_ties", "base", ["one", "three"], parameters={"rank": 4})
    )
    (folder / "notes.txt").write_text("mine")
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(main, ["batch", *map(str, arguments)])
    assert result.exit_code == code and isinstance(result.exception, SystemExit | None), result.output
    return result


def record(out):
    return {row["name"]: row for row in json.loads((Path(out) / "batch.json").read_text())}


def alone(recipes, name, out, command="adapter"):
    """What the command for one recipe writes."""
    result = CliRunner().invoke(main, [command, str(recipes / f"{name}.yml"), str(out), "--quiet"])
    assert result.exit_code == 0, result.output
    return contents(Path(out))


def check(recipes, out):
    rows = record(out)
    assert {name: (row["result"], row["error"]) for name, row in rows.items()} == {
        "alike": ("adapter", None),
        "broken": ("adapter", "none: there is no such adapter directory"),
        "random": ("adapter", None),
    }
    assert all(row["seconds"] > 0 for row in rows.values())
    for name in ("alike", "random"):
        assert contents(Path(out, name)) == alone(recipes, name, f"alone/{name}"), name
    assert {path.name for path in Path(out).iterdir()} == {"batch.json", "alike", "random"}


def test_adapters(recipes):
    """One recipe fails; the others give the bytes of their own commands."""
    result = run("recipes", "--out", "out", "--quiet", code=1)
    assert "none: there is no such adapter" in " ".join(result.stdout.split()) and "alike" in result.stdout
    check(recipes, "out")


@pytest.mark.slow
def test_on_ray(recipes):
    """The same on a cluster, whose machine was started elsewhere."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.chdir("/")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    os.chdir(recipes.parent)
    try:
        result = run("recipes", "--out", "out", "--ray", cluster.address, code=1)
    finally:
        cluster.shutdown()
    assert "alike: warning: two: it says that it was trained on" in result.stderr
    check(recipes, "out")


def test_models(recipes, llama):
    """As mergekit-yaml writes them, also by methods of mergekit."""
    (recipes / "broken.yaml").unlink()
    write_recipe(recipes / "stock.yml", {"merge_method": "passthrough", "models": [{"model": str(llama)}]})
    run("recipes", "--out", "out", "--models", "--no-copy-tokenizer", "--quiet")
    assert {row["result"] for row in record("out").values()} == {"model"}
    for name in ("alike", "random"):
        want = alone(recipes, name, f"alone/{name}", "yaml")
        assert contents(Path("out", name)) == want, name
    base, stock = (load_model(Path(path)).state_dict() for path in (llama, "out/stock"))
    assert all(torch.equal(base[name], stock[name]) for name in base)
    result = run("recipes", "--out", "out", "--quiet", code=1)
    assert result.output == "Error: out: takes models, of an earlier batch; name another directory\n"


def test_it_goes_on(recipes, monkeypatch):
    """What is complete stays, what failed or changed or was lost is merged."""
    run("recipes", "--out", "out", "--quiet", code=1)
    before = {name: os.stat(f"out/{name}/adapter_config.json").st_mtime_ns for name in ("alike", "random")}
    changed = lambda: {  # noqa: E731
        name for name, was in before.items() if os.stat(f"out/{name}/adapter_config.json").st_mtime_ns != was
    }
    result = run("recipes", "--out", "out", code=1)
    assert "alike: adapter, complete from before" in result.stderr and not changed()
    write_recipe(recipes / "broken.yaml", recipe("core_tsv", "base", ["one", "three"]))
    run("recipes", "--out", "out", "--quiet")
    assert adapter_complete(Path("out/broken")) and not changed()
    write_recipe(recipes / "alike.yml", recipe("core_tsv", "base", ["one", "two"], [0.5, 1.0]))
    Path("out/random/adapter_config.json").unlink()
    run("recipes", "--out", "out", "--quiet")
    assert changed() == {"alike", "random"}
    assert contents(Path("out/alike")) == alone(recipes, "alike", "alone")
    monkeypatch.setattr(batch, "open_pool", None)
    run("recipes", "--out", "out", "--ray")


def test_a_kill(recipes):
    """Between two recipes' results; the first is not merged again."""
    merged = batch.merge_to_adapter

    def stop(file, options, out):
        if out.name == "random":
            os.kill(os.getpid(), signal.SIGKILL)
        merged(file, options, out)

    child = os.fork()
    if not child:
        try:
            batch.merge_to_adapter = stop
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            main(["batch", "recipes", "--out", "out", "--quiet"])
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert record("out").keys() == {"alike", "broken"}
    result = run("recipes", "--out", "out", code=1)
    assert "alike: adapter, complete from before" in result.stderr and "random: adapter in" in result.stderr
    check(recipes, "out")


def test_a_ray_option_without_an_address(recipes, monkeypatch):
    asked = []

    def open_pool(*functions, **options):
        asked.append(options)
        return here(*functions)

    here = batch.open_pool
    monkeypatch.setattr(batch, "open_pool", open_pool)
    (recipes / "broken.yaml").unlink()
    for i, ray in enumerate([[], ["--ray"], ["--ray", "auto", "-j", "3"], ["--ray=h:1", "--cuda"]]):
        CliRunner().invoke(main, ["batch", "recipes", "--out", f"out{i}", "--quiet", *ray])
    assert [(o["ray"], o["cpus"], o["gpus"]) for o in asked] == [
        (None, 1, 0),
        ("", 1, 0),
        ("auto", 3, 0),
        ("h:1", 1, 1),
    ]


def test_what_is_refused(recipes):
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other/batch.json").write_text('{"mine": 1}')
    refused = lambda *arguments: run(*arguments, code=1).output  # noqa: E731
    assert "empty: holds no recipe" in refused("empty", "--out", "out")
    assert "other/batch.json: was not written by this command" in refused("recipes", "--out", "other")
    shutil.copy(recipes / "alike.yml", recipes / "alike.yaml")
    assert "alike.yaml and alike.yml would have one output" in refused("recipes", "--out", "out")
    assert not Path("out").exists()
    run("none", "--out", "out", code=2)
    run("recipes", code=2)


def test_an_adapter_where_a_model_would_be_written(recipes):
    shutil.copytree("one", "out/alike")
    before = contents(Path("out/alike"))
    run("recipes", "--out", "out", "--models", "--quiet", code=1)
    assert "holds an adapter" in record("out")["alike"]["error"] and contents(Path("out/alike")) == before
