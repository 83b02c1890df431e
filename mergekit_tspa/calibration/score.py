"""How close merged updates come to the single adapters, measured in memory on the single adapters' own
texts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from mergekit_tspa.calibration.batches import Batch, Texts, make_batches
from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.calibration.layers import Progress, frozen, silent
from mergekit_tspa.calibration.moments import Inputs
from mergekit_tspa.calibration.singles import Pace, Singles
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import finite
from mergekit_tspa.updates import LoraFactors

TOP = 128
ANSWER_TOKENS = 2048  # in a pass, because their logits are in memory together
NOTHING = 1e-6  # a divergence that is only rounding
GRID = (1.0, 1.25, 1.5)
SMALLEST, LARGEST = 0.25, 2.5  # of lambda


class Answers(NamedTuple):
    """What a single adapter says of each token of its answer: its likeliest tokens, and the rest as one.

    In this form 128 tokens and their probabilities stand for a vocabulary of 50 or 150 thousand.  The
    divergence from it is that of the distributions with all other tokens taken as one: never above the exact
    one, and equal to it for as many tokens as the vocabulary has.
    """

    example: Example
    tokens: Tensor  # (n, top)
    log_p: Tensor  # (n, top)
    log_rest: Tensor  # (n,)


SingleAnswers: TypeAlias = Mapping[str, Sequence[Answers]]  # by adapter


class Score(NamedTuple):
    """Means over the answers' tokens of one adapter's texts."""

    loss: float  # -log p of the text
    divergence: float  # KL(p_single || p)


@torch.no_grad()
def single_answers(
    singles: Singles,
    texts: Texts,
    top: int = TOP,
    batch_tokens: int = ANSWER_TOKENS,
    progress: Progress = silent,
    inputs: Inputs | None = None,
) -> dict[str, list[Answers]]:
    """What every adapter alone says of its own texts, all adapters side by side.

    Args:
        singles: the model and its adapters
        texts: by adapter; texts without an answer are left out
        top: how many of the likeliest tokens are kept
        batch_tokens: in a pass
        inputs: takes the moments of the same texts, where they are wanted as well

    Raises:
        InputError: an adapter has no text with an answer, or says NaN.
    """
    answered = {name: [example for example in own if example.answer_tokens] for name, own in texts.items()}
    said: dict[str, list[Answers]] = {name: [] for name in singles.names}
    batches = singles.batches(answered, batch_tokens)
    pace = Pace("what single adapters say", sum(len(batch.examples) for batch in batches), progress)
    for batch in batches:
        hearing = inputs.taken(batch, pace) if inputs else nullcontext()
        with frozen(singles.model), singles.alone(batch.parts), hearing:
            logits = answer_logits(singles, batch)
        log_p, tokens = logits.log_softmax(dim=-1).topk(min(top, logits.shape[-1]), dim=-1)
        log_rest = _rest(log_p)
        start = 0
        for name, example in _owners(batch):
            own = slice(start, start + example.answer_tokens)
            said[name].append(Answers(example, tokens[own], log_p[own], log_rest[own]))
            start = own.stop
        pace.finished(len(batch.examples))
        pace.at(batch.names, 0)
    return said


@torch.no_grad()
def score(
    singles: Singles,
    updates: Mapping[str, LoraFactors],
    answers: SingleAnswers,
    scale: float = 1.0,
    batch_tokens: int = ANSWER_TOKENS,
) -> dict[str, Score]:
    """Losses of a merge, and its divergence from the single adapters, by adapter.

    The updates stand beside the base while this lasts, whose tensors are not touched.  What adapters trained
    directly, beside their factors, is not part of the merge here.

    Args:
        singles: the model and its adapters
        updates: the merge, by tensor of the base and in its orientation; none is the base itself
        answers: from `single_answers`
        scale: factor on the updates
        batch_tokens: in a pass
    """
    losses, divergences, counts = (dict.fromkeys(answers, 0.0) for _ in range(3))
    with frozen(singles.model), singles.merged(updates, scale):
        for batch, targets in answer_batches(answers, batch_tokens):
            logits = answer_logits(singles, batch)
            loss = torch.nn.functional.cross_entropy(
                logits, _answer_ids(batch).to(logits.device), reduction="none"
            )
            start = 0
            apart = divergence(logits, targets)
            for name, example in _owners(batch):
                own = slice(start, start + example.answer_tokens)
                losses[name] += float(loss[own].sum())
                divergences[name] += float(apart[own].sum())
                counts[name] += example.answer_tokens
                start = own.stop
    return {name: Score(losses[name] / counts[name], divergences[name] / counts[name]) for name in answers}


def divergence(logits: Tensor, answers: Sequence[Answers]) -> Tensor:
    """`KL(p_single || p)` of every token of the answers, differentiable.

    Args:
        logits: of the model whose distribution is p  # (n, vocabulary)
        answers: of as many tokens together, n

    Returns:
        (n,)
    """
    tokens = torch.cat([answer.tokens for answer in answers]).to(logits.device)
    log_p = torch.cat([answer.log_p for answer in answers]).to(logits.device)
    log_rest = torch.cat([answer.log_rest for answer in answers]).to(logits.device)
    log_q = logits.gather(1, tokens) - logits.logsumexp(dim=-1, keepdim=True)
    inside = (log_p.exp() * (log_p - log_q)).sum(-1)
    if tokens.shape[1] == logits.shape[1]:
        return inside
    return inside + log_rest.exp() * (log_rest - _rest(log_q))


class LambdaSearch(NamedTuple):
    """What a line search found."""

    lambda_: float
    tried: Mapping[float, float]  # mean_t KL_t(lambda) / KL_t(0) by lambda


def line_search(
    divergences: Callable[[float], Mapping[str, float]], grid: Sequence[float] = GRID
) -> LambdaSearch:
    """The lambda that minimises `mean_t KL_t(lambda) / KL_t(0)`.

    The grid goes on at an end that is the best so far, from .25 to 2.5.  A parabola through the best of its
    points and the two beside it gives the result.  The texts may be those that gave the statistics; a few of
    each adapter are enough.

    Args:
        divergences: from lambda to `KL_t` by adapter.  An adapter whose `KL_t(0)` is 0 says what the base
            says, and does not count
        grid: at least three points, increasing, all equally far apart
    """
    start = {name: kl for name, kl in divergences(0.0).items() if kl > NOTHING}
    if not start:
        return LambdaSearch(1.0, {})
    tried: dict[float, float] = {}

    def measure(point: float) -> None:
        kl = divergences(point)
        tried[point] = sum(kl[name] / start[name] for name in start) / len(start)

    for point in grid:
        measure(point)
    step = grid[1] - grid[0]
    while True:
        points = sorted(tried)
        best = min(points, key=tried.__getitem__)
        if best not in (points[0], points[-1]):
            break
        further = best + step if best == points[-1] else best - step
        if not SMALLEST <= further <= LARGEST:
            return LambdaSearch(best, tried)
        measure(further)
    middle = points.index(best)
    below, here, above = (tried[point] for point in points[middle - 1 : middle + 2])
    curvature = below - 2 * here + above
    shift = 0.5 * step * (below - above) / curvature if curvature > 0 else 0.0
    return LambdaSearch(best + shift, dict(sorted(tried.items())))


def search_lambda(
    singles: Singles,
    updates: Mapping[str, LoraFactors],
    answers: SingleAnswers,
    grid: Sequence[float] = GRID,
    batch_tokens: int = ANSWER_TOKENS,
    progress: Progress = silent,
) -> LambdaSearch:
    """`line_search` of a factor on merged updates.

    Args:
        singles: the model and its adapters
        updates: as for `score`, and so is `answers`
        grid: of lambda
        batch_tokens: in a pass
    """
    texts = sum(len(own) for own in answers.values())
    pace = Pace("lambda", (len(grid) + 1) * texts, progress)

    def divergences(scale: float) -> dict[str, float]:
        scored = score(singles, updates if scale else {}, answers, scale, batch_tokens)
        pace.finished(texts)
        pace.at([*answers], 0)
        return {name: own.divergence for name, own in scored.items()}

    return line_search(divergences, grid)


def answer_batches(answers: SingleAnswers, tokens: int) -> Iterator[tuple[Batch, list[Answers]]]:
    """Batches of the answers' texts, and the answers in the order of their rows."""
    by_name = {name: {id(answer.example): answer for answer in own} for name, own in answers.items()}
    texts = {name: [answer.example for answer in own] for name, own in answers.items()}
    for batch in make_batches(texts, tokens):
        yield batch, [by_name[name][id(example)] for name, example in _owners(batch)]


