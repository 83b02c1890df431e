"""Readings of the TSPA manuscript for which the methods have no parameter, as methods of their own.

They are variations of `tspa` and its stages for `reproduce.py` alone: what is free, which products stage 1 aligns, what
becomes of its factors, which stage comes first, and how the solver steps and rounds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.one_rotation import align_blocks
from mergekit_tspa import METHODS
from mergekit_tspa.alignment import attention, lora, stiefel
from mergekit_tspa.alignment.attention import SideGrams, align_attention, pair_problem
from mergekit_tspa.alignment.stiefel import Objective, minimise
from mergekit_tspa.methods import Method
from mergekit_tspa.methods import pairs as stage_1
from mergekit_tspa.methods import tspa as stage_2
from mergekit_tspa.methods.inputs import Pair, PairSide, Progress, TensorInputs
from mergekit_tspa.methods.method import Merged
from mergekit_tspa.methods.tspa import align_tensors, sum_factors, tspa, tspa_attention, tspa_lora, weighted
from mergekit_tspa.updates import LoraFactors, LowRank

Merge = Callable[[Sequence[TensorInputs], Sequence[Pair], Progress], Merged]


def with_other(merge: Merge, module: Any, **names: Any) -> Merge:
    """While it merges, these names of a module mean something else."""

    def reading(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
        with patch.multiple(module, **names):
            return merge(inputs, pairs, progress)

    return reading


def scales(merge: Merge, **options: Any) -> Merge:
    """`scale=False`: every s_t of stage 1 is 1; `scale_without_partner=True`: every one is free."""
    return with_other(merge, stage_1, align_attention=partial(align_attention, **options))


def mean_in_stage_1(merge: Merge) -> Merge:
    """`target_scale` is one of stage 2 alone."""
    return with_other(merge, stage_1, pair_problem=lambda x, y, weights, _: pair_problem(x, y, weights))


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


def other_objective(merge: Merge, change: Callable[[Objective], Objective], *stages: Any) -> Merge:
    """What the solver sees of these stages is changed."""

    def reading(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
        def solve(objective: Objective, *start: Any, **options: Any) -> Any:
            return minimise(change(objective), *start, **options)

        with ExitStack() as stack:
            for stage in stages:
                stack.enter_context(patch.object(stage, "minimise", solve))
            return merge(inputs, pairs, progress)

    return reading


def without_scales(objective: Objective) -> Objective:
    """Every s_t stays 1."""

    def fixed(point: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, d_point, d_log_s = objective(point, log_s)
        return loss, d_point, torch.zeros_like(d_log_s)

    return fixed


def in_bfloat16(objective: Objective) -> Objective:
    """Rotations, scales and gradients are rounded to bfloat16 at every step, the loss is not."""

    def short(x: Tensor) -> Tensor:
        return x.bfloat16().to(x)

    def rounded(point: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, d_point, d_log_s = objective(short(point), short(log_s))
        return loss, short(d_point), short(d_log_s)

    return rounded


def amsgrad_per_entry(point: Tensor, log_s: Tensor, lr: float) -> stiefel.Step:
    """AMSGrad with a second moment of each entry, as in a space without curvature; projected, then retracted."""
    moment, second, largest = (torch.zeros_like(point) for _ in range(3))
    moment_s, second_s, largest_s = (torch.zeros_like(log_s) for _ in range(3))
    count = 0

    def direction(g: Tensor, moment: Tensor, second: Tensor, largest: Tensor) -> Tensor:
        moment.lerp_(g, 1 - stiefel.BETA1)
        second.lerp_(g.square(), 1 - stiefel.BETA2)
        torch.maximum(largest, second, out=largest)
        divisor = (largest / (1 - stiefel.BETA2**count)).sqrt() + stiefel.EPSILON
        return moment / (1 - stiefel.BETA1**count) / divisor

    def tangent(M: Tensor, V: Tensor) -> Tensor:
        A = M @ V.mT
        return M - (A + A.mT) / 2 @ V

    def advance(V: Tensor, log_s: Tensor, D: Tensor, d_log_s: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        step = direction((D - V @ D.mT @ V) / 2, moment, second, largest)
        turned = stiefel.retract(V - lr * tangent(step, V))
        moment.copy_(tangent(moment, turned))
        return turned, log_s - lr * direction(d_log_s, moment_s, second_s, largest_s)

    return advance


def reversed_stages(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
    """Stage 2 first: it turns ranks, stage 1 the coordinates of heads, so that one does not undo the other."""
    before = weighted(inputs)
    plain = [w._replace(parameters=w.parameters.model_copy(update={"lambda_": 1.0})) for w in before]
    with patch.object(stage_2, "sum_aligned", _beside):
        turned, reports = align_tensors(plain, plain, progress)
    after = []
    for w, (B, A) in zip(before, turned):
        n = len(w.factors)
        after.append(w._replace(factors=[*map(LoraFactors, B.chunk(n, dim=1), A.chunk(n, dim=0))]))
    found = {w.name: (w, new) for w, new in zip(before, after)}
    turned_pairs = [pair._replace(**{at: _turned(pair, at, found) for at in ("x", "y")}) for pair in pairs]
    aligned, more = stage_1.align_pairs(turned_pairs, after, progress, stage_1.solve_products)
    return Merged(sum_factors(aligned), reports + more)


def _beside(B: Tensor, A: Tensor, weights: Tensor, R: Tensor, s: Tensor) -> LoraFactors:
    """The aligned factors of stage 2, beside each other in place of summed."""
    assert bool((weights == 1).all())
    B, A = s[:, None, None] * (B @ R), R.mT @ A / s[:, None, None]
    return LoraFactors(torch.cat([*B], dim=1), torch.cat([*A]))


def _turned(pair: Pair, at: str, found: dict[str, tuple[TensorInputs, TensorInputs]]) -> SideGrams:
    """The Grams of one side after `L_t -> L_t P_t`, `S_t -> P_t^-1 S_t`; P_t is what stage 2 did to L_t."""
    side: PairSide = getattr(pair.plan, at)
    K, H, C, inner = getattr(pair, at)
    one = torch.eye(H.shape[-1], dtype=torch.float64, device=H.device)
    P = one.repeat(len(side.modules), 1, 1)  # (n, r, r)
    for t, module in enumerate(side.modules):
        if module is not None:
            old, new = (w.factors[w.adapters.index(pair.plan.adapters[t])] for w in found[side.tensor])
            outer = [f.B if side.role == "o" or pair.plan.reads_input else f.A.mT for f in (old, new)]
            P[t] = torch.linalg.lstsq(*(L.double() for L in outer)).solution
    H = torch.einsum("tji,tujk,ukl->tuil", P.to(H), H, P.to(H))
    C = torch.einsum("tji,tghjd->tghid", P.to(C), C)
    inner = torch.einsum("tij,tghjd->tghid", P.inverse().to(inner), inner)
    return SideGrams(K, H, C, inner)


_MERGES: dict[str, tuple[str, Merge]] = {
    "tspa, scales 1": ("tspa", scales(tspa, scale=False)),
    "tspa, scales free": ("tspa", scales(tspa, scale_without_partner=True)),
    "tspa_attention, scales 1": ("tspa_attention", scales(tspa_attention, scale=False)),
    "tspa_attention, scales free": ("tspa_attention", scales(tspa_attention, scale_without_partner=True)),
    "tspa, stage 1 at the mean": ("tspa", mean_in_stage_1(tspa)),
    "tspa, query and key": ("tspa", only(tspa, "q")),
    "tspa, output and value": ("tspa", only(tspa, "o")),
    "tspa_attention, query and key": ("tspa_attention", only(tspa_attention, "q")),
    "tspa_attention, output and value": ("tspa_attention", only(tspa_attention, "o")),
    "tspa, norm restored": ("tspa", restored(tspa)),
    "tspa_attention, norm restored": ("tspa_attention", restored(tspa_attention)),
    "tspa_attention, products summed": ("tspa_attention", products),
    "tspa, stage 2 first": ("tspa", reversed_stages),
    "tspa, scales of stage 2 1": ("tspa", other_objective(tspa, without_scales, lora)),
    "tspa_lora, scales 1": ("tspa_lora", other_objective(tspa_lora, without_scales, lora)),
    "tspa, bfloat16": ("tspa", other_objective(tspa, in_bfloat16, lora, attention)),
    "tspa_attention, bfloat16": ("tspa_attention", other_objective(tspa_attention, in_bfloat16, attention)),
    "tspa, no momentum": ("tspa", with_other(tspa, stiefel, BETA1=0.0)),
    "tspa_attention, no momentum": ("tspa_attention", with_other(tspa_attention, stiefel, BETA1=0.0)),
    "tspa, short memory": ("tspa", with_other(tspa, stiefel, BETA2=0.9)),
    "tspa_attention, short memory": ("tspa_attention", with_other(tspa_attention, stiefel, BETA2=0.9)),
    "tspa, second moment of each entry": ("tspa", with_other(tspa, stiefel, _amsgrad=amsgrad_per_entry)),
    "tspa_attention, second moment of each entry": (
        "tspa_attention",
        with_other(tspa_attention, stiefel, _amsgrad=amsgrad_per_entry),
    ),
    "tspa_lora, second moment of each entry": (
        "tspa_lora",
        with_other(tspa_lora, stiefel, _amsgrad=amsgrad_per_entry),
    ),
    "tspa, one rotation a block": ("tspa", with_other(tspa, stage_2, align_pairs=align_blocks)),
    "tspa_attention, one rotation a block": (
        "tspa_attention",
        with_other(tspa_attention, stage_2, align_pairs=align_blocks),
    ),
}
READINGS: dict[str, Method] = {
    name: replace(METHODS[method], name=name, merge=merge) for name, (method, merge) in _MERGES.items()
}


@contextmanager
def known() -> Iterator[None]:
    """While this lasts the readings are methods as all others."""
    with patch.dict(METHODS, READINGS):
        yield
