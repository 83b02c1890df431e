"""Tensors that stay in their file until they are asked for."""

import json
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from mergekit_tspa.base.files import check_name, readable
from mergekit_tspa.errors import InputError

# Those that safetensors stores and adapters are of, by its names.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_Stamp: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class OnDisk:
    """A tensor of a safetensors file, and perhaps what is made of it, by its shape and dtype.

    It is read by ordinary reads of the file, because a map of a file that is cut meanwhile would end the
    process.  The file must be the one that it was when it was opened.
    """

    file: Path  # absolute, so that it is the same from wherever it is read
    key: str
    start: int  # its first byte
    stored: tuple[int, ...]  # its shape in the file
    dtype: torch.dtype
    stamp: _Stamp
    make: Callable[[Tensor], Tensor] | None = None
    shape: tuple[int, ...] = ()  # of what is made
    # Of its file the two tensors that parts were last made of, such as experts' `B` and `A`, by their keys.
    last: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Of what is made."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """
        Raises:
            InputError: the file has changed since it was opened, or cannot be read.
        """
        if self.make is None:
            return self._read()
        whole = self.last.get(self.key)
        if whole is None:  # parts of a tensor are asked for one after the other, such as its experts
            whole = self._read()
            for older in [*self.last][:-1]:
                self.last.pop(older, None)  # another thread may have done so
            self.last[self.key] = whole
        return self.make(whole)

    def _read(self) -> Tensor:
        values = torch.empty(prod(self.stored), dtype=self.dtype, device="cpu")
        room = values.view(torch.uint8).numpy().data
        with readable(self.file), self.file.open("rb") as opened:
            if _stamp(opened.fileno()) != self.stamp:
                raise InputError(
                    f"{self.file}: the file has changed since this run began; let it be while it is merged"
                )
            opened.seek(self.start)
            if opened.readinto(room) != len(room):
                raise InputError(f"{self.file}: {self.key} is cut off; copy or save the file again")
        return values.view(self.stored)

    def to(self, *args: object) -> Tensor:
        """What `Tensor.to` gives, of the values."""
        tensor: Tensor = self.read().to(*args)  # type: ignore[call-overload]
        return tensor

    def made(self, make: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> "OnDisk":
        """What a function makes of it, of which the shape is known."""
        before = self.make
        return replace(self, make=make if before is None else _Composed(before, make), shape=shape)


@dataclass(frozen=True)
class _Composed:
    first: Callable[[Tensor], Tensor]
    then: Callable[[Tensor], Tensor]

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.then(self.first(tensor))


Factor: TypeAlias = Tensor | OnDisk


def in_memory(factor: Factor) -> Tensor:
    """Its values."""
    return factor.read() if isinstance(factor, OnDisk) else factor


def part_of(factor: Factor, make: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Factor:
    """What a function makes of a factor, a view of it, once it is read.

    Args:
        shape: of what it makes
    """
    return make(factor) if isinstance(factor, Tensor) else factor.made(make, shape)


def transposed(factor: Factor) -> Factor:
    """The matrix with its sides exchanged."""
    return part_of(factor, _transpose, tuple(factor.shape[::-1]))


def _transpose(M: Tensor) -> Tensor:
    return M.mT


def rows_of(factor: Factor, rows: slice) -> Factor:
    """Some of a matrix's rows."""
    count = len(range(*rows.indices(factor.shape[0])))
    return part_of(factor, operator.itemgetter(rows), (count, *factor.shape[1:]))


def open_tensors(file: Path) -> dict[str, Factor]:
    """The tensors of a safetensors file; those of floating-point matrices stay there.

    Raises:
        InputError: the file is damaged, or the name of a tensor is none.
    """
    with readable(file), file.open("rb") as raw:
        stamp = _stamp(raw.fileno())
        with safe_open(file, framework="pt") as opened:  # it checks the header
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
            found: dict[str, Factor] = {}
            last: dict[str, Tensor] = {}
            keys = opened.keys()  # what is opened is no mapping
            for key in keys:
                check_name(key, file)
                entry = header[key]
                shape, dtype = tuple(entry["shape"]), _DTYPES.get(entry["dtype"])
                if dtype is None or len(shape) != 2 or not prod(shape):
                    found[key] = opened.get_tensor(key).clone()
                    continue
                start = 8 + size + entry["data_offsets"][0]
                found[key] = OnDisk(file.absolute(), key, start, shape, dtype, stamp, shape=shape, last=last)
            return found


def _stamp(opened: int) -> _Stamp:
    """What tells a file from another, and from itself once it was written to."""
    stat = os.fstat(opened)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
