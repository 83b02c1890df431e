"""What a search found, in sentences and as JSON."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mergekit_tspa.insight.inspection import short_names
from mergekit_tspa.scoring.judge import GENERAL
from mergekit_tspa.scoring.losses import mean_loss
from mergekit_tspa.scoring.score_report import json_interval, shown
from mergekit_tspa.tuning.study import Tried
from mergekit_tspa.tuning.tuner import Tuned

GOALS = {"mean": "on average", "worst": "of the adapter that loses most"}


def sentences(found: Tuned) -> list[str]:
    """Three: what was found, how sure that is, and what the second best was; then what was left out."""
    best, *others = found.finalists
    names = short_names([*found.single])
    tried = sum(one.value is not None for one in found.tried)
    rank = "no adapter" if best.tried.rank is None else f"an adapter of rank {best.tried.rank}"
    said = [
        f"The best of {tried} trials is {best.tried.spec.described()} ({rank}): it retains "
        f"{best.tried.value:.2f} of the single adapters' gains {GOALS[found.goal]} on the texts of the "
        f"search."
    ]
    each = ", ".join(
        f"{name} {best.kept.tasks[task].value:.2f}"
        for name, task in zip(names, found.single)
        if task in best.kept.tasks
    )
    if best.kept.tasks:
        each = f" ({each})"
    count = min(map(len, found.single.values()))
    goal = getattr(best.kept, found.goal)
    said.append(
        f"On texts that the search never saw, {count} or more of each adapter, it retains {shown(goal)} "
        f"{GOALS[found.goal]}{each}" + _harm(found) + "."
    )
    lead = found.lead()
    if others and lead is not None:
        other = others[0]
        kept = getattr(other.kept, found.goal)
        sure = (
            "that is outside chance"
            if lead.low > 0 or lead.high < 0
            else "the texts do not tell which is better"
        )
        led = f"the first leads it there by {lead.value:+.2f} ({lead.low:+.2f} to {lead.high:+.2f}): "
        said.append(
            f"The second best is {other.tried.spec.described()} with {shown(kept)}; "
            f"{led if math.isfinite(lead.value) else ''}{sure}."
        )
    else:
        said.append("There is no second best: no other method had a result.")
    if useless := [name for name, task in zip(names, found.single) if task not in best.kept.tasks]:
        said.append(
            f"No better than the base on these texts: {', '.join(useless)}; no share of its gain can be "
            "told, and it does not count there."
        )
    if found.left_out:
        said.append(f"Left out were {'; '.join(f'{name} ({why})' for name, why in found.left_out.items())}.")
    if found.untried:
        said.append(f"There was no time for {_some(found.untried)}; give more minutes.")
    return said


def _some(names: Sequence[str], most: int = 6) -> str:
    """
    >>> _some(["a", "b", "c", "d"], 3)
    'a, b, c and 1 more'
    """
    others = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + others


def _harm(found: Tuned) -> str:
    losses = found.finalists[0].losses
    if GENERAL not in losses:
        return ""
    own, base = mean_loss(losses[GENERAL]), mean_loss(found.base[GENERAL])
    return f"; on general texts its loss is {own:.3f}, the base's {base:.3f}"


def as_json(found: Tuned) -> dict[str, Any]:
    """Everything but texts."""
    return {
        "goal": found.goal,
        "sentences": sentences(found),
        "finalists": [
            {
                **_json_of(finalist.tried),
                "unseen_mean": json_interval(finalist.kept.mean),
                "unseen_worst": json_interval(finalist.kept.worst),
                "unseen": {task: json_interval(own) for task, own in finalist.kept.tasks.items()},
            }
            for finalist in found.finalists
        ],
        "trials": [_json_of(one) for one in found.tried],
        "left_out": found.left_out,
        "untried": found.untried,
    }


def _json_of(one: Tried) -> dict[str, Any]:
    return {
        "number": one.number,
        "stage": one.stage,
        "method": one.spec.method,
        "parameters": dict(one.spec.parameters),
        "weights": dict(one.spec.weights),
        "value": one.value,
        "round": one.round,
        "rank": one.rank,
        "within_limits": one.feasible,
        "error": one.error or None,
    }


def best_rows(tried: Sequence[Tried], most: int = 15) -> Iterator[tuple[str, ...]]:
    """The best trials as rows of a table: what, stage, value, rank."""
    known = [one for one in tried if one.value is not None]
    furthest = max((one.round for one in known), default=0)
    known.sort(key=lambda one: (one.round == furthest, one.feasible, one.value), reverse=True)
    for one in known[:most]:
        rank = "-" if one.rank is None else str(one.rank)
        yield one.spec.described(), one.stage, str(one.round + 1), f"{one.value:.3f}", rank
