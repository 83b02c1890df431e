"""The search: every method at its defaults on few texts, then the promising ones on more, and the best on
texts that it never saw.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mergekit_tspa.errors import InputError
from mergekit_tspa.jobs.pool import Outcome, Pool
from mergekit_tspa.methods import METHODS
from mergekit_tspa.methods.inputs import Progress, silent
from mergekit_tspa.methods.method import Method
from mergekit_tspa.scoring.judge import GENERAL, Judge
from mergekit_tspa.scoring.losses import Interval, Losses, Retained, difference, mean_loss, retained
from mergekit_tspa.tuning.problem import Problem, Split, only
from mergekit_tspa.tuning.search_space import defaults, draw
from mergekit_tspa.tuning.study import FINISH, SCREEN, SEARCH, Study, Tried
from mergekit_tspa.tuning.workbench import Job, Seen, Spec

LOG = logging.getLogger(__name__)

PROMISING = 6  # methods that the search is about
ALIKE = 2  # of them, with the same rule
KNOWN = (  # what keeps most on four sets of adapters together (benchmarks/results/one_setting.md)
    Spec("core_tsv", {"lambda": 2.0, "pico": True, "svc": True}),
    Spec("core_iso", {"lambda": 3.0, "pico": True}),
)
SCREENING = 0.45  # of the time, at most, for all methods at their defaults
TRAINING = 0.7  # of the time for distillation, where there are examples
LAST = 0.08  # of the time, for the texts that the search never sees
FINALISTS = 3
POOR = 0.5  # of the best so far: a method that is worse at its defaults is tried again with a shorter update
SHORTER = 0.4  # of the default lambda; the sum of several updates is often too long
DRAWS = 200  # of the bootstrap that only ranks
PATIENCE, LEAST_PATIENCE = 0.05, 5.0  # a merge may take this share of the time, and these seconds in any case
NOT_FINITE = "its losses are not finite"
# Of a distillation with one text of each adapter a step, the more of which fit (benchmarks/results/tune.md).
FEWEST_STEPS, MOST_STEPS = 12, 192
PASSES_A_STEP = 3.2  # over a text that a step of distillation costs: forward, backward, its share of tests
STEPS_BEFORE = 15  # that its start is worth: what the single adapters say, the regression, its length


class Finalist(NamedTuple):
    """A merge, and what it retains on texts that the search never saw."""

    tried: Tried
    losses: Losses
    kept: Retained


@dataclass
class Tuned:
    """What a search found."""

    finalists: list[Finalist]  # the best first, by the texts of the search
    tried: list[Tried]
    base: Losses  # on the unseen texts
    single: Losses
    left_out: dict[str, str] = field(default_factory=dict)  # methods that were refused, and why
    untried: list[str] = field(default_factory=list)  # methods for which there was no time
    goal: str = "mean"

    @property
    def best(self) -> Spec:
        """The merge that was found."""
        return self.finalists[0].tried.spec

    def lead(self) -> Interval | None:
        """By how much the best leads the second best, on the unseen texts."""
        if len(self.finalists) < 2:
            return None
        one, two = (finalist.losses for finalist in self.finalists[:2])
        return difference(self.base, self.single, one, two, worst=self.goal == "worst")


class Clock:
    """The time of a search, that of its earlier runs included."""

    def __init__(self, minutes: float, before: float = 0.0):
        self.limit, self.before, self.start = 60 * minutes, before, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds."""
        return self.before + time.monotonic() - self.start

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the time is over."""
        return share * self.limit - self.spent


class Tuner:
    """
    Args:
        study: of the trials
        pool: that runs them
        judge: of the base and the single adapters, which it reads once
        split: of the judge's texts
        problem: what is searched for
        start: the merge that the search begins with
        examples: whether there are texts that methods may look at
        clock: of the whole search, earlier runs included
        progress: hears of it
        pace: seconds a token, as far as it is known before the first trial
    """

    def __init__(
        self,
        study: Study,
        pool: Pool,
        judge: Judge,
        split: Split,
        problem: Problem,
        start: Spec,
        examples: bool,
        clock: "Clock",
        progress: Progress = silent,
        pace: float | None = None,
    ):
        self.study, self.pool, self.judge, self.split, self.problem = study, pool, judge, split, problem
        self.start, self.examples, self.progress = start, examples, progress
        self.clock = clock
        self.adapters = [*judge.texts]
        self.base, self.single = judge.base.losses, judge.single.losses
        self.pace = [pace] if pace else []  # seconds a token, to plan the training
        self.untried: list[str] = []
        self.interrupted = False
        self._alone = 0  # jobs that ran outside the stages

    def run(self) -> Tuned:
        """Search until the time is over, or until Ctrl-C, and judge what was found.

        Raises:
            InputError: no trial has a result.
        """
        try:
            self._screen()
            self._search()
            self._finish()
        except KeyboardInterrupt:
            LOG.warning("the search is interrupted; the best merge so far is the result")
            self.interrupted = True
        finally:
            self.study.spent(self.clock.spent)
        return self._result()

    # -- the stages
    # ------------------------------------------------------------------------------------------------------

    def _screen(self) -> None:
        """The first merge, known settings, and every method at its defaults, on the texts of the first round.

        Poor ones are tried again with a shorter update, for which some rules are the best of all.  However
        little time there is, the first merge is tried, so that there is a result.
        """
        done = [one.spec for one in self.study.tried(SCREEN)]
        specs = [self.start, *(spec for spec in KNOWN if spec.method in METHODS)]
        specs += [Spec(method.name) for method in self._methods()]
        queue = [spec for i, spec in enumerate(specs) if spec not in done and spec not in specs[:i]]
        share = SCREENING * (0.4 if self._kept else 1.0)
        waiting, again = iter(queue), [*done]

        def next_job() -> tuple[Spec, Job] | None:
            if self.clock.left(share) <= 0 and again:
                return None
            spec = next(waiting, None) or next((one for one in self._shorter() if one not in again), None)
            if spec is None:
                return None
            again.append(spec)
            return spec, Job(spec, self._texts(0), self._patience)

        def over(spec: Spec, outcome: Outcome) -> None:
            self._told(f"trying {spec.described()}")
            self._add(SCREEN, spec, 0, outcome)

        try:
            self._all(next_job, over)
        finally:
            tried = {one.spec.method for one in self.study.tried(SCREEN)}
            self.untried = [spec.method for spec in queue if spec.method not in tried]

    def _shorter(self) -> Iterator[Spec]:
        """Of methods that are poor at their defaults."""
        tried = [one for one in self.study.tried(SCREEN) if one.value is not None]
        best = max((one.value or 0.0 for one in tried), default=0.0)
        for one in tried:
            default = METHODS[one.spec.method].parameter_fields()["lambda"].default
            poor = (one.value or 0.0) < POOR * best and not one.spec.parameters
            if poor and isinstance(default, int | float):
                yield one.spec._replace(parameters={"lambda": SHORTER * default})

    def _search(self) -> None:
        """The promising methods, their parameters, lambda and weights, on more and more texts."""
        promising = self._promising()
        if not promising:
            return
        # A run with more time may find others promising, and Optuna wants the same choice under a name.
        which = f"method of {', '.join(promising)}"
        for method in promising:
            screened = [one for one in self.study.tried(SCREEN) if one.spec.method == method]
            best = max(screened, key=lambda one: -math.inf if one.value is None else one.value)
            point = {which: method, "weighted": False} | defaults(METHODS[method], [])
            known = {f"{method}.{name}": value for name, value in best.spec.parameters.items()}
            self.study.start_at(point | {name: value for name, value in known.items() if name in point})
        again: list[tuple[Any, Spec, int]] = []  # trials that go on to their next round

        def next_job() -> tuple[Any, Job] | None:
            if again:
                trial, spec, at = again.pop()
                return (trial, spec, at), Job(spec, self._texts(at), self._patience)
            if self.clock.left(1 - LAST - self._kept) <= 0:
                return None
            trial = self.study.ask()
            name = trial.suggest_categorical(which, promising)
            weighted = trial.suggest_categorical("weighted", [False, True])
            parameters, weights = draw(trial, METHODS[name], self.adapters if weighted else [])
            spec = Spec(name, parameters, weights)
            return (trial, spec, 0), Job(spec, self._texts(0), self._patience)

        def over(key: tuple[Any, Spec, int], outcome: Outcome) -> None:
            trial, spec, at = key
            self._told(f"searching: {spec.described()}")
            if outcome.error:
                self.study.note(trial, SEARCH, spec, error=outcome.error, round=at)
                self.study.tell(trial, None)
                return
            seen: Seen = outcome.value
            value, excess = self._value(seen.losses, at)
            if not math.isfinite(value):
                self.study.note(trial, SEARCH, spec, error=NOT_FINITE, round=at)
                self.study.tell(trial, None)
                return
            self.study.note(
                trial, SEARCH, spec, losses=seen.losses, rank=seen.rank, value=value, excess=excess, round=at
            )
            trial.report(value, 3**at)
            last = at == len(self.split.rounds) - 1
            if not last and not trial.should_prune():
                again.append((trial, spec, at + 1))
            else:
                self.study.tell(trial, value, pruned=not last)

        self._all(next_job, over)

    def _finish(self) -> None:
        """Distillation for as many steps as there is time for, where there are examples."""
        if not self._trains or any(one.value is not None for one in self.study.tried(FINISH)):
            return
        steps = self._steps(self.clock.left(1 - LAST))
        if steps < FEWEST_STEPS:
            self.untried.append("distill")
            return
        spec = Spec("distill", {"steps": steps, "texts_per_step": 1})
        self._told(f"distilling in {steps} steps")
        last = len(self.split.rounds) - 1
        outcome = self._one(Job(spec, self._texts(last)))
        self._add(FINISH, spec, last, outcome)

    def _result(self) -> Tuned:
        """The best of all trials, judged by the texts that no trial saw."""
        tried = self.study.tried()
        known = [one for one in tried if one.value is not None and math.isfinite(one.value) and one.feasible]
        if not known:
            raise self._nothing_found(tried)
        furthest = max(one.round for one in known)
        ranked = sorted(known, key=lambda one: (one.round == furthest, one.value), reverse=True)
        best = _different(ranked)[:FINALISTS]
        unseen = {task: own for task, own in self.split.unseen.items() if own}
        finalists = []
        for one in best:
            self._told(f"judging {one.spec.described()}", last=True)
            try:
                outcome = self._one(Job(one.spec, unseen))
            except KeyboardInterrupt:
                self.interrupted = True
                break
            if outcome.error:
                LOG.warning("%s: %s", one.spec.described(), outcome.error)
                continue
            losses = outcome.value.losses
            kept = retained(only(self.base, unseen), only(self.single, self._own(unseen)), losses)
            finalists.append(Finalist(one, losses, kept))
        self.study.spent(self.clock.spent)
        if not finalists:
            if self.interrupted:
                raise InputError(
                    f"the search was interrupted before its result was judged; its trials are in "
                    f"{self.study.file}, and the same call goes on with them"
                )
            raise InputError("no merge was found: what was found could not be merged again; search anew")
        return Tuned(
            finalists,
            tried,
            only(self.base, unseen),
            only(self.single, self._own(unseen)),
            self._left_out(tried),
            self.untried,
            self.problem.goal,
        )

    # -- what they share
    # ------------------------------------------------------------------------------------------------------

    @property
    def _trains(self) -> bool:
        return self.examples and "distill" in METHODS

    @property
    def _kept(self) -> float:
        """The share of the time that is kept for distillation; none if too little is left for one."""
        time = min(TRAINING * self.clock.limit, self.clock.left(1 - LAST))
        return TRAINING if self._trains and self._steps(time) >= FEWEST_STEPS else 0.0

    def _methods(self) -> Iterator[Method]:
        """Those that can be tried, closed formulas first, because solvers take long; no distillation."""
        usable = [
            method
            for method in METHODS.values()
            if method.name != "distill" and (self.examples or not method.guided)
        ]
        yield from sorted(usable, key=lambda method: (_slow(method), not method.guided))

    @property
    def _patience(self) -> float:
        """Seconds that a merge may take."""
        return max(LEAST_PATIENCE, PATIENCE * self.clock.limit)

    def _texts(self, at: int) -> Mapping[str, Sequence[int]]:
        return self.split.rounds[at]

    def _own(self, numbers: Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[int]]:
        """Without the texts that belong to no adapter, which no single adapter reads."""
        return {task: own for task, own in numbers.items() if task != GENERAL}

    def _value(self, losses: Losses, at: int) -> tuple[float, float]:
        """The goal, and by how much the loss on general texts is above its limit."""
        numbers = self._texts(at)
        base, single = only(self.base, numbers), only(self.single, self._own(numbers))
        kept = retained(base, single, losses, DRAWS)
        goal: Interval = getattr(kept, self.problem.goal)
        limit = self.problem.general_limit
        excess = 0.0 if limit is None else mean_loss(losses[GENERAL]) - limit
        return goal.value, excess

    def _add(self, stage: str, spec: Spec, at: int, outcome: Outcome) -> None:
        if outcome.error:
            self.study.add(stage, spec, None, error=outcome.error, round=at)
            return
        seen: Seen = outcome.value
        value, excess = self._value(seen.losses, at)
        if not math.isfinite(value):
            self.study.add(stage, spec, None, error=NOT_FINITE, round=at)
            return
        self.study.add(
            stage,
            spec,
            value,
            losses=seen.losses,
            rank=seen.rank,
            excess=excess,
            round=at,
        )

    def _all(
        self, next_job: Callable[[], tuple[Any, Job] | None], over: Callable[[Any, Outcome], None]
    ) -> None:
        """Keep the pool busy until there is no further job, and hear of each that is over."""
        running: dict[int, tuple[Any, Job]] = {}
        number = 0
        while True:
            while len(running) < self.pool.capacity and (found := next_job()):
                running[number] = found
                self.pool.submit(number, found[1])
                number += 1
            if not running:
                return
            outcome = self.pool.wait()
            key, job = running.pop(outcome.key)
            if outcome.seconds and not outcome.error:
                self._paced(job, outcome.seconds)
            over(key, outcome)
            self.study.spent(self.clock.spent)

    def _one(self, job: Job) -> Outcome:
        """A job alone; what others of an interrupted search bring is let go."""
        self._alone += 1
        key = f"alone {self._alone}"  # which another process can send back
        self.pool.submit(key, job)
        while (outcome := self.pool.wait()).key != key:
            pass
        return outcome

    def _left_out(self, tried: Sequence[Tried]) -> dict[str, str]:
        """Methods that had no result at their defaults, and why."""
        with_result = {one.spec.method for one in tried if one.value is not None}
        return {
            one.spec.method: one.error
            for one in tried
            if one.stage != SEARCH and one.error and one.spec.method not in with_result
        }

    def _nothing_found(self, tried: Sequence[Tried]) -> InputError:
        """Why there is no result."""
        excesses = [one.excess for one in tried if one.value is not None and not one.feasible]
        if excesses:
            limit = self.problem.general_limit or 0.0
            why = (
                f"the lowest loss on general texts is {limit + min(excesses):.4g}, and {limit:.4g} is the "
                f"limit, with {mean_loss(self.base[GENERAL]):.4g} of the base; raise it, or give more minutes"
            )
        elif left_out := self._left_out(tried):
            why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        else:  # the first merge is tried however little time there is
            why = "the search was interrupted before its first trial was over; let it run longer"
        return InputError(f"no merge was found: {why}")

    def _paced(self, job: Job, seconds: float) -> None:
        texts = self.judge.every
        tokens = sum(len(texts[task][i].tokens) for task, own in job.texts.items() for i in own)
        self.pace.append(seconds / tokens)

    def _steps(self, seconds: float) -> int:
        """How many steps of distillation fit."""
        pace = min(self.pace, default=1e-3)  # others spent time on merges as well
        own = [example for texts in self.judge.texts.values() for example in texts]
        length = sum(len(example.tokens) for example in own) / len(own)
        step = PASSES_A_STEP * pace * len(self.adapters) * length
        return min(MOST_STEPS, int(seconds / step) - STEPS_BEFORE)

    def _promising(self) -> list[str]:
        """The best methods of the first round, of those with one rule no more than two."""
        ranked = [one for one in self.study.tried(SCREEN) if one.value is not None]
        # Of those that do more harm than they may, what does least: with a smaller lambda it may do less.
        ranked.sort(key=lambda one: (one.feasible, one.value if one.feasible else -one.excess), reverse=True)
        chosen: list[str] = []
        rules: dict[str, int] = {}
        for one in ranked:
            name = one.spec.method
            rule = name.partition("_")[2] or name
            if name in chosen or name == "distill" or rules.get(rule, 0) >= ALIKE:
                continue
            rules[rule] = rules.get(rule, 0) + 1
            chosen.append(name)
        return chosen[:PROMISING]

    def _told(self, stage: str, last: bool = False) -> None:
        best = max(
            (one.value for one in self.study.tried() if one.value is not None and one.feasible), default=0.0
        )
        done = 1.0 if last else min(1.0, self.clock.spent / self.clock.limit)
        self.progress(f"{stage}; best so far {best:.3f}", done, None)


def _slow(method: Method) -> bool:
    """Whether it takes steps or looks at whole tensors, and may take a hundred times as long as others."""
    steps = method.solves or "steps" in method.parameter_fields()
    return steps or (method.result.dense and not method.guided)


def _different(ranked: Sequence[Tried]) -> list[Tried]:
    """The best trial of each method: a second best that only differs by a digit says nothing."""
    found: dict[str, Tried] = {}
    for one in ranked:
        found.setdefault(one.spec.method, one)
    return [*found.values()]