def answer_logits(singles: Singles, batch: Batch) -> Tensor:
    """Logits that predict the answers' tokens, row by row, in float32; NaN or infinite ones are refused.

    The head reads only the positions that are wanted.

    Returns:
        (tokens of answers, vocabulary)
    """
    where = torch.zeros_like(batch.counts)
    for row, example in zip(where, batch.examples):
        row[example.start - 1 : len(example.tokens) - 1] = True
    where = where.to(singles.device)
    head = None if singles.adapts_head else singles.model.get_output_embeddings()
    with _reading(head, where):
        logits = singles.model(input_ids=batch.ids.to(singles.device), use_cache=False).logits
    if logits.ndim == 3:
        logits = logits[where.to(logits.device)]
    found: Tensor = logits.float()
    if not finite(found.detach()):
        raise InputError("the model's logits are NaN or infinite; load it in float32, or check the adapters")
    return found


@contextmanager
def _reading(head: nn.Module | None, where: Tensor) -> Iterator[None]:
    """While this lasts a head is given only the positions `where`, as rows."""

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][where.to(args[0].device)], *args[1:])

    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _owners(batch: Batch) -> Iterator[tuple[str, Example]]:
    for name, rows in batch.parts:
        for example in batch.examples[rows]:
            yield name, example


def _answer_ids(batch: Batch) -> Tensor:
    return torch.tensor([token for example in batch.examples for token in example.tokens[example.start :]])


def _rest(log_p: Tensor) -> Tensor:
    """The log-probability of all tokens that are not listed.  # (n, top) -> (n,)"""
    return torch.log1p(-log_p.exp().sum(-1).clamp(max=1 - 1e-6))
