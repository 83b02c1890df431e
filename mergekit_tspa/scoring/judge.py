"""A base model in memory, read once, that says how well it answers texts with whatever stands beside it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import NamedTuple

import torch

from mergekit_tspa.calibration.batches import Batch, Texts, make_batches
from mergekit_tspa.calibration.examples import Example, Tokenizer
from mergekit_tspa.calibration.generate import write_answers
from mergekit_tspa.calibration.layers import Progress, frozen, silent
from mergekit_tspa.calibration.score import ANSWER_TOKENS, answer_logits
from mergekit_tspa.calibration.singles import Singles
from mergekit_tspa.errors import InputError
from mergekit_tspa.scoring.exact_match import matches
from mergekit_tspa.scoring.losses import Losses, TextLoss
from mergekit_tspa.scoring.placement import Placement, placed

GENERAL = "(general)"  # the task of texts that no adapter was trained on


class Written(NamedTuple):
    """An answer that was written to a text that says what the right one is."""

    right: bool
    tokens: int


class Judged(NamedTuple):
    """What was seen of one model."""

    losses: Losses
    written: Mapping[str, Sequence[Written]]  # by task, of the texts with an `answer`


class Judge:
    """Texts to judge by, beside the base and its adapters.

    Args:
        singles: the base in memory, and the adapters; each is a task of its own
        texts: of each adapter; those without an answer are left out
        general: texts that no adapter was trained on
        tokenizer: of the base, for answers that are written
        new_tokens: an answer that is written has at most so many; 0 writes none
        batch_tokens: in a pass
        progress: hears of long work

    Raises:
        InputError: an adapter has no text with an answer.
    """

    def __init__(
        self,
        singles: Singles,
        texts: Texts,
        general: Sequence[Example] = (),
        tokenizer: Tokenizer = None,
        new_tokens: int = 0,
        batch_tokens: int = ANSWER_TOKENS,
        progress: Progress = silent,
    ):
        self.singles, self.tokenizer, self.new_tokens = singles, tokenizer, new_tokens
        self.batch_tokens, self.progress = batch_tokens, progress
        self.texts = {name: [e for e in texts.get(name, ()) if e.answer_tokens] for name in singles.names}
        for name, own in self.texts.items():
            if not own:
                raise InputError(f"{name}: there is no text with an answer to judge merges by")
        self.general = [example for example in general if example.answer_tokens]

    @property
    def every(self) -> dict[str, list[Example]]:
        """All texts, by task."""
        return self.texts | ({GENERAL: self.general} if self.general else {})

    @cached_property
    def base(self) -> Judged:
        """The base alone."""
        return self.judge("the base", self.singles, nullcontext)

    @cached_property
    def single(self) -> Judged:
        """Each adapter alone on its own texts."""
        return Judged(self._single_losses(), self._written("single adapters", self.singles, None))

    def merged(self, name: str, placement: Placement, texts: Texts | None = None) -> Judged:
        """A merge.

        Args:
            name: for the progress
            placement: of the merge, by `place`
            texts: to judge by, by default all; then nothing is written
        """
        return self.judge(name, self.singles, lambda: placed(self.singles, placement), texts)

    def judge(
        self,
        name: str,
        singles: Singles,
        standing: Callable[[], AbstractContextManager[None]],
        texts: Texts | None = None,
    ) -> Judged:
        """A model with whatever stands beside it.

        Args:
            name: for the progress
            singles: the model, the judge's own or another
            standing: while it lasts the model is the one that is judged
            texts: to judge by, by default all; then nothing is written
        """
        with standing():
            losses = self._losses(name, singles, self.every if texts is None else texts)
            written = {} if texts is not None else self._written(name, singles, nullcontext)
        return Judged(losses, written)

    def _losses(self, name: str, singles: Singles, texts: Texts) -> Losses:
        return self._read(name, singles, make_batches(texts, self.batch_tokens), None)

    def _single_losses(self) -> Losses:
        """All adapters side by side."""
        batches = self.singles.batches(self.texts, self.batch_tokens)
        return self._read("single adapters", self.singles, batches, self.singles.alone)

    @torch.no_grad()
    def _read(
        self,
        name: str,
        singles: Singles,
        batches: Sequence[Batch],
        alone: Callable[[Sequence[tuple[str, slice]]], AbstractContextManager[None]] | None,
    ) -> Losses:
        found: dict[int, TextLoss] = {}  # by the text's identity
        for done, batch in enumerate(batches):
            self.progress(f"{name} reads", done / len(batches), None)
            with frozen(singles.model), alone(batch.parts) if alone else nullcontext():
                logits = answer_logits(singles, batch)
            tokens = [example.tokens[example.start :] for example in batch.examples]
            ids = torch.tensor([token for own in tokens for token in own], device=logits.device)
            loss = torch.nn.functional.cross_entropy(logits, ids, reduction="none").double()
            for example, own in zip(batch.examples, loss.split([len(own) for own in tokens])):
                found[id(example)] = TextLoss(float(own.sum()), len(own))
        tasks = {task: None for batch in batches for task in batch.names}
        return {
            task: [found[id(e)] for e in own if id(e) in found]
            for task, own in self.every.items()
            if task in tasks
        }

    def _written(
        self,
        name: str,
        singles: Singles,
        standing: Callable[[], AbstractContextManager[None]] | None,
    ) -> dict[str, list[Written]]:
        """Answers to the texts with an `answer`, the likeliest token at each step.

        Args:
            standing: None for each row's own adapter
        """
        asked = {task: [e for e in own if e.answer is not None] for task, own in self.texts.items()}
        asked = {task: own for task, own in asked.items() if own}
        if not asked or not self.new_tokens:
            return {}
        reading = None if standing is None else lambda parts: standing()
        questions = {task: [Example(e.prompt, None, e.answer) for e in own] for task, own in asked.items()}
        written = write_answers(
            singles,
            questions,
            self.new_tokens,
            temperature=0,
            batch_tokens=self.batch_tokens,
            progress=self.progress,
            reading=reading,
        )
        return {task: [self._marked(example) for example in own] for task, own in written.items()}

    def _marked(self, example: Example) -> Written:
        assert example.completion is not None and example.answer is not None
        text = self.tokenizer.decode(example.completion, skip_special_tokens=True)
        return Written(matches(text, example.answer), len(example.completion))
