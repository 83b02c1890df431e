"""Stage 1 of TSPA for all attention pairs of a chunk: query and key, or output and value, of one block."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from mergekit_tspa.alignment.attention import (
    PairProblem,
    SideGrams,
    align_attention,
    inner_to_A,
    inner_to_B,
    pair_problem,
)
from mergekit_tspa.alignment.pairwise import align_pairwise
from mergekit_tspa.alignment.stiefel import Solution
from mergekit_tspa.base.geometry import AttentionGeometry
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.inputs import Pair, PairPlan, PairSide, Progress, TensorInputs
from mergekit_tspa.methods.report import Report
from mergekit_tspa.updates import LoraFactors


def oriented(geometry: AttentionGeometry, f: LoraFactors) -> LoraFactors:
    return LoraFactors(f.A.mT, f.B.mT) if geometry.transposed else f


PartProgress: TypeAlias = Callable[[float, float], None]  # fraction done, fraction of the objective left
Aligned: TypeAlias = tuple[Tensor, Tensor, Solution]  # inner factors of the sides x and y, one row per pair


def align_pairs(
    pairs: Sequence[Pair],
    inputs: Sequence[TensorInputs],
    progress: Progress,
    solve: Callable[[Sequence[Pair], PartProgress], Aligned],
) -> tuple[list[TensorInputs], list[Report]]:
    """Stage 1 for all pairs; the inputs with their aligned factors, and what the solver did.

    Pairs of equal shapes and parameters are one batch.

    Args:
        solve: `solve_products` or `solve_pairwise`
    """
    aligned = {w.name: w for w in inputs}
    reports = []

    def batch_of(pair: Pair):
        p = pair.plan.parameters
        shapes = tuple(tuple(side.inner.shape) for side in (pair.x, pair.y))
        return pair.plan.x.role, shapes, pair.plan.geometry, repr(p)

    batches: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        batches.setdefault(batch_of(pair), []).append(pair)
    for (role, *_), batch in batches.items():
        what = f"{'query-key' if role == 'q' else 'value-output'} alignment"
        names = [pair.plan.name for pair in batch]
        try:
            inner_x, inner_y, solution = solve(batch, partial(progress, what))
        except FloatingPointError as error:
            culprit = batch[error.args[1]].plan
            raise InputError(
                f"{culprit.name}: the loss of attention alignment is not finite; "
                f"adapters {', '.join(a.name for a in culprit.adapters)}"
            ) from error
        reports.append(Report.of(what, names, [pair.plan.adapters for pair in batch], solution, axis=2))
        for pair, X, Y in zip(batch, inner_x, inner_y):
            write_back(pair.plan, pair.plan.x, X, aligned)
            write_back(pair.plan, pair.plan.y, Y, aligned)
    return list(aligned.values()), reports


def solve_products(batch: Sequence[Pair], progress: PartProgress) -> Aligned:
    """Align the products of attention (Eq. 5-7)."""
    plan = batch[0].plan
    p = plan.parameters
    rope = p.rope_safe and plan.x.role == "q" and plan.geometry.rotary_dim != 0
    return align_attention(
        problem_of(batch), **_solver(p, progress), rope_safe=rope, rotary_dim=plan.geometry.rotary_dim
    )


def problem_of(batch: Sequence[Pair]) -> PairProblem:
    """The objectives of pairs of equal shapes, which differ in nothing but their tensors."""
    plan = batch[0].plan
    sides = _sides(batch)
    # Unless taken literally, weights are in the sides already.
    weights = sides[0][0].K.new_tensor(
        [pair.plan.weights if pair.plan.literal else [1.0] * len(pair.plan.weights) for pair in batch]
    )
    problem = pair_problem(*sides, weights, min(plan.parameters.target_scale, len(plan.adapters)))
    # Folded in float64, where the targets cancel; float32 is enough for the steps.
    return PairProblem(*(t.to(batch[0].x.K.dtype) for t in problem))


def solve_pairwise(batch: Sequence[Pair], progress: PartProgress) -> Aligned:
    """Compare every two adapted models (Eq. 4)."""
    return align_pairwise(*_sides(batch), **_solver(batch[0].plan.parameters, progress))


def _sides(batch: Sequence[Pair]) -> tuple[list[SideGrams], list[SideGrams]]:
    """All sides x and all sides y, in float64."""
    x = [SideGrams(*(grams.double() for grams in pair.x)) for pair in batch]
    y = [SideGrams(*(grams.double() for grams in pair.y)) for pair in batch]
    return x, y


def _solver(parameters: Any, progress: PartProgress) -> dict[str, Any]:
    return {
        "steps": parameters.attention_steps,
        "lr": parameters.attention_lr,
        "seed": parameters.seed,
        "tolerance": parameters.tolerance,
        "solver": parameters.solver,
        "on_progress": progress,
    }


def write_back(plan: PairPlan, side: PairSide, inner: Tensor, aligned: dict[str, TensorInputs]) -> None:
    """Replace the rotated factor of each adapter, or the side's rows of it."""
    g = plan.geometry
    for adapter, module, S in zip(plan.adapters, side.modules, inner):
        if module is None:
            continue
        inputs = aligned[side.tensor]
        index = inputs.adapters.index(adapter)
        f = oriented(g, inputs.factors[index])
        if side.role == "o" or plan.reads_input:
            f = LoraFactors(f.B, inner_to_A(S)[: f.rank].to(f.A))
        else:
            part = inner_to_B(S)[:, : f.rank].to(f.B)
            f = LoraFactors(
                f.B.index_copy(0, g.rows(side.role).to(f.B.device), part) if g.fused else part, f.A
            )
        factors = [*inputs.factors[:index], oriented(g, f), *inputs.factors[index + 1 :]]
        aligned[side.tensor] = inputs._replace(factors=factors)
