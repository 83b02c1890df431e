"""Search for the best merge, in Python."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.batches import Texts
from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.calibration.load import load_model, load_tokenizer
from mergekit_tspa.calibration.readings import Reading, Readings, TextSource
from mergekit_tspa.calibration.singles import Singles
from mergekit_tspa.calibration.store import hash_base
from mergekit_tspa.errors import InputError
from mergekit_tspa.jobs.pool import Pool, Shared, open_pool
from mergekit_tspa.merging.api import merge_adapters
from mergekit_tspa.merging.arguments import AdapterLike, TextsLike, text_sources
from mergekit_tspa.merging.guide import Guide
from mergekit_tspa.merging.plan import MergePlan
from mergekit_tspa.methods.inputs import Progress, silent
from mergekit_tspa.scoring.judge import GENERAL, Judge
from mergekit_tspa.scoring.scores import judge_of
from mergekit_tspa.tuning.problem import Goal, Problem, Split, affordable, split_texts, telling
from mergekit_tspa.tuning.study import Study, check_storage
from mergekit_tspa.tuning.tuner import Clock, Tuned, Tuner
from mergekit_tspa.tuning.workbench import Job, Seen, Spec, Workbench


@dataclass(frozen=True)
class Bench:
    """Everything that a worker makes its workbench of; it holds paths and tokens, and can be sent.

    Args:
        merge: makes a merge of the adapters on that machine, of which all others are variations
        directory: of the base
        sources: of the adapters' texts that methods may look at, by the adapter's name; none: no method may
        rank: of the result
        device: where methods and the model compute; None: a GPU where a worker has one
        texts: that judge, as tokens, once they are written
        general: the same of texts that belong to no adapter
    """

    merge: Callable[[], MergePlan]
    directory: Path
    sources: Mapping[str, TextSource]
    rank: int | None = None
    device: str | None = None
    texts: Texts = field(default_factory=dict)
    general: Sequence[Example] = ()

    def open(self, shared: Shared = None) -> Workbench:
        """Load the base, unless its tensors are there, and put the adapters beside it.

        Args:
            shared: the base's parameters, by their names in the model
        """
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = load_model(self.directory, dtype, device=device)
        if shared is not None:
            _take(model, shared)
        return self.on(model, device)

    def on(self, model: Any, device: str, judge: Judge | None = None) -> Workbench:
        """A workbench with a model that is in memory."""
        merge = self.merge()
        base = ModelTensors.of(str(self.directory), Checkpoint(self.directory))
        by_name = {adapter.name: adapter for adapter in merge.adapters}
        sources = {by_name[name]: source for name, source in self.sources.items()}
        tokenizer = load_tokenizer(self.directory)
        readings = None
        if sources:
            guide = Guide(base, self.directory, sources, model, tokenizer)
            merge = replace(merge, guide=guide)
            readings = Readings(
                base, self.directory, sources, Reading(), device, model=model, tokenizer=tokenizer
            )
        if judge is None:
            judge = Judge(Singles(model, base, merge.adapters), self.texts, self.general)
        return Workbench(merge, judge, readings, self.rank, device)


def _take(model: Any, shared: Mapping[str, Tensor]) -> None:
    """Let the parameters of a model lie in memory that others read as well."""
    for name, parameter in model.named_parameters():
        if name in shared and shared[name].shape == parameter.shape:
            parameter.data = shared[name]


def run_job(bench: Workbench, job: Job | None) -> Seen | None:
    """A trial, on whatever worker; None only wants it to be there."""
    return None if job is None else bench.run(job)


def _ready(pool: Pool) -> None:
    """Wait until the workers have loaded the base, which is not to count as time of the search.

    Raises:
        InputError: none of them can.
    """
    count = pool.capacity
    for number in range(count):
        pool.submit(f"ready {number}", None)
    errors = [pool.wait().error for _ in range(count)]
    if errors[0] and all(errors):
        raise InputError(errors[0])


class Searched(NamedTuple):
    """A search that is over, and what it was judged by."""

    found: Tuned
    judge: Judge
    split: Split


class Search(NamedTuple):
    """How a search runs."""

    problem: Problem
    minutes: float
    storage: Path  # of its trials
    start: Spec  # the merge that it begins with
    ray: str | None = None  # as `open_pool` takes it
    cpus: int = 1  # of a worker on Ray


def search(bench: Bench, given: Judge, how: Search, progress: Progress = silent) -> Searched:
    """Search for a merge; trials that are on disk already count.

    Args:
        bench: of the workers
        given: the base with all texts, of which as many are read as there is time for

    Raises:
        InputError: no trial has a result, a storage of another search, Ray is missing or not reached.
    """
    if not 0 < how.minutes < math.inf:
        raise InputError(f"{how.minutes} minutes are no time for a search; give a positive number")
    split = split_texts(given.every)  # refuses too few
    examples = {name: [source.examples, source.part] for name, source in bench.sources.items()}
    merged = hash_base(Checkpoint(bench.directory)), _hash(given.singles)
    study = Study(
        how.storage,
        how.problem,
        how.problem.fingerprint([*given.texts], given.every, examples, *merged),
    )
    start = time.monotonic()
    pace = _pace(given, split)
    # Trials on other numbers of texts are not comparable.
    size = study.size if study.tried() else None
    size = size or affordable(60 * how.minutes, pace, given.every)
    study.settle(size)
    split = split_texts(given.every, size)
    general = split.texts.get(GENERAL, [])
    texts = {task: own for task, own in split.texts.items() if task != GENERAL}
    judge = Judge(given.singles, texts, general, progress=progress)
    split = telling(split, judge.base.losses, judge.single.losses)
    reading = time.monotonic() - start
    bench = replace(bench, texts=texts, general=general)
    device = str(judge.singles.device)
    if how.ray is None:
        here = bench.on(judge.singles.model, device, judge)
        pool = open_pool(run_job, lambda shared: here)
    else:
        parameters = dict(judge.singles.model.named_parameters()) if device == "cpu" else None
        pool = open_pool(run_job, bench.open, parameters, ray=how.ray, cpus=how.cpus)
    with pool:
        if how.ray is not None:
            _ready(pool)
        clock = Clock(how.minutes, study.seconds + reading)  # starting Ray does not count
        guided = bool(bench.sources)
        tuner = Tuner(study, pool, judge, split, how.problem, how.start, guided, clock, progress, pace)
        return Searched(tuner.run(), judge, split)


def _hash(singles: Singles) -> str:
    """Of what the adapters do to the linear layers: a new version in the same place is another adapter."""
    found = hashlib.sha256()
    for name, own in singles.factors.items():
        for tensor, factors in own.items():
            found.update(json.dumps([name, tensor, factors.B.shape]).encode())
            for matrix in (factors.B, factors.A):
                found.update(matrix.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _pace(judge: Judge, split: Split) -> float:
    """Seconds a token, of the base on the texts of the first round."""
    few = {task: [split.texts[task][i] for i in own] for task, own in split.rounds[0].items()}
    seconds = 0.0
    for _ in range(2):  # the first pass also reads the base's tensors from disk
        start = time.perf_counter()
        judge.judge("the base", judge.singles, nullcontext, few)
        seconds = time.perf_counter() - start
    return seconds / sum(len(text.tokens) for own in few.values() for text in own)


def tune(
    model: str | os.PathLike,
    adapters: Sequence[AdapterLike],
    held_out: TextsLike | Sequence[TextsLike | None],
    examples: TextsLike | Sequence[TextsLike | None] | None = None,
    general: TextsLike | None = None,
    goal: Goal = "mean",
    general_loss_at_most: float | None = None,
    rank: int | None = None,
    minutes: float = 10.0,
    storage: str | os.PathLike | None = None,
    seed: int = 0,
    ray: str | None = None,
    cpus: int = 1,
    device: str | None = None,
    progress: Progress = silent,
) -> Tuned:
    """Search methods, their parameters, weights and lambda for the merge that answers best.

    Every method is tried at its defaults on few texts, then the promising ones are varied on more, and with
    examples one adapter is trained.  A third of the texts judges only the result.

    Args:
        model: the base's directory
        adapters: as for `merge_adapters`
        held_out: texts that judge, one entry per adapter
        examples: other texts of each, which methods may look at; without them no method reads texts
        general: texts that no adapter was trained on
        goal: `mean` over the adapters of the share of its gain that is retained, or that of the `worst`
        general_loss_at_most: on the general texts, of merges that count
        rank: that the result has at most, which is then one adapter
        minutes: for the search; loading the base and writing answers to prompts come on top
        storage: a file with the trials; a search that has one goes on where it was
        seed: of what is drawn
        ray: None tries here; an address, or `""` for this machine, tries on a Ray cluster
        cpus: of a worker there
        device: of the base and the methods, by default the CPU
        progress: hears of it

    Raises:
        InputError: an adapter without texts, no trial with a result, a storage of another search.
    """
    import tempfile

    if storage is not None:
        check_storage(Path(storage))
    directory = Path(model)
    merge = partial(_sum_of, adapters, str(directory))
    plan = merge()
    base = ModelTensors.of(str(directory), Checkpoint(directory))
    judging = text_sources(plan.adapters, held_out, None)
    readings = Readings(base, directory, judging, device=device or "cpu", progress=progress)
    judge = judge_of(readings, general)
    given = text_sources(plan.adapters, examples, None) if examples is not None else {}
    if lacking := [adapter.name for adapter, source in given.items() if source.empty]:
        raise InputError(f"{lacking[0]}: it has no examples; give each adapter some, or none at all")
    sources = {adapter.name: source for adapter, source in given.items()}
    problem = Problem(goal, general_loss_at_most, rank, seed)
    check_problem(problem, judge)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(storage) if storage is not None else Path(folder) / "trials"
        how = Search(problem, minutes, file, Spec("core_tsv"), ray, cpus)
        return search(Bench(merge, directory, sources, rank, device), judge, how, progress).found


def _sum_of(adapters: Sequence[AdapterLike], base: str) -> MergePlan:
    """A plan of the adapters, whose own result is of no interest."""
    plan = merge_adapters("lora_task_arithmetic", adapters, base=base).plan
    assert plan is not None
    return plan


def check_problem(problem: Problem, judge: Judge) -> None:
    """
    Raises:
        InputError: a goal or a limit that is none, or a limit on general texts, and there are none.
    """
    if problem.goal not in get_args(Goal):
        raise InputError(f"goal {problem.goal!r}: give one of {', '.join(get_args(Goal))}")
    if problem.rank is not None and problem.rank < 1:
        raise InputError(f"rank {problem.rank}: an adapter has a rank of at least 1; give that or more")
    if problem.general_limit is not None and not math.isfinite(problem.general_limit):
        raise InputError(
            f"a loss of {problem.general_limit} on general texts is no limit; give a number or leave it out"
        )
    if problem.general_limit is not None and not judge.general:
        raise InputError(
            "a limit on the loss of general texts needs such texts: give general (--general FILE)"
        )
