"""Which tensors form an attention product, and the Grams of their base tensors.

Planning needs names and configuration only.  Base tensors are read once, one at a time, and only their Grams
are kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.alignment.attention import SideGrams, input_side, output_side, query_side, side_grams
from mergekit_tspa.base.geometry import (
    KNOWN_LAYOUTS,
    AttentionGeometry,
    attention_blocks,
    attention_role,
    in_attention,
)
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.outputs import TensorPlan
from mergekit_tspa.methods.inputs import PairPlan, PairSide
from mergekit_tspa.methods.pairs import oriented
from mergekit_tspa.updates import LoraFactors


def plan_pairs(
    plans: Sequence[TensorPlan],
    shapes: Mapping[str, tuple[int, ...] | None],
    geometry_of: Callable[[str], AttentionGeometry],
) -> Iterator[PairPlan]:
    """The pairs that the planned weights belong to, of the blocks whose `attention_steps` are not 0.

    `shapes` names all tensors of the model, with their shapes as far as they are known.  Parameters and
    adapter weights of a pair are those of its query or value weight when an adapter touches it, else of the
    other one.

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
                f"{block}: {geometry.n_heads} attention heads are no multiple of {geometry.n_kv_heads} kv "
                "heads; correct the base's configuration"
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
                yield _plan_pair(
                    f"{block} {x}{y}", roles[x], roles[y], (x, y), owner, planned, shapes, geometry
                )


def _plan_pair(name, weight_x, weight_y, roles, owner, planned, shapes, geometry) -> PairPlan:
    adapters: dict[Adapter, float] = {}
    for plan in (owner, planned.get(weight_x), planned.get(weight_y)):
        for (adapter, _), weight in zip(plan.sources, plan.weights) if plan else ():
            adapters.setdefault(adapter, weight)

    def side(role: str, tensor: str) -> PairSide:
        plan = planned.get(tensor)
        modules = dict(plan.sources) if plan else {}
        weights = {adapter: a for (adapter, _), a in zip(plan.sources, plan.weights)} if plan else {}
        bias = tensor.removesuffix("weight") + "bias"
        _check_width(role, tensor, shapes[tensor], geometry)
        return PairSide(
            role,
            tensor,
            bias if role != "o" and bias in shapes else None,
            modules=tuple(modules.get(adapter) for adapter in adapters),
            weights=tuple(weights.get(adapter, a) for adapter, a in adapters.items()),
        )

    x, y = (side(role, tensor) for role, tensor in zip(roles, (weight_x, weight_y)))
    pair = PairPlan(name, x, y, tuple(adapters), tuple(adapters.values()), geometry, owner.parameters)
    if roles[0] == "q" and getattr(pair.parameters, "rope_safe", False) and geometry.rotary_dim is None:
        raise InputError(
            f"{name}: rope_safe is not known for this model's interleaved rotary embedding; leave it out"
        )
    if pair.reads_input and geometry.fused:
        raise InputError(
            f"{name}: align_space: input cannot be written back to the fused {weight_x}; use head"
        )
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
        f"{tensor}: its attention layout is not known, so attention alignment cannot be done (known: "
        f"{KNOWN_LAYOUTS}); set attention_steps: 0 for such weights, or altogether, to go without it"
    )


def load_side(
    pair: PairPlan, side: PairSide, read: Callable[[str], Tensor], device: torch.device | str | None = None
) -> SideGrams:
    """Read a side's base weight, unless the other side has no LoRA, and keep its Grams; float32."""
    g = pair.geometry
    other = pair.y if side is pair.x else pair.x
    W: Tensor | None = None
    bias: Tensor | None = None
    if any(other.modules):
        W = _part(g, side.role, _upright(g, read(side.tensor).to(device, torch.float32)))
        if side.bias:
            bias = _part(g, side.role, read(side.bias).to(device, torch.float32))
    B, A = _stacked(pair, side, W, device)
    if side.role == "o":
        return side_grams(*output_side(W, B, A, g.n_heads, g.n_kv_heads))
    if pair.reads_input:
        return side_grams(*input_side(W, B, A))
    heads = g.n_heads if side.role == "q" else g.n_kv_heads
    return side_grams(*query_side(W, B, A, heads, g.n_kv_heads, bias))


def _upright(geometry: AttentionGeometry, W: Tensor) -> Tensor:
    """(d_out, d_in), however the base stores it."""
    return W.mT if geometry.transposed and W.ndim == 2 else W


def _part(geometry: AttentionGeometry, role: str, W: Tensor) -> Tensor:
    """The rows of a role in a fused weight."""
    return W[geometry.rows(role).to(W.device)] if geometry.fused and role != "o" else W


def _stacked(pair: PairPlan, side: PairSide, W: Tensor | None, device) -> tuple[Tensor, Tensor]:
    """All weighted adapters' factors of one side, B (n, d_out, r) and A (n, r, d_in), zero where there is
    none.
    """
    g = pair.geometry
    loaded = [
        oriented(g, adapter.factors(module, device=device).scaled(1.0 if pair.literal else weight))
        if module
        else None
        for adapter, module, weight in zip(pair.adapters, side.modules, side.weights)
    ]
    parts = [f and LoraFactors(_part(g, side.role, f.B), f.A) for f in loaded]
    rank = max((f.rank for f in parts if f), default=0)
    shapes = [tuple(f.shape) for f in parts if f]
    # Where no adapter changes this side, one changes the other, for which W was read.
    d_out, d_in = (shapes if W is None else [*shapes, tuple(W.shape)])[0]
    nothing = LoraFactors(torch.zeros(d_out, rank, device=device), torch.zeros(rank, d_in, device=device))
    padded = [f.padded(rank) if f else nothing for f in parts]
    return torch.stack([f.B for f in padded]), torch.stack([f.A for f in padded])
