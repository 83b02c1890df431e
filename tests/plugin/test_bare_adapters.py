"""Inputs that are adapters without their base, and adapters of the hub."""

import json
import shutil

import pytest
from click.testing import CliRunner

from mergekit_tspa.commands.main import main
from tests.conftest import merge, merged_tensors, recipe, save_adapter, save_llama
from tests.plugin.test_merge import check, weighted_target


def bare(*adapters, **top):
    models = [{"model": {"model": {"path": str(adapter)}}} for adapter in adapters]
    return {"merge_method": "lora_task_arithmetic", "models": models} | top


def edit_base(adapter, base):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    return adapter


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(adapters, tmp_path):
    """A cache of the hub with one adapter, `user/lora`, at two revisions."""
    repository = tmp_path / "hub/models--user--lora"
    for revision, adapter, commit in (("main", adapters[0], "a" * 40), ("v2", adapters[1], "b" * 40)):
        shutil.copytree(adapter, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return tmp_path / "hub"


def test_base_of_the_recipe(llama, adapters, tmp_path):
    moved = edit_base(shutil.copytree(adapters[1], tmp_path / "moved"), "/nowhere")
    for name, config in {
        "base_model": bare(adapters[0], moved, base_model=str(llama)),
        "one input has it": recipe("lora_task_arithmetic", llama, adapters[:1]) | {"base_model": str(llama)},
    }.items():
        config["models"] = config["models"][:1] + bare(moved)["models"]
        got = merged_tensors(config, tmp_path / name)
        check(got, weighted_target(llama, adapters[:2], [1, 1]))


def test_base_of_the_adapters(llama, adapters, tmp_path):
    check(merged_tensors(bare(*adapters[:2]), tmp_path / "out"), weighted_target(llama, adapters[:2], [1, 1]))


def test_base_that_is_not_there(llama, adapters, tmp_path):
    for named in ("/nowhere", "user/nothing", None):
        moved = edit_base(shutil.copytree(adapters[0], tmp_path / "moved", dirs_exist_ok=True), named)
        result = merge(bare(moved), tmp_path / "out")
        assert result.exit_code == 1
        assert f"names the base model {named!r}, which is neither" in result.output
        assert "name the base as base_model" in result.output and not (tmp_path / "out").exists()


def test_bases_that_differ(llama, adapters, tmp_path):
    other = save_llama(tmp_path / "other", seed=1)
    result = merge(bare(adapters[0], save_adapter(other, tmp_path / "a")), tmp_path / "out")
    assert result.exit_code == 1 and "name one as base_model" in result.output


def test_slices_of_bare_adapters(llama, adapters, tmp_path):
    source = {"model": str(adapters[0]), "layer_range": [0, 2]}
    config = {"merge_method": "lora_task_arithmetic", "slices": [{"sources": [source]}]}
    check(merged_tensors(config, tmp_path / "out"), weighted_target(llama, adapters[:1], [1]))


@pytest.mark.parametrize("written", ["{base}+user/lora", "user/lora"])
def test_hub(written, llama, adapters, hub, tmp_path):
    """From the cache, offline; `@` names a revision."""
    for revision, adapter in (("", adapters[0]), ("@v2", adapters[1])):
        models = [{"model": written.format(base=llama) + revision}]
        config = {"merge_method": "lora_task_arithmetic", "models": models}
        got = merged_tensors(config, tmp_path / f"out{revision}", "--transformers-cache", str(hub))
        check(got, weighted_target(llama, [adapter], [1]))


def test_hub_without_the_repository(llama, hub, tmp_path):
    for model, message in (
        (f"{llama}+user/other", "not to be had from the hub"),
        ("user/other", "has no adapter"),
    ):
        config = {"merge_method": "lora_task_arithmetic", "models": [{"model": model}]}
        result = merge(config, tmp_path / "out", "--transformers-cache", str(hub))
        assert result.exit_code == 1 and message in result.output, result.output
        assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_asked_once(llama, monkeypatch, tmp_path):
    """transformers and mergekit ask again and again, and wait between."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    one = {"merge_method": "lora_task_arithmetic", "base_model": str(llama), "models": [{"model": "no/such"}]}
    other = {
        "merge_method": "lora_task_arithmetic",
        "base_model": "no/such",
        "models": [{"model": str(llama)}],
    }
    for config in (one, other):
        for method in ("lora_task_arithmetic", "aligned_mean"):
            result = merge(config | {"merge_method": method}, tmp_path / "out")
            assert result.exit_code == 1 and "Error: no/such: there is n" in result.output, result.output
    for arguments in (["no/such", "--to", str(llama)], [str(llama), "--to", "no/such"]):
        result = CliRunner().invoke(main, ["align", *arguments])
        assert result.exit_code == 1 and "Error: no/such: there is no such model directory" in result.output
