"""One setting without texts for all sets of adapters: a few methods with Pico and SVC around them, at several lengths.

    python benchmarks/one_setting.py --base MODEL --data DIR --adapters DIR [--device cuda] [--workers 14] [--best 3]

Every setting is read on 16 train texts a task of four sets; the table is in the order of the mean over the sets, and those
that do best there are read on 64 dev texts a task as well.  Rows are kept in --results as they are measured, in the form
of reproduce.py, whose adapters and texts these are.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.claims import GIVEN, Book, NotRun, Row, measured, references, row
from benchmarks.reproduce import ENOUGH, Context, Sets, load, machine, pool_of, save, shown


class Setting(NamedTuple):
    method: str
    parameters: dict[str, Any]

    def row(self, name: str, split: str) -> Row:
        return row(name, self.method, split=split, **self.parameters)

    def __str__(self) -> str:
        return ", ".join([f"`{self.method}`", *(f"{key} {value}" for key, value in self.parameters.items())])


def settings() -> Iterator[Setting]:
    for length in (1.0, 1.5):
        yield Setting("core_tsv", {"lambda": length})
    for pico in (False, True):
        for length in (1.5, 2.0, 2.5, 3.0):
            yield Setting("core_tsv", {"lambda": length, "pico": pico, "svc": True})
        for length in (3.0, 4.0):
            yield Setting("core_iso", {"lambda": length, "pico": pico})
        for length in (1.3, 1.64, 2.0):
            for ridge in (0.136, 0.3):
                more = {"ridge": ridge, "shrink_to": "mean"}
                yield Setting("actmat", {"lambda": length, "pico": pico, "svc": True, **more})
    for length in (2.0, 2.9):
        yield Setting("swudi", {"lambda": length, "pico": True, "svc": True})
    for length in (1.7, 2.53):
        yield Setting("dc_merge", {"lambda": length, "svc": True, "smoothing": "average", "ratio": 1.9})


def share(book: Book, setting: Setting, split: str) -> list[float]:
    return [book.share(setting.row(name, split)).value for name in GIVEN]


def ranked(book: Book) -> list[Setting]:
    """By the mean over the sets, on the train split."""
    return sorted(settings(), key=lambda setting: -sum(share(book, setting, "train")))


def measure(rows: Iterable[Row], args: argparse.Namespace, records: dict[str, Any]) -> None:
    book = Book(records, ENOUGH)
    missing = dict.fromkeys(
        need for own in rows for need in (*references(own), own) if not measured(need, book)
    )
    context = Context(args.base, args.data, ENOUGH, args.device, Sets((args.adapters,)))
    with pool_of(args.workers, context) as pool:
        for own, found in pool([*missing]) if missing else ():
            if isinstance(found, str):
                raise SystemExit(found)
            records[own.key(ENOUGH)] = found | {"machine": machine(own, args.device)}
            save(args.results, {own.key(ENOUGH): records[own.key(ENOUGH)]})


def table(book: Book, best: list[Setting]) -> Iterator[str]:
    yield f"| setting | mean | least | {' | '.join(GIVEN)} | {' | '.join(f'dev, {name}' for name in GIVEN)} |"
    yield f"|---|---|---|{'---|' * 2 * len(GIVEN)}"
    for setting in ranked(book):
        train = share(book, setting, "train")
        cells = [f"{sum(train) / len(train):.2f}", f"{min(train):.2f}", *(f"{value:.2f}" for value in train)]
        for name in GIVEN:
            try:
                cells.append(shown(book.share(setting.row(name, "dev"))) if setting in best else "-")
            except NotRun:
                cells.append("-")
        yield f"| {setting} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for path in ("base", "data", "adapters"):
        parser.add_argument(f"--{path}", type=Path, required=True)
    parser.add_argument("--device", default="cpu", help="that merges and reads")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--best", type=int, default=3, help="how many settings are read on dev texts")
    parser.add_argument("--results", type=Path, default=Path("build/one_setting.json"))
    args = parser.parse_args()
    records = load(args.results)
    measure([setting.row(name, "train") for setting in settings() for name in GIVEN], args, records)
    best = ranked(Book(records, ENOUGH))[: args.best]
    measure([setting.row(name, "dev") for setting in best for name in GIVEN], args, records)
    print("\n".join(table(Book(records, ENOUGH), best)))


if __name__ == "__main__":
    main()
