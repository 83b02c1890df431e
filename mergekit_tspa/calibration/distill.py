"""Distillation of the single adapters into one, from what they say of their own texts and without labels.

Start from merged factors of rank r and lower `mean_t KL(p_t || p) / KL(p_t || p_base)`, where `p_t` is the
next-token distribution of adapter t alone on its own texts and `p` that of the merge.  Only `B` and `A` are
trained, in float32 beside the base, whose precision stays.  This is no published method.
"""

import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.calibration.batches import Batch
from mergekit_tspa.calibration.layers import Progress, frozen, silent
from mergekit_tspa.calibration.score import NOTHING, Answers, SingleAnswers, answer_logits, divergence, score
from mergekit_tspa.calibration.singles import Singles
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import seed_of
from mergekit_tspa.updates import LoraFactors, LowRank

ALIKE = 0.75  # of the longest text's length; with fewer texts in a batch less is padded


class Distilled(NamedTuple):
    """Merged factors after distillation."""

    updates: dict[str, LoraFactors]
    steps: int  # after which these were the best on the texts that were held out
    start: float  # mean_t KL_t / KL_t of the base, on those texts
    end: float


def distill(
    singles: Singles,
    updates: Mapping[str, LoraFactors],
    answers: SingleAnswers,
    steps: int = 48,
    texts_per_step: int = 2,
    rate: float = 1e-3,
    warm_up: int = 5,
    held_out: float = 0.125,
    every: int = 12,
    patience: int = 2,
    seed: int = 0,
    progress: Progress = silent,
) -> Distilled:
    """Train merged factors until they say what the single adapters say.

    AdamW without weight decay, gradients clipped to norm 1, a linear warm-up and then half a cosine.  The
    factors are balanced first (`B^T B = A A^T`), so that one rate suits both.  Some texts of each adapter are
    held out: the factors that are best on them are the result, the start among them, and the training ends
    when `patience` measurements in a row bring nothing.

    Args:
        singles: the model, not streamed, and its adapters
        updates: to start from, by tensor of the base and in its orientation
        answers: of the single adapters, computed once; see `single_answers`.  The rest of the vocabulary
            counts as one token, which with 128 tokens kept changes nothing that can be measured
        steps: of the optimiser
        texts_per_step: of each adapter
        rate: the largest learning rate
        warm_up: steps in which the rate rises
        held_out: share of each adapter's texts, at least one text
        every: so many steps between two measurements on the texts held out
        patience: how many measurements without a gain end the training
        seed: of the order of the texts
        progress: hears which fraction of the start's divergence is left

    Raises:
        InputError: an adapter has fewer than two texts, the base is streamed, or the training diverges.
    """
    if any(parameter.is_meta for parameter in singles.model.parameters()):
        raise InputError(
            "distillation needs the whole base in memory, not streamed from disk: give more memory"
        )
    train, held = split_answers(answers, held_out, seed)
    zero = {name: max(own.divergence, NOTHING) for name, own in score(singles, {}, held).items()}

    def measure(current: Mapping[str, LoraFactors]) -> float:
        kl = score(singles, current, held)
        return sum(own.divergence / zero[name] for name, own in kl.items()) / len(kl)

    parameters = {tensor: _balanced(factors) for tensor, factors in updates.items()}
    flat = [factor for factors in parameters.values() for factor in factors]
    optimiser = torch.optim.AdamW(flat, lr=rate, weight_decay=0.0)
    order = {name: _Order(own, seed_of(str(seed), name)) for name, own in train.items()}
    start = measure(updates)
    best = Distilled(dict(updates), 0, start, start)
    began, misses = time.monotonic(), 0
    for step in range(1, steps + 1):
        drawn = {name: own.draw(texts_per_step) for name, own in order.items()}
        for group in optimiser.param_groups:
            group["lr"] = rate * schedule(step, steps, warm_up)
        _descend(singles, parameters, flat, optimiser, drawn, zero)
        texts = step * texts_per_step * len(order)
        pace = texts / max(1e-9, time.monotonic() - began)
        left = best.end / start if start else 0.0
        progress(
            f"distilling {', '.join(Path(name).name for name in order)}, {pace:.2g} texts a second",
            step / steps,
            left,
        )
        if step % every == 0 or step == steps:
            current = {tensor: _detached(factors) for tensor, factors in parameters.items()}
            now = measure(current)
            misses = 0 if now < best.end else misses + 1
            if now < best.end:
                best = Distilled(current, step, start, now)
            if misses >= patience:
                break
    return best


