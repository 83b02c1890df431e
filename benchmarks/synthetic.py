"""Random checkpoints and adapters of given shapes, written shard by shard."""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

LLAMA_3_8B = {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128}
LLAMA_3_70B = {"hidden": 8192, "intermediate": 28672, "heads": 64, "kv_heads": 8, "head_dim": 128}
QWEN3_30B_A3B = {
    **{"hidden": 2048, "intermediate": 768, "heads": 32, "kv_heads": 4, "head_dim": 128},
    "experts": 128,
}
MODELS = {"8b": (LLAMA_3_8B, 32), "70b": (LLAMA_3_70B, 80), "moe": (QWEN3_30B_A3B, 48)}  # and their layers
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def linear_shapes(
    hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, experts: int = 0
) -> dict[str, tuple[int, int]]:
    """`{module in a layer: (d_out, d_in)}` of a Llama layer, or of one with that many experts."""
    q, kv = heads * head_dim, kv_heads * head_dim
    mlp = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
    } | {
        f"mlp.{place}{name}": shape
        for place in ([f"experts.{e}." for e in range(experts)] or [""])
        for name, shape in mlp.items()
    }


def _tensor_shapes(layers: int, vocabulary: int, **shape) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (vocabulary, shape["hidden"])}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{m}.weight": s for m, s in linear_shapes(**shape).items()}
        if experts := shape.get("experts"):
            shapes[f"model.layers.{i}.mlp.gate.weight"] = (experts, shape["hidden"])
            norms = ("self_attn.q_norm", "self_attn.k_norm")
            shapes |= {f"model.layers.{i}.{norm}.weight": (shape["head_dim"],) for norm in norms}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{i}.{norm}.weight": (shape["hidden"],) for norm in norms}
    shapes |= {"model.norm.weight": (shape["hidden"],), "lm_head.weight": (vocabulary, shape["hidden"])}
    return shapes


def _shards(shapes: dict[str, tuple[int, ...]], nbytes: int) -> Iterator[tuple[str, dict]]:
    """File names, and the shapes of the bf16 tensors in each, of about that many bytes."""
    shard: dict[str, tuple[int, ...]] = {}
    shards = [shard]
    for name, dims in shapes.items():
        if sum(2 * prod(own) for own in shard.values()) >= nbytes:
            shards.append(shard := {})
        shard[name] = dims
    yield from ((f"model-{i:05d}.safetensors", own) for i, own in enumerate(shards, 1))


def _write_index(path: Path, files: dict[str, str], config: dict) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (path / "config.json").write_text(json.dumps(config))


def write_llama(path: Path, layers: int, vocabulary: int = 32000, shard_bytes: int = 2**29, **shape) -> Path:
    """A bf16 Llama checkpoint with random weights."""
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    files = {}
    for file, shapes in _shards(_tensor_shapes(layers, vocabulary, **shape), shard_bytes):
        draw = lambda dims: torch.empty(dims, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)  # noqa: E731
        save_file({name: draw(dims) for name, dims in shapes.items()}, path / file, {"format": "pt"})
        files |= dict.fromkeys(shapes, file)
    _write_index(path, files, _config(layers, vocabulary, **shape))
    return path


def write_sparse_llama(path: Path, layers: int, vocabulary: int = 128256, **shape) -> Path:
    """The same checkpoint in shards whose headers are real and whose weights are holes: it takes no disk."""
    path.mkdir(parents=True, exist_ok=True)
    files = {}
    for file, shapes in _shards(_tensor_shapes(layers, vocabulary, **shape), 2**32):
        header, end = {}, 0
        for name, dims in shapes.items():
            start, end = end, end + 2 * prod(dims)
            header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
        packed = json.dumps(header).encode()
        with open(path / file, "wb") as shard:
            shard.write(len(packed).to_bytes(8, "little") + packed)
            shard.truncate(8 + len(packed) + end)
        files |= dict.fromkeys(shapes, file)
    _write_index(path, files, _config(layers, vocabulary, **shape))
    return path


def _config(layers: int, vocabulary: int, **shape) -> dict:
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if experts := shape.get("experts"):
        kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts}
        kind["moe_intermediate_size"] = shape["intermediate"]
    return kind | {
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "torch_dtype": "bfloat16",
    }


def write_adapters(
    path: Path, count: int, layers: int, rank: int, modules: tuple[str, ...], **shape
) -> Iterator[Path]:
    """bf16 PEFT adapters with random factors."""
    shapes = {m: s for m, s in linear_shapes(**shape).items() if m.split(".")[-1] in modules}
    for t in range(count):
        folder = path / str(t)
        if not (folder / "adapter_config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            generator = torch.Generator().manual_seed(1 + t)
            draw = lambda *dims: torch.empty(dims, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)  # noqa: E731,B023
            tensors = {}
            for i in range(layers):
                for module, (d_out, d_in) in shapes.items():
                    prefix = f"base_model.model.model.layers.{i}.{module}"
                    tensors[f"{prefix}.lora_A.weight"] = draw(rank, d_in)
                    tensors[f"{prefix}.lora_B.weight"] = draw(d_out, rank)
            save_file(tensors, folder / "adapter_model.safetensors")
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules)}
            (folder / "adapter_config.json").write_text(json.dumps(config))
        yield folder


@contextmanager
def large_adapters(
    doc: str, methods: Sequence[str]
) -> Iterator[tuple[Path, Path, list[Path], argparse.Namespace]]:
    """A folder, in it a sparse base of a large model's shapes and adapters of it; the command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--layers", type=int, help="by default all of the model")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--all-linear", action="store_true", help="adapt the MLPs, too, not only q, k, v and o"
    )
    parser.add_argument("--methods", nargs="*", default=methods)
    args = parser.parse_args()
    shape, layers = MODELS[args.model]
    layers, modules = args.layers or layers, ALL_LINEAR if args.all_linear else ATTENTION
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPU cores; python {' '.join(sys.argv)}\n")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        base = write_sparse_llama(folder / "base", layers, **shape)
        adapters = [*write_adapters(folder / "adapters", args.adapters, layers, args.rank, modules, **shape)]
        yield folder, base, adapters, args
