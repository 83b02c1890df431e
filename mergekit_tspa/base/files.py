"""Reading files of which nothing is trusted, and writing files that are whole or not there."""

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_tspa.errors import InputError

# Without brackets, because `name[3]` means expert 3 of a fused tensor.
_TENSOR_NAME = re.compile(r"[^\[\]\x00-\x1f]{1,1000}")
_POINTER = b"version https://git-lfs"  # how every pointer begins


def path_of(given: Any, what: str) -> str:
    """
    Args:
        what: it is the path of

    Raises:
        InputError: it is none.
    """
    if not isinstance(given, str | os.PathLike) or not str(given) or "\0" in str(given):
        raise InputError(f"{what} must be a path, not {given!r}; for the current directory give '.'")
    return str(os.fspath(given))


def read_json(file: Path) -> dict[str, Any]:
    """
    Raises:
        InputError: the file holds no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        _refuse_other_causes(file)
        raise InputError(f"{file}: not readable as JSON ({error}); copy or save it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds a {type(content).__name__} where an object is expected")
    return content


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn every exception into an `InputError` that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors and pickle raise a dozen unrelated types for damaged files
        _refuse_other_causes(file)
        reason = str(error)[:300]
        raise InputError(
            f"{file}: damaged, truncated or missing ({reason}); copy or save it again"
        ) from error


def _refuse_other_causes(file: Path) -> None:
    """
    Raises:
        InputError: Git LFS has left a pointer where the file should be, or it may not be read.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
    except PermissionError as error:  # safetensors says that there is no such file
        raise InputError(f"{file}: you may not read it; change its permissions") from error
    except OSError:
        return
    if start == _POINTER:
        raise InputError(
            f"{file}: is a Git LFS pointer, not the file itself; run git lfs pull where it was cloned"
        )


def load_pickle(file: Path, mmap: bool = False) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, bare or under `state_dict`, without running code from it.

    Raises:
        InputError: it holds anything else.
    """
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
    """
    Raises:
        InputError: this cannot be the name of a tensor.
    """
    if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
        raise InputError(f"{file}: {str(name)[:80]!r} is no name of a tensor; copy or save the file again")
    return name


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yield a path to write to; what is written there takes the name of `file` when it is whole.

    If writing fails, it is removed.  A run that is killed leaves the earlier `file`, or none, and never a
    part of the new one under its name.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
