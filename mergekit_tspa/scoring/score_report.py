"""The result of judging merges: a table, and the same as JSON."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Column, Table

from mergekit_tspa.insight.inspection import short_names
from mergekit_tspa.scoring.judge import GENERAL, Judged, Written
from mergekit_tspa.scoring.losses import (
    LEAST_GAIN,
    Interval,
    Losses,
    Retained,
    gains,
    loss_interval,
    mean_loss,
    retained,
)

BASE, SINGLE, SUM = "base", "single adapters", "plain sum"
FEW_TEXTS = 16  # of a task; below this an interval says little


@dataclass(frozen=True)
class Row:
    """One model that was judged."""

    name: str
    kind: str  # base, single adapters, plain sum, recipe, adapter, model, merge
    judged: Judged | None = None  # None: it could not be merged
    rank: int | None = None  # if it is one adapter
    seconds: float = 0.0  # to merge and to judge it
    error: str = ""  # why it could not be


@dataclass(frozen=True)
class ScoreReport:
    """What was judged, in the order in which it was asked for; the base and the single adapters come "
    "first."""

    rows: Sequence[Row]
    model: str  # the base's name
    texts: Mapping[str, str]  # by task, where they come from
    notes: Sequence[str] = field(default_factory=list)

    @property
    def base(self) -> Losses:
        return self._judged(BASE).losses

    @property
    def single(self) -> Losses:
        return self._judged(SINGLE).losses

    @property
    def tasks(self) -> list[str]:
        """Names of the adapters."""
        return [*self.single]

    @property
    def names(self) -> list[str]:
        """Short ones of the same."""
        return short_names(self.tasks)

    def retained(self, row: Row) -> Retained | None:
        """What a merge retains; nothing is said of the base and of a merge that failed."""
        if row.judged is None or row.kind == SINGLE:
            return None
        return retained(self.base, self.single, row.judged.losses)

    def best(self, goal: str = "mean") -> Row | None:
        """The merge that retains most, of the mean of the tasks or of the worst."""
        found = [(getattr(kept, goal).value, row) for row in self.merges if (kept := self.retained(row))]
        found = [(value, row) for value, row in found if math.isfinite(value)]
        return max(found, key=lambda pair: pair[0])[1] if found else None

    @property
    def merges(self) -> list[Row]:
        """The rows that are neither the base nor the single adapters."""
        return [row for row in self.rows if row.kind not in (BASE, SINGLE)]

    def _judged(self, kind: str) -> Judged:
        judged = next(row.judged for row in self.rows if row.kind == kind)
        assert judged is not None
        return judged

    def sentences(self) -> list[str]:
        """What a reader of the table should know."""
        said = list(self.notes)
        useless = [t for t, gain in gains(self.base, self.single).items() if gain <= LEAST_GAIN]
        names = dict(zip(self.tasks, self.names))
        for task in useless:
            said.append(
                f"{names[task]} is not better than the base on its texts, so no share of its gain can be "
                "told, and it does not count in the means."
            )
        few = min(map(len, self.single.values()))
        if few < FEW_TEXTS:
            said.append(
                f"The fewest texts that judge an adapter are {few}. With less than {FEW_TEXTS} the intervals "
                "are wide; give more."
            )
        failed = [row for row in self.rows if row.error]
        said += [f"{row.name} could not be merged: {row.error}." for row in failed]
        ranked = [(kept.mean, row) for row in self.merges if (kept := self.retained(row))]
        ranked = sorted(
            [(mean, row) for mean, row in ranked if math.isfinite(mean.value)],
            key=lambda pair: -pair[0].value,
        )
        if ranked:
            (mean, row), *others = ranked
            said.append(f"{row.name} retains most: {shown(mean)} of the single adapters' gains.")
            if others and others[0][0].high > mean.low:
                said.append(
                    f"{others[0][1].name} with {shown(others[0][0])} is within the interval, so these texts "
                    "do not tell which of the two is better."
                )
        return said

    def tables(self) -> tuple[Table, Table]:
        """For a terminal: what is retained, and the losses of each task."""
        right = Column("", overflow="fold"), *(Column(name, justify="right") for name in self.columns[0])
        kept, losses = (
            Table(*right),
            Table("loss (retained)", *(Column(n, justify="right") for n in self.names)),
        )
        for row in self.rows:
            kept.add_row(row.name, *self.summary(row))
            losses.add_row(row.name, *self.by_task(row))
        return kept, losses

    @property
    def columns(self) -> tuple[list[str], list[str]]:
        """Of `summary` and of `by_task`."""
        kept = ["retained", "worst", *["general loss"] * self._general]
        kept += ["right answers", "tokens"] * self._writing
        return [*kept, "rank", "seconds"], [f"{name}: loss (retained)" for name in self.names]

    @property
    def _general(self) -> bool:
        return GENERAL in self.base

    @property
    def _writing(self) -> bool:
        return any(row.judged and row.judged.written for row in self.rows)

    def summary(self, row: Row) -> list[str]:
        """A row as text: what it retains of all tasks, and what else is known of it."""
        rank = "-" if row.rank is None else str(row.rank)
        if row.judged is None:
            return ["failed", *["-"] * (len(self.columns[0]) - 2), f"{row.seconds:.0f}"]
        kept = self.retained(row)
        if kept is None or row.kind == BASE:
            cells = ["1" if row.kind == SINGLE else "0"] * 2
        else:
            cells = [shown(kept.mean), f"{kept.worst.value:.2f}"]
        if self._general:
            losses = row.judged.losses
            cells.append(f"{mean_loss(losses[GENERAL]):.3f}" if GENERAL in losses else "-")
        cells += _written_cells(row.judged.written) if self._writing else []
        return [*cells, rank, f"{row.seconds:.0f}"]

    def by_task(self, row: Row) -> list[str]:
        """A row as text: its loss on each task, and the share that it retains there."""
        if row.judged is None:
            return ["-"] * len(self.tasks)
        kept = self.retained(row) if row.kind != BASE else None
        shares = {task: f" ({own.value:.2f})" for task, own in kept.tasks.items()} if kept else {}
        return [f"{mean_loss(row.judged.losses[task]):.3f}{shares.get(task, '')}" for task in self.tasks]

    def as_json(self) -> dict[str, Any]:
        """Everything, the losses of single texts included, and no text."""
        return {
            "model": self.model,
            "tasks": [
                {
                    "adapter": task,
                    "name": name,
                    "texts": len(self.single[task]),
                    "from": self.texts.get(task, ""),
                }
                for task, name in zip(self.tasks, self.names)
            ],
            "sentences": self.sentences(),
            "rows": [self._json_of(row) for row in self.rows],
        }

    def _json_of(self, row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {"name": row.name, "kind": row.kind, "rank": row.rank}
        found |= {"seconds": round(row.seconds, 3)}
        if row.judged is None:
            return found | {"error": row.error}
        kept = self.retained(row)
        losses = row.judged.losses
        found["loss"] = {task: json_interval(loss_interval(own)) for task, own in losses.items()}
        if kept and row.kind != BASE:
            found["retained"] = {task: json_interval(own) for task, own in kept.tasks.items()}
            found["retained_mean"], found["retained_worst"] = map(json_interval, (kept.mean, kept.worst))
        if row.judged.written:
            found["right"] = {
                task: {"share": _share(own), "of": len(own), "tokens": _length(own)}
                for task, own in row.judged.written.items()
            }
        found["texts"] = {task: [[text.loss, text.tokens] for text in own] for task, own in losses.items()}
        return found


def shown(interval: Interval) -> str:
    """
    >>> shown(Interval(0.81234, 0.7, 0.9))
    '0.81 (0.70 to 0.90)'
    """
    if not math.isfinite(interval.value):
        return "-"
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def json_interval(interval: Interval) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in interval._asdict().items()}


def _share(written: Sequence[Written]) -> float:
    return sum(one.right for one in written) / len(written)


def _length(written: Sequence[Written]) -> float:
    return sum(one.tokens for one in written) / len(written)


def _written_cells(written: Mapping[str, Sequence[Written]]) -> Iterator[str]:
    every = [one for own in written.values() for one in own]
    yield f"{sum(one.right for one in every)} of {len(every)}" if every else "-"
    yield f"{_length(every):.0f}" if every else "-"
