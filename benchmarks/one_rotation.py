"""A reading of TSPA's stage 1 in which each adapter has one rotation for both products of an attention block.

Query, key, value and output turn by the same `R_t` in the coordinates of a kv group's heads, so that it serves
`X_q Y_k^T` and `X_o Y_v^T` alike. The scales are each product's own, and each product counts by its start.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_tspa.alignment.attention import Objective, PairProblem, Rotation, aligned_objective, free_scales
from mergekit_tspa.alignment.stiefel import Solution, leave_saddle, minimise
from mergekit_tspa.methods.inputs import Pair, Progress, TensorInputs
from mergekit_tspa.methods.pairs import problem_of, write_back
from mergekit_tspa.methods.report import Report


def align_blocks(
    pairs: Sequence[Pair], inputs: Sequence[TensorInputs], progress: Progress, solve: Any
) -> tuple[list[TensorInputs], list[Report]]:
    """In place of `align_pairs`: every block has both products, of the same adapters and shapes throughout."""
    x = sorted((pair for pair in pairs if pair.plan.x.role == "q"), key=lambda pair: pair.plan.block)
    o = sorted((pair for pair in pairs if pair.plan.x.role == "o"), key=lambda pair: pair.plan.block)
    assert [pair.plan.block for pair in x] == [pair.plan.block for pair in o]
    assert [pair.plan.adapters for pair in x] == [pair.plan.adapters for pair in o]
    aligned = {w.name: w for w in inputs}
    what = "attention alignment, one rotation"
    p = x[0].plan.parameters
    factors, solution = align_both(
        [problem_of(x), problem_of(o)],
        steps=p.attention_steps,
        lr=p.attention_lr,
        seed=p.seed,
        on_progress=partial(progress, what),
    )
    for batch, sides in zip((x, o), factors):
        for pair, X, Y in zip(batch, *sides):
            write_back(pair.plan, pair.plan.x, X, aligned)
            write_back(pair.plan, pair.plan.y, Y, aligned)
    names, adapters = [pair.plan.block for pair in x], [pair.plan.adapters * 2 for pair in x]
    return list(aligned.values()), [Report.of(what, names, adapters, solution, axis=2)]


def align_both(
    problems: Sequence[PairProblem],
    *,
    steps: int,
    lr: float,
    seed: int,
    on_progress: Callable[[float, float], None] | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], Solution]:
    """The inner factors of both sides of each product, all of them turned by one `R_t`."""
    stacked = [
        torch.cat([p.inner_x.flatten(3, 4), p.inner_y.flatten(3, 4)], -2).movedim(1, 2) for p in problems
    ]
    L, G, n, _, d = stacked[0].shape
    objectives, turned = zip(
        *(aligned_objective(p, turns(Z), free_scales(p, True, False)) for p, Z in zip(problems, stacked))
    )
    start = torch.eye(d).to(stacked[0]).expand(L, G, n, d, d)
    solution = minimise(
        sum_of(objectives, [100 * torch.finfo(start.dtype).eps * p.target.sum(1) for p in problems]),
        leave_saddle(start, torch.cat([p.similarity for p in problems], dim=1), seed if steps else None),
        stacked[0].new_zeros(L, len(problems) * n),
        steps=steps,
        lr=lr,
        on_progress=on_progress,
    )
    factors = []
    for p, rotated, log_s in zip(problems, turned, solution.log_s.split(n, dim=1)):
        S_X, S_Y = rotated(solution.point, log_s).movedim(2, 1).split([*p.G_M.shape[-2:]], dim=-2)
        factors.append((S_X.reshape(p.inner_x.shape), S_Y.reshape(p.inner_y.shape)))
    return factors, solution


def turns(Z: Tensor) -> Rotation:
    """A rotation whose point is `R_t` itself, whatever factors `Z_t (L, G, n, k, d)` it turns."""

    def merge(R: Tensor, coefficients: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        scaled = (coefficients[:, None, :, :, None] * Z).transpose(2, 3).flatten(3)  # (L, G, k, n d)
        return scaled @ R.flatten(2, 3), lambda d_sum: (scaled.mT @ d_sum).view(R.shape)

    return Rotation(torch.empty(0), lambda R: Z @ R, merge)


def sum_of(objectives: Sequence[Objective], noise: Sequence[Tensor]) -> Objective:
    """Each of them by its value at the first look; one that is no more than noise `(L,)` there counts for nothing."""
    units: list[Tensor] = []

    def objective(point: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = [own(point, s) for own, s in zip(objectives, log_s.chunk(len(objectives), dim=1))]
        if not units:
            units.extend(torch.where(own[0] > least, 1 / own[0], 0) for own, least in zip(found, noise))
        loss, d_point, d_log_s = zip(*(_by(unit, own) for unit, own in zip(units, found)))
        return torch.stack(loss).sum(0), torch.stack(d_point).sum(0), torch.cat(d_log_s, dim=1)

    return objective


def _by(unit: Tensor, found: Sequence[Tensor]) -> list[Tensor]:
    return [unit.view(-1, *[1] * (part.ndim - 1)) * part for part in found]
