"""Full disks, directories that cannot be written, inputs that change: one sentence, and nothing that looks whole."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as run_yaml
from safetensors.torch import load_file, save_file

from mergekit_tspa import InputError, merge_adapters
from mergekit_tspa.commands.merge_adapter import main as run_adapter
from mergekit_tspa.plugin.output import held
from tests.conftest import load_model, merge, recipe, write_recipe
from tests.kills import Task, adapter_complete, fork, model_complete


def refused(result, *words):
    assert result.exit_code == 1 and result.output.startswith("Error: "), result.output
    assert result.output.count("\n") == 1 and all(word in result.output for word in words), result.output


@pytest.mark.parametrize("size", [100, 10_000, 100_000])
@pytest.mark.parametrize("command, complete", [(run_yaml, model_complete), (run_adapter, adapter_complete)])
def test_files_that_cannot_grow(command, complete, size, llama, adapters, tmp_path):
    """As on a full disk: by the limit of a process on the size of its files."""
    file = write_recipe(tmp_path / "recipe.yml", recipe("core_tsv", llama, adapters))
    task = Task(
        command, [str(file), str(tmp_path / "out"), "--no-copy-tokenizer"], tmp_path / "out", complete
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    _, status = os.waitpid(fork(task, limit), 0)
    if status == 0:
        assert complete(task.out)
    else:
        kind = (tmp_path / "out.error").read_text().partition(": ")[0]
        assert kind in ("PrintedError", "ClickException")
        assert not task.out.exists() or not complete(task.out)


@pytest.mark.parametrize("command", [run_yaml, run_adapter])
def test_directories_that_cannot_be_written(command, llama, adapters, tmp_path):
    file = write_recipe(tmp_path / "recipe.yml", recipe("core_tsv", llama, adapters))
    for out in (file / "out", "/proc/out"):
        refused(CliRunner().invoke(command, [str(file), str(out), "--quiet"]), str(out), "the merge stopped")


@pytest.mark.parametrize(
    "first, second",
    [([], ["--out-shard-size", "20K"]), (["--out-shard-size", "20K"], []), ([], ["--no-safe-serialization"])],
    ids=["whole, then shards", "shards, then whole", "safetensors, then pickles"],
)
def test_a_second_merge_replaces_the_weights_of_the_first(first, second, llama, adapters, tmp_path):
    """transformers would load `model.safetensors` of the first merge, whatever the second has written."""
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    assert merge(recipe("core_tsv", llama, adapters[1:]), out, *first).exit_code == 0
    (out / "model_notes.bin").write_text("mine")
    config = recipe("core_tsv", llama, adapters[:2])
    assert merge(config, out, *second).exit_code == merge(config, fresh, *second).exit_code == 0
    assert {f.name for f in out.iterdir()} == {f.name for f in fresh.iterdir()} | {"model_notes.bin"}
    got, want = (load_model(path).state_dict() for path in (out, fresh))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_file_is_no_directory(llama, adapters, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(merge(recipe("core_tsv", llama, adapters), tmp_path / "out"), "it is a file; name a directory")


def test_one_merge_at_a_time(llama, adapters, tmp_path):
    config = recipe("core_tsv", llama, adapters)
    with held(tmp_path / "out"):
        refused(merge(config, tmp_path / "out"), "another merge is writing there")
    assert not (tmp_path / "out").exists()
    assert merge(config, tmp_path / "out").exit_code == 0
    assert merge(config, tmp_path / "out").exit_code == 0


def test_inputs_are_no_outputs(llama, adapters, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    before = sorted(base.iterdir())
    refused(merge(recipe("core_tsv", base, adapters), base), "is an input of this merge")
    adapter = shutil.copytree(adapters[0], tmp_path / "adapter")
    file = write_recipe(tmp_path / "recipe.yml", recipe("core_tsv", llama, [adapter, adapters[1]]))
    refused(
        CliRunner().invoke(run_adapter, [str(file), str(adapter), "--quiet"]), "is an input of this merge"
    )
    assert sorted(base.iterdir()) == before and adapter_complete(adapter)


def test_a_merge_that_fails_leaves_no_config_of_an_earlier_one(llama, adapters, tmp_path, monkeypatch):
    from mergekit.io.tensor_writer import TensorWriter

    config = recipe("core_tsv", llama, adapters)
    assert merge(config, tmp_path / "out").exit_code == 0 and (tmp_path / "out/config.json").exists()

    def full(*_, **_shard):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, "_write_shard_task", full)
    refused(merge(config, tmp_path / "out"), "No space left on device", "not complete")
    assert not (tmp_path / "out/config.json").exists()


def test_merged_tensor_beyond_the_dtype(llama, adapters, tmp_path):
    config = recipe("core_tsv", llama, adapters[:1], parameters={"lambda": 1e6}, dtype="float16")
    refused(merge(config, tmp_path / "out"), "too large for torch.float16")
    assert not (tmp_path / "out/config.json").exists()


METHODS = ("tspa_lora", "core_tsv", "ctm_ties", "lora_ties", "lora_pcb", "knots_emr")
VALUES = {
    "zero": (lambda t: 0 * t, {}),
    "denormal": (lambda t: t * 1e-42, {}),
    "1e-30": (lambda t: t * 1e-30, {}),
    "1e30": (lambda t: t * 1e30, {}),
    "float64 beyond float32": (lambda t: t.double() * 1e200, {}),
    "alpha 1e30": (lambda t: t, {"lora_alpha": 1e30}),
    "alpha 1e-30": (lambda t: t, {"lora_alpha": 1e-30}),
    "alpha 1e300": (lambda t: t, {"lora_alpha": 1e300}),
    "alpha 0": (lambda t: t, {"lora_alpha": 0}),
    "rank 1": (lambda t: t[:1] if len(t) == 4 else t[:, :1], {"r": 1}),
    "rank above the matrix": (lambda t: torch.cat([t] * 9, dim=0 if len(t) == 4 else 1), {"r": 36}),
    "NaN": (lambda t: t / 0 * 0, {}),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("method", METHODS)
def test_values(method, value, adapters, tmp_path):
    """Finite, or refused in a sentence; beside an ordinary adapter and beside one of its kind."""
    of, changes = VALUES[value]
    odd = shutil.copytree(adapters[0], tmp_path / "odd")
    tensors = {
        name: of(tensor).contiguous() for name, tensor in load_file(odd / "adapter_model.safetensors").items()
    }
    save_file(tensors, odd / "adapter_model.safetensors")
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(config | changes))
    for beside in (adapters[0], shutil.copytree(odd, tmp_path / "twin")):
        try:
            merged = merge_adapters(method, [odd, beside])
        except InputError:
            assert value in ("1e30", "float64 beyond float32", "alpha 1e30", "alpha 1e300", "NaN")
        else:
            assert all(update.dense().isfinite().all() for update in merged.values())


def test_a_config_that_is_cut_while_it_is_written(llama, adapters, tmp_path, monkeypatch):
    """mergekit-multi takes a stage whose `config.json` is there for finished."""
    from transformers import PretrainedConfig

    def cut(self, file, **kwargs):
        Path(file).write_text("{")
        raise OSError("no space left")

    monkeypatch.setattr(PretrainedConfig, "to_json_file", cut)
    result = merge(recipe("core_tsv", llama, adapters), tmp_path / "out")
    assert result.exit_code == 1 and "no space left" in result.output
    assert (tmp_path / "out/model.safetensors").exists() and not (tmp_path / "out/config.json").exists()
