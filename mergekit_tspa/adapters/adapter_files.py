"""The files of an adapter.  Nothing in them is trusted."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from mergekit_tspa.adapters.on_disk import Factor, OnDisk, in_memory, open_tensors
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.files import load_pickle, read_json, readable
from mergekit_tspa.errors import InputError

CONFIG_FILE = "adapter_config.json"
_INDEX = ".index.json"  # what follows a file's name in that of the index of its shards
_LARGEST = torch.finfo(torch.float32).max
_PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_config(directory: Path, name: str) -> dict[str, Any]:
    """`adapter_config.json` of a directory.

    Raises:
        InputError: there is none, or it holds no JSON object.
    """
    file = directory / CONFIG_FILE
    if not os.path.isdir(directory):  # False also of a name that is too long for the file system
        raise InputError(f"{name}: there is no adapter directory {directory}")
    if not file.is_file():
        found = [f.name for f in (*directory.glob("adapter*.safetensors"), *directory.glob("adapter*.bin"))]
        hint = f" (it does hold {found[0]})" if found else ""
        raise InputError(f"{name}: {directory} has no {CONFIG_FILE}{hint}; is it a PEFT adapter?")
    return read_json(file)


def check_config(config: Mapping[str, Any], keys: type[BaseModel], directory: Path) -> dict[str, Any]:
    """Those keys of a configuration that `keys` declares, of the types that it declares.

    Raises:
        InputError: a key is missing, or its value is of another type.
    """
    try:
        return keys.model_validate(config).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:200]
        message = (
            f"{where} is {repr(first['input'])[:80]}: {first['msg']}" if first["type"] != "missing" else where
        )
        raise InputError(
            f"{directory / CONFIG_FILE}: {'no ' if first['type'] == 'missing' else ''}{message}; save the "
            "adapter again"
        ) from error


def find_file(directory: Path, candidates: Sequence[str], name: str) -> Path:
    """The first of these files that is there, or the index of its shards.

    Raises:
        InputError: none is.
    """
    names = [candidate + ending for candidate in candidates for ending in ("", _INDEX)]
    file = next((directory / name for name in names if (directory / name).is_file()), None)
    if file is None:
        raise InputError(f"{name}: no {' or '.join(candidates)} beside {CONFIG_FILE} in {directory}")
    return file


def read_tensors(file: Path) -> dict[str, Factor]:
    """All tensors.  Matrices in safetensors files stay there until they are asked for; the rest is in memory.

    Args:
        file: it holds the tensors, or is the index of the shards that do
    """
    if file.name.endswith(_INDEX):
        shards = Checkpoint(file.parent, [file.name.removesuffix(_INDEX)]).files
        opened = {shard: _read_file(shard) for shard in dict.fromkeys(shards.values())}
        for key, shard in shards.items():
            if key not in opened[shard]:
                raise InputError(
                    f"{shard}: has no {key}, which {file.name} puts there; save the adapter again"
                )
        return {key: opened[shard][key] for key, shard in shards.items()}
    return _read_file(file)


def _read_file(file: Path) -> dict[str, Factor]:
    if file.suffix == ".safetensors":
        return dict(open_tensors(file))
    with readable(file):
        return dict(load_pickle(file))


def check_values(factor: Factor, key: str, file: Path) -> None:
    """
    Raises:
        InputError: a tensor is empty, is not of floating-point values of 16 bits or more, or is not finite.
    """
    tensor = in_memory(factor)
    if tensor.numel() == 0:
        raise InputError(
            f"{file}: {key} is empty; it was saved under DeepSpeed ZeRO-3 without gathering, save it again "
            "with stage3_gather_16bit_weights_on_model_save"
        )
    if tensor.dtype not in _PRECISIONS:
        raise InputError(
            f"{file}: {key} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} where floating-point "
            "values of 16 bits or more are expected"
        )
    if not all(abs(bound) <= _LARGEST for bound in map(float, tensor.aminmax())):  # never true of NaN
        raise InputError(
            f"{file}: {key} contains NaN or Inf, or values beyond float32; the training diverged or the file "
            "is damaged"
        )


def as_matrices(B: Factor, A: Factor, module: str, file: Path) -> tuple[Factor, Factor]:
    """`B (d_out, r)` and `A (r, d_in)`.

    The factors of a convolution, `B (d_out, r, 1 ..)` and `A (r, d_in, kernel ..)`, make an update `B A` of
    its tensor taken as `(d_out, d_in * kernel)`.

    Raises:
        InputError: a factor has fewer than two dimensions, or their ranks differ.
    """
    if A.ndim < 2 or B.ndim < 2:
        raise InputError(
            f"{file}: {module} has factors of shapes {tuple(B.shape)} and {tuple(A.shape)} where at least "
            "two dimensions are expected; save the adapter again"
        )
    B, A = (factor if isinstance(factor, OnDisk) else factor.flatten(1) for factor in (B, A))
    if A.shape[0] != B.shape[1]:
        raise InputError(
            f"{file}: {module} has lora_B of shape {tuple(B.shape)} and lora_A of shape {tuple(A.shape)}, "
            "whose ranks differ"
        )
    return B, A
