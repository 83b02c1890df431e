"""The files of an adapter directory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_tspa.errors import InputError

CONFIG_FILE = "adapter_config.json"


def read_config(directory: Path, name: str) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    if not directory.is_dir():
        raise InputError(f"{name}: there is no adapter directory {directory}")
    if not file.is_file():
        found = [f.name for f in (*directory.glob("adapter*.safetensors"), *directory.glob("adapter*.bin"))]
        hint = f" (it does hold {found[0]})" if found else ""
        raise InputError(f"{name}: {directory} has no {CONFIG_FILE}{hint}; is it a PEFT adapter?")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: holds a {type(config).__name__} where an object is expected")
    return config


def find_weights(directory: Path, candidates: Sequence[str], name: str) -> Path:
    file = next((directory / f for f in candidates if (directory / f).is_file()), None)
    if file is None:
        raise InputError(f"{name}: no {' or '.join(candidates)} beside {CONFIG_FILE} in {directory}")
    return file


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and pickle raise a dozen unrelated types for damaged files
        raise InputError(f"{file}: damaged or truncated ({error}); copy or save the adapter again") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f"{file}: does not hold a dictionary of tensors")
    return tensors


def check_values(tensor: Tensor, key: str, file: Path) -> None:
    """Refuse what cannot be a trained tensor."""
    if tensor.numel() == 0:
        raise InputError(
            f"{file}: {key} is empty; it was saved under DeepSpeed ZeRO-3 without gathering, save it again "
            "with stage3_gather_16bit_weights_on_model_save"
        )
    if not tensor.is_floating_point():
        raise InputError(
            f"{file}: {key} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} where floating-point values are "
            "expected"
        )
    if not torch.isfinite(tensor).all():
        raise InputError(f"{file}: {key} contains NaN or Inf; the training diverged or the file is damaged")


def as_matrices(A: Tensor, B: Tensor, module: str, file: Path) -> tuple[Tensor, Tensor]:
    """`A (r, d_in)` and `B (d_out, r)`.

    Those of a convolution, `(r, d_in, kernel ..)` and `(d_out, r, 1 ..)`, make an update `B A` of its weight taken as
    `(d_out, d_in * kernel)`.
    """
    if A.ndim < 2 or B.ndim < 2:
        raise InputError(
            f"{file}: {module} has factors of shapes {tuple(A.shape)} and {tuple(B.shape)} where at least two "
            "dimensions are expected; save the adapter again"
        )
    A, B = A.flatten(1), B.flatten(1)
    if A.shape[0] != B.shape[1]:
        raise InputError(
            f"{file}: {module} has lora_A of shape {tuple(A.shape)} and lora_B of shape {tuple(B.shape)}, "
            "whose ranks differ"
        )
    return A, B
