"""What a trial of a search costs, and what `mergekit-tspa tune` finds.

    python benchmarks/tune.py trial --base MODEL --data DIR --adapters SET
    python benchmarks/tune.py search --base MODEL --data DIR --adapters SET [SET ...] [--minutes 10] [--examples] [-n 24]

`trial`: a merge with 8 texts of each task, judged as a search does it, against the passes of the base over the same
texts in the same run.

`search`: tune with texts of the train split (64 of each task judge, others are the examples), the result and, without
examples, the rows that README recommends scored on the dev split, which the search does not see.  SET is a directory with one adapter
per task, DIR has `TASK.train.jsonl` and `TASK.dev.jsonl` with a prompt `p` and an answer `a` a line.
"""

import argparse
import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mergekit_tspa import merge_adapters, score, tune
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.readings import Readings, TextSource
from mergekit_tspa.methods import METHODS
from mergekit_tspa.scoring.score_report import shown
from mergekit_tspa.scoring.scores import judge_of
from mergekit_tspa.tuning.tune_report import sentences
from mergekit_tspa.tuning.workbench import Job, Spec, Workbench

TRIALS = ("lora_task_arithmetic", "core_tsv", "ctm_ties", "lora_ties", "lora_pcb", "swudi_a", "actmat")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "sum at 0.4": ("lora_task_arithmetic", {"lambda": 0.4}),
    "core_tsv": ("core_tsv", {}),
    "swudi_a": ("swudi_a", {}),
    "tspa": ("tspa", {}),
}


def rows_of(data: Path, task: str, split: str, start: int, count: int) -> list[dict[str, str]]:
    lines = (data / f"{task}.{split}.jsonl").read_text().splitlines()[start : start + count]
    return [{"prompt": row["p"], "completion": row["a"]} for row in map(json.loads, lines)]


def adapters_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if (path / "adapter_config.json").exists())


def measure_trials(base: Path, data: Path, folder: Path, rounds: int) -> None:
    """Each method's trial as a multiple of the passes alone; medians."""
    paths = adapters_of(folder)
    plan = merge_adapters("lora_task_arithmetic", paths, base=base).plan
    assert plan is not None
    texts = {a: TextSource(rows_of(data, Path(a.name).name, "train", 0, 8)) for a in plan.adapters}
    readings = Readings(ModelTensors.of(str(base), Checkpoint(base)), base, texts)
    judge = judge_of(readings)
    bench = Workbench(plan, judge)
    numbers = {task: range(len(own)) for task, own in judge.texts.items()}
    alone: list[float] = []
    spent: dict[str, list[float]] = {name: [] for name in TRIALS}
    for _ in range(rounds):
        start = time.perf_counter()
        judge.__dict__.pop("base", None)
        _ = judge.base
        alone.append(time.perf_counter() - start)
        for name in TRIALS:
            bench._last = None
            start = time.perf_counter()
            bench.run(Job(Spec(name), numbers))
            spent[name].append(time.perf_counter() - start)
    floor = statistics.median(alone)
    print(
        f"{date.today()}, {torch.get_num_threads()} threads; {folder.name}, 8 texts of each of {len(paths)} tasks"
    )
    print(f"the passes alone: {floor:.2f} s\n\n| method | trial, s | of the passes |\n|---|---|---|")
    for name, seconds in spent.items():
        print(f"| {name} | {statistics.median(seconds):.2f} | {statistics.median(seconds) / floor:.2f} |")


def measure_search(
    base: Path, data: Path, folder: Path, minutes: float, examples: bool, n: int, rank: int | None
) -> None:
    paths = adapters_of(folder)
    tasks = [path.name for path in paths]
    held_out = [rows_of(data, task, "train", 100, 64) for task in tasks]
    given = [rows_of(data, task, "train", 0, 32) for task in tasks] if examples else None
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as storage:
        found = tune(
            base, paths, held_out, given, minutes=minutes, rank=rank, storage=Path(storage) / "trials"
        )
    seconds = time.perf_counter() - start
    best = found.best
    own = {"examples": given} if METHODS[best.method].guided else {}
    parameters = dict(best.parameters) | ({"rank": rank} if rank else {})
    names = {str(path): path for path in paths}
    weights = [best.weights.get(name, 1.0) for name in names]
    merges: dict[str, Any] = {
        f"found: {best.described()}": merge_adapters(
            best.method, paths, weights, base=base, **own, **parameters
        )
    }
    rows = {} if examples else ROWS  # which look at no texts
    for label, (method, values) in rows.items():
        merges[label] = merge_adapters(method, paths, base=base, **values)
    report = score(base, merges, [rows_of(data, task, "dev", 0, n) for task in tasks])
    print(
        f"\n{folder.name}, {'with' if examples else 'without'} examples, {seconds / 60:.1f} minutes in all\n"
    )
    for sentence in sentences(found):
        print(f"- {sentence}")
    print("\n| merge | retained on dev | rank |\n|---|---|---|")
    for row in report.merges:
        kept = report.retained(row)
        assert kept is not None
        print(f"| {row.name} | {shown(kept.mean)} | {row.rank or '-'} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["trial", "search"])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--examples", action="store_true")
    parser.add_argument("--rank", type=int)
    parser.add_argument("-n", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3, help="of trials")
    args = parser.parse_args()
    if args.what == "search":
        print(
            f"{date.today()}, {torch.get_num_threads()} threads, {args.minutes:g} minutes, {args.n} dev texts a task"
        )
    for folder in args.adapters:
        if args.what == "trial":
            measure_trials(args.base, args.data, folder, args.rounds)
        else:
            measure_search(args.base, args.data, folder, args.minutes, args.examples, args.n, args.rank)


if __name__ == "__main__":
    main()
