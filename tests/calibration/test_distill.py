"""Distillation on a tiny model."""

import pytest
import torch

from mergekit_tspa.calibration import distill as distillation
from mergekit_tspa.calibration.distill import distill, schedule, split_answers
from mergekit_tspa.calibration.score import score, single_answers
from mergekit_tspa.errors import InputError
from mergekit_tspa.updates import LoraFactors
from tests.calibration.conftest import random_texts, singles_of
from tests.conftest import base_tensors


@pytest.fixture
def setting(llama, adapters):
    """Adapters, what they say, and a poor merge: a tenth of the first one."""
    singles = singles_of(llama, adapters[:2])
    answers = single_answers(singles, random_texts(singles.names, count=24))
    return singles, answers, {t: f.scaled(0.1) for t, f in singles.factors["one"].items()}


def mean_divergence(singles, updates, answers) -> float:
    return sum(own.divergence for own in score(singles, updates, answers).values())


def test_distillation_lowers_the_divergence(setting, llama):
    singles, answers, start = setting
    copies = {tensor: LoraFactors(f.B.clone(), f.A.clone()) for tensor, f in start.items()}
    heard = []
    found = distill(
        singles, start, answers, steps=24, every=4, rate=1e-2, progress=lambda *a: heard.append(a)
    )
    assert found.end < 0.95 * found.start and 0 < found.steps <= 24
    # On texts that it was not trained on, and of the ranks that it started from.
    others = single_answers(singles, random_texts(singles.names, count=8, seed=1))
    assert mean_divergence(singles, found.updates, others) < mean_divergence(singles, start, others)
    assert {f.rank for f in found.updates.values()} == {4} and found.updates.keys() == start.keys()
    assert not any(t.requires_grad for f in found.updates.values() for t in f)
    # Neither the base nor what was given has changed.
    known = base_tensors(llama)
    assert all(torch.equal(tensor, known[name]) for name, tensor in singles.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in singles.model.parameters())
    assert all(torch.equal(f.B, copies[t].B) and torch.equal(f.A, copies[t].A) for t, f in start.items())
    stages, done, left = zip(*heard)
    assert stages[-1].startswith("distilling one, two, ") and done[-1] == 1
    assert left[-1] < left[0] == 1


def test_distillation_is_reproducible(setting):
    singles, answers, start = setting
    one, two, other = (distill(singles, start, answers, steps=4, every=2, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(f.B, two.updates[t].B) for t, f in one.updates.items())
    assert any(not torch.equal(f.B, other.updates[t].B) for t, f in one.updates.items())


def test_distillation_stops_early_and_keeps_the_best(setting):
    """With a rate that only does harm it ends after two measurements and returns the start."""
    singles, answers, start = setting
    heard = []
    found = distill(
        singles, start, answers, steps=20, every=1, rate=3.0, warm_up=0, progress=lambda *a: heard.append(a)
    )
    assert len(heard) == 2
    assert (found.steps, found.end) == (0, found.start)
    assert all(torch.equal(f.dense(), start[t].dense()) for t, f in found.updates.items())


def test_distillation_beside_a_base_in_bfloat16(llama, adapters):
    singles = singles_of(llama, adapters[:2], torch.bfloat16)
    answers = single_answers(singles, random_texts(singles.names, count=4))
    start = {t: f.scaled(0.5) for t, f in singles.factors["one"].items()}
    found = distill(singles, start, answers, steps=8, every=4, rate=1e-2)
    assert found.end < found.start
    assert all(f.B.dtype == torch.float32 for f in found.updates.values())
    assert all(p.dtype == torch.bfloat16 for p in singles.model.parameters())


def test_texts_are_held_out(setting):
    _, answers, _ = setting
    train, held = split_answers(answers, 0.25, 0)
    for name, own in answers.items():
        assert len(held[name]) == 6 and len(train[name]) == 18
        assert {id(a) for a in held[name]} | {id(a) for a in train[name]} == {id(a) for a in own}
    train, held = split_answers({"one": answers["one"][:2]}, 0.01, 0)
    assert len(held["one"]) == len(train["one"]) == 1
    with pytest.raises(InputError, match="one: distillation needs at least two"):
        split_answers({"one": answers["one"][:1]}, 0.1, 0)


def test_divergence_to_infinity_is_an_error(setting):
    singles, answers, start = setting
    with pytest.raises(InputError, match=r"diverges|NaN or infinite"):
        distill(singles, start, answers, steps=8, every=8, rate=1e30, warm_up=0)


def test_schedule():
    rates = [schedule(step, 40, 5) for step in range(1, 41)]
    assert rates[0] == pytest.approx(0.2) and rates.index(max(rates)) == 4
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.01
    assert schedule(1, 10, 0) == 1


def test_a_step_is_the_same_however_its_texts_are_grouped(setting, monkeypatch):
    """Texts of like lengths are read together; in one batch or one by one the gradient is the same."""
    singles, answers, start = setting
    groups = distillation.alike_in_length(
        [("one", a) for a in answers["one"]] + [("two", a) for a in answers["two"]]
    )
    for group in groups:
        lengths = [len(answer.example.tokens) for _, answer in group]
        assert min(lengths) >= distillation.ALIKE * max(lengths)
    assert sum(map(len, groups)) == 48 and len(groups) > 1
    found = []
    for alike in (0.0, 0.75, 2.0):
        monkeypatch.setattr(distillation, "ALIKE", alike)
        # One step of the optimiser turns gradients into signs, which rounding may turn around; several do not.
        found.append(distill(singles, start, answers, steps=8, every=8, rate=1e-2))
    for other in found[1:]:
        assert other.end == pytest.approx(found[0].end, rel=0.02)
        assert found[0].end < 0.999 * found[0].start
