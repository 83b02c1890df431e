"""The search without a model: losses are a formula of the method and its parameters."""

import math
import pickle
from collections import deque
from types import SimpleNamespace

import pytest

from mergekit_tspa import InputError
from mergekit_tspa.jobs.pool import OUT_OF_MEMORY, attempt
from mergekit_tspa.methods import METHODS
from mergekit_tspa.scoring.judge import GENERAL
from mergekit_tspa.scoring.losses import TextLoss
from mergekit_tspa.tuning import tuner as tuning
from mergekit_tspa.tuning.problem import Problem, split_texts
from mergekit_tspa.tuning.study import FINISH, SCREEN, SEARCH, Study
from mergekit_tspa.tuning.tune_report import as_json, sentences
from mergekit_tspa.tuning.tuner import NOT_FINITE, PROMISING, Clock, Tuner
from mergekit_tspa.tuning.workbench import Seen, Spec
from tests.calibration.conftest import random_texts

TASKS = ("math", "code")
# What each retains of math and of code at its defaults; a lambda other than 1 retains less.
SHARES = {
    "core_tsv": (0.9, 0.3),
    "lora_ties": (0.55, 0.55),
    "actmat": (0.5, 0.5),
    "lora_mean": (0.4, 0.4),
    "ctm_iso": (0.3, 0.3),
    "lora_task_arithmetic": (0.2, 0.2),
    "knots_ties": (0.1, 0.1),
    "core_ties": (0.05, 0.05),
    "regmean": (0.7, 0.7),
    "distill": (0.95, 0.95),
}


def shares(spec: Spec) -> tuple[float, ...]:
    off = abs(math.log(spec.parameters.get("lambda", 1.0)))
    return tuple(share - 0.1 * off for share in SHARES[spec.method])


class FakePool:
    """Does the jobs as a formula says, and sends everything through pickle, as another machine would."""

    def __init__(self, texts, work, capacity=1):
        self.texts, self.work, self.capacity = texts, work, capacity
        self.jobs, self.done = deque(), []

    def submit(self, key, job):
        assert len(self.jobs) < self.capacity, "more than can run"
        self.jobs.append(pickle.loads(pickle.dumps((key, job))))

    def wait(self):
        key, job = self.jobs.pop()  # not in the order in which they came
        self.done.append(job)
        return pickle.loads(pickle.dumps(attempt(self._do, lambda: None, key, job)))

    def _do(self, _state, job):
        found = {task: self.work(job.spec, task) for task in job.texts}
        return Seen({task: [TextLoss(found[task], 1) for _ in own] for task, own in job.texts.items()}, 4)


class FakeClock(Clock):
    """On which every job takes a second."""

    def __init__(self, pool, seconds, before):
        super().__init__(seconds / 60)
        self.pool, self.before = pool, before

    @property
    def spent(self) -> float:
        return self.before + len(self.pool.done)


def loss(spec: Spec, task: str) -> float:
    """The base has 2 and a single adapter 1; of general texts the base has 1."""
    if task == GENERAL:
        return 1.0 + sum(SHARES[spec.method]) * spec.parameters.get("lambda", 1.0)
    return 2.0 - shares(spec)[TASKS.index(task)]


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)  # most of the time
    monkeypatch.setattr(tuning, "METHODS", {name: METHODS[name] for name in SHARES})
    monkeypatch.setattr(tuning, "POOR", 0.0)  # no method is tried again with a shorter update
    monkeypatch.setattr(tuning, "KNOWN", ())  # nor with settings that are known


