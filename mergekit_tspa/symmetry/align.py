"""A whole model turned towards another one by its symmetries, block by block, as its tensors are read.

The residual stream stays as it is: norms and embeddings fix its axes.
"""

import math
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.alignment.procrustes import best_scale
from mergekit_tspa.base.architectures import COMPUTED
from mergekit_tspa.base.geometry import AttentionGeometry
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError
from mergekit_tspa.symmetry.blocks import Block, Kind, blocks_of
from mergekit_tspa.symmetry.head_rotation import commuting_rotation
from mergekit_tspa.symmetry.permutation import head_likeness, match_heads, weight_matching


class Map(NamedTuple):
    """What happens to the n units of a role, each of d rows: `Y_i = R_i X_{p_i}`."""

    p: Tensor  # (n,)
    R: Tensor | None = None  # (m, d, d), of n/m units each, with a scale on it; None: the identity

    def __call__(self, X: Tensor) -> Tensor:
        """
        Args:
            X: (n d, m), in float32 where it turns
        """
        units: Tensor = X.unflatten(0, (len(self.p), -1))[self.p.to(X.device)]
        if self.R is None:
            return units.flatten(0, 1)
        turned: Tensor = self.R.to(X)[:, None] @ units.unflatten(0, (len(self.R), -1))
        return turned.flatten(0, 2)

    @property
    def still(self) -> bool:
        """Whether it leaves everything as it is."""
        return self.R is None and torch.equal(self.p, torch.arange(len(self.p)))


class Aligned(NamedTuple):
    """How a block was aligned."""

    maps: Mapping[str, Map]  # by role; empty: it stays as it is
    matched: float  # share of its units or heads that were in their places
    before: float  # ||W - W_0||^2 over its tensors, with W_0 of the anchor
    after: float
    size: float  # ||W_0||^2


