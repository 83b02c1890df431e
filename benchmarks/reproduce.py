"""The papers, claim by claim: measures what decides each claim of `claims.py`, and writes docs/reproduction.md.

    python benchmarks/reproduce.py plan  [-n 64] [--only CLAIM ...]
    python benchmarks/reproduce.py train --trainer TRAINER.py --base MODEL [--only SET ...] [--minutes M] [--workers W]
    python benchmarks/reproduce.py run   --base MODEL --data DIR --adapters DIR [-n 64] [--only CLAIM ...] [--minutes M]
                                         [--workers W] [--device cuda]
    python benchmarks/reproduce.py page  [-n 64]

`--adapters` has a directory for each set of adapters, with one adapter a task in it; sets that are missing there are
trained into build/reproduce/sets.  DIR of `--data` has `TASK.train.jsonl` and `TASK.dev.jsonl`, as `examples.py` wants
them.  Every merge is kept in results/reproduction.json as it is measured, and an interrupted run goes on where it was;
claims that need the least come first.  CLAIM is the beginning of a claim's name, such as `Table 1` or `CtM`.
Workers are processes that measure rows side by side, on one GPU too; what measures time waits until they are done.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from benchmarks import readings
from benchmarks.claims import (
    CLAIMS,
    EIGHT,
    SETS,
    TUNING_TEXTS,
    Book,
    Claim,
    Entry,
    NotRun,
    Row,
    Tuned,
    loss_difference,
    measured,
    references,
)
from benchmarks.examples import Losses, Scorer, rows_of
from mergekit_tspa import merge_adapters
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.calibration.load import load_tokenizer
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.finish import Dora
from mergekit_tspa.scoring.losses import Interval, mean_loss
from mergekit_tspa.scoring.placement import Placement, placed
from mergekit_tspa.updates import Dense, LowRank

ROOT = Path(__file__).resolve().parents[1]
OWN = ROOT / "build/reproduce"
RESULTS = ROOT / "benchmarks/results/reproduction.json"
PAGE = ROOT / "docs/reproduction.md"
ENOUGH = 64  # texts of each task
SECONDS_A_TEXT = 0.4  # of the bench model on one core
SECONDS_A_MERGE = 4
EMR = "emr of each task"
NOT_RUN = "not run"
# Rows that some claim wants with the rest of the texts are read with it at once.
WITH_REST = {
    own for claim in CLAIMS for own in claim.entries() if isinstance(own, Row) and own.split == "dev and rest"
}


class Sets(NamedTuple):
    """Where the sets of adapters are."""

    folders: tuple[Path, ...]

    def paths(self, own: Row) -> list[Path] | None:
        """The adapters of a row, or None if one is missing."""
        if own.set == EIGHT:
            found = [self.paths(Row(name, "single")) for name in EIGHT.split(" + ")]
            return None if None in found else [path for paths in found if paths for path in paths]
        for folder in self.folders:
            paths = [folder / own.set / task for task in own.merged]
            if all((path / "adapter_config.json").exists() for path in paths):
                return paths
        return None


class Reader(Scorer):
    """The base with one set of adapters, and the texts of both splits."""

    def __init__(self, base: Path, data: Path, adapters: list[Path], n: int, device: str = "cpu"):
        super().__init__(base, data, adapters, n, device)
        self.device = device
        tokenizer = load_tokenizer(base)
        self.train = {
            task: self._encode(tokenizer, rows_of(data, task, "train", TUNING_TEXTS)) for task in self.own
        }
        self.tensors = Checkpoint(base)

    def read(self, own: Row, updates: Mapping[str, Any] | None = None) -> Losses:
        """The texts of a row's tasks with a merge beside the base, with nothing, or with single adapters."""
        texts = self.train if own.split == "train" else self.own
        texts = {task: texts[task] for task in own.merged}
        if own.split == "dev and rest":
            texts |= self.other
        if own.method == "single":
            return self._losses(texts, lambda batch: self.singles.alone(batch.parts))
        placement = Placement()
        for module, update in (updates or {}).items():
            name = f"{module}.weight"
            if isinstance(update, LowRank):
                placement.beside[name] = update
            else:
                placement.values[name] = update.apply_to(self.tensors[name].to(self.device, torch.float32))
        return self._losses(texts, lambda batch: placed(self.singles, placement))


