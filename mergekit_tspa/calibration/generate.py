"""Answers that adapters write themselves, sampled with a seed."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_tspa.calibration.examples import Example, Tokenizer, assistant_header, context_length
from mergekit_tspa.calibration.layers import Progress, frozen, silent
from mergekit_tspa.calibration.singles import BATCH_TOKENS, Model, Pace, Singles
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import finite, seed_of

Parts: TypeAlias = Sequence[tuple[str, slice]]  # whose texts which rows of a batch are


class Question(NamedTuple):
    """A prompt without an answer, and where it is among the texts of its adapter."""

    name: str
    position: int
    prompt: tuple[int, ...]


def write_answers(
    singles: Singles,
    texts: Mapping[str, Sequence[Example]],
    new_tokens: int = 96,
    seed: int = 0,
    temperature: float = 1.0,
    stop: Collection[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
    reading: Callable[[Parts], AbstractContextManager[None]] | None = None,
) -> dict[str, list[Example]]:
    """The texts, with an answer sampled by the text's own adapter wherever there is none.

    What is drawn for an answer depends on the seed, on the adapter's name and on the text's position, so that
    other adapters and the size of the batches change nothing of it but rounding.

    Args:
        singles: the model and its adapters
        texts: by adapter; those with a completion stay as they are.  Of a prompt that leaves no room for the
            answer in the model's context the end is kept, which asks for it
        new_tokens: an answer has at most so many
        seed: of the samples
        temperature: 1 samples what the adapter says, 0 takes the likeliest token
        stop: tokens that end an answer, by default those of the model's generation configuration
        batch_tokens: in a batch, those to be written included
        reading: what stands beside the model while it writes the answers of a batch with these parts, by
            default each row's own adapter

    Raises:
        InputError: texts of an adapter that is not there, or logits that are NaN or infinite.
    """
    if reading is None:
        singles.check(texts)
    context = context_length(singles.model.config)
    room = max(1, context - new_tokens) if context else 0
    new_tokens = min(new_tokens, context - room) if context else new_tokens
    questions = [
        Question(name, position, example.prompt[-room:])
        for name, own in texts.items()
        for position, example in enumerate(own)
        if example.completion is None
    ]
    ends = _ends(singles.model) if stop is None else frozenset(stop)
    written = {name: list(own) for name, own in texts.items()}
    pace = Pace("writing", len(questions), progress)
    for batch in _batches(questions, batch_tokens - new_tokens, singles.apart):
        answers = _sample(singles, reading or singles.alone, batch, new_tokens, seed, temperature, ends, pace)
        for question, answer in zip(batch, answers):
            own = written[question.name]
            own[question.position] = Example(question.prompt, answer, own[question.position].answer)
        pace.finished(len(batch))
    return written


def self_texts(
    singles: Singles,
    tokenizer: Tokenizer,
    count: int = 32,
    new_tokens: int = 110,
    names: Sequence[str] | None = None,
    **sampling: Any,
) -> dict[str, list[Example]]:
    """Texts for users who have none: each adapter writes right after the chat template's assistant header.

    With no question in between, which an adapter would have to invent first, it writes answers of its own
    kind.

    Args:
        singles: the model and its adapters
        tokenizer: of the base
        count: of each adapter's texts
        new_tokens: a text has at most so many after the header
        names: of the adapters that write, by default all
        **sampling: as for `write_answers`

    Raises:
        InputError: the tokenizer has no header and no token that begins a text.
    """
    header = assistant_header(tokenizer)
    return write_answers(
        singles,
        {name: [Example(header, None)] * count for name in names or singles.names},
        new_tokens,
        **sampling,
    )


def _ends(model: Model) -> frozenset[int]:
    """The tokens after which the model's own generation stops."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def _batches(questions: Sequence[Question], tokens: int, apart: bool) -> Iterator[list[Question]]:
    """Questions of about equal length, those of one adapter next to each other."""
    order = {name: position for position, name in enumerate(dict.fromkeys(q.name for q in questions))}
    groups = [[q for q in questions if q.name == name] for name in order] if apart else [list(questions)]
    for group in groups:
        group.sort(key=lambda q: -len(q.prompt))
        while group:
            size = max(1, tokens // len(group[0].prompt))
            yield sorted(group[:size], key=lambda q: order[q.name])
            del group[:size]


def _sample(
    singles: Singles,
    reading: Callable[[Parts], AbstractContextManager[None]],
    questions: Sequence[Question],
    new_tokens: int,
    seed: int,
    temperature: float,
    ends: Collection[int],
    pace: Pace,
) -> list[tuple[int, ...]]:
    """An answer to each question, without a token that follows its end."""
    device, n = singles.device, len(questions)
    longest = max(len(question.prompt) for question in questions)
    ids = torch.zeros(n, longest, dtype=torch.long)
    mask = torch.zeros(n, longest, dtype=torch.long)
    for row, question in enumerate(questions):
        ids[row, longest - len(question.prompt) :] = torch.tensor(question.prompt)
        mask[row, longest - len(question.prompt) :] = 1
    draws = torch.stack([_draws(seed, question, new_tokens) for question in questions])
    names = [question.name for question in questions]
    parts = [
        (name, slice(names.index(name), names.index(name) + names.count(name)))
        for name in dict.fromkeys(names)
    ]

    answers: list[list[int]] = [[] for _ in questions]
    done = [False] * n
    step, cache, positions = ids, None, (mask.cumsum(1) - 1).clamp(min=0)
    # Only the last token's logits are wanted; a few models know no such argument.
    known = inspect.signature(singles.model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    with torch.no_grad(), frozen(singles.model), reading(parts):
        for position in range(new_tokens):
            output = singles.model(
                input_ids=step.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=cache,
                use_cache=True,
                **last_only,
            )
            cache = output.past_key_values
            tokens = _pick(output.logits[:, -1].float(), draws[:, position], temperature)
            for row, token in enumerate(tokens.tolist()):
                if not done[row]:
                    answers[row].append(token)
                    done[row] = token in ends
            pace.at(list(dict.fromkeys(names)), n, share=(position + 1) / new_tokens)
            if all(done):
                break
            step, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(n, 1)], dim=1)
    return [tuple(answer) for answer in answers]


def _draws(seed: int, question: Question, new_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(str(seed), question.name, str(question.position)))
    return torch.rand(new_tokens, generator=generator, dtype=torch.float64)


def _pick(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """Tokens from `softmax(logits / temperature)`, by the inverse of its cumulative sum.

    Args:
        logits: (n, vocabulary)
        draws: uniform in [0, 1)  # (n,)

    Returns:
        (n,), on the CPU
    """
    if not finite(logits):
        raise InputError("the model's logits are NaN or infinite; load it in float32, or check the adapters")
    if temperature == 0:
        return logits.argmax(dim=-1).cpu()
    reached = (logits / temperature).softmax(dim=-1).double().cumsum(dim=-1).cpu()
    picked = torch.searchsorted(reached, draws[:, None] * reached[:, -1:], right=True)
    return picked[:, 0].clamp(max=logits.shape[-1] - 1)
