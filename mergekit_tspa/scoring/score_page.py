"""The report of scores on disk: JSON, one HTML file that needs nothing else, and its picture beside it."""

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from mergekit_tspa.base.files import replaced
from mergekit_tspa.errors import InputError
from mergekit_tspa.insight.page import Table, drawn, render
from mergekit_tspa.insight.pictures import WIDTH, Picture, Theme
from mergekit_tspa.scoring.losses import Interval, Retained
from mergekit_tspa.scoring.score_report import Row, ScoreReport, shown

PAGE, JSON, PNG = "score.html", "score.json", "score-{}.png"
GENERATOR = "mergekit-tspa score"
TERMS = (
    ("loss", "-log p of the answer's tokens, per token, in nats: lower is better."),
    (
        "retained",
        "1: the merge answers an adapter's own texts as well as that adapter alone; 0: as the base. Without "
        "the name of an adapter it is the mean over all, and `worst` is the least of them. (loss of the base "
        "- loss of the merge) / (loss of the base - loss of the adapter alone).",
    ),
    (
        "interval",
        "in brackets after a value: where 95 % of the values lie when texts are drawn anew from these texts. "
        "Two merges whose intervals overlap may still differ, but these texts do not tell.",
    ),
    ("general loss", "on texts that no adapter was trained on: above the base's, the merge harms."),
    ("rank", "of the adapter that can hold the merge; none where the merge is no adapter."),
)


def write_scores(report: ScoreReport, out: Path) -> Path:
    """
    Returns:
        The page.

    Raises:
        InputError: a file cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PAGE).unlink(missing_ok=True)
        with replaced(out / JSON) as file:
            file.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
        pictures = [drawn(picture, out, PNG) for picture in score_pictures(report)]
        render(
            out,
            PAGE,
            "score.html.j2",
            generator=GENERATOR,
            title=f"Scores: {', '.join(report.names)}",
            subtitle=f"base {report.model}; {', '.join(_texts(report))}",
            sentences=report.sentences(),
            pictures=pictures,
            tables=[_table(report)],
            terms=TERMS,
            foot="Losses are measured in memory; no text is kept.",
        )
    except OSError as error:
        raise InputError(f"{out}: the report could not be written: {error}") from error
    return out / PAGE


def _texts(report: ScoreReport) -> Iterator[str]:
    for task, name in zip(report.tasks, report.names):
        yield f"{len(report.single[task])} texts of {name}"


def _table(report: ScoreReport) -> Table:
    kept, losses = report.columns
    rows = [(row.name, *report.summary(row), *report.by_task(row)) for row in report.rows]
    return "All numbers", ["model", *kept, *losses], rows, ()


def score_pictures(report: ScoreReport) -> Iterator[Picture]:
    """The share that each merge retains, if there is one of which it can be told."""
    rows = [(row, kept) for row in report.merges if (kept := report.retained(row)) and kept.tasks]
    if not rows:
        return
    rows.sort(key=lambda pair: pair[1].mean.value)
    said = [f"{row.name} {shown(kept.mean)}" for row, kept in reversed(rows)]
    yield Picture(
        "retained",
        "What each merge retains",
        "The share of the single adapters' gains that each merge retains: the mean with its interval, and a "
        "mark for each adapter. 0 is the base, 1 the adapter alone. What is below -1 or above 2.5 "
        "is not drawn.",
        f"Share retained, the mean and its 95 % interval: {', '.join(said)}.",
        partial(_draw_retained, rows=rows, tasks=report.tasks, names=report.names),
    )


_MARKS = "osD^vP*Xd<>"
LOWEST, HIGHEST = -1.0, 2.5  # shares that are drawn, so that one bad merge does not hide the others


def _reach(every: Sequence[Retained]) -> tuple[float, float]:
    """From where to where shares are drawn: 0 and 1 always."""
    shares = [s for kept in every for s in (*kept.mean, *(own.value for own in kept.tasks.values()))]
    shares = [0.0, 1.0, *(share for share in shares if math.isfinite(share))]
    return max(min(shares), LOWEST), min(max(shares), HIGHEST)


def _draw_retained(
    theme: Theme, rows: Sequence[tuple[Row, Retained]], tasks: Sequence[str], names: Sequence[str]
) -> Figure:
    figure = Figure(figsize=(WIDTH, 1.4 + 0.34 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for y, (_, kept) in enumerate(rows):
        draw_interval(ax, y, kept.mean, theme)
    for t, (task, name) in enumerate(zip(tasks, names)):
        known = [(kept.tasks[task].value, y) for y, (_, kept) in enumerate(rows) if task in kept.tasks]
        if known:
            shares, heights = zip(*known)
            colour, mark = theme.lines[1 + t % 2], _MARKS[t % len(_MARKS)]
            ax.scatter(shares, heights, 22, colour, marker=mark, label=name, zorder=3, alpha=0.85)
    for share, dashes in ((0, ":"), (1, "--")):
        ax.axvline(share, color=theme.text, linewidth=0.8, linestyle=dashes, zorder=1)
    ax.set_yticks(range(len(rows)), [row.name for row, _ in rows])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    low, high = _reach([kept for _, kept in rows])
    ax.set_xlim(low - 0.06, high + 0.06)
    for y, (_, kept) in enumerate(rows):
        if kept.mean.value < low:
            ax.text(low, y, f"◂ {kept.mean.value:.2f}", color=theme.lines[0], va="center")
        elif kept.mean.value > high:
            ax.text(high, y, f"{kept.mean.value:.2f} ▸", color=theme.lines[0], va="center", ha="right")
    ax.set_xlabel("share of the single adapters' gains that is retained")
    ax.grid(axis="x", color=theme.missing, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper left", ncols=6, frameon=False, labelcolor=theme.text)
    return figure


def draw_interval(ax, y: float, interval: Interval, theme: Theme) -> None:
    """A mean as a bar over its interval."""
    colour = theme.lines[0]
    ax.plot(
        [interval.low, interval.high], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt"
    )
    ax.plot([interval.value], [y], "|", color=colour, markersize=13, markeredgewidth=2.4, zorder=4)
