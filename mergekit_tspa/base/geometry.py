"""Where the attention weights of a base model are, and how their heads lie in them.

Names of the tensors say which role a weight plays; the head counts come from the model's configuration, never
from shapes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from mergekit_tspa.errors import InputError

_ROLES = {
    "q": ("q_proj", "self.query", "q_lin", "q"),
    "k": ("k_proj", "self.key", "k_lin", "k"),
    "v": ("v_proj", "self.value", "v_lin", "v"),
    "o": ("o_proj", "out_proj", "output.dense", "out_lin", "o", "dense", "c_proj"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_ATTENTION = re.compile(
    r"^(?P<block>(?:.*\.)?[^.]*(?:attn|attention)[^.]*)\.(?P<name>"
    + "|".join(map(re.escape, sorted(_ROLE_OF, key=len, reverse=True)))
    + r")\.weight$",
    re.IGNORECASE,
)
# Models with one tensor for query, key and value: all queries, then all keys, then all values; or the three of
# each head in turn.
_FUSED = {"phi3": "stacked", "gpt2": "stacked", "gpt_neox": "per head"}
# Models whose rotary embedding turns neighbouring coordinates instead of the two halves of a head.
_INTERLEAVED_ROPE = {"chatglm", "cohere", "cohere2", "glm", "glm4", "gptj"}
KNOWN_LAYOUTS = (
    "separate " + ", ".join("/".join(_ROLES[role]) for role in "qkvo") + "; fused " + ", ".join(sorted(_FUSED))
)


class AttentionGeometry(NamedTuple):
    """How many heads an attention block has and how wide they are."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int | None = None  # coordinates of a head that RoPE turns; None: unknown layout, 0: no RoPE
    fused: str | None = None  # layout of a fused qkv tensor
    transposed: bool = False  # weights are stored (d_in, d_out)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], block: str = "") -> "AttentionGeometry":
        """Read a model's `config.json`; for `block`s of a vision tower its `vision_config`.

        Raises:
            InputError: the configuration names no head count.
        """
        part = "vision_config" if re.search(r"vis(ion|ual)", block) else "text_config"
        config = config.get(part) or config

        def first(*keys: str) -> Any:
            return next((config[key] for key in keys if config.get(key) is not None), None)

        n_heads = first("num_attention_heads", "n_head", "num_heads", "n_heads")
        if n_heads is None:
            raise InputError("the base's configuration names no number of attention heads (num_attention_heads)")
        n_kv_heads = first("num_key_value_heads", "num_kv_heads") or n_heads
        head_dim = first("head_dim", "d_kv") or first("hidden_size", "n_embd", "d_model", "dim") // n_heads
        rope = first("rope_parameters", "rope_scaling") or {}
        if first("rope_theta", "rope_parameters", "rotary_pct", "rotary_emb_base") is None:
            rotary_dim = 0
        elif config.get("model_type") in _INTERLEAVED_ROPE:
            rotary_dim = None
        else:
            share = first("partial_rotary_factor", "rotary_pct") or rope.get("partial_rotary_factor") or 1
            rotary_dim = int(head_dim * share)
        model_type = config.get("model_type")
        return cls(n_heads, n_kv_heads, head_dim, rotary_dim, _FUSED.get(model_type), model_type == "gpt2")

    def rows(self, role: str) -> torch.Tensor:
        """Rows of a fused qkv weight that belong to a role."""
        n = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        if self.fused == "per head":
            heads = torch.arange(3 * self.n_heads * self.head_dim).view(self.n_heads, 3, self.head_dim)
            return heads[:, "qkv".index(role)].flatten()
        start = sum(n[before] for before in "qkv"[: "qkv".index(role)]) * self.head_dim
        return torch.arange(start, start + n[role] * self.head_dim)


def attention_role(tensor: str) -> tuple[str, str] | None:
    """`(block, role)` of a weight, role one of q, k, v, o, qkv; None when it is not a known attention weight.

    >>> attention_role("model.layers.0.self_attn.q_proj.weight")
    ('model.layers.0.self_attn', 'q')
    """
    match = _ATTENTION.match(tensor)
    return match and (match["block"], _ROLE_OF[match["name"]])


def in_attention(tensor: str) -> bool:
    """Whether a weight belongs to an attention block, of whatever layout."""
    return re.search(r"(^|\.)[^.]*(attn|attention)[^.]*\.", tensor, re.IGNORECASE) is not None


def attention_blocks(tensors: Iterable[str]) -> dict[str, dict[str, str]]:
    """`{block: {role: tensor}}` of a checkpoint."""
    blocks: dict[str, dict[str, str]] = {}
    for tensor in tensors:
        if found := attention_role(tensor):
            block, role = found
            blocks.setdefault(block, {})[role] = tensor
    return blocks
