"""A search on Ray: a machine that is lost, shared parameters, and the command on this machine alone."""

import json
import os
import pickle
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mergekit_tspa import tune
from mergekit_tspa.calibration.load import load_model
from mergekit_tspa.calibration.readings import TextSource
from mergekit_tspa.commands.main import main
from mergekit_tspa.plugin.compat import MergeOptions
from mergekit_tspa.plugin.tune_recipe import _merge_of
from mergekit_tspa.tuning import searches
from mergekit_tspa.tuning.searches import Bench, _sum_of, run_job
from mergekit_tspa.tuning.workbench import Job, Spec
from tests.conftest import recipe, write_recipe
from tests.plugin.test_score_recipes import judged


@pytest.fixture
def cluster():
    """Two machines with one core each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    ray.shutdown()
    # By default it takes 15 s until the loss of a machine counts.
    checks = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": checks}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def told_job(folder: Path, bench, job):
    """A trial that says where it begins and ends; on the machine that is to be lost the third does not end."""
    import ray

    if job is None:
        return None
    node = ray.get_runtime_context().get_node_id()
    name = f"{time.time_ns()}-{os.getpid()}"
    (folder / f"{name}.begun").write_text(node)
    if (
        node == (folder / "second").read_text()
        and sum(f.read_text() == node for f in folder.glob("*.over")) == 2
    ):
        time.sleep(60)
    seen = run_job(bench, job)
    (folder / f"{name}.over").write_text(node)
    return seen


@pytest.mark.slow
def test_a_machine_that_is_lost_in_the_middle(cluster, few_methods, speaking, prompts, tmp_path, monkeypatch):
    """Its trial runs again on the other machine, and the search ends with what it would have found."""
    base, adapters, _ = speaking
    second = cluster.add_node(num_cpus=1)
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (jobs / "second").write_text(second.node_id)
    monkeypatch.setattr(searches, "run_job", partial(told_job, jobs))
    lost = threading.Event()

    def on_second(what):
        return sum(file.read_text() == second.node_id for file in jobs.glob(f"*.{what}"))

    def lose():
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if on_second("begun") == 3:
                cluster.remove_node(second, allow_graceful=False)
                lost.set()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=lose)
    thread.start()
    found = tune(
        base,
        adapters,
        prompts,
        minutes=0.12,
        storage=tmp_path / "trials",
        ray=cluster.address,
    )
    thread.join()
    assert lost.is_set(), "no trial ran on the second machine"
    assert (on_second("begun"), on_second("over")) == (3, 2)
    assert not found.left_out and not found.untried, (found.left_out, found.untried)
    assert not [one.error for one in found.tried if one.error]
    numbers = [one.number for one in found.tried]
    assert numbers == [*range(len(numbers))], "a trial is lost"
    assert {one.stage for one in found.tried} == {"screen", "search"}
    assert found.finalists and found.best.method in {one.spec.method for one in found.tried}
    assert found.finalists[0].kept.tasks


def test_workers_share_the_parameters_and_leave_them_as_they_are(speaking, prompts, tmp_path):
    """Also tied ones: a merge that replaces whole tensors writes to none of the base's."""
    base, adapters, texts = speaking
    given = load_model(base)
    shared = {name: parameter.detach() for name, parameter in given.named_parameters()}
    before = {name: tensor.clone() for name, tensor in shared.items()}
    sources = {str(adapter): TextSource(str(file)) for adapter, file in zip(adapters, texts)}
    examples = searches.Readings(
        searches.ModelTensors.of(str(base), searches.Checkpoint(base)),
        base,
        searches.text_sources(_sum_of(adapters, str(base)).adapters, prompts, None),
    ).written
    bench = Bench(partial(_sum_of, adapters, str(base)), base, sources, texts=examples)
    bench = pickle.loads(pickle.dumps(bench))
    opened = bench.open(shared)
    model = opened.judge.singles.model
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == shared[name].data_ptr(), f"{name} is a copy"
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    alone = bench.open()
    numbers = {str(adapter): range(3) for adapter in adapters}
    for spec in (Spec("lora_ties"), Spec("core_tsv"), Spec("regmean"), Spec("distill", {"steps": 2})):
        seen = opened.run(Job(spec, numbers))
        assert seen.losses == alone.run(Job(spec, numbers)).losses, spec.method
    assert all(torch.equal(shared[name], tensor) for name, tensor in before.items())


def test_what_a_recipe_makes_can_be_sent(speaking, prompts, tmp_path, monkeypatch):
    base, adapters, _ = speaking
    file = write_recipe(
        tmp_path / "recipe.yml", judged(recipe("lora_ties", base, adapters), "held_out", prompts)
    )
    bench = Bench(partial(_merge_of, file, MergeOptions(random_seed=3)), base, {})
    sent = pickle.loads(pickle.dumps(bench))
    assert [adapter.name for adapter in sent.merge().adapters] == [str(adapter) for adapter in adapters]


@pytest.mark.slow
def test_the_command_on_this_machine(few_methods, speaking, prompts, tmp_path):
    ray = pytest.importorskip("ray")
    ray.shutdown()
    base, adapters, _ = speaking
    config = write_recipe(
        tmp_path / "recipe.yml", judged(recipe("lora_ties", base, adapters), "held_out", prompts)
    )
    out = tmp_path / "best.yml"
    arguments = ["tune", str(config), "--out", str(out), "--minutes", "0.06", "--quiet", "--ray"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert not ray.is_initialized()
    found = json.loads((tmp_path / "best-report/tune.json").read_text())
    assert not found["left_out"] and len(found["finalists"]) >= 2 and out.exists()
