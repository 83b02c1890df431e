"""Readings of the TSPA manuscript for which the methods have no parameter, as methods of their own.

They are variations of `tspa` and `tspa_attention` for `reproduce.py` alone: what is free in stage 1, which products it
aligns, and what becomes of its factors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from mergekit_tspa import METHODS
from mergekit_tspa.alignment.attention import align_attention
from mergekit_tspa.methods import Method
from mergekit_tspa.methods import pairs as stage_1
from mergekit_tspa.methods.inputs import Pair, Progress, TensorInputs
from mergekit_tspa.methods.method import Merged
from mergekit_tspa.methods.tspa import tspa, tspa_attention, weighted
from mergekit_tspa.updates import LowRank

Merge = Callable[[Sequence[TensorInputs], Sequence[Pair], Progress], Merged]


def scales(merge: Merge, **options: Any) -> Merge:
    """`scale=False`: every s_t of stage 1 is 1; `scale_without_partner=True`: every one is free."""

    def reading(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
        with patch.object(stage_1, "align_attention", partial(align_attention, **options)):
            return merge(inputs, pairs, progress)

    return reading


def only(merge: Merge, role: str) -> Merge:
    """Stage 1 aligns query and key (`q`), or output and value (`o`), alone."""
    return lambda inputs, pairs, progress: merge(
        inputs, [pair for pair in pairs if (pair.plan.x.role == "q") == (role == "q")], progress
    )


def restored(merge: Merge) -> Merge:
    """Each merged tensor gets the mean norm of its updates."""

    def reading(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
        merged = merge(inputs, pairs, progress)
        updates = []
        for w, update in zip(inputs, merged.updates):
            mean = torch.stack([a * f.norm() for f, a in zip(w.factors, w.weights)]).mean()
            norm = LowRank(*update).norm()
            updates.append(update.scaled(float(mean / norm)) if norm else update)
        return merged._replace(updates=updates)

    return reading


def products(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
    """After stage 1 the products are summed, `sum B_t A_t`, and not the factors: there are no cross terms."""
    aligned, reports = stage_1.align_pairs(pairs, weighted(inputs), progress, stage_1.solve_products)
    updates: list[Any] = []
    for w in aligned:
        B = torch.cat([a * f.B for f, a in zip(w.factors, w.weights)], dim=1)  # (d_out, n r)
        A = torch.cat([f.A for f in w.factors], dim=0)  # (n r, d_in)
        updates.append(LowRank(w.parameters.lambda_ * B, A))
    return Merged(updates, reports)


_MERGES: dict[str, tuple[str, Merge]] = {
    "tspa, scales 1": ("tspa", scales(tspa, scale=False)),
    "tspa, scales free": ("tspa", scales(tspa, scale_without_partner=True)),
    "tspa_attention, scales 1": ("tspa_attention", scales(tspa_attention, scale=False)),
    "tspa_attention, scales free": ("tspa_attention", scales(tspa_attention, scale_without_partner=True)),
    "tspa, query and key": ("tspa", only(tspa, "q")),
    "tspa, output and value": ("tspa", only(tspa, "o")),
    "tspa_attention, query and key": ("tspa_attention", only(tspa_attention, "q")),
    "tspa_attention, output and value": ("tspa_attention", only(tspa_attention, "o")),
    "tspa, norm restored": ("tspa", restored(tspa)),
    "tspa_attention, norm restored": ("tspa_attention", restored(tspa_attention)),
    "tspa_attention, products summed": ("tspa_attention", products),
}
READINGS: dict[str, Method] = {
    name: replace(METHODS[method], name=name, merge=merge) for name, (method, merge) in _MERGES.items()
}


@contextmanager
def known() -> Iterator[None]:
    """While this lasts the readings are methods as all others."""
    with patch.dict(METHODS, READINGS):
        yield
