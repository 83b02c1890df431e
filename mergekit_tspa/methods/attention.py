"""The attention pairs of a merge: which weights form a product, their Grams, and their aligned factors.

A pair is query and key, or output and value, of one block.  Planning needs names and configuration only; the
base weights are read once, one at a time, and only their Grams are kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.adapters import Adapter, LoraFactors
from mergekit_tspa.adapters.geometry import (
    KNOWN_LAYOUTS,
    AttentionGeometry,
    attention_blocks,
    attention_role,
    in_attention,
)
from mergekit_tspa.alignment.attention import (
    SideGrams,
    align_attention,
    inner_to_A,
    inner_to_B,
    input_side,
    output_side,
    pair_problem,
    query_side,
    side_grams,
)
from mergekit_tspa.alignment.pairwise import align_pairwise
from mergekit_tspa.alignment.stiefel import Solution
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.base import Parameters, Report, WeightInputs, WeightPlan


class Side(NamedTuple):
    """One side of a pair: a weight and, per adapter of the pair, the module that updates it."""

    role: str  # q, k, v or o
    weight: str
    bias: str | None
    modules: tuple[str | None, ...]  # per adapter


class PairPlan(NamedTuple):
    """One product of one attention block, before anything is loaded."""

    name: str  # block and roles
    x: Side  # query or output
    y: Side  # key or value
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    geometry: AttentionGeometry
    parameters: Parameters

    @property
    def block(self) -> str:
        return self.name.rsplit(" ", 1)[0]

    @property
    def nbytes(self) -> int:
        """About what solving it takes: per adapter rotations, moments and factors; Grams of the base."""
        g, n = self.geometry, len(self.adapters)
        modules = [a.modules[m] for s in (self.x, self.y) for a, m in zip(self.adapters, s.modules) if m]
        rank = max(m.rank for m in modules)
        if _reads_input(self):
            d = max(m.shape[0 if g.transposed else 1] for m in modules)
            return 8 * (6 * n * 2 * rank * d + 4 * d * d)
        return 8 * (g.n_heads + g.n_kv_heads) * g.head_dim * (6 * n * rank + 2 * g.head_dim)


def plan_pairs(
    plans: Sequence[WeightPlan],
    shapes: Mapping[str, tuple[int, ...] | None],
    geometry_of: Callable[[str], AttentionGeometry],
) -> Iterator[PairPlan]:
    """The pairs that the planned weights belong to, of the blocks whose `attention_steps` are not 0.

    `shapes` names all tensors of the model, with their shapes as far as they are known.  Parameters and adapter
    weights of a pair are those of its query or value weight when an adapter touches it, else of the other one.

    Raises:
        InputError: an adapted attention weight whose layout is not known, or head counts that do not fit.
    """
    planned = {plan.name: plan for plan in plans if plan.parameters.attention_steps}
    blocks = attention_blocks(shapes)
    touched = {}
    for name in planned:
        if found := attention_role(name):
            touched[found[0]] = blocks[found[0]]
        elif in_attention(name):
            raise InputError(_unknown(name))
    for block, roles in touched.items():
        geometry = geometry_of(block)
        if geometry.n_heads % geometry.n_kv_heads:
            raise InputError(
                f"{block}: {geometry.n_heads} attention heads are no multiple of {geometry.n_kv_heads} kv heads; "
                "correct the base's configuration"
            )
        if "qkv" in roles:
            if geometry.fused is None:
                raise InputError(_unknown(roles["qkv"]))
            roles = roles | dict.fromkeys("qkv", roles["qkv"])
        else:
            geometry = geometry._replace(fused=None)
        for x, y, leading in (("q", "k", "q"), ("o", "v", "v")):
            adapted = [roles[role] for role in (x, y) if roles.get(role) in planned]
            if adapted and not (x in roles and y in roles):
                raise InputError(_unknown(adapted[0]))
            if adapted:
                owner = planned.get(roles[leading]) or planned[roles[y if leading == x else x]]
                yield _plan_pair(f"{block} {x}{y}", roles[x], roles[y], (x, y), owner, planned, shapes, geometry)


def _plan_pair(name, weight_x, weight_y, roles, owner, planned, shapes, geometry) -> PairPlan:
    adapters: dict[Adapter, float] = {}
    for plan in (owner, planned.get(weight_x), planned.get(weight_y)):
        for (adapter, _), weight in zip(plan.sources, plan.weights) if plan else ():
            adapters.setdefault(adapter, weight)

    def side(role: str, weight: str) -> Side:
        modules = dict(planned[weight].sources) if weight in planned else {}
        bias = weight.removesuffix("weight") + "bias"
        _check_width(role, weight, shapes[weight], geometry)
        return Side(role, weight, bias if role != "o" and bias in shapes else None, tuple(map(modules.get, adapters)))

    pair = PairPlan(
        name, *map(side, roles, (weight_x, weight_y)), (*adapters,), (*adapters.values(),), geometry, owner.parameters
    )
    if roles[0] == "q" and getattr(pair.parameters, "rope_safe", False) and geometry.rotary_dim is None:
        raise InputError(f"{name}: rope_safe is not known for this model's interleaved rotary embedding; leave it out")
    if _reads_input(pair) and geometry.fused:
        raise InputError(f"{name}: align_space: input cannot be written back to the fused {weight_x}; use head")
    return pair


def _check_width(role: str, weight: str, shape: tuple[int, ...] | None, g: AttentionGeometry) -> None:
    if shape is None:
        return
    heads = g.n_heads if role in "qo" else g.n_kv_heads
    if g.fused and role != "o":
        heads = g.n_heads + 2 * g.n_kv_heads
    width = shape[(role == "o") != g.transposed]
    if width != heads * g.head_dim:
        raise InputError(
            f"{weight}: its {role} side is {width} wide, but the base's configuration has {heads} heads of "
            f"{g.head_dim}; set attention_steps: 0 to go without attention alignment"
        )


def _unknown(tensor: str) -> str:
    return (
        f"{tensor}: its attention layout is not known, so attention alignment cannot be done (known: {KNOWN_LAYOUTS}); "
        "set attention_steps: 0 for such weights, or altogether, to go without it"
    )


def load_side(
    pair: PairPlan, side: Side, read: Callable[[str], Tensor], device: torch.device | str | None = None
) -> SideGrams:
    """Read a side's base weight, unless the other side has no LoRA, and keep its Grams; float32."""
    g = pair.geometry
    other = pair.y if side is pair.x else pair.x
    W = bias = None
    if any(other.modules):
        W = _part(g, side.role, _upright(g, read(side.weight).to(device, torch.float32)))
        bias = side.bias and _part(g, side.role, read(side.bias).to(device, torch.float32))
    B, A = _stacked(pair, side, W, device)
    if side.role == "o":
        return side_grams(*output_side(W, B, A, g.n_heads, g.n_kv_heads))
    if _reads_input(pair):
        return side_grams(*input_side(W, B, A))
    heads = g.n_heads if side.role == "q" else g.n_kv_heads
    return side_grams(*query_side(W, B, A, heads, g.n_kv_heads, bias))


