"""Read a PEFT LoRA adapter from disk, or refuse it by name.

The file's tensors decide what is adapted, not `target_modules`.  The configuration gives the scale and the
flags that change what the tensors mean; `kinds.py` lists them.  Rank and alpha patterns are looked up with
PEFT's own function.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from mergekit_tspa.adapters import experts
from mergekit_tspa.adapters.adapter import Adapter
from mergekit_tspa.adapters.adapter_files import (
    as_matrices,
    check_config,
    check_values,
    find_file,
    read_tensors,
)
from mergekit_tspa.adapters.kinds import KINDS, MERGE_FIRST, check_kinds, check_tensor, check_type, kinds_of
from mergekit_tspa.adapters.modules import BasePart, Change, LoraModule
from mergekit_tspa.adapters.on_disk import Factor, in_memory
from mergekit_tspa.base.names import strip_prefixes
from mergekit_tspa.errors import InputError

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Frozen copies of the base's tensors, and what some kinds need for training only.
_TRAINING_ONLY = [kind.training_only for kind in KINDS if kind.training_only]
_IGNORED = re.compile("|".join([r"\.base_layer\.weight$", r"\.original_module\.", *_TRAINING_ONLY]))
_LORA_KEY = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(\.weight|(?P<bias>\.bias))?$"
)
_TOKENS = ".token_adapter.trainable_tokens_delta"

_Rank = Annotated[int, Field(ge=1, lt=2**31)]
_Rows = list[Annotated[int, Field(ge=0, lt=2**31)]]


class _Blocks(BaseModel, strict=True):
    """The settings of BD-LoRA."""

    nblocks: Annotated[int, Field(ge=1, le=256)]  # devices that share a layer
    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None


class _Config(BaseModel, strict=True, allow_inf_nan=False):
    """The keys of adapter_config.json that are read; `kinds.py` looks at others to refuse an adapter."""

    base_model_name_or_path: str | None = None
    r: _Rank
    lora_alpha: float
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    use_bdlora: _Blocks | None = None
    fan_in_fan_out: bool | None = False
    init_lora_weights: bool | str | dict | None = True
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: _Rows | dict[str, _Rows] | None = None
    lora_B_layout: str | None = None


def read_peft(directory: Path, config: Mapping[str, Any], name: str) -> Adapter:
    """Read a PEFT directory; `docs/adapters.md` lists what is read and what is refused.

    Raises:
        InputError: files are missing or damaged, the adapter is of another kind, or a value is not finite.
    """
    check_type(config, name)
    check_kinds(config, name)
    config = check_config(config, _Config, directory)
    file = find_file(directory, _FILES, name)
    lora, trained = _sort(read_tensors(file), config, file)
    if not lora and not trained:
        raise InputError(f"{file}: holds no LoRA tensors")
    modules: dict[str, LoraModule] = {}
    changes = dict(_change(key, value, config, file) for key, value in trained.items())
    parameters = experts.name_parameters(lora, config, file)
    for module, parts in lora.items():
        if module in parameters:
            modules |= _read_experts(parameters[module], parts, config, file)
            continue
        modules[module] = found = _read_module(module, parts, config, file)
        if "B.bias" in parts:
            bias, added = f"{module}.bias", found.scale * in_memory(parts["B.bias"]).float()
            if bias in changes and changes[bias].value.shape != added.shape:
                raise InputError(f"{file}: {bias} is there twice, in two shapes; save the adapter again")
            changes[bias] = (
                Change(changes[bias].value + added) if bias in changes else Change(added, added=True)
            )
    return Adapter(name, config["base_model_name_or_path"], modules, changes)


def _sort(
    tensors: Mapping[str, Factor], config: Mapping[str, Any], file: Path
) -> tuple[dict[str, dict[str, Factor]], dict[str, Tensor]]:
    """`{module: {part: tensor}}` of LoRA, and the tensors that were trained directly, by name."""
    lora: dict[str, dict[str, Factor]] = {}
    trained = {}
    adapter_names = set()
    for key, tensor in tensors.items():
        key = strip_prefixes(key)
        if _IGNORED.search(key):
            continue
        check_values(tensor, key, file)
        if match := _LORA_KEY.match(key):
            adapter_names.add(match["adapter"])
            lora.setdefault(match["module"], {})[match["part"] + (match["bias"] or "")] = tensor
        else:
            _check_trained(key, config, file)
            key = re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", key).removesuffix(".default")
            trained[key.replace(".base_layer.bias", ".bias")] = in_memory(tensor)
    if len(adapter_names) > 1:
        raise InputError(
            f"{file}: holds several adapters ({', '.join(map(str, adapter_names))}); save one per file"
        )
    return lora, trained


def _check_trained(key: str, config: Mapping[str, Any], file: Path) -> None:
    """Refuse a tensor that does not belong to a saved module, a bias, or trained tokens."""
    check_tensor(key, file)
    if not any(
        known in key for known in (".weight", ".bias", _TOKENS, *(config.get("modules_to_save") or ()))
    ):
        raise InputError(f"{file}: tensor {key} is of no known kind; {MERGE_FIRST}")


def _change(key: str, value: Tensor, config: Mapping[str, Any], file: Path) -> tuple[str, Change]:
    """The name and the new values of a saved module, a bias, or some tokens' rows of an embedding."""
    if not key.endswith(_TOKENS):
        return key, Change(value)
    module, indices = key.removesuffix(_TOKENS), config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((rows for layer, rows in indices.items() if f".{module}".endswith(f".{layer}")), None)
    if not indices or value.shape[:1] != (len(indices),):
        raise InputError(
            f"{file}: {key} has shape {tuple(value.shape)}, but trainable_token_indices of "
            f"adapter_config.json names {len(indices or ())} tokens of {module}; restore the configuration "
            "it was saved with"
        )
    return f"{module}.weight", Change(value, rows=torch.tensor(indices))