def merge(own: Row, adapters: list[Path], base: Path, device: str = "cpu") -> Any:
    parameters = dict(own.parameters)
    weights = [parameters.pop("weight", 1.0)] * len(adapters)
    with readings.known():
        return merge_adapters(own.method, adapters, weights, base=base, device=device, **parameters)


def measure(own: Row, reader: Reader, adapters: list[Path], base: Path) -> dict[str, Any]:
    """A row, as it is kept."""
    if own.method in ("base", "single"):
        return {"losses": reader.read(own)}
    if own.method == EMR:
        return {"losses": rebuilt_by_emr(own, reader, adapters, base)}
    updates = merge(own, adapters, base, reader.device)
    found: dict[str, Any] = {"losses": reader.read(own, updates)}
    if own.split == "train":
        return found
    found["stages"] = {
        report.stage: [float(report.start.sum()), float(report.end.sum())]
        for report in updates.reports
        if hasattr(report, "stage") and hasattr(report, "start")
    }
    if not any(isinstance(update, Dora) for update in updates.values()):
        found["rank"] = max(update.rank for update in updates.values())
        found |= lengths(updates, merge_adapters("lora_mean", adapters, base=base), reader.device)
    return found


@torch.no_grad()
def lengths(updates: Mapping[str, Any], mean: Mapping[str, Any], device: str = "cpu") -> dict[str, float]:
    """`||M|| / ||mean||` and `||M - mean|| / ||mean||` over all tensors."""
    squares = torch.zeros(3, dtype=torch.float64, device=device)
    for module, update in updates.items():
        M, D = (type(dW)(*(part.to(device) for part in dW)).dense() for dW in (update, mean[module]))
        squares += torch.stack([own.double().square().sum() for own in (M, M - D, D)])
    norm, distance, unit = squares.sqrt().tolist()
    return {"norm": norm / unit, "distance": distance / unit}


def rebuilt_by_emr(own: Row, reader: Reader, adapters: list[Path], base: Path) -> Losses:
    """Each task's texts read by that task's own model: `uni * [M_t uni > 0] * scale_t`."""
    unified = merge_adapters("lora_emr", adapters, base=base, device=reader.device)
    uni = {module: update.dense() for module, update in unified.items()}
    losses: Losses = {}
    for task, adapter in zip(own.merged, adapters):
        single = merge_adapters("lora_task_arithmetic", [adapter], base=base, device=reader.device)
        updates = {}
        for module, update in single.items():
            M = update.dense()
            kept = uni[module] * (M * uni[module] > 0)
            scale = M.abs().sum() / kept.abs().sum().clamp_min(torch.finfo(M.dtype).tiny)
            updates[module] = Dense(kept * scale)
        losses |= reader.read(own._replace(tasks=(task,)), updates)
    return losses


