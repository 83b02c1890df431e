"""Where the symmetries of a model lie: hidden units of MLPs, and heads of attention, in which tensors.

Everything is read from the names and shapes of the tensors, the configuration, and the table of
architectures.  A block is left alone, and named, if one of its tensors is not understood.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_tspa.base.architectures import (
    EXPERTS,
    MLP_ROLES,
    POSITION_BIAS,
    SYMMETRIES_TESTED,
    architecture_of,
    part_of,
)
from mergekit_tspa.base.geometry import AttentionGeometry, attention_blocks, in_attention
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError, did_you_mean

Kind: TypeAlias = Literal["permutation", "rotation", "scale"]
KINDS: tuple[Kind, ...] = ("permutation", "rotation", "scale")
DEFAULT_KINDS = KINDS[:2]  # as the authors of rotation matching, who leave scales out

_ROLE_OF = {name: role for role, names in MLP_ROLES.items() for name in names}
_NAMES = "|".join(map(re.escape, sorted(_ROLE_OF, key=len, reverse=True)))
_MLP = re.compile(rf"(?P<block>.*)\.(?P<name>{_NAMES})(?P<end>\.weight)?")
# What an attention block may have beside its projections: the norm of its result, buffers, position biases,
# and norms of query and key.
_HARMLESS = re.compile(
    rf"output\.LayerNorm\.(weight|bias)|rotary_emb\.inv_freq|(masked_)?bias|.*{POSITION_BIAS}.*"
)
_HEAD_NORM = re.compile(r"(q|k|query|key)_?(layer)?_?norm\.(weight|bias)")


def kinds_of(text: str) -> tuple[Kind, ...]:
    """The symmetries of `permutation, rotation`, or of `all`; none of an empty text.

    Raises:
        InputError: one of the names is no symmetry.
    """
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in KINDS and named != ["all"]:
            raise InputError(
                f"align: {name!r} is no symmetry; give some of {', '.join(KINDS)}, or all"
                f"{did_you_mean(name, KINDS)}"
            )
    return KINDS if named == ["all"] else tuple(kind for kind in KINDS if kind in named)


class Slot(NamedTuple):
    """Where units lie in a tensor, or in one expert of a fused one."""

    tensor: str
    dim: int  # the dimension along which they lie
    rows: Tensor | None = None  # at which of its indices, in the order of the units; None: at all

    def of(self, W: Tensor) -> Tensor:
        """The units' rows  # (n, m)"""
        W = W.movedim(self.dim, 0).flatten(1) if W.ndim > 1 else W[:, None]
        return W if self.rows is None else W[self.rows.to(W.device)]

    def put(self, W: Tensor, rows: Tensor) -> Tensor:
        """The tensor with other rows of its units, in its own dtype."""
        moved = W.movedim(self.dim, 0).clone()
        where = ... if self.rows is None else self.rows.to(W.device)
        moved[where] = rows.to(W.dtype).view(-1, *moved.shape[1:])
        return moved.movedim(0, self.dim).contiguous()


@dataclass(frozen=True, eq=False)
class Block:
    """An MLP or attention block.

    The roles of an MLP are its tensors; those of attention are `q`, `k`, `v` and `o`.  A role has several
    slots where a bias goes with the tensor.
    """

    name: str
    slots: Mapping[str, tuple[Slot, ...]]  # by role
    geometry: AttentionGeometry | None = None  # of attention
    # Which symmetry the heads lack, and why: `permutation` of their places, the others of query and key.
    lacks: Mapping[Kind, str] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors, or experts in tensors, in which it lies."""
        return tuple(dict.fromkeys(slot.tensor for slots in self.slots.values() for slot in slots))


class Note(NamedTuple):
    """Something that has no symmetry here, and why."""

    kinds: frozenset[Kind]  # of the symmetries that it could have
    sentence: str


class _Left(Exception):
    """Why a block is left alone."""


_INCOMPLETE = "it lacks tensors, which layers may share, so all blocks like it stay as they are"


def blocks_of(model: ModelTensors) -> tuple[list[Block], list[Note]]:
    """The blocks of a model that have symmetries, and what is left alone."""
    blocks: list[Block] = []
    left: dict[str, dict[str, set[Kind]]] = defaultdict(dict)  # why: which blocks, and what they lack
    below = _below(model.shapes)
    for name, roles in _mlp_roles(model.shapes).items():
        try:
            blocks.append(_mlp(name, roles, model, below))
        except _Left as reason:
            left[str(reason)][name] = {"permutation"}
    biased = any(POSITION_BIAS in tensor for tensor in model.shapes)
    for name, roles in attention_blocks(model.shapes).items():
        try:
            blocks.append(_attention(name, roles, model, below, biased))
        except _Left as reason:
            left[str(reason)][name] = {*KINDS}
    broken = {_pattern(name) for name in left[_INCOMPLETE]}
    blocks = [block for block in blocks if _pattern(block.name) not in broken]
    for block in blocks:
        for kind, why in block.lacks.items():
            left[why].setdefault(block.name, set()).add(kind)
    return blocks, [
        Note(
            frozenset().union(*names.values()),
            f"{min(names)}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}",
        )
        for why, names in left.items()
        if names
    ]


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _below(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """`{module: the tensors in it}`."""
    below: dict[str, list[str]] = defaultdict(list)
    for tensor in shapes:
        parts = tensor.split(".")
        for end in range(1, len(parts)):
            below[".".join(parts[:end])].append(tensor)
    return below


def _bias(tensor: str) -> str:
    """The bias of a linear layer."""
    return tensor.removesuffix("weight") + "bias"


def _mlp_roles(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, str]]:
    """`{block: {role: tensor}}`; of experts in one tensor each expert is a block."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for tensor, shape in shapes.items():
        match = _MLP.fullmatch(tensor)
        if match is None or in_attention(tensor):
            continue
        role = _ROLE_OF[match["name"]]
        if len(shape) == 2 and match["end"]:
            found[match["block"]][role] = tensor
        elif len(shape) == 3 and EXPERTS.search(tensor):
            for expert in range(shape[0]):
                found[f"{match['block']}[{expert}]"][role] = f"{tensor}[{expert}]"
    return found


