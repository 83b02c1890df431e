"""Models that compute what another one does, with units and heads elsewhere and turned."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.symmetry.align import Map
from mergekit_tspa.symmetry.blocks import KINDS, Block, blocks_of
from mergekit_tspa.symmetry.head_rotation import commuting_rotation


def opened(path: Path) -> ModelTensors:
    return ModelTensors.of(str(path), Checkpoint(path))


def random_maps(block: Block, size: int, draw: torch.Generator, kinds=KINDS) -> dict[str, Map]:
    """
    Args:
        size: of how many rows a role is; the units of an MLP
    """
    g = block.geometry
    if g is None:
        p = torch.randperm(size, generator=draw) if "permutation" in kinds else torch.arange(size)
        return dict.fromkeys(block.slots, Map(p))
    m, inner = g.n_kv_heads, g.n_heads // g.n_kv_heads
    groups, heads = torch.arange(m), torch.arange(g.n_heads)
    if "permutation" in kinds and "permutation" not in block.lacks:
        groups = torch.randperm(m, generator=draw)
        heads = torch.cat([inner * i + torch.randperm(inner, generator=draw) for i in groups])
    maps = {}
    for x, y in (("q", "k"), ("v", "o")):
        free = [kind for kind in kinds if x == "v" or kind not in block.lacks]
        R = torch.eye(g.head_dim).expand(m, -1, -1)
        if "rotation" in free:
            X, X_0 = torch.randn(2, m, g.head_dim, 3 * g.head_dim, generator=draw).double()
            R = commuting_rotation(X, X_0, (g.rotary_dim or 0) if x == "q" else 0).float()
        k = torch.rand(m, 1, 1, generator=draw) + 0.5 if "scale" in free else torch.ones(m, 1, 1)
        for role, T in ((x, k * R), (y, R / k)):
            many = role in "qo"
            maps[role] = Map(heads if many else groups, T.repeat_interleave(inner if many else 1, 0))
    return maps


def plant(source: Path, out: Path, seed: int = 0, kinds=KINDS, noise: float = 0.0) -> Path:
    """A model as `source`, with noise of that share of each tensor, and then moved and turned at random."""
    draw = torch.Generator().manual_seed(seed)
    out.mkdir(parents=True)
    for file in source.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, W in tensors.items():
        if W.ndim > 1:
            tensors[name] = (W + noise * W.std() * torch.randn(W.shape, generator=draw)).to(W.dtype)
    for block in blocks_of(opened(source))[0]:
        first = next(iter(block.slots.values()))[0]
        size = len(first.of(_part(tensors, first.tensor)))
        for role, map in random_maps(block, size, draw, kinds).items():
            for slot in block.slots[role]:
                W = _part(tensors, slot.tensor)
                W.copy_(slot.put(W, map(slot.of(W).float())))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _part(tensors, name):
    whole, bracket, expert = name.partition("[")
    return tensors[whole][int(expert[:-1])] if bracket else tensors[whole]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: W for file in path.glob("*.safetensors") for name, W in load_file(file).items()}


def save_tensors(like: Path, tensors, out: Path) -> Path:
    out.mkdir(parents=True)
    for file in like.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    save_file(
        {name: W.contiguous() for name, W in tensors.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    return out
