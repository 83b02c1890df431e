"""What losses say of a merge: the share of each adapter's gain that it retains, and how sure that is.

    retained_t = (loss_t of the base - loss_t of the merge) / (loss_t of the base - loss_t of adapter t alone)

with losses per token of the answers, in nats.  1: the merge answers the texts of adapter t as that adapter
does,
0: as the base does.  What belongs to all tasks is the mean over t.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

DRAWS = 2000  # of the bootstrap
LEVEL = 0.95  # of its intervals
LEAST_GAIN = 1e-4  # nats a token; of an adapter that gains less, no share can be told


class TextLoss(NamedTuple):
    """Of one text."""

    loss: float  # -log p of its answer, the sum over the tokens
    tokens: int


Losses: TypeAlias = Mapping[str, Sequence[TextLoss]]  # by task


class Interval(NamedTuple):
    """A value, and between which bounds 95 % of the resampled texts lie."""

    value: float
    low: float
    high: float


class Retained(NamedTuple):
    """Shares of the single adapters' gains."""

    tasks: Mapping[str, Interval]  # of those whose adapter gains something
    mean: Interval
    worst: Interval


def mean_loss(texts: Sequence[TextLoss]) -> float:
    """Per token of all texts together."""
    return sum(text.loss for text in texts) / sum(text.tokens for text in texts)


def gains(base: Losses, single: Losses) -> dict[str, float]:
    """By how much each adapter alone is better than the base on its own texts, in nats a token."""
    return {task: mean_loss(base[task]) - mean_loss(own) for task, own in single.items()}


def retained(base: Losses, single: Losses, merge: Losses, draws: int = DRAWS) -> Retained:
    """The shares, with intervals of a bootstrap over texts that is the same for all merges.

    Args:
        base: of the base on the texts of every task; so is `merge`
        single: of each adapter on its own texts
        draws: of the bootstrap, with a fixed seed
    """
    tasks = [task for task, gain in gains(base, single).items() if gain > LEAST_GAIN]
    if not tasks:
        nothing = Interval(math.nan, math.nan, math.nan)
        return Retained({}, nothing, nothing)
    generator = torch.Generator().manual_seed(0)
    shares = torch.stack([_shares(base[t], single[t], merge[t], draws, generator) for t in tasks])
    return Retained(
        {task: _interval(own) for task, own in zip(tasks, shares)},
        _interval(shares.mean(0)),
        _interval(shares.amin(0)),
    )


def loss_interval(texts: Sequence[TextLoss], draws: int = DRAWS) -> Interval:
    """The loss per token, with the same kind of interval."""
    counts = _counts(len(texts), draws, torch.Generator().manual_seed(0))
    return _interval(_loss(texts, counts))


def difference(
    base: Losses, single: Losses, one: Losses, other: Losses, worst: bool = False, draws: int = DRAWS
) -> Interval:
    """How much more of the gains the one merge retains than the other, on the same resampled texts.

    Args:
        worst: of the task where least is retained, in place of the mean
    """
    tasks = [task for task, gain in gains(base, single).items() if gain > LEAST_GAIN]
    if not tasks:
        return Interval(math.nan, math.nan, math.nan)
    drawn = []
    for merge in (one, other):
        generator = torch.Generator().manual_seed(0)
        shares = torch.stack([_shares(base[t], single[t], merge[t], draws, generator) for t in tasks])
        drawn.append(shares.amin(0) if worst else shares.mean(0))
    return _interval(drawn[0] - drawn[1])


def _shares(
    base: Sequence[TextLoss],
    single: Sequence[TextLoss],
    merge: Sequence[TextLoss],
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """Of one task on the texts as they are, and then on each draw of as many of them.  # (1 + draws,)"""
    counts = _counts(len(single), draws, generator)
    b, s, m = (_loss(texts, counts) for texts in (base, single, merge))
    gain = b - s
    return torch.where(gain > LEAST_GAIN, (b - m) / gain, torch.nan)


def _counts(texts: int, draws: int, generator: torch.Generator) -> Tensor:
    """How often each text is there: once, and then in each draw.  # (1 + draws, texts)"""
    drawn = torch.randint(texts, (draws, texts), generator=generator)
    counts = torch.zeros(draws, texts, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return torch.cat([torch.ones(1, texts, dtype=torch.float64), counts])


def _loss(texts: Sequence[TextLoss], counts: Tensor) -> Tensor:
    loss = torch.tensor([text.loss for text in texts], dtype=torch.float64)
    tokens = torch.tensor([text.tokens for text in texts], dtype=torch.float64)
    return (counts @ loss) / (counts @ tokens)


def _interval(values: Tensor) -> Interval:
    """Of the value itself and of the draws after it; draws without a gain do not count."""
    drawn = values[1:][values[1:].isfinite()]
    if not len(drawn):
        return Interval(float(values[0]), math.nan, math.nan)
    tail = (1 - LEVEL) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).tolist()
    return Interval(float(values[0]), low, high)