def align_mlp(model: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> dict[str, Map]:
    """Permute the hidden units of an MLP by weight matching.

    Args:
        model: by role the rows of its units (n, m), biases as further columns
        anchor: the same of the anchor
    """
    (p,) = weight_matching(model, anchor, dict.fromkeys(model, ("unit", None))).values()
    return {role: Map(p) for role in model}


def align_attention(
    model: Mapping[str, Tensor], anchor: Mapping[str, Tensor], block: Block, kinds: Collection[Kind]
) -> dict[str, Map]:
    """Bring the heads of an attention block to their places, and turn and scale them there.

    Of the model's groups of heads with one key and value, `(Q R, K R)` and `(V R', R'^T O)` have the same
    function for rotations R that commute with the rotary embedding and any R', and so have `(k Q, K / k)`
    and `(k' V, O / k')`.

    Args:
        model: of `q`, `k`, `v` and `o` the rows of the heads (n d, m), biases as a further column
        anchor: the same of the anchor
    """
    g = block.geometry
    assert g is not None
    n, m = g.n_heads, g.n_kv_heads
    counts = {"q": n, "k": m, "v": m, "o": n}
    X, X_0 = ({role: A[role].unflatten(0, (counts[role], -1)) for role in "qkvo"} for A in (model, anchor))
    groups, heads = torch.arange(m), torch.arange(n)
    if "permutation" in kinds and "permutation" not in block.lacks:
        likeness = (head_likeness(X[x], X[y], X_0[x], X_0[y]) for x, y in (("q", "k"), ("o", "v")))
        groups, heads = match_heads(sum(likeness), m)  # type: ignore[arg-type]
    places = {"q": heads, "k": groups, "v": groups, "o": heads}
    maps = {}
    for x, y in (("q", "k"), ("o", "v")):
        free = [kind for kind in kinds if x == "o" or kind not in block.lacks]
        placed = (X[role][places[role].to(X[role].device)] for role in (x, y))
        sides = (_grouped(A, m) for A in (*placed, X_0[x], X_0[y]))
        R, k = _turn(*sides, rotary_dim=(g.rotary_dim or 0) if x == "q" else 0, kinds=free)
        for role, factor in ((x, k), (y, 1 / k)):
            turned = None if R is None else (factor[:, None, None] * R).to(model[role].dtype)
            maps[role] = Map(places[role], turned)
    return maps


def _grouped(A: Tensor, m: int) -> Tensor:
    """The heads (n, d, p) of each of m groups side by side, in float64  # (m, d, n/m p)"""
    groups: Tensor = A.double().unflatten(0, (m, -1))
    return groups.transpose(1, 2).flatten(2)


def _turn(
    X: Tensor, Y: Tensor, X_0: Tensor, Y_0: Tensor, *, rotary_dim: int, kinds: Collection[Kind]
) -> tuple[Tensor | None, Tensor]:
    """The R and k with which `(k R X, R Y / k)` is nearest to the anchor's, None and 1 if none are needed.

    Fine-tunes of one model are not turned against each other, but a rotation by some degrees fits a part of
    the noise between them, and would make differences of low rank dense.  So a group of heads that is within
    such a rotation stays as it is, unless turning it halves the squared distance.

    Args:
        X: (m, d, p)
        Y: (m, d, q)

    Returns:
        R (m, d, d) and k (m,)
    """
    m, d, _ = X.shape
    one = torch.eye(d, dtype=X.dtype, device=X.device).expand(m, d, d)
    R, k = one, X.new_ones(m)
    if "rotation" in kinds:
        R = commuting_rotation(torch.cat([X, Y], -1), torch.cat([X_0, Y_0], -1), rotary_dim)
    if "scale" in kinds:
        k = best_scale(R @ X, R @ Y, X_0, Y_0)

    def distance(R: Tensor, k: Tensor) -> Tensor:
        k = k[:, None, None]
        return (k * R @ X - X_0).square().sum((1, 2)) + (R @ Y / k - Y_0).square().sum((1, 2))

    near = (R.diagonal(dim1=1, dim2=2).mean(1) > 0.5) & (k.log().abs() < 0.2)
    still = near & (distance(R, k) >= distance(one, torch.ones_like(k)) / 2)
    if still.all():
        return None, torch.ones_like(k)
    return torch.where(still[:, None, None], one, R), torch.where(still, 1, k)


class AlignedModel(ModelTensors):
    """The tensors of a model turned towards an anchor; a block is aligned when one of its tensors is read.

    What is kept of a block are its permutations and rotations, which are small; its tensors are read, and
    those of the anchor, once to find these and each again when it is asked for.

    Args:
        model: its names of tensors are the anchor's
        anchor: a model of the same architecture
        kinds: which symmetries to use
        device: where they are found; by default torch's default device

    Raises:
        InputError: the two have other layers, or layers of other sizes.
    """

    def __init__(
        self,
        model: ModelTensors,
        anchor: ModelTensors,
        kinds: Collection[Kind],
        device: torch.device | str | None = None,
    ):
        super().__init__(model.name, model.shapes, model.config, self.whole, model.quantised)
        self.model, self.anchor, self.kinds, self.device = model, anchor, frozenset(kinds), device
        blocks, notes = blocks_of(anchor)
        self.blocks = [block for block in blocks if block.geometry or "permutation" in kinds]
        self.notes = [note.sentence for note in notes if self.kinds.intersection(note.kinds)]
        _check(model, anchor, self.blocks)
        self._block_of = {tensor: block for block in self.blocks for tensor in block.tensors}
        self._experts = {tensor.partition("[")[0] for tensor in self._block_of if tensor.endswith("]")}
        self._found: dict[str, Aligned] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """About what aligning its largest block takes, the tensors of both models among it."""
        return max(map(self._nbytes, self.blocks))

    def _nbytes(self, block: Block) -> int:
        values = sum(math.prod(self.anchor.shape(tensor)) for tensor in block.tensors)
        if block.geometry:
            return 40 * values  # in float32, and twice in float64
        (down,) = block.slots["down"]
        n = self.anchor.shape(down.tensor)[down.dim]
        return 8 * values + 12 * n * n  # products in float32, and in float64 for scipy

    def part(self, tensor: str) -> Tensor:
        """The aligned values of a tensor, or of one expert of a fused one, in its own dtype."""
        W = self.model.part(tensor)
        return self.turned(tensor, W) if tensor in self._block_of else W

    def whole(self, tensor: str) -> Tensor:
        """The aligned values of a tensor, in its own dtype."""
        if tensor not in self._experts:
            return self.part(tensor)
        W = self.model.part(tensor).clone()
        for expert in range(len(W)):
            if (name := f"{tensor}[{expert}]") in self._block_of:
                W[expert] = self.turned(name, W[expert])
        return W

    def turned(self, tensor: str, W: Tensor, dims: Collection[int] = (0, 1)) -> Tensor:
        """What alignment does to a tensor, done to W.

        Args:
            tensor: of a block
            W: has its shape in the dimensions `dims`
            dims: along which of them to turn; a low-rank update `B A` has one in B and one in A

        Returns:
            In the dtype of W.
        """
        block = self._block_of.get(tensor)
        if block is None:
            return W
        maps = self.aligned(block).maps
        for role, map in maps.items():
            for slot in block.slots[role]:
                if slot.tensor == tensor and slot.dim in dims and not map.still:
                    rows = slot.of(W)
                    W = slot.put(W, map(rows if map.R is None else rows.float()))
        return W

    def aligned(self, block: Block) -> Aligned:
        """How a block is aligned, found when it is first asked for."""
        with self._lock:
            if block.name not in self._found:
                self._found[block.name] = self._align(block)
            return self._found[block.name]

    def all_aligned(self) -> Iterator[tuple[Block, Aligned]]:
        """All blocks, each aligned when it is come to."""
        return ((block, self.aligned(block)) for block in self.blocks)

    @property
    def known(self) -> list[tuple[Block, Aligned]]:
        """The blocks that are aligned already."""
        return [(block, self._found[block.name]) for block in self.blocks if block.name in self._found]

    @torch.no_grad()
    def _align(self, block: Block) -> Aligned:
        X, X_0 = (self._rows(block, side) for side in (self.model, self.anchor))
        maps = align_attention(X, X_0, block, self.kinds) if block.geometry else align_mlp(X, X_0)
        before = sum((X[role] - X_0[role]).square().sum().item() for role in X)
        after = sum((maps[role](X[role]) - X_0[role]).square().sum().item() for role in X)
        p = maps["o" if block.geometry else "down"].p
        matched = (p == torch.arange(len(p))).double().mean().item()
        size = sum(rows.square().sum().item() for rows in X_0.values())
        # Heads are compared by their products, so other places need not bring the tensors nearer.
        if after >= before or all(map.still for map in maps.values()):
            return Aligned({}, 1.0, before, before, size)
        return Aligned(maps, matched, before, after, size)

    def _rows(self, block: Block, side: ModelTensors) -> dict[str, Tensor]:
        """By role the rows of the units, biases as further columns  # (n d, m), float32"""
        device = self.device or torch.get_default_device()
        parts = {tensor: side.part(tensor).to(device, torch.float32) for tensor in block.tensors}
        for tensor, W in parts.items():
            if not torch.isfinite(W).all():
                raise InputError(f"{side.name}: {tensor} contains NaN or Inf; save the model again")
        rows = {role: [slot.of(parts[slot.tensor]) for slot in slots] for role, slots in block.slots.items()}
        return {role: torch.cat(columns, 1) if columns[1:] else columns[0] for role, columns in rows.items()}


def _check(model: ModelTensors, anchor: ModelTensors, blocks: Collection[Block]) -> None:
    """
    Raises:
        InputError: a tensor of a block is not there, has another shape, or is quantised.
    """
    for side in (model, anchor):
        if side.quantised or side.config.get("quantization_config"):
            raise InputError(
                f"{side.name}: it is quantised ({min(side.quantised, default='config.json')}), and its units "
                "cannot be turned; use the full-precision checkpoint"
            )
    if not blocks:
        raise InputError(f"{anchor.name}: it has no MLPs or heads that are known to have such symmetries")
    named, wanted = ({t for t in side.shapes if re.search(r"\.\d+\.", t)} for side in (model, anchor))
    for owner, other, missing in ((anchor, model, wanted - named), (model, anchor, named - wanted)):
        if missing := {t for t in missing if not COMPUTED.search(t)}:
            raise InputError(
                f"{model.name}: {len(missing)} tensors in layers of {owner.name} are not in {other.name}, "
                f"{min(missing)} among them; both must have the same layers, saved by the same version of "
                "transformers"
            )
    for tensor in {t.partition("[")[0]: None for block in blocks for t in block.tensors}:
        if model.shapes[tensor] != anchor.shapes[tensor]:
            raise InputError(
                f"{model.name}: {tensor} has shape {model.shapes[tensor]}, but {anchor.shapes[tensor]} in "
                f"{anchor.name}; only models of the same widths can be aligned"
            )
    for block in blocks:
        if block.geometry is None:
            continue
        here, there = AttentionGeometry.from_config(model.config, block.name), block.geometry
        if here != there:
            heads, others = (f"{g.n_heads} heads in {g.n_kv_heads} groups" for g in (here, there))
            raise InputError(
                f"{model.name}: {block.name} has {heads}, but {others} in {anchor.name}; only models of the "
                "same heads can be aligned"
            )