def _reads_input(pair: PairPlan) -> bool:
    """Whether rotations act on the model space; the printed form has a meaning for query and key only."""
    return getattr(pair.parameters, "align_space", "head") == "input" and pair.x.role == "q"


def _upright(geometry: AttentionGeometry, W: Tensor) -> Tensor:
    """(d_out, d_in), however the base stores it."""
    return W.mT if geometry.transposed and W.ndim == 2 else W


def _part(geometry: AttentionGeometry, role: str, W: Tensor) -> Tensor:
    """The rows of a role in a fused weight."""
    return W[geometry.rows(role).to(W.device)] if geometry.fused and role != "o" else W


def _stacked(pair: PairPlan, side: Side, W: Tensor | None, device) -> tuple[Tensor, Tensor]:
    """All adapters' factors of one side, B (n, d_out, r) and A (n, r, d_in), zero where there is none."""
    g = pair.geometry
    loaded = [
        _oriented(g, adapter.factors(module, device=device)) if module else None
        for adapter, module in zip(pair.adapters, side.modules)
    ]
    loaded = [f and LoraFactors(_part(g, side.role, f.B), f.A) for f in loaded]
    rank = max((f.rank for f in loaded if f), default=0)
    d_out, d_in = next((f.shape for f in loaded if f), None) or W.shape
    nothing = LoraFactors(torch.zeros(d_out, rank, device=device), torch.zeros(rank, d_in, device=device))
    loaded = [f.padded(rank) if f else nothing for f in loaded]
    return torch.stack([f.B for f in loaded]), torch.stack([f.A for f in loaded])


