"""TSPA recipes through mergekit: the same numbers as the Python entry, whatever executor, slices and filters."""

import contextlib
import logging
import queue
import time
from types import SimpleNamespace

import pytest
import torch

from mergekit_tspa import merge_adapters
from mergekit_tspa.progress import Bar
from tests.conftest import base_tensors, merge, merged_tensors, recipe, relative_error, save_adapter

STEPS = {"attention_steps": 15, "lora_steps": 30}
METHODS = {
    "tspa": STEPS,
    "tspa_attention": {"attention_steps": 15},
    "tspa_lora": {"lora_steps": 30},
    "tspa_pairwise": {"attention_steps": 5},
}


@pytest.fixture(scope="module")
def three(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    targets = (["q_proj", "v_proj", "up_proj"], ["q_proj", "k_proj"], ["v_proj", "o_proj", "up_proj"])
    return [
        save_adapter(llama, folder / str(i), seed=i, r=r, target_modules=t)
        for i, (r, t) in enumerate(zip((4, 2, 3), targets))
    ]


def expected(llama, updates):
    return {
        name: updates[module].apply_to(W) if (module := name.removesuffix(".weight")) in updates else W
        for name, W in base_tensors(llama).items()
        if name != "lm_head.weight"
    }


def check(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) < tolerance, name


@pytest.mark.parametrize("method", METHODS)
def test_recipe_and_python_entry_agree(method, llama, three, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = recipe(method, llama, three, [1.0, 0.5, 0.8], parameters=METHODS[method])
    got = merged_tensors(config, tmp_path / "out")
    updates = merge_adapters(method, three, [1.0, 0.5, 0.8], base=llama, **METHODS[method])
    check(got, expected(llama, updates))
    logged = [record.message for record in caplog.records if record.name.startswith("mergekit_tspa")]
    assert sum("objective" in message and "orthogonality" in message for message in logged) == len(
        updates.reports
    )


def test_small_chunks_give_the_same(llama, three, tmp_path, monkeypatch):
    from mergekit_tspa.plugin import planning as plan

    whole = merged_tensors(recipe("tspa", llama, three, parameters=STEPS), tmp_path / "whole")
    monkeypatch.setattr(plan, "CPU_BYTES", 1)
    check(merged_tensors(recipe("tspa", llama, three, parameters=STEPS), tmp_path / "parts"), whole)


def test_base_weights_are_not_held_while_solving(llama, three, tmp_path, monkeypatch):
    """All solving comes before the first base tensor that is written."""
    from mergekit.io.tasks import LoadTensor

    from mergekit_tspa.plugin.tasks import LoadSide, MergeChunk

    order = []
    for task in (LoadSide, MergeChunk, LoadTensor):
        original = task.execute
        monkeypatch.setattr(
            task,
            "execute",
            lambda self, *a, _f=original, **k: order.append(type(self).__name__) or _f(self, *a, **k),
        )
    merged_tensors(recipe("tspa", llama, three, parameters=STEPS), tmp_path / "out")
    solved = len(order) - order[::-1].index("MergeChunk")
    # the reads before are those that LoadSide itself does, one per side whose partner has LoRA
    assert order[:solved].count("LoadTensor") <= order[:solved].count("LoadSide")
    assert "LoadSide" not in order[solved:]


def test_stages_switched_off_by_a_filter(llama, three, tmp_path):
    """`attention_steps: 0` for one layer leaves that layer to stage 2 alone."""
    config = recipe("tspa", llama, three)
    config["parameters"] = {
        "attention_steps": [{"filter": "layers.0.", "value": 0}, {"value": 15}],
        "lora_steps": [{"filter": "v_proj", "value": 0}, {"value": 30}],
    }
    got = merged_tensors(config, tmp_path / "out")
    both = expected(llama, merge_adapters("tspa", three, base=llama, **STEPS))
    lora = expected(llama, merge_adapters("tspa_lora", three, lora_steps=30))
    attention = expected(llama, merge_adapters("tspa_attention", three, base=llama, attention_steps=15))
    for name in got:
        if "layers.0." in name and "v_proj" not in name:
            assert relative_error(got[name], lora[name]) < 1e-5, name
        elif "layers.1." in name:
            assert relative_error(got[name], (attention if "v_proj" in name else both)[name]) < 1e-5, name


def test_slices_and_gradients(llama, three, tmp_path):
    """Layers 0, 1, 1 with weights along a gradient; the repeated layer is aligned in both places."""
    ref = recipe("x", llama, three)["models"]
    source = lambda layers, weights: [  # noqa: E731
        {"model": ref[i]["model"], "layer_range": layers, "parameters": {"weight": w}}
        for i, w in enumerate(weights)
    ]
    config = {
        "merge_method": "tspa",
        "base_model": str(llama),
        "parameters": STEPS,
        "slices": [{"sources": source([0, 2], [[1, 0.5], 1, 1])}, {"sources": source([1, 2], [1, 1, 1])}],
    }
    got = merged_tensors(config, tmp_path / "out", "--clone-tensors")
    even = expected(llama, merge_adapters("tspa", three, base=llama, **STEPS))
    half = expected(llama, merge_adapters("tspa", three, [0.5, 1, 1], base=llama, **STEPS))
    for name, tensor in got.items():
        if "layers.0." in name:
            want = even[name]
        elif "layers.1." in name:
            want = half[name]
        else:
            want = even[name.replace("layers.2.", "layers.1.")]
        assert relative_error(tensor, want) < 1e-5, name


@pytest.mark.parametrize("inner", ["models", "slices"])
def test_modules(inner, llama, three, tmp_path):
    """`modules:` with its own list of models, or of slices that lack the base."""
    config = recipe("tspa", llama, three, parameters=STEPS)
    models = config.pop("models")
    if inner == "slices":
        models = [{"sources": [model | {"layer_range": [0, 2]} for model in models]}]
    config["modules"] = {"default": {inner: models}}
    check(
        merged_tensors(config, tmp_path / "out"),
        expected(llama, merge_adapters("tspa", three, base=llama, **STEPS)),
    )


class SlowQueue(queue.Queue):
    def get(self, *args, **kwargs):
        time.sleep(0.005)
        return super().get(*args, **kwargs)


@pytest.mark.parametrize("options", [[], ["--low-cpu-memory", "--read-to-gpu"]], ids=" ".join)
def test_several_devices(options, llama, three, tmp_path, monkeypatch):
    """mergekit's multi-GPU executor with two CPU devices and real threads; islands stay independent."""
    from mergekit import common, multigpu_executor

    fakes = {
        "get_torch_accelerator_type": lambda name=None: "cpu",
        "get_torch_accelerator_count": lambda name=None: 2,
        "get_torch_accelerator_module": lambda name=None: SimpleNamespace(synchronize=lambda device: None),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(common, name, fake)
        monkeypatch.setattr(multigpu_executor, name, fake)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    # The thread that collects results lags behind the devices, as it does on a busy machine.
    monkeypatch.setattr(multigpu_executor.queue, "Queue", SlowQueue)
    used = set()
    from mergekit_tspa.plugin import tasks

    device_of = tasks.device_of
    monkeypatch.setattr(tasks, "device_of", lambda device: used.add(device_of(device)) or device_of(device))
    got = merged_tensors(
        recipe("tspa", llama, three, parameters=STEPS), tmp_path / "out", "--multi-gpu", *options
    )
    check(got, expected(llama, merge_adapters("tspa", three, base=llama, **STEPS)))
    assert used == {torch.device("cpu:0"), torch.device("cpu:1")}


@pytest.mark.parametrize("method, parameters", [("tspa", STEPS), ("knots_ties", {"scope": "model"})])
def test_the_device_of_a_thread_is_for_computing_alone(
    method, parameters, llama, three, tmp_path, monkeypatch
):
    """A thread of the multi-GPU executor makes on its GPU what names no device; here that has no values."""
    from mergekit_tspa.plugin import tasks

    def elsewhere(execute):
        def executed(*args, **arguments):
            with torch.device("meta"):
                return execute(*args, **arguments)

        return executed

    for task in (tasks.LoadSide, tasks.SurveyModel, tasks.MergeChunk, tasks.ApplyUpdates):
        monkeypatch.setattr(task, "execute", elsewhere(task.execute))
    monkeypatch.setattr(tasks, "device_of", lambda device: torch.device("cpu"))
    got = merged_tensors(recipe(method, llama, three, parameters=parameters), tmp_path / "out")
    check(got, expected(llama, merge_adapters(method, three, base=llama, **parameters)))


def test_several_devices_need_an_accelerator(llama, three, tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    result = merge(recipe("tspa", llama, three), tmp_path / "out", "--multi-gpu")
    assert result.exit_code == 1 and "no accelerator" in result.output


def test_a_solver_that_fails_leaves_no_files(llama, tmp_path):
    adapter = save_adapter(llama, tmp_path / "a", lora_alpha=1e38, target_modules=["q_proj"])
    result = merge(
        recipe("tspa", llama, [adapter, save_adapter(llama, tmp_path / "b", seed=5)]), tmp_path / "out"
    )
    assert result.exit_code == 1
    assert "not finite" in result.output and "self_attn" in result.output
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_quiet(llama, three, tmp_path):
    config = recipe("tspa", llama, three, parameters=STEPS)
    assert "alignment" not in merge(config, tmp_path / "quiet").output


def test_progress_says_what_is_solved_and_how_far(llama, three):
    """Through the entry that the commands share; the bar shows the same."""
    said = []
    merge_adapters("tspa", three, base=llama, progress=lambda *what: said.append(what), **STEPS)
    stages = list(dict.fromkeys(stage for stage, *_ in said))
    assert stages == ["query-key alignment", "value-output alignment", "LoRA alignment"]
    for stage in stages:
        done, left = zip(*(numbers for name, *numbers in said if name == stage))
        assert done[0] == 0 and done[-1] == 1  # in between again, as tensors of other ranks are another batch
        # Batches of tensors that one adapter touches have nothing to gain: they stay at 1, but for rounding.
        assert left[0] == pytest.approx(1) and min(left) < 0.9
        assert all(0 < part <= 1 + 1e-6 for part in left)
    with Bar(quiet=False) as bar:
        bar.update("LoRA alignment", 0.5, 0.25)
        assert "LoRA alignment:  50%" in str(bar.bar) and "0.25 of the objective left" in str(bar.bar)
