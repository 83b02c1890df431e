"""What a base model and its adapters say of a merge's texts; each thing is made when it is first wanted."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.examples import Example, Tokenizer, context_length, read_examples
from mergekit_tspa.calibration.generate import self_texts, write_answers
from mergekit_tspa.calibration.layers import Progress, silent
from mergekit_tspa.calibration.load import load_model, load_tokenizer
from mergekit_tspa.calibration.moments import Inputs, InputStatistics, input_statistics
from mergekit_tspa.calibration.score import ANSWER_TOKENS, Answers, single_answers
from mergekit_tspa.calibration.singles import BATCH_TOKENS, Model, Singles
from mergekit_tspa.calibration.store import hash_adapter, hash_base, load_statistics
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import seed_of
from mergekit_tspa.updates import Dense, LowRank

SELF = "self"
FEW_TOKENS = 256  # of an adapter's texts; below this the ridge has much to say


# A file of texts, or its rows, or `self`: the adapter writes them.
GivenTexts: TypeAlias = Path | str | Sequence[Mapping[str, Any]]


class TextSource(NamedTuple):
    """Where an adapter's texts come from, or statistics that were made of texts before."""

    examples: GivenTexts | None = None
    calibration: Path | None = None
    held_out: GivenTexts | None = None  # by which a merge is judged; no method sees them
    part: Literal["all", "to merge", "to judge"] = "all"  # of the examples

    @property
    def empty(self) -> bool:
        return self.examples is None and self.calibration is None


class Reading(NamedTuple):
    """How texts are read and written."""

    self_texts: int = 32  # how many an adapter writes by itself
    new_tokens: int = 110  # an answer that an adapter writes has at most so many
    temperature: float = 0.7  # of what it writes; 0 takes the likeliest token
    seed: int = 42
    batch_tokens: int = BATCH_TOKENS
    memory: float | None = None  # GiB for the base; by default most of what is free