def _mlp(name: str, roles: Mapping[str, str], model: ModelTensors, below: Mapping[str, list[str]]) -> Block:
    """
    Raises:
        _Left: it is none whose units may change places.
    """
    ups = [role for role in ("gate_up", "gate", "up") if role in roles]
    if "down" not in roles or not ups:
        raise _Left(_INCOMPLETE)
    shapes = {role: model.shape(tensor) for role, tensor in roles.items()}
    times = {role: 2 if role == "gate_up" else 1 for role in ups}  # parts in one tensor
    down = shapes["down"]
    leaf = roles["down"].removesuffix(".weight").rpartition(".")[2]
    conv1d = leaf in architecture_of(part_of(model.config, name)).conv1d
    # The dimension of the units in the last tensor, which is the other one in the first.  Linear layers are
    # stored (d_out, d_in), fused experts in either way.
    ways = (1, 0) if "[" in name else (0,) if conv1d else (1,)
    unit = next(
        (
            d
            for d in ways
            if all(shapes[u][1 - d] == times[u] * down[d] and shapes[u][d] == down[1 - d] for u in ups)
        ),
        None,
    )
    if unit is None or sum(times.values()) > 2:
        raise _Left("its tensors do not fit together as those of an MLP do")
    n, width = down[unit], down[1 - unit]
    known = {tensor.partition("[")[0] for tensor in roles.values()}
    known |= {_bias(tensor) for tensor in known if tensor.endswith(".weight")}
    for tensor in below[name.partition("[")[0]]:
        other = tensor in known or _MLP.fullmatch(tensor) or in_attention(tensor)
        if not other and n != width and {n, 2 * n} & {*model.shapes[tensor]}:
            raise _Left(f"{tensor.rpartition('.')[2]} of its hidden units is not understood")
    slots: dict[str, tuple[Slot, ...]] = {"down": (Slot(roles["down"], unit),)}
    for role in ups:
        halves = {"gate": torch.arange(n), "up": torch.arange(n, 2 * n)}  # gates first
        for part, rows in halves.items() if role == "gate_up" else [(role, None)]:
            slots[part] = (Slot(roles[role], 1 - unit, rows),)
            if (bias := _bias(roles[role])) in model.shapes:
                slots[part] += (Slot(bias, 0, rows),)
    return Block(name, slots)


def _attention(
    name: str, roles: Mapping[str, str], model: ModelTensors, below: Mapping[str, list[str]], biased: bool
) -> Block:
    """
    Args:
        biased: whether the model adds position biases to the scores of its heads

    Raises:
        _Left: it is none whose heads may turn or change places.
    """
    kind = part_of(model.config, name).get("model_type")
    if kind not in SYMMETRIES_TESTED:
        raise _Left(f"the heads of model_type {kind} were never tested, as positions may tie them")
    try:
        geometry = AttentionGeometry.from_config(model.config, name)
    except InputError as error:
        raise _Left(str(error)) from error
    n, m, d = geometry.n_heads, geometry.n_kv_heads, geometry.head_dim
    if {*roles} not in ({*"qkvo"}, {"qkv", "o"}):
        raise _Left(_INCOMPLETE)
    if "qkv" in roles and geometry.fused is None:
        raise _Left("how queries, keys and values lie in its one tensor is not known")
    side = 1 if geometry.transposed else 0  # of the outputs
    sizes = {"q": n * d, "k": m * d, "v": m * d, "qkv": (n + 2 * m) * d, "o": n * d}
    for role, tensor in roles.items():
        shape = model.shapes[tensor]
        if len(shape) != 2 or shape[1 - side if role == "o" else side] != sizes[role]:
            raise _Left(f"its {role} has shape {shape}, which is not that of {n} heads of {d}")
    slots: dict[str, tuple[Slot, ...]] = {"o": (Slot(roles["o"], 1 - side),)}
    for role in "qkv":
        tensor = roles.get(role, roles.get("qkv", ""))
        rows = geometry.rows(role) if "qkv" in roles else None
        slots[role] = (Slot(tensor, side, rows),)
        if (bias := _bias(tensor)) in model.shapes:
            slots[role] += (Slot(bias, 0, rows),)
    known = {*roles.values(), *map(_bias, roles.values())}
    lacks: dict[Kind, str] = {}
    if biased:
        lacks["permutation"] = "its heads keep their places, as layers share position biases of each head"
    for tensor in below[name]:
        own = tensor.removeprefix(f"{name}.")
        if tensor in known or _HARMLESS.fullmatch(own):
            continue
        if not _HEAD_NORM.fullmatch(own):
            raise _Left(f"{own} is not understood")
        lacks["rotation"] = lacks["scale"] = (
            "query and key are not turned, as their norms have learned scales"
        )
        if model.shapes[tensor] != (d,):
            lacks["permutation"] = "its heads keep their places, as a norm goes over all of them"
    if geometry.rotary_dim is None:
        lacks["rotation"] = (
            "query and key are not turned, as the layout of their rotary embedding is not known"
        )
    return Block(name, slots, geometry, lacks)