class Search:
    """A search of some jobs; `run` may be called again."""

    pace = 1e-7  # seconds a token

    def __init__(
        self, tmp_path, problem=None, work=loss, seconds=60, examples=False, capacity=1, general=False
    ):
        self.file, self.problem, self.work = tmp_path / "trials", problem or Problem(), work
        self.seconds, self.examples, self.capacity = seconds, examples, capacity
        texts = random_texts(TASKS, 30) | ({GENERAL: random_texts("g", 12)["g"]} if general else {})
        self.split = split_texts(texts, 18)
        every = self.split.texts

        def known(value):
            return {task: [TextLoss(value, 1) for _ in own] for task, own in every.items()}

        single = known(1.0)
        single.pop(GENERAL, None)
        self.judge = SimpleNamespace(
            texts={task: every[task] for task in TASKS},
            every=every,
            base=SimpleNamespace(losses=known(2.0) | ({GENERAL: known(1.0)[GENERAL]} if general else {})),
            single=SimpleNamespace(losses=single),
        )

    def run(self, start="core_tsv"):
        study = Study(self.file, self.problem, "own")
        self.pool = FakePool(self.split.texts, self.work, self.capacity)
        clock = FakeClock(self.pool, self.seconds, study.seconds)
        tuner = Tuner(
            study,
            self.pool,
            self.judge,
            self.split,
            self.problem,
            Spec(start),
            self.examples,
            clock,
            pace=self.pace,
        )
        return tuner.run()


def test_known_settings_come_first_and_the_search_starts_from_them(tmp_path, monkeypatch):
    known = Spec("lora_ties", {"lambda": 2.0, "pico": True}), Spec("core_iso", {"lambda": 3.0})
    monkeypatch.setattr(tuning, "KNOWN", known)  # the second is none of the methods

    def work(spec, task):
        return loss(spec._replace(parameters={}), task) - 0.2 * bool(spec.parameters.get("pico"))

    found = Search(tmp_path, work=work).run("lora_mean")
    first, second, *others = (one.spec for one in found.tried if one.stage == SCREEN)
    assert (first.method, second) == ("lora_mean", known[0])
    assert Spec("lora_ties") in others, "and its defaults as well"
    searched = [one.spec for one in found.tried if one.stage == SEARCH and one.spec.method == "lora_ties"]
    assert searched[0].parameters["lambda"] == 2 and searched[0].parameters["pico"]


@pytest.mark.parametrize("capacity", [1, 3])
def test_every_method_once_and_then_the_promising_ones(tmp_path, capacity):
    search = Search(tmp_path, capacity=capacity)
    found = search.run()
    screened = [one.spec.method for one in found.tried if one.stage == SCREEN]
    assert sorted(screened) == sorted({*SHARES} - {"regmean", "distill"}), "no examples"
    searched = {one.spec.method for one in found.tried if one.stage == SEARCH}
    ranked = ["core_tsv", "lora_ties", "actmat", "lora_mean", "ctm_iso", "lora_task_arithmetic"]
    assert searched == {*ranked} and len(ranked) == PROMISING
    assert found.best.method == "core_tsv" and not found.left_out and not found.untried
    assert len({one.tried.spec.method for one in found.finalists}) == len(found.finalists) == 3
    numbers = [one.number for one in found.tried]
    assert numbers == [*range(len(numbers))] and len(numbers) > 30


def test_poor_methods_are_tried_again_with_a_shorter_update(tmp_path, monkeypatch):
    """For which a rule that is far too long at its defaults is the best of all."""
    monkeypatch.setattr(tuning, "POOR", 0.5)

    def work(spec, task):
        if spec.method == "lora_task_arithmetic":
            return 2.0 - (0.95 if 0.2 < spec.parameters.get("lambda", 1.0) < 0.6 else -0.5)
        return loss(spec, task)

    found = Search(tmp_path, work=work).run()
    screened = [one.spec for one in found.tried if one.stage == SCREEN]
    shorter = {spec.method for spec in screened if spec.parameters == {"lambda": 0.4}}
    assert shorter >= {"lora_task_arithmetic", "knots_ties", "core_ties"} and "core_tsv" not in shorter
    assert len(screened) == 8 + len(shorter) and found.best.method == "lora_task_arithmetic"


