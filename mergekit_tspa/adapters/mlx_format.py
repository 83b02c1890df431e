"""Read an adapter that mlx-lm wrote."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mergekit_tspa.adapters.adapter import Adapter
from mergekit_tspa.adapters.adapter_files import (
    as_matrices,
    check_config,
    check_values,
    find_file,
    read_tensors,
)
from mergekit_tspa.adapters.kinds import MLX
from mergekit_tspa.adapters.modules import LoraModule
from mergekit_tspa.adapters.on_disk import in_memory, transposed
from mergekit_tspa.errors import InputError

_PARTS = ("lora_a", "lora_b", "m")


class _Scale(BaseModel, strict=True, allow_inf_nan=False):
    scale: float


class _Config(BaseModel, strict=True, protected_namespaces=()):
    """The keys of adapter_config.json that are read."""

    lora_parameters: _Scale
    model: str | None = None


def read_mlx(directory: Path, config: Mapping[str, Any], name: str) -> Adapter:
    """`W + scale (a b)^T` with `a (d_in, r)` and `b (r, d_out)`; with DoRA also magnitudes `m (d_out,)`.

    Raises:
        InputError: files are missing or damaged, or whole tensors were trained.
    """
    kind = config[MLX.flag]
    if kind not in ("lora", "dora"):
        raise InputError(
            f"{name}: an mlx-lm adapter with fine_tune_type {reprlib.repr(kind)} holds no LoRA; fuse it with "
            "mlx_lm.fuse first"
        )
    file = find_file(directory, ("adapters.safetensors",), name)
    config = check_config(config, _Config, directory)
    scale = config["lora_parameters"]["scale"]
    parts: dict[str, dict] = {}
    for key, tensor in read_tensors(file).items():
        module, _, part = key.rpartition(".")
        if part not in _PARTS:
            raise InputError(
                f"{file}: tensor {key} is no part of an mlx-lm LoRA; fuse it with mlx_lm.fuse first"
            )
        check_values(tensor, key, file)
        parts.setdefault(module, {})[part] = tensor
    modules = {}
    for module, found in parts.items():
        if not {"lora_a", "lora_b"} <= found.keys():
            raise InputError(f"{file}: {module} has only {', '.join(found)}; the file is incomplete")
        if any(found[side].ndim != 2 for side in ("lora_a", "lora_b")):
            raise InputError(
                f"{file}: the factors of {module} are no matrices; fuse it with mlx_lm.fuse first"
            )
        B, A = as_matrices(transposed(found["lora_b"]), transposed(found["lora_a"]), module, file)
        magnitude = in_memory(found["m"]).flatten() if "m" in found else None
        modules[module] = LoraModule(B, A, scale, magnitude=magnitude)
    return Adapter(name, config["model"], modules)