def timed(own: Row, adapters: list[Path], base: Path) -> dict[str, float]:
    """Of a merge alone, in a process of its own: seconds, and how far the memory grew."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_timed, (own, adapters, base))


def _timed(own: Row, adapters: list[Path], base: Path) -> dict[str, float]:
    parameters = dict(own.parameters)
    adapters = adapters[: parameters.pop("n")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    merge(own._replace(parameters=tuple(parameters.items())), adapters, base)
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    return {"seconds": seconds, "megabytes": max(grown, 1) / 1024}


# What is still to do


def wanted(entry: Entry, book: Book) -> Iterator[Row]:
    """The rows that are missing for an entry, references first; what tuning finds is known once it is tuned."""
    candidates = entry.candidates if isinstance(entry, Tuned) else (entry,)
    for own in candidates:
        needed = (own,) if own.split == "time" else (*references(own), own)
        yield from (found for found in needed if not measured(found, book))
    if isinstance(entry, Tuned) and all(measured(own, book) for own in candidates):
        try:
            best = book.row(entry)
        except NotRun:
            return  # a reference is missing
        yield from (found for found in (*references(best), best) if not measured(found, book))


def missing(claim: Claim, book: Book) -> list[Row]:
    """By set, so that each set is loaded once."""
    rows = dict.fromkeys(own for entry in claim.entries() for own in wanted(entry, book))
    unique = {own.key(book.n): own for own in map(richest, rows)}
    order = {name: place for place, name in enumerate((*SETS, EIGHT))}
    return sorted(unique.values(), key=lambda own: (order[own.set], own.split == "train"))


def richest(own: Row) -> Row:
    more = own._replace(split="dev and rest")
    return more if own.split == "dev" and more in WITH_REST else own


def cost(own: Row, n: int) -> float:
    """About how many seconds a row takes."""
    tasks = len(own.merged) + (2 if own.split == "dev and rest" else 0)
    return SECONDS_A_MERGE + SECONDS_A_TEXT * tasks * own.texts(n)


def costs(claim: Claim, book: Book) -> float:
    """What is missing now, and what tuned rows will want."""
    later = sum(
        cost(entry.candidates[0]._replace(split="dev"), book.n)
        for entry in claim.entries()
        if isinstance(entry, Tuned) and not measured(entry, book)
    )
    return later + sum(cost(own, book.n) for own in missing(claim, book))


def chosen(only: Iterable[str]) -> list[Claim]:
    only = [*only]
    return [claim for claim in CLAIMS if not only or any(claim.name.startswith(start) for start in only)]


# The commands


def plan(args: argparse.Namespace) -> None:
    book = Book(load(args.results), args.n)
    seen: dict[str, Row] = {}
    for claim in chosen(args.only):
        rows = missing(claim, book)
        seen |= {own.key(args.n): own for own in rows}
        sets = dict.fromkeys(own.set for own in rows)
        print(
            f"{claim.name}: {len(rows)} rows now, {costs(claim, book) / 60:.0f} minutes; {', '.join(sets) or 'done'}"
        )
    print(
        f"together {len(seen)} rows now, {sum(cost(own, args.n) for own in seen.values()) / 3600:.1f} hours"
    )


def train(args: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * args.minutes

    def make(adapter: tuple[str, str]) -> None:
        name, task = adapter
        out = OWN / "sets" / name / task
        if (out / "adapter_config.json").exists() or time.monotonic() > end:
            return
        command = [sys.executable, args.trainer, "--base", args.base, "--task", task, "--out", out]
        subprocess.run([*command, *SETS[name].training], check=True)

    wanted = [name for name, found in SETS.items() if found.training and name in (args.only or SETS)]
    with ThreadPoolExecutor(args.workers) as pool:
        for _ in pool.map(make, [(name, task) for name in wanted for task in SETS[name].tasks]):
            pass


def run(args: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * args.minutes
    sets = Sets((args.adapters, OWN / "sets"))
    records = load(args.results)
    book = Book(records, args.n)
    context = Context(args.base, args.data, args.n, args.device, sets)
    done: set[Row] = set()
    with pool_of(args.workers, context) as pool:
        while rows := [own for own in due(chosen(args.only), book) if own not in done]:
            for own, found in pool(rows):
                done.add(own)
                if isinstance(found, str):
                    print(f"{own.key(args.n)}: {found}", file=sys.stderr)
                else:
                    records[own.key(args.n)] = found | {"machine": machine(own, args.device)}
                    save(args.results, records)
                    print(own.key(args.n), file=sys.stderr, flush=True)
                if time.monotonic() > end:
                    return


def machine(own: Row, device: str) -> str:
    if device == "cpu" or own.split == "time":
        return f"{platform.machine()}, {os.cpu_count()} cores"
    return torch.cuda.get_device_name(device)


def due(claims: Iterable[Claim], book: Book) -> list[Row]:
    """What is missing, those first that the claims with the least to do want, and last what measures time."""
    rows: dict[Row, None] = {}
    for claim in sorted(claims, key=lambda claim: costs(claim, book)):
        rows |= dict.fromkeys(missing(claim, book))
    untimed = [own for own in rows if own.split != "time"]
    return untimed or [*rows]


class Context(NamedTuple):
    """What a row is measured with, beside its own set."""

    base: Path
    data: Path
    n: int
    device: str
    sets: Sets

    def measure(self, own: Row) -> tuple[Row, dict[str, Any] | str]:
        """A row and what was found, or why it could not be measured."""
        adapters = self.sets.paths(own)
        if adapters is None:
            return own, f"{own.set}: there are no such adapters; `train` makes them"
        try:
            if own.split == "time":
                return own, timed(own, adapters, self.base)
            return own, measure(own, _reader(self, own.set), adapters, self.base)
        except InputError as error:
            return own, str(error)


@lru_cache
def _reader(context: Context, name: str) -> Reader:
    whole = context.sets.paths(Row(name, "single"))
    assert whole is not None
    return Reader(context.base, context.data, whole, context.n, context.device)


Found: TypeAlias = Iterable[tuple[Row, dict[str, Any] | str]]


@contextmanager
def pool_of(workers: int, context: Context) -> Iterator[Callable[[list[Row]], Found]]:
    """A function that measures rows, in the order in which they are done."""
    if workers == 1:
        yield lambda rows: map(context.measure, rows)
        return
    with get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:

        def measured_by_all(rows: list[Row]) -> Found:
            alone = rows[0].split == "time"
            return map(context.measure, rows) if alone else pool.imap_unordered(context.measure, rows)

        yield measured_by_all


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def save(path: Path, records: Mapping[str, Any]) -> None:
    """Beside what another run has kept since."""
    records = {**load(path), **records}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(_rounded(record))}" for key, record in sorted(records.items())]
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(new, path)


def _rounded(value: Any) -> Any:
    """Losses to a ten thousandth of a nat, which says more than 64 texts can."""
    if isinstance(value, Mapping):
        return {key: _rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_rounded(own) for own in value]
    return round(value, 4) if isinstance(value, float) else value


# The page


def page(args: argparse.Namespace) -> None:
    args.out.write_text("\n".join(pages(Book(load(args.results), args.n))) + "\n")


def pages(book: Book) -> Iterator[str]:
    judged = {claim.name: claim.judged(book) for claim in CLAIMS}
    yield "# The papers, claim by claim\n"
    yield (
        "What the papers of the methods claim, and whether it holds on SmolLM2-135M-Instruct and small adapters. A model of "
        "another size with other tasks may answer otherwise.\n"
    )
    yield (
        "A cell is the share of the single adapters' gain that a merge keeps, the mean of the tasks (1: as each task's own "
        f"adapter, 0: as the base), with a 95 % bootstrap interval over {book.n} unseen texts a task. Two merges are compared on "
        "the same resampled texts, and a difference whose interval holds 0 is called none. Each comparison stands for itself: "
        "of a hundred, a few are off by chance. What is called tuned was chosen on "
        f"{TUNING_TEXTS} texts a task of the train split, which the adapters may have seen, and is reported on the others. The length along "
        "the mean is 1 for the mean of the adapters' updates and n for their sum.\n"
    )
    if book.n < ENOUGH:
        yield f"**A first look:** fewer than {ENOUGH} texts a task.\n"
    machines = sorted({record["machine"] for record in book.records.values() if "machine" in record})
    yield f"`python benchmarks/reproduce.py page`, {date.today()}; measured on {' and '.join(machines)}.\n"
    yield "| claim | verdict |\n|---|---|"
    for claim in CLAIMS:
        yield f"| [{claim.name}](#{anchor(claim.name)}) | {judged[claim.name].word} |"
    for claim in CLAIMS:
        yield f"\n## {claim.name}\n"
        yield f"{claim.source}. {claim.says}\n"
        if claim.paper:
            yield f"*The paper:* {claim.paper}\n"
        found = judged[claim.name]
        yield f"**{found.word}**: {found.sentence}" + (f" {claim.note}" if claim.note else "")
        if claim.table:
            yield ""
            yield from detailed(claim, book) if claim.details else crossed(claim, book)


def anchor(title: str) -> str:
    """As Markdown makes it of a heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -")
    return "-".join(kept.split())


