"""The files of an adapter or a checkpoint.  Nothing in them is trusted."""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import safe_open
from torch import Tensor

from mergekit_tspa.errors import InputError

CONFIG_FILE = "adapter_config.json"
_PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Brackets would pass for the number of an expert.
_TENSOR_NAME = re.compile(r"[^\[\]\x00-\x1f]{1,1000}")


def read_config(directory: Path, name: str) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    if not directory.is_dir():
        raise InputError(f"{name}: there is no adapter directory {directory}")
    if not file.is_file():
        found = [f.name for f in (*directory.glob("adapter*.safetensors"), *directory.glob("adapter*.bin"))]
        hint = f" (it does hold {found[0]})" if found else ""
        raise InputError(f"{name}: {directory} has no {CONFIG_FILE}{hint}; is it a PEFT adapter?")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); copy or save it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds a {type(content).__name__} where an object is expected")
    return content


def check_config(config: Mapping[str, Any], keys: type[BaseModel], directory: Path) -> dict[str, Any]:
    """Those keys of a configuration that `keys` declares, of the types that it declares."""
    try:
        return keys.model_validate(config).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:200]
        message = f"{where} is {str(first['input'])[:80]}: {first['msg']}" if first["type"] != "missing" else where
        raise InputError(
            f"{directory / CONFIG_FILE}: {'no ' if first['type'] == 'missing' else ''}{message}; save the adapter again"
        ) from error


def find_weights(directory: Path, candidates: Sequence[str], name: str) -> Path:
    file = next((directory / f for f in candidates if (directory / f).is_file()), None)
    if file is None:
        raise InputError(f"{name}: no {' or '.join(candidates)} beside {CONFIG_FILE} in {directory}")
    return file


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors, in memory of their own: if a mapped file were cut, the next access would end the process."""
    with readable(file):
        if file.suffix != ".safetensors":
            return load_pickle(file)
        with safe_open(file, framework="pt") as opened:
            return {check_name(key, file): opened.get_tensor(key).clone() for key in opened.keys()}


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Say of every exception but our own that the file is to blame."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors and pickle raise a dozen unrelated types for damaged files
        reason = str(error)[:300]
        raise InputError(f"{file}: damaged, truncated or missing ({reason}); copy or save it again") from error


def load_pickle(file: Path, mmap: bool = False) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, bare or under `state_dict`, without running code from it."""
    size = file.stat().st_size
    zipped = zipfile.is_zipfile(file)  # files from before torch 1.6 are not
    if zipped:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise InputError(f"{file}: unpacks to more than its own size, which no file of PyTorch does")
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{file}: does not hold a dictionary of tensors")
    for key, tensor in tensors.items():
        check_name(key, file)
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.nbytes > size:
            raise InputError(f"{file}: {key} of shape {tuple(tensor.shape)} is not stored as plain values")
    return tensors


def check_name(name: Any, file: Path) -> str:
    if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
        raise InputError(f"{file}: {str(name)[:80]!r} is no name of a tensor; copy or save the file again")
    return name


def check_values(tensor: Tensor, key: str, file: Path) -> None:
    """Refuse what cannot be a trained tensor."""
    if tensor.numel() == 0:
        raise InputError(
            f"{file}: {key} is empty; it was saved under DeepSpeed ZeRO-3 without gathering, save it again "
            "with stage3_gather_16bit_weights_on_model_save"
        )
    if tensor.dtype not in _PRECISIONS:
        raise InputError(
            f"{file}: {key} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} where floating-point values of "
            "16 bits or more are expected"
        )
    if not torch.isfinite(tensor.float()).all():
        raise InputError(f"{file}: {key} contains NaN or Inf; the training diverged or the file is damaged")


def as_matrices(B: Tensor, A: Tensor, module: str, file: Path) -> tuple[Tensor, Tensor]:
    """`B (d_out, r)` and `A (r, d_in)`.

    Those of a convolution, `(r, d_in, kernel ..)` and `(d_out, r, 1 ..)`, make an update `B A` of its weight taken as
    `(d_out, d_in * kernel)`.
    """
    if A.ndim < 2 or B.ndim < 2:
        raise InputError(
            f"{file}: {module} has factors of shapes {tuple(A.shape)} and {tuple(B.shape)} where at least two "
            "dimensions are expected; save the adapter again"
        )
    B, A = B.flatten(1), A.flatten(1)
    if A.shape[0] != B.shape[1]:
        raise InputError(
            f"{file}: {module} has lora_A of shape {tuple(A.shape)} and lora_B of shape {tuple(B.shape)}, "
            "whose ranks differ"
        )
    return B, A