class Readings:
    """The base, its adapters, and their texts.

    Args:
        base: the base as adapters see it
        directory: of the base; None if `model` and `tokenizer` are given
        sources: of each adapter's texts
        how: texts are read and written
        device: where the model computes
        progress: hears of all long work
        model: if it is in memory already
        tokenizer: of the base, by default the one beside it
    """

    def __init__(
        self,
        base: ModelTensors,
        directory: Path | None,
        sources: Mapping[Adapter, TextSource],
        how: Reading | None = None,
        device: torch.device | str = "cpu",
        progress: Progress = silent,
        model: Model = None,
        tokenizer: Tokenizer = None,
    ):
        self.base, self.directory, self.sources, self.how = base, directory, sources, how or Reading()
        self.device, self.progress = torch.device(device), progress
        self.warnings: list[str] = []  # of what was read so far; numbers, and no text
        # What another method makes of the same adapters, given it and its parameters: tensors and updates.
        self.merged_by: Callable[..., Iterable[tuple[str, LowRank | Dense]]] | None = None
        self._model, self._tokenizer = model, tokenizer
        self._said: dict[int | None, dict[str, list[Answers]]] = {}  # by how many texts of each

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        return tuple(self.sources)

    @property
    def has_texts(self) -> bool:
        """Whether texts of every adapter are at hand, and not only statistics of them."""
        return all(source.examples is not None for source in self.sources.values())

    @property
    def has_given_texts(self) -> bool:
        """Whether these were given, as opposed to written by the adapter with no prompt."""
        return self.has_texts and all(source.examples != SELF for source in self.sources.values())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None and self.directory is None:
            raise InputError("a model in memory has no tokenizer: give tokenizer=")
        return self._tokenizer or load_tokenizer(self._path)

    @cached_property
    def model(self) -> Model:
        if self._model is not None:
            return self._model
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.progress("loading the base", 0.0, None)
        return load_model(self._path, dtype, self.memory_limit, self.device)

    @property
    def memory_limit(self) -> int | None:
        """Bytes that the base may take; a larger one is streamed."""
        given = self.how.memory
        return free_memory(self.device) if given is None else int(given * 2**30)

    @cached_property
    def singles(self) -> Singles:
        """The adapters beside the base, those with texts only."""
        reading = [adapter for adapter, source in self.sources.items() if source.examples is not None]
        return Singles(self.model, self.base, reading)

    def texts(self) -> dict[str, list[Example]]:
        """The texts that are given, by adapter; those without an answer are not written yet.

        Raises:
            InputError: a file that is not readable, or a line that is no example.
        """
        found = {}
        for adapter, source in self.sources.items():
            if source.examples is None or source.examples == SELF:
                continue
            found[adapter.name] = part_of(self.read(source.examples, adapter.name), source.part)
        return found

    def read(self, given: GivenTexts, name: str) -> list[Example]:
        """Texts as tokens.

        Args:
            given: a file or rows
            name: whose they are, for a warning that they are too long

        Raises:
            InputError: a file that is not readable, or a line that is no example.
        """
        rows = Path(given) if isinstance(given, str | Path) else given
        examples, cut = read_examples(rows, self.tokenizer, self._context)
        if cut:
            self.warnings.append(
                f"{name}: {cut} of {len(examples)} texts are longer than the model's context of "
                f"{self._context} tokens and were cut"
            )
        return list(examples)

    @cached_property
    def written(self) -> dict[str, list[Example]]:
        """The texts of every adapter, with answers that it wrote itself where none are given."""
        sampling: dict[str, Any] = {
            "seed": self.how.seed,
            "temperature": self.how.temperature,
            "batch_tokens": self.how.batch_tokens,
            "progress": self.progress,
        }
        texts = self.texts()  # before the model is loaded: a wrong file is said at once
        texts = write_answers(self.singles, texts, self.how.new_tokens, **sampling)
        for part in ("all", "to merge", "to judge"):
            alone = [a.name for a, s in self.sources.items() if s.examples == SELF and s.part == part]
            if alone:
                seed = self.how.seed + (part == "to judge")  # other texts, not a share of them
                texts |= self_texts(
                    self.singles,
                    self.tokenizer,
                    self.how.self_texts,
                    self.how.new_tokens,
                    alone,
                    **sampling | {"seed": seed},
                )
        for name, own in texts.items():
            self.warnings += few_tokens(name, own)
        return {name: texts[name] for name in self.singles.names}

    @cached_property
    def statistics(self) -> dict[str, dict[str, InputStatistics]]:
        """Second moments of every adapter's inputs, from files or in one pass, by adapter and tensor."""
        found = self.stored()
        if len(found) < len(self.sources):
            found |= input_statistics(
                self.singles, self.written, batch_tokens=self.how.batch_tokens, progress=self.progress
            )
        return {adapter.name: found[adapter.name] for adapter in self.adapters}

    def answers(self, texts: int | None = None) -> dict[str, list[Answers]]:
        """What single adapters say of their texts, or of the first so many of each; computed once."""
        if texts not in self._said:
            chosen = {name: own[:texts] for name, own in self.written.items()}
            if texts is not None and None in self._said:
                few = {name: {id(example) for example in own} for name, own in chosen.items()}
                said = self._said[None].items()
                return {name: [one for one in own if id(one.example) in few[name]] for name, own in said}
            self._said[texts] = single_answers(
                self.singles, chosen, batch_tokens=self.answer_tokens, progress=self.progress
            )
        return self._said[texts]

    def study(self) -> None:
        """`statistics` and `answers` of all texts from the same passes, for what will want both."""
        known = "statistics" in self.__dict__ or None in self._said
        if known or any(source.examples is None for source in self.sources.values()):
            return
        if not all(example.answer_tokens for own in self.written.values() for example in own):
            return  # a text without an answer has statistics, and nothing is said to it
        inputs = Inputs(self.singles)
        self._said[None] = single_answers(
            self.singles,
            self.written,
            batch_tokens=self.answer_tokens,
            progress=self.progress,
            inputs=inputs,
        )
        self.statistics = inputs.statistics()

    @property
    def answer_tokens(self) -> int:
        """How many tokens are read at once where their logits are wanted."""
        return min(ANSWER_TOKENS, self.how.batch_tokens)

    @property
    def _path(self) -> Path:
        """
        Raises:
            InputError: the base is a model in memory, whose files are not known.
        """
        if self.directory is None:
            raise InputError("the files of a model in memory are not known: give examples, no calibration")
        return self.directory

    @property
    def _context(self) -> int | None:
        if self._model is not None:
            return context_length(self._model.config)
        limit = Checkpoint(self._path).config().get("max_position_embeddings")
        return int(limit) if limit else None

    def stored(self) -> dict[str, dict[str, InputStatistics]]:
        """The statistics of adapters that have files of them in place of texts.

        Raises:
            InputError: statistics of another base or adapter, or no statistics.
        """
        wanted = {a: s.calibration for a, s in self.sources.items() if s.calibration and s.examples is None}
        if not wanted:
            return {}
        base = hash_base(Checkpoint(self._path))
        return {
            adapter.name: load_statistics(file, base, hash_adapter(adapter))
            for adapter, file in wanted.items()
        }


def few_tokens(name: str, examples: Sequence[Example]) -> list[str]:
    """A warning if an adapter's texts have too few tokens for the ridge, or none."""
    tokens = sum(len(example.tokens) for example in examples)
    if tokens >= FEW_TOKENS:
        return []
    return [
        f"{name}: its {len(examples)} texts have {tokens} tokens together, which says little of its inputs; "
        "give more"
    ]


def part_of(examples: Sequence[Example], part: str) -> list[Example]:
    """The third of some texts that judges a merge, or the other two thirds, or all.

    Which texts are set aside depends on the texts alone, not on their order or on the file they are in.

    Raises:
        InputError: there is one text only.
    """
    if part == "all":
        return list(examples)
    if len(examples) < 2:
        raise InputError("one text cannot be divided into texts to merge and texts to judge: give more")
    shuffled = sorted(range(len(examples)), key=lambda i: seed_of(*map(str, examples[i].tokens)))
    aside = set(shuffled[: -(-len(examples) // 3)])
    return [example for i, example in enumerate(examples) if (i in aside) == (part == "to judge")]


def free_memory(device: torch.device) -> int | None:
    """Most of the memory that is free, in bytes; None where the system does not say."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(0.7 * 1024 * int(line.split()[1]))
        return int(0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (OSError, ValueError):
        return None