def crossed(claim: Claim, book: Book) -> Iterator[str]:
    """A line for each method and a column for each set."""
    columns = [*dict.fromkeys(column for line in claim.table.values() for column in line)]
    left_out = 0
    yield f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
    for label, line in claim.table.items():
        cells = [cell(line[column], book) if column in line else "-" for column in columns]
        if NOT_RUN in cells and {*cells} <= {NOT_RUN, "-"}:
            left_out += 1
        else:
            yield f"| {label} | {' | '.join(cells)} |"
    yield from _not_shown(left_out)


def _not_shown(lines: int) -> Iterator[str]:
    if lines:
        yield f"\n{lines} more lines are not run."


def cell(entry: Entry, book: Book) -> str:
    try:
        if isinstance(entry, Row) and entry.split == "time":
            found = book.record(entry)
            return f"{found['seconds']:.1f} s, {found['megabytes']:.0f} MB"
        settings = ""
        if isinstance(entry, Tuned):
            varied = {key for own in entry.candidates for key, _ in own.parameters}
            settings = ", ".join(
                f"{key} {value}" for key, value in book.row(entry).parameters if key in varied
            )
        return shown(book.share(entry)) + (f"; {settings}" if settings else "")
    except NotRun:
        return NOT_RUN


def shown(found: Interval, digits: int = 2) -> str:
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def detailed(claim: Claim, book: Book) -> Iterator[str]:
    """A line for each method and set, with what was seen of the merge and its losses."""
    left_out = 0
    yield "| | set | keeps | left of the objective | norm, of the mean's | length along the mean | loss of the tasks | general, tool against the base |"
    yield "|---|---|---|---|---|---|---|---|"
    for label, line in claim.table.items():
        for column, entry in line.items():
            if cells := details(entry, book):
                yield f"| {label} | {column} | {' | '.join(cells)} |"
            else:
                left_out += 1
    yield from _not_shown(left_out)