def test_of_one_rule_two_methods_go_on(tmp_path):
    better = {"knots_ties": (0.9, 0.9), "core_ties": (0.8, 0.8), "lora_ties": (0.7, 0.7)}
    work = lambda spec, task: 2.0 - (SHARES | better)[spec.method][TASKS.index(task)]  # noqa: E731
    found = Search(tmp_path, work=work).run()
    searched = {one.spec.method for one in found.tried if one.stage == SEARCH}
    assert {"knots_ties", "core_ties", "actmat"} <= searched and "lora_ties" not in searched


def test_bad_trials_read_few_texts_and_unseen_ones_judge(tmp_path):
    search = Search(tmp_path)
    found = search.run()
    rounds, unseen = search.split.rounds, search.split.unseen
    assert len(rounds) == 3
    trials = [one for one in found.tried if one.stage == SEARCH]
    for one in trials:
        assert {task: len(own) for task, own in one.losses.items()} == {
            task: len(own) for task, own in rounds[one.round].items()
        }
    stopped = [one.value for one in trials if one.round == 0]
    far = [one.value for one in trials if one.round == 2]
    assert len(stopped) > len(far) > 0 and max(far) > max(stopped) and sum(stopped) / len(stopped) < min(far)
    judging = [job for job in search.pool.done if job.texts == unseen]
    assert [job.spec for job in judging] == [one.tried.spec for one in found.finalists]
    assert search.pool.done[-len(judging) :] == judging
    assert all(job.texts in [*rounds, unseen] for job in search.pool.done)
    for one in found.finalists:
        assert {task: len(own) for task, own in one.losses.items()} == {
            t: len(own) for t, own in unseen.items()
        }


def test_the_goal_decides(tmp_path):
    (tmp_path / "worst").mkdir()
    assert Search(tmp_path).run().best.method == "core_tsv"
    found = Search(tmp_path / "worst", Problem("worst")).run()
    assert found.best.method == "lora_ties" and found.goal == "worst"
    assert found.finalists[0].tried.value == pytest.approx(0.55, abs=0.02)


def test_what_does_too_much_harm_is_never_chosen(tmp_path):
    """Even if everything does at its defaults: with a smaller lambda some does not."""
    for limit in (2.05, 1.09):
        folder = tmp_path / str(limit)
        folder.mkdir()
        found = Search(folder, Problem(general_limit=limit), general=True, seconds=90).run()
        for one in found.finalists:
            assert one.tried.feasible and loss(one.tried.spec, GENERAL) <= limit
        assert any(not one.feasible and one.value > found.finalists[0].tried.value for one in found.tried)
        assert as_json(found)["finalists"][0]["within_limits"]
    assert not any(one.feasible for one in found.tried if one.stage == SCREEN)
    with pytest.raises(
        InputError, match=r"the lowest loss on general texts is .*, and 0.5 is the limit, with 1 of"
    ):
        Search(tmp_path, Problem(general_limit=0.5), general=True).run()


def test_jobs_that_fail_are_left_out_and_told(tmp_path):
    def work(spec, task):
        if spec.method == "lora_ties":
            raise InputError("it is too large; take a smaller one")
        if spec.method == "actmat":
            raise MemoryError
        if spec.method == "lora_mean":
            return math.nan
        if spec.method == "core_tsv" and spec.weights:
            return math.inf
        return loss(spec, task)

    found = Search(tmp_path, work=work).run()
    assert found.left_out == {
        "lora_ties": "it is too large; take a smaller one",
        "actmat": OUT_OF_MEMORY,
        "lora_mean": NOT_FINITE,
    }
    assert found.best.method == "core_tsv" and not found.best.weights
    failed = [one for one in found.tried if one.stage == SEARCH and one.error == NOT_FINITE]
    assert 0 < len(failed) < 15, "and the search learns to avoid them"
    assert any("Left out were " in said and "lora_ties (it is too large" in said for said in sentences(found))
    with pytest.raises(InputError, match="no merge was found: core_tsv: broken; actmat: broken"):

        def broken(spec, task):
            raise InputError("broken")

        Search(tmp_path / "none", work=broken).run()