def _read_module(
    module: str, parts: Mapping[str, Factor], config: Mapping[str, Any], file: Path
) -> LoraModule:
    """LoRA, DoRA or BD-LoRA on a linear layer, a convolution or an embedding; the base may be altered."""
    embedding = "embedding_A" in parts or "embedding_B" in parts
    B, A = _pair(module, parts, "embedding_" if embedding else "", file)
    if blocks := config.get("use_bdlora"):
        B, A = _expanded(module, B, A, blocks, file)
    convolution = A.ndim > 2
    B, A = as_matrices(B, A, module, file)
    rank = _setting(config, "rank_pattern", "r", module, file)
    if rank != A.shape[0]:
        raise InputError(
            f"{file}: {module} has rank {A.shape[0]} but adapter_config.json says r = {rank}, so its scale "
            "is unknown; restore the configuration it was saved with"
        )
    scale = _scale(config, module, rank, file)
    magnitude = parts.get("magnitude_vector")
    if magnitude is None and config.get("use_dora"):
        raise InputError(
            f"{file}: {module} has no lora_magnitude_vector, but adapter_config.json says DoRA; the file is "
            "incomplete"
        )
    return LoraModule(
        B,
        A,
        scale,
        transposed=embedding or bool(config.get("fan_in_fan_out")),
        embedding=embedding,
        magnitude=None if magnitude is None else in_memory(magnitude).flatten(),
        base_part=None if embedding else _base_part(config, rank, scale),
        convolution=convolution,
    )


def _read_experts(
    parameter: str, parts: Mapping[str, Factor], config: Mapping[str, Any], file: Path
) -> dict[str, LoraModule]:
    """`{parameter[expert]: factors}`."""
    B, A = as_matrices(*_pair(parameter, parts, "", file), parameter, file)
    rank = _setting(config, "rank_pattern", "r", parameter, file)
    if A.shape[0] % rank:
        raise InputError(
            f"{file}: the factors of {parameter} hold {A.shape[0]} rows, no multiple of the rank {rank} that "
            "adapter_config.json says; restore the configuration it was saved with"
        )
    scale = _scale(config, parameter, rank, file)
    pairs = experts.unpack(B, A, rank, config["lora_B_layout"])
    return {f"{parameter}[{expert}]": LoraModule(B, A, scale) for expert, (B, A) in enumerate(pairs)}


def _pair(module: str, parts: Mapping[str, Factor], kind: str, file: Path) -> tuple[Factor, Factor]:
    for side in "AB":
        if kind + side not in parts:
            raise InputError(
                f"{file}: {module} has {', '.join(f'lora_{part}' for part in parts)} but no "
                f"lora_{kind}{side}; the file is incomplete"
            )
    return parts[f"{kind}B"], parts[f"{kind}A"]


def _expanded(
    module: str, B: Factor, A: Factor, blocks: Mapping[str, Any], file: Path
) -> tuple[Factor, Factor]:
    """BD-LoRA: the file holds the blocks of a block-diagonal factor one below the other."""
    if A.ndim != 2 or B.ndim != 2:
        raise InputError(
            f"{file}: the factors of {module} are no matrices, as BD-LoRA's are; save the adapter again"
        )
    layer = module.rpartition(".")[2]

    def expand(factor: Factor, targets: str) -> Factor:
        if any(target in layer for target in blocks[targets] or ()):
            return torch.block_diag(*in_memory(factor).chunk(blocks["nblocks"]))
        return factor

    return expand(B, "target_modules_bd_b"), expand(A, "target_modules_bd_a")


def _base_part(config: Mapping[str, Any], rank: int, scale: float) -> BasePart | None:
    part = next((kind.base_part for kind in kinds_of(config) if kind.base_part), None)
    return BasePart(partial(part, rank=rank, scale=scale)) if part else None


def _setting(config: Mapping[str, Any], pattern: str, default: str, module: str, file: Path) -> Any:
    """A setting that may depend on the module, by PEFT's rule for patterns."""
    from peft.utils.other import get_pattern_key

    values = config[pattern] or {}
    try:
        return values.get(get_pattern_key(list(values), module), config[default])
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"{file}: {pattern} of adapter_config.json holds no regular expression ({error})"
        ) from error


def _scale(config: Mapping[str, Any], module: str, rank: int, file: Path) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` for rsLoRA."""
    alpha = _setting(config, "alpha_pattern", "lora_alpha", module, file)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
