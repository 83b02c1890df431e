"""Where the attention tensors of a base model are, and how their heads lie in them.

The names of the tensors say which role each of them plays.  The head counts come from the model's
configuration, never from shapes.  `architectures.py` lists the names and the keys.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.base.architectures import (
    ARCHITECTURES,
    ATTENTION_BLOCK,
    ATTENTION_ROLES,
    architecture_of,
    part_of,
)
from mergekit_tspa.errors import InputError

_ROLE_OF = {name: role for role, names in ATTENTION_ROLES.items() for name in names}
_ATTENTION = re.compile(
    rf"^(?P<block>(?:.*\.)?{ATTENTION_BLOCK})\.(?P<name>"
    + "|".join(map(re.escape, sorted(_ROLE_OF, key=len, reverse=True)))
    + r")\.weight$",
    re.IGNORECASE,
)
_IN_ATTENTION = re.compile(rf"(^|\.){ATTENTION_BLOCK}\.", re.IGNORECASE)
KNOWN_LAYOUTS = (
    "separate "
    + ", ".join("/".join(ATTENTION_ROLES[role]) for role in "qkvo")
    + "; fused "
    + ", ".join(sorted(row.model_type for row in ARCHITECTURES if row.fused))
)


class AttentionGeometry(NamedTuple):
    """How many heads an attention block has and how wide they are."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int | None = None  # coordinates of a head that RoPE turns; None: unknown layout, 0: no RoPE
    fused: str | None = None  # layout of a fused qkv tensor
    transposed: bool = False  # the tensors are stored (d_in, d_out)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], block: str = "") -> "AttentionGeometry":
        """Read a model's `config.json`; for a `block` of a vision tower its `vision_config`.

        Raises:
            InputError: the configuration names no head count.
        """
        config = part_of(config, block)
        architecture = architecture_of(config)

        def first(keys: tuple[str, ...]) -> Any:
            return next((config[key] for key in keys if config.get(key) is not None), None)

        n_heads = first(architecture.n_heads)
        if n_heads is None:
            raise InputError(
                "the base's configuration names no number of attention heads (num_attention_heads)"
            )
        n_kv_heads = first(architecture.n_kv_heads) or n_heads
        head_dim = first(architecture.head_dim) or first(architecture.width) // n_heads
        rope = first(("rope_parameters", "rope_scaling")) or {}
        if architecture.interleaved_rope:
            rotary_dim = None
        elif first(architecture.rope) is None:
            rotary_dim = 0
        else:
            share = first(architecture.rotary_share) or rope.get("partial_rotary_factor") or 1
            rotary_dim = first(("rotary_dim",)) or int(head_dim * share)
        return cls(n_heads, n_kv_heads, head_dim, rotary_dim, architecture.fused, bool(architecture.conv1d))

    def rows(self, role: str) -> Tensor:
        """Indices of the rows of a fused qkv tensor that belong to a role."""
        n = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        if self.fused == "per head":
            heads = torch.arange(3 * self.n_heads * self.head_dim).view(self.n_heads, 3, self.head_dim)
            return heads[:, "qkv".index(role)].flatten()
        start = sum(n[before] for before in "qkv"[: "qkv".index(role)]) * self.head_dim
        return torch.arange(start, start + n[role] * self.head_dim)


def attention_role(tensor: str) -> tuple[str, str] | None:
    """`(block, role)` of a tensor, role one of q, k, v, o, qkv; None if it is not a known attention tensor.

    >>> attention_role("model.layers.0.self_attn.q_proj.weight")
    ('model.layers.0.self_attn', 'q')
    """
    match = _ATTENTION.match(tensor)
    return (match["block"], _ROLE_OF[match["name"].lower()]) if match else None


def in_attention(tensor: str) -> bool:
    """Whether a tensor belongs to an attention block, of whatever layout."""
    return _IN_ATTENTION.search(tensor) is not None


def attention_blocks(tensors: Iterable[str]) -> dict[str, dict[str, str]]:
    """`{block: {role: tensor}}` of a checkpoint."""
    blocks: dict[str, dict[str, str]] = {}
    for tensor in tensors:
        if found := attention_role(tensor):
            block, role = found
            blocks.setdefault(block, {})[role] = tensor
    return blocks
