"""A trial where it is run: what a slow merge may take, and what it may not."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from mergekit_tspa import InputError
from mergekit_tspa.calibration import readings
from mergekit_tspa.calibration.moments import input_statistics
from mergekit_tspa.calibration.readings import Readings, TextSource
from mergekit_tspa.calibration.score import single_answers
from mergekit_tspa.methods import METHODS
from mergekit_tspa.scoring.scores import judge_of
from mergekit_tspa.tuning.searches import Bench, _sum_of
from mergekit_tspa.tuning.workbench import Job, Spec, with_rank
from tests.calibration.conftest import tiny_tokenizer
from tests.conftest import load_model


@pytest.fixture(scope="module")
def bench(speaking):
    """With texts that methods may look at, which judge as well here."""
    base, adapters, texts = speaking
    merge = partial(_sum_of, adapters, str(base))
    plan, model = merge(), load_model(base)
    sources = {adapter: TextSource(file) for adapter, file in zip(plan.adapters, texts)}
    given = Readings(plan_base(base), base, sources, model=model, tokenizer=tiny_tokenizer())
    named = {adapter.name: source for adapter, source in sources.items()}
    return Bench(merge, base, named, device="cpu").on(model, "cpu", judge_of(given))


def plan_base(base):
    from mergekit_tspa.base.checkpoint import Checkpoint
    from mergekit_tspa.base.tensors import ModelTensors

    return ModelTensors.of(str(base), Checkpoint(base))


def test_a_slow_merge_is_given_up_and_reading_texts_is_not(bench):
    """What was read serves all later trials, so a machine that reads slowly must not lose every such method."""
    numbers = {task: [0, 1] for task in bench.judge.texts}
    with pytest.raises(InputError, match="it takes longer than 0 s"):
        bench.run(Job(Spec("wudi"), numbers, 0.0))
    for method in ("regmean", "regmean_plus"):
        assert bench.run(Job(Spec(method), numbers, 0.0)).rank == 3
    assert bench.run(Job(Spec("distill", {"steps": 2, "start": "regmean_plus"}), numbers)).rank == 3


def test_a_rank_that_a_method_stays_below_anyway_is_no_parameter_of_it(bench):
    """`--rank 4` with adapters of rank 3: what keeps their rank takes part, the others are cut."""
    numbers = {task: [0] for task in bench.judge.texts}
    larger = replace(bench, rank=4)
    for spec, rank in (
        (Spec("tspa_lora", {"lora_steps": 3}), 3),
        (Spec("regmean"), 4),
        (Spec("core_tsv"), 4),
        (Spec("ctm_tsv"), 4),
    ):
        assert larger.run(Job(spec, numbers)).rank == rank, spec
        given = with_rank(larger.merge, METHODS[spec.method], spec.parameters, 4)
        assert given.get("rank") == (4 if rank == 4 else None)
    assert with_rank(larger.merge, METHODS["tspa_lora"], {}, 3) == {"rank": 3}
    assert with_rank(larger.merge, METHODS["core_tsv"], {}, None) == {}


def test_distillation_hears_single_adapters_once(bench, monkeypatch):
    """Its start's statistics come from the pass that asks what they say, and are those of a pass of their own."""
    own = bench.readings
    fresh = Readings(own.base, own.directory, own.sources, model=own.model, tokenizer=own.tokenizer)
    monkeypatch.setattr(fresh.singles, "read", None)  # the pass that only takes statistics
    fresh.study()
    for name, said in fresh.answers(1).items():
        assert [one.example for one in said] == fresh.written[name][:1]
    apart = input_statistics(own.singles, own.written)
    assert apart.keys() == fresh.statistics.keys()
    for name, tensors in apart.items():
        assert tensors.keys() == fresh.statistics[name].keys()
        for tensor, one in tensors.items():
            assert fresh.statistics[name][tensor].tokens == one.tokens
            torch.testing.assert_close(fresh.statistics[name][tensor].dense(), one.dense())


def test_single_adapters_are_heard_once_for_all_trials(bench, monkeypatch):
    heard = []

    def counted(singles, texts, **rest):
        heard.append(texts)
        return single_answers(singles, texts, **rest)

    monkeypatch.setattr(readings, "single_answers", counted)
    bench.readings._said.clear()
    numbers = {task: [0, 1] for task in bench.judge.texts}
    for parameters in ({}, {"ridge": 0.2}):
        bench.run(Job(Spec("regmean", parameters), numbers))
    assert len(heard) == 1
