"""Everything that is known of architectures, in one table.

Tensors are recognised by their names, which most architectures share: the constants below list them.  What
is special about the models of one `model_type` is one row of `ARCHITECTURES`, whose other fields keep their
defaults.

So a new architecture is one row.  The following one has one tensor for the query, key and value of each head
in turn, and a rotary embedding that turns neighbouring coordinates:

    Architecture("somemodel", fused="per head", interleaved_rope=True),

If it calls its projections by names of its own, these go into `ATTENTION_ROLES`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# -- names of tensors --------------------------------------------------------------------------------------

# What a projection of an attention block is called, by the role it plays; "qkv" is one tensor for all three.
ATTENTION_ROLES = {
    "q": ("q_proj", "self.query", "q_lin", "q"),
    "k": ("k_proj", "self.key", "k_lin", "k"),
    "v": ("v_proj", "self.value", "v_lin", "v"),
    "o": ("o_proj", "out_proj", "output.dense", "out_lin", "o", "dense", "c_proj"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn"),
}
# What the tensors of an MLP are called: from the model's width to the hidden units and back.  The first of a
# gated MLP passes through the activation; "gate_up" is one tensor for both, gates first.
MLP_ROLES = {
    "gate": ("gate_proj", "w1", "wi_0"),
    "up": ("up_proj", "w3", "wi_1", "wi", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "intermediate.dense"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "w2", "wo", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "output.dense"),
}
ATTENTION_BLOCK = r"[^.]*(?:attn|attention)[^.]*"  # pattern of the part of a name that says "attention"
VISION_BLOCK = re.compile(r"vis(ion|ual)")  # blocks that `vision_config` describes

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = tuple(
    f"{name}.weight" for name in ("embed_tokens", "wte", "embed_in", "word_embeddings", "shared")
)
VOCABULARY = HEADS + EMBEDDINGS  # a row per token of the vocabulary, in one tensor if the model ties them
# Matrices that are tables: a row per token, position or token type.
TABLE = re.compile(r"(embed\w*|wte|wpe|shared|lm_head)\.weight$")

EXPERTS = re.compile(r"expert|moe")  # tensors of three dimensions with these names hold a matrix per expert
EXPERT_CONTAINER = "experts"  # the module whose parameters are the fused experts
# The parameters of that module in the order in which it declares them.
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")

# Position biases that are added to the scores of each head; some models share those of one layer among all.
POSITION_BIAS = "relative_attention_bias"

COMPUTED = re.compile(r"\.inv_freq$")  # old checkpoints store this buffer, and nothing reads it

# -- what is special about a model type --------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """What is special about the models of one `model_type`; the defaults hold for most.

    The last fields are keys of `config.json`, of which the first one that is there counts.
    """

    model_type: str
    # How query, key and value lie in one tensor: all queries, then all keys, then all values ("stacked"), or
    # the three of each head in turn ("per head").  None: each has its own tensor, or the layout is unknown.
    fused: Literal["stacked", "per head"] | None = None
    # Layers that are transformers' Conv1D, whose tensors are stored (d_in, d_out).
    conv1d: tuple[str, ...] = ()
    # Whether the rotary embedding turns neighbouring coordinates instead of the two halves of a head.
    interleaved_rope: bool = False
    n_heads: tuple[str, ...] = ("num_attention_heads", "n_head", "num_heads", "n_heads")
    n_kv_heads: tuple[str, ...] = ("num_key_value_heads", "num_kv_heads")  # absent: as many as heads
    head_dim: tuple[str, ...] = ("head_dim", "d_kv")  # absent: width / n_heads
    width: tuple[str, ...] = ("hidden_size", "n_embd", "d_model", "dim")
    rope: tuple[str, ...] = (
        "rope_theta",
        "rope_parameters",
        "rotary_pct",
        "rotary_emb_base",
        "rotary_dim",
    )  # absent: no RoPE
    rotary_share: tuple[str, ...] = ("partial_rotary_factor", "rotary_pct")  # of a head; absent: all of it


_CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")

ARCHITECTURES = (
    Architecture("gpt2", fused="stacked", conv1d=_CONV1D),
    Architecture("openai-gpt", conv1d=_CONV1D),
    Architecture("imagegpt", conv1d=_CONV1D),
    Architecture("decision_transformer", conv1d=_CONV1D),
    Architecture("phi3", fused="stacked"),
    Architecture("gpt_neox", fused="per head"),
    Architecture("chatglm", interleaved_rope=True),
    Architecture("cohere", interleaved_rope=True),
    Architecture("cohere2", interleaved_rope=True),
    Architecture("glm", interleaved_rope=True),
    Architecture("glm4", interleaved_rope=True),
    Architecture("gptj", interleaved_rope=True),
    Architecture("codegen", interleaved_rope=True),
)
_USUAL = Architecture("")

# Model types whose outputs a test compares before and after their symmetries are used.  What is known of a
# type by its names alone is enough for its MLPs, and not for its attention: position embeddings have no
# tensors.
SYMMETRIES_TESTED = frozenset(
    "bert cohere gemma gemma2 gemma3 gemma3_text glm gpt2 gpt_neox granite llama mistral mixtral olmo2 phi "
    "phi3 qwen2 qwen2_moe qwen3 qwen3_moe roberta siglip_vision_model smollm3 stablelm starcoder2 t5".split()
)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The row of a configuration's `model_type`, or one with the defaults."""
    model_type = config.get("model_type")
    return next((row for row in ARCHITECTURES if row.model_type == model_type), _USUAL)


def part_of(config: Mapping[str, Any], block: str = "") -> Mapping[str, Any]:
    """The part of a configuration that describes a block: the vision tower's, or the language model's."""
    part = "vision_config" if VISION_BLOCK.search(block) else "text_config"
    return config.get(part) or config