def _oriented(geometry: AttentionGeometry, f: LoraFactors) -> LoraFactors:
    return LoraFactors(f.A.mT, f.B.mT) if geometry.transposed else f


class Pair(NamedTuple):
    """A planned pair with its Grams."""

    plan: PairPlan
    x: SideGrams
    y: SideGrams


def align_pairs(
    pairs: Sequence[Pair], inputs: Sequence[WeightInputs], progress: Callable[[str, float, float], None]
) -> tuple[list[WeightInputs], list[Report]]:
    """Stage 1 for all pairs; the inputs with their aligned factors, and what the solver did.

    Pairs of equal shapes and parameters are one batch.
    """
    aligned = {w.name: w._replace(factors=list(w.factors)) for w in inputs}
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
            inner_x, inner_y, solution = _solve(batch, lambda done, left, what=what: progress(what, done, left))
        except FloatingPointError as error:
            culprit = batch[error.args[1]].plan
            raise InputError(
                f"{culprit.name}: the loss of attention alignment is not finite; "
                f"adapters {', '.join(a.name for a in culprit.adapters)}"
            ) from error
        reports.append(Report.of(what, names, [pair.plan.adapters for pair in batch], solution, axis=2))
        for pair, X, Y in zip(batch, inner_x, inner_y):
            _write_back(pair.plan, pair.plan.x, X, aligned)
            _write_back(pair.plan, pair.plan.y, Y, aligned)
    return list(aligned.values()), reports


def _solve(batch: Sequence[Pair], progress: Callable[[float, float], None]) -> tuple[Tensor, Tensor, Solution]:
    plan = batch[0].plan
    p = plan.parameters
    common = {
        "steps": p.attention_steps,
        "lr": p.attention_lr,
        "seed": p.seed,
        "tolerance": p.tolerance,
        "solver": p.solver,
        "on_progress": progress,
    }
    sides = [[SideGrams(*(t.double() for t in side)) for side in sides] for sides in zip(*((b.x, b.y) for b in batch))]
    if not hasattr(p, "align_space"):  # the pairwise original
        return align_pairwise(*sides, **common)
    weights = sides[0][0].K.new_tensor([pair.plan.weights for pair in batch])
    problem = pair_problem(*sides, weights)
    # Folded in float64, where the targets cancel; float32 is enough for the steps.
    problem = type(problem)(*(t.to(batch[0].x.K.dtype) for t in problem))
    rope = p.rope_safe and plan.x.role == "q" and plan.geometry.rotary_dim != 0
    return align_attention(problem, **common, rope_safe=rope, rotary_dim=plan.geometry.rotary_dim)


def _write_back(plan: PairPlan, side: Side, inner: Tensor, aligned: dict[str, WeightInputs]) -> None:
    """Replace the rotated factor of each adapter, or the side's rows of it."""
    g = plan.geometry
    for adapter, module, S in zip(plan.adapters, side.modules, inner):
        if module is None:
            continue
        inputs = aligned[side.weight]
        index = inputs.adapters.index(adapter)
        f = _oriented(g, inputs.factors[index])
        if side.role == "o" or _reads_input(plan):
            f = LoraFactors(f.B, inner_to_A(S)[: f.rank].to(f.A))
        else:
            part = inner_to_B(S)[:, : f.rank].to(f.B)
            f = LoraFactors(f.B.index_copy(0, g.rows(side.role).to(f.B.device), part) if g.fused else part, f.A)
        inputs.factors[index] = _oriented(g, f)