def schedule(step: int, steps: int, warm_up: int) -> float:
    """Which share of the largest rate a step has, counted from 1."""
    return min(1.0, step / warm_up if warm_up else 1.0) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def split_answers(
    answers: SingleAnswers, held_out: float, seed: int
) -> tuple[dict[str, list[Answers]], dict[str, list[Answers]]]:
    """Texts to train on, and at least one of each adapter that is held out.

    Raises:
        InputError: an adapter has fewer than two.
    """
    check_texts(answers)
    train, held = {}, {}
    for name, own in answers.items():
        shuffled = random.Random(seed_of(str(seed), name)).sample(list(own), len(own))
        count = min(len(own) - 1, max(1, round(held_out * len(own))))
        held[name], train[name] = shuffled[:count], shuffled[count:]
    return train, held


def check_texts(texts: Mapping[str, Sequence[object]]) -> None:
    """
    Raises:
        InputError: an adapter has fewer than two.
    """
    for name, own in texts.items():
        if len(own) < 2:
            raise InputError(
                f"{name}: distillation needs at least two texts of it, one of them to be held out"
            )


class _Order:
    """Draws texts in random order, each once before one comes again."""

    def __init__(self, own: Sequence[Answers], seed: int):
        self.own, self.random = own, random.Random(seed)
        self.queue: list[Answers] = []

    def draw(self, count: int) -> list[Answers]:
        drawn = []
        for _ in range(count):
            if not self.queue:
                self.queue = self.random.sample(list(self.own), len(self.own))
            drawn.append(self.queue.pop())
        return drawn


def _descend(
    singles: Singles,
    parameters: Mapping[str, LoraFactors],
    flat: Sequence[Tensor],
    optimiser: torch.optim.Optimizer,
    drawn: Mapping[str, Sequence[Answers]],
    zero: Mapping[str, float],
) -> None:
    """One step on some texts of each adapter, every adapter counting as much as another.

    Raises:
        InputError: the divergence is NaN or infinite.
    """
    # Each token's share: adapters count alike, and so do the tokens of an adapter.
    sizes = {name: sum(answer.example.answer_tokens for answer in own) for name, own in drawn.items()}
    shares = {name: 1 / (size * zero[name] * len(sizes)) for name, size in sizes.items()}
    optimiser.zero_grad()
    for texts in alike_in_length([(name, answer) for name, own in drawn.items() for answer in own]):
        batch = Batch.of((name, answer.example) for name, answer in texts)
        with torch.enable_grad(), frozen(singles.model):
            with singles.merged(parameters):
                logits = answer_logits(singles, batch)
            apart = divergence(logits, [answer for _, answer in texts])
            own = [torch.full((answer.example.answer_tokens,), shares[name]) for name, answer in texts]
            loss = apart @ torch.cat(own).to(apart.device)
            if not torch.isfinite(loss):
                raise InputError("the distillation diverges; give a smaller rate")
            # Not backward(), which would leave gradients on the model if somebody trains it.
            gradients = torch.autograd.grad(loss, list(flat), allow_unused=True)
        for factor, gradient in zip(flat, gradients):
            if gradient is not None:
                factor.grad = gradient if factor.grad is None else factor.grad + gradient
    torch.nn.utils.clip_grad_norm_(flat, 1.0)
    optimiser.step()


def alike_in_length(texts: Iterable[tuple[str, Answers]]) -> list[list[tuple[str, Answers]]]:
    """The texts in groups of which none is much longer than another, so that little is padded.

    Within a group those of an adapter stand next to each other, as in a batch.
    """
    groups: list[list[tuple[str, Answers]]] = []
    for text in sorted(texts, key=lambda text: -len(text[1].example.tokens)):
        if groups and len(text[1].example.tokens) >= ALIKE * len(groups[-1][0][1].example.tokens):
            groups[-1].append(text)
        else:
            groups.append([text])
    return [sorted(group, key=lambda text: text[0]) for group in groups]


def _balanced(factors: LoraFactors) -> LoraFactors:
    """The same update as trainable factors with `B^T B = A A^T`, as many columns as before."""
    balanced = LowRank(*factors.to(torch.float32)).truncated(factors.rank).padded(factors.rank)
    return LoraFactors(*(factor.contiguous().requires_grad_(True) for factor in balanced))


def _detached(factors: LoraFactors) -> LoraFactors:
    return LoraFactors(*(factor.detach().clone() for factor in factors))