def along_the_mean(record: Mapping[str, Any]) -> float:
    """`<M, D> / <D, D>` with the adapters' mean D: 1 for the mean itself, n for their sum."""
    norm, distance = record["norm"], record["distance"]  # both in units of ||D||
    return float(norm**2 + 1 - distance**2) / 2


def details(entry: Entry, book: Book) -> list[str]:
    """The cells of a row; none if it is not run."""
    try:
        own, record, losses = book.row(entry), book.record(entry), book.losses(entry)
        kept = "1" if own.method == "single" else shown(book.share(entry))
        base = book.base(entry)
    except NotRun:
        return []
    stages = record.get("stages", {})
    left = ", ".join(f"{end / start:.3f}" for start, end in stages.values() if start)
    rest = [
        shown(loss_difference(losses[task], base[task]), 3)
        for task in ("general", "tool")
        if task in losses and task not in own.merged
    ]
    return [
        kept,
        left or "-",
        f"{record['norm']:.2f}" if "norm" in record else "-",
        f"{along_the_mean(record):.2f}" if "distance" in record else "-",
        " ".join(f"{mean_loss(losses[task]):.3f}" for task in own.merged),
        ", ".join(rest) or "-",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for command in (plan, train, run, page):
        own = commands.add_parser(command.__name__)
        own.set_defaults(command=command)
        own.add_argument("-n", type=int, default=ENOUGH, help="texts of each task")
        own.add_argument("--results", type=Path, default=RESULTS)
        own.add_argument(
            "--only", nargs="*", default=[], help="beginnings of the names of claims, or sets to train"
        )
        own.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
        if command in (train, run):
            own.add_argument("--base", type=Path, required=True)
            own.add_argument("--workers", type=int, default=1, help="processes side by side")
        if command is train:
            own.add_argument("--trainer", type=Path, required=True)
        if command is run:
            own.add_argument("--data", type=Path, required=True)
            own.add_argument("--adapters", type=Path, required=True)
            own.add_argument("--device", default="cpu", help="that merges and reads")
        if command is page:
            own.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
