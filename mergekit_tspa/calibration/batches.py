"""Texts of several adapters side by side, padded on the right."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_tspa.calibration.examples import Example

Texts: TypeAlias = Mapping[str, Sequence[Example]]  # by the name of the adapter that they are for


class Batch(NamedTuple):
    """Texts as rows, those of one adapter next to each other."""

    examples: tuple[Example, ...]
    parts: tuple[tuple[str, slice], ...]  # whose texts which rows are
    ids: Tensor  # (texts, tokens)
    counts: Tensor  # (texts, tokens), whether it is a token of a text and not padding

    @classmethod
    def of(cls, texts: Iterable[tuple[str, Example]]) -> "Batch":
        by_name: dict[str, list[Example]] = {}
        for name, example in texts:
            by_name.setdefault(name, []).append(example)
        parts: list[tuple[str, slice]] = []
        examples: list[Example] = []
        for name, own in by_name.items():
            parts.append((name, slice(len(examples), len(examples) + len(own))))
            examples += own
        lengths = torch.tensor([len(example.tokens) for example in examples])
        ids = torch.zeros(len(examples), int(lengths.max()), dtype=torch.long)
        for row, example in zip(ids, examples):
            row[: len(example.tokens)] = torch.tensor(example.tokens)
        counts = torch.arange(ids.shape[1]) < lengths[:, None]
        return cls(tuple(examples), tuple(parts), ids, counts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)


def make_batches(texts: Texts, tokens: int, apart: bool = False, padded: bool = True) -> list[Batch]:
    """Batches of about equally long texts, so that little is padded.

    Args:
        texts: by adapter; texts without tokens are left out
        tokens: as many as a batch may have, with padding; a longer text is a batch of its own
        apart: give every adapter batches of its own
        padded: whether texts of unequal lengths may be in one batch
    """
    queue = [(name, example) for name, own in texts.items() for example in own if example.tokens]
    order = {name: position for position, name in enumerate(texts)}

    def key(text: tuple[str, Example]) -> tuple[int, int, int]:
        name, example = text
        return (order[name] if apart else 0), len(example.tokens), order[name]

    batches: list[list[tuple[str, Example]]] = []
    for name, example in sorted(queue, key=key):
        if batches:
            last, length = batches[-1], len(example.tokens)
            fits = (len(last) + 1) * length <= tokens
            alike = padded or len(last[0][1].tokens) == length
            if fits and alike and not (apart and last[0][0] != name):
                last.append((name, example))
                continue
        batches.append([(name, example)])
    return [Batch.of(sorted(batch, key=lambda text: order[text[0]])) for batch in batches]