def test_time_that_is_over_ends_it_and_more_time_goes_on(tmp_path):
    search = Search(tmp_path, seconds=6)
    first = search.run("lora_ties")
    screened = [one.spec.method for one in first.tried if one.stage == SCREEN]
    assert len(screened) == 3 and len(search.pool.done) <= 6 + 3
    assert {*screened, *first.untried} == {*SHARES} - {"regmean", "distill"} and first.finalists
    assert any("There was no time for" in said for said in sentences(first))
    search.seconds, search.work = 80, lambda spec, task: loss(spec, task) - 0.5 * (spec.method == "ctm_iso")
    second = search.run("lora_ties")
    assert not second.untried and len(search.pool.done) <= 80 - 6 + 3
    assert [one.spec for one in second.tried[: len(first.tried)]] == [one.spec for one in first.tried]
    screened = [one.spec.method for one in second.tried if one.stage == SCREEN]
    assert len(screened) == len({*screened}) == 8
    assert second.best.method == "ctm_iso", "methods that were screened later are searched too"
    for seconds in (6, 80):
        search.seconds = seconds
        assert search.run("lora_ties").best == second.best
        assert len(search.pool.done) == 3, "without time it only judges"
    least = Search(tmp_path / "none", seconds=1e-3).run("lora_ties")
    assert [one.spec.method for one in least.tried] == ["lora_ties"], "without time the first merge is tried"


def test_with_examples_methods_read_and_one_is_trained(tmp_path):
    found = Search(tmp_path, examples=True, seconds=90).run()
    assert "regmean" in {one.spec.method for one in found.tried if one.stage == SCREEN}
    (finish,) = [one for one in found.tried if one.stage == FINISH]
    spec = Spec("distill", {"steps": tuning.MOST_STEPS, "texts_per_step": 1})
    assert finish.spec == spec and found.best == finish.spec
    assert finish.round == 2


def test_time_that_no_training_fits_into_is_searched_in(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning.Tuner, "_paced", lambda self, job, seconds: None)
    search = Search(tmp_path, examples=True, seconds=90)
    search.pace = 1.0
    found = search.run()
    assert found.untried == ["distill"] and not any(one.stage == FINISH for one in found.tried)
    assert len(search.pool.done) >= (1 - tuning.LAST) * 90


@pytest.mark.parametrize("at, finalists", [(3, 2), (20, 3)])
def test_ctrl_c(tmp_path, at, finalists):
    """In the screen and in the search the best so far is the result."""

    def work(spec, task):
        if len(search.pool.done) == at and task == "code":
            raise KeyboardInterrupt
        return loss(spec, task)

    search = Search(tmp_path, work=work, seconds=1000)
    found = search.run()
    assert len(search.pool.done) == at + finalists == at + len(found.finalists)
    assert found.best.method == "core_tsv"
    assert len({*found.untried}) == (6 if at < 8 else 0)
    search.seconds = 40
    again = search.run()
    assert [one.spec for one in again.tried[: len(found.tried)]] == [one.spec for one in found.tried]


def test_ctrl_c_in_the_last_judging(tmp_path):
    """What is judged by then is the result."""
    judged = []

    def work(spec, task):
        if search.pool.done[-1].texts == search.split.unseen and task == "math":
            judged.append(spec)
            if len(judged) == 2:
                raise KeyboardInterrupt
        return loss(spec, task)

    search = Search(tmp_path, work=work)
    found = search.run()
    assert [one.tried.spec for one in found.finalists] == judged[:1] and len(sentences(found)) >= 3


def test_ctrl_c_before_anything_is_known(tmp_path):
    def work(spec, task):
        raise KeyboardInterrupt

    with pytest.raises(InputError, match="interrupted before its first trial was over"):
        Search(tmp_path, work=work).run()
    search = Search(tmp_path / "later")

    def late(spec, task):
        if len(search.pool.done[-1].texts[task]) == len(search.split.unseen[task]):
            raise KeyboardInterrupt
        return loss(spec, task)

    search.work = late
    with pytest.raises(InputError, match=r"its trials are in .*, and the same call goes on"):
        search.run()
    search.work = loss
    assert search.run().best.method == "core_tsv"
