"""Judge merges side by side, in Python."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.readings import Readings, TextSource
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.api import MergedAdapters
from mergekit_tspa.merging.arguments import TextsLike, text_sources
from mergekit_tspa.methods.inputs import Progress, silent
from mergekit_tspa.scoring.candidates import Candidate, made, stored
from mergekit_tspa.scoring.judge import Judge
from mergekit_tspa.scoring.score_report import BASE, SINGLE, Row, ScoreReport

NEW_TOKENS = 256  # of an answer that is written, at most


def score(
    model: str | os.PathLike | Any,
    merges: Mapping[str, MergedAdapters | str | os.PathLike],
    examples: TextsLike | Sequence[TextsLike | None],
    general: TextsLike | None = None,
    tokenizer: Any = None,
    new_tokens: int = NEW_TOKENS,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> ScoreReport:
    """Which merge is the best one: losses, and the share of the single adapters' gains that each retains.

    The base, each single adapter on its own texts, and every merge answer the same texts.  Nothing is
    written; the base is loaded once, and is as it was afterwards.

    Args:
        model: the base's directory, or the model itself
        merges: by name what `merge_adapters` returned, or the directory of an adapter or a model.  One of the
            first kind must be among them; it says which adapters are merged
        examples: texts for each adapter in the order of the merge, as in `merge_adapters`; none should have
            been shown to a method
        general: texts that no adapter was trained on, so that harm is seen
        tokenizer: of a model in memory
        new_tokens: an answer to a text with an `answer` has at most so many; 0 writes none
        device: where a model that is loaded computes
        progress: hears of long work

    Raises:
        InputError: nothing to score, merges of different adapters, an adapter without texts, texts that are
            not readable.
    """
    plans = {name: m.plan for name, m in merges.items() if isinstance(m, MergedAdapters)}
    first = next((merge for merge in merges.values() if isinstance(merge, MergedAdapters)), None)
    if first is None or first.plan is None:
        raise InputError(
            "there is no merge of merge_adapters among the merges: give one, whose adapters are judged"
        )
    adapters = first.plan.adapters
    for name, plan in plans.items():
        if plan is None or {a.name for a in plan.adapters} != {a.name for a in adapters}:
            raise InputError(f"{name}: it merges other adapters than the first one; score them apart")
    directory = Path(model) if isinstance(model, str | os.PathLike) else None
    if directory is not None:
        base = ModelTensors.of(str(directory), Checkpoint(directory))
    elif first.model is not None:
        base = first.model
    else:
        raise InputError("the merge knows no base: give merge_adapters base=, or score the base's directory")
    sources = text_sources(adapters, examples, None)
    readings = Readings(
        base,
        directory,
        sources,
        device=device,
        progress=progress,
        model=None if directory else model,
        tokenizer=tokenizer,
    )
    judge = judge_of(readings, general, new_tokens)
    candidates = [
        made(name, merge)
        if isinstance(merge, MergedAdapters)
        else stored(name, Path(merge), _needed(directory, name))
        for name, merge in merges.items()
    ]
    return score_all(judge, candidates, str(directory or base.name), described(sources))


def _needed(directory: Path | None, name: str) -> Path:
    if directory is None:
        raise InputError(f"{name}: to score what is on disk, give the base's directory and not the model")
    return directory


def judge_of(readings: Readings, general: Any = None, new_tokens: int = 0) -> Judge:
    """The judge by the texts of some readings, whose model it shares.

    Args:
        general: a file or rows of texts that no adapter was trained on

    Raises:
        InputError: an adapter without texts, or texts that are not readable.
    """
    for adapter, source in readings.sources.items():
        if source.examples is None:
            raise InputError(f"{adapter.name}: there are no texts to judge merges by: give it some")
    others = readings.read(general, "general") if general is not None else []
    return Judge(
        readings.singles,
        readings.written,
        others,
        readings.tokenizer if new_tokens else None,
        new_tokens,
        progress=readings.progress,
    )


def described(sources: Mapping[Adapter, TextSource]) -> dict[str, str]:
    """Where each adapter's texts come from, in words."""
    part = {"all": "", "to merge": "two thirds of ", "to judge": "a third of "}
    return {
        adapter.name: part[source.part]
        + (str(source.examples) if isinstance(source.examples, str | Path) else "given rows")
        for adapter, source in sources.items()
    }


def score_all(
    judge: Judge,
    candidates: Iterable[Candidate],
    model: str,
    texts: Mapping[str, str],
    notes: Sequence[str] = (),
) -> ScoreReport:
    """The base, the single adapters, and every candidate; one that fails is a row that says why."""
    rows = []
    for name, look in ((BASE, lambda: judge.base), (SINGLE, lambda: judge.single)):
        start = time.perf_counter()
        seen = look()
        rows.append(Row(name, name, seen, None, time.perf_counter() - start))
    for candidate in candidates:
        start = time.perf_counter()
        try:
            judged, rank = candidate.judge(judge)
        except InputError as error:
            rows.append(
                Row(candidate.name, candidate.kind, error=error.message, seconds=time.perf_counter() - start)
            )
        else:
            rows.append(Row(candidate.name, candidate.kind, judged, rank, time.perf_counter() - start))
    return ScoreReport(rows, model, texts, notes)
