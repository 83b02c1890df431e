"""The report of a search on disk: JSON, and one HTML file with a picture of the trade-off between tasks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from mergekit_tspa.base.files import replaced
from mergekit_tspa.errors import InputError
from mergekit_tspa.insight.inspection import short_names
from mergekit_tspa.insight.page import drawn, render
from mergekit_tspa.insight.pictures import WIDTH, Picture, Theme
from mergekit_tspa.scoring.judge import GENERAL, Judge
from mergekit_tspa.scoring.losses import LEAST_GAIN, gains, mean_loss
from mergekit_tspa.scoring.score_page import TERMS
from mergekit_tspa.scoring.score_report import shown
from mergekit_tspa.tuning.problem import Split, only
from mergekit_tspa.tuning.study import Tried
from mergekit_tspa.tuning.tune_report import as_json, best_rows, sentences
from mergekit_tspa.tuning.tuner import Tuned

PAGE, JSON, PNG = "tune.html", "tune.json", "tune-{}.png"
GENERATOR = "mergekit-tspa tune"
STAGES = (
    (
        "stage",
        "screen: the recipe's own merge, and every method at its defaults, on few texts; search: the "
        "promising methods with other parameters and weights; finish: one adapter, trained on the examples.",
    ),
    ("round", "how far the trial came: 1 on two texts of each adapter, the last on all texts of the search."),
)
BEST = 5  # trials that are drawn in colour
LOWEST, HIGHEST = -1.0, 2.5  # shares that are drawn


def write_search(found: Tuned, judge: Judge, split: Split, model: str, out: Path) -> Path:
    """
    Args:
        judge: by which the trials were judged, and so is `split`
        model: the base's name

    Returns:
        The page.

    Raises:
        InputError: a file cannot be written.
    """
    names = short_names([*found.single])
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PAGE).unlink(missing_ok=True)
        with replaced(out / JSON) as file:
            file.write_text(json.dumps(as_json(found), indent=1), encoding="utf-8")
        pictures = [drawn(picture, out, PNG) for picture in search_pictures(found, judge, split)]
        finalists = [
            (
                one.tried.spec.described(),
                shown(one.kept.mean),
                *(shown(one.kept.tasks[task]) if task in one.kept.tasks else "-" for task in found.single),
            )
            for one in found.finalists
        ]
        trials = ("merge", "stage", "round", f"retained ({found.goal})", "rank")
        render(
            out,
            PAGE,
            "score.html.j2",
            generator=GENERATOR,
            title=f"Search: {', '.join(names)}",
            subtitle=f"base {model}; {len(found.tried)} trials",
            sentences=sentences(found),
            pictures=pictures,
            tables=[
                ("On texts that the search never saw", ("merge", "mean", *names), finalists, (0,)),
                ("The best trials", trials, list(best_rows(found.tried)), (1,)),
            ],
            terms=(*STAGES, *TERMS),
            foot="Losses are measured in memory; no text is kept.",
        )
    except OSError as error:
        raise InputError(f"{out}: the report could not be written: {error}") from error
    return out / PAGE


def search_pictures(found: Tuned, judge: Judge, split: Split) -> Iterator[Picture]:
    """What each trial of the last rounds retains of each task, if two tasks have a gain to retain."""
    known = [one for one in found.tried if one.value is not None]  # all losses of these are finite
    lines = [(one, shares) for one in known if (shares := trial_shares(one, judge, split))]
    furthest = max((one.round for one, _ in lines), default=0)
    lines = [(one, shares) for one, shares in lines if one.round == furthest]
    tasks = [task for task in judge.texts if all(task in shares for _, shares in lines)]
    if len(tasks) < 2 or not lines:
        return
    lines.sort(key=lambda line: line[0].value or 0.0)
    names = dict(zip(judge.texts, short_names([*judge.texts])))
    best = ", ".join(f"{names[task]} {lines[-1][1][task]:.2f}" for task in tasks)
    yield Picture(
        "tradeoff",
        "The trade-off between tasks",
        "A line is a trial on the texts of the search: the share of each adapter's gain that it retains. "
        "Lines that cross give one adapter more and another less. The best trials have colours. 0 is the "
        "base, 1 the adapter alone.",
        f"Share of each adapter's gain by trial; the best trial: {best}.",
        partial(_draw_tradeoff, lines=lines, tasks=tasks, names=[names[task] for task in tasks]),
    )


def trial_shares(one: Tried, judge: Judge, split: Split) -> Mapping[str, float]:
    """The share of each adapter's gain that a trial retains, on the texts of its last round."""
    if not one.losses:
        return {}
    numbers = {task: own for task, own in split.rounds[one.round].items() if task != GENERAL}
    base, single = only(judge.base.losses, numbers), only(judge.single.losses, numbers)
    return {
        task: (mean_loss(base[task]) - mean_loss(one.losses[task])) / gain
        for task, gain in gains(base, single).items()
        if gain > LEAST_GAIN
    }


_MARKS = "osD^v"  # one of each of the best


def _draw_tradeoff(
    theme: Theme,
    lines: Sequence[tuple[Tried, Mapping[str, float]]],
    tasks: Sequence[str],
    names: Sequence[str],
) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    ax = figure.subplots()
    where = range(len(tasks))
    for place, (one, shares) in enumerate(lines):
        rank = len(lines) - 1 - place  # the best is 0
        heights = [shares[task] for task in tasks]
        if rank < BEST:
            colour, dashes = theme.lines[rank % len(theme.lines)], ("-", "--")[rank // len(theme.lines)]
            label = one.spec.described()
            label = label if len(label) < 100 else f"{label[:98]}…"
            ax.plot(
                where, heights, dashes, color=colour, linewidth=2, marker=_MARKS[rank], label=label, zorder=3
            )
        else:
            ax.plot(where, heights, color=theme.text, alpha=0.2, linewidth=0.9, zorder=1)
    ax.axhline(1, color=theme.text, linewidth=0.8, linestyle="--")
    ax.axhline(0, color=theme.text, linewidth=0.8, linestyle=":")
    seen = [shares[task] for _, shares in lines[-max(BEST, len(lines) // 2) :] for task in tasks]
    low, high = max(min(seen), LOWEST), max(min(max(seen), HIGHEST), 1.0)
    ax.set_ylim(min(low, 0.9) - 0.05, high + 0.1)
    ax.set_xticks(where, names)
    ax.set_ylabel("share retained")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(  # the best first
        handles[::-1],
        labels[::-1],
        loc="outside lower left",
        frameon=False,
        labelcolor=theme.text,
        fontsize=8,
        handlelength=4,
    )
    return figure
