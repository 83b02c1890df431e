"""A base checkpoint on disk as a mapping of tensors that are read when asked for."""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mergekit_tspa.errors import InputError

_SINGLE = ("model.safetensors", "pytorch_model.bin")
# As safetensors and torch spell them.
_QUANTISED = re.compile(r"^(I8|U8|F8\w*|F4|torch\.(u?int8|float8\w*))$")


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a Hugging Face model directory, sharded or not, safetensors or `.bin`.

    Args:
        names: file names to look for, of the whole file or, followed by `.index.json`, of the index of its shards

    Raises:
        InputError: no weights there, or a damaged header.
    """

    def __init__(self, directory: str | Path, names: Sequence[str] = _SINGLE):
        self.directory = Path(directory)
        self._files = self._index(names)

    def _index(self, names: Sequence[str]) -> dict[str, Path]:
        for name in names:
            index, single = self.directory / f"{name}.index.json", self.directory / name
            if index.is_file():
                weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {tensor: self.directory / file for tensor, file in weights.items()}
            if single.is_file():
                return dict.fromkeys(self._open(single).keys(), single)
        raise InputError(f"{self.directory}: no {' or '.join(names)} there, whole or sharded")

    def _open(self, file: Path):
        try:
            if file.suffix == ".safetensors":
                return safe_open(file, framework="pt")
            mmap = zipfile.is_zipfile(file)  # files from before torch 1.6 are not
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
            return tensors.get("state_dict", tensors)
        except Exception as error:  # safetensors and pickle raise a dozen unrelated types for damaged files
            raise InputError(f"{file}: damaged or missing ({error})") from error

    def __getitem__(self, name: str) -> Tensor:
        opened = self._open(self._files[name])
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    @cached_property
    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes, as safetensors or torch spell them, of all tensors."""
        headers = {}
        for file in dict.fromkeys(self._files.values()):
            opened = self._open(file)
            for name in (name for name, owner in self._files.items() if owner == file):
                if isinstance(opened, dict):
                    headers[name] = tuple(opened[name].shape), str(opened[name].dtype)
                else:
                    tensor = opened.get_slice(name)
                    headers[name] = tuple(tensor.get_shape()), tensor.get_dtype()
        return headers

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in self.headers.items()}

    def quantised(self) -> set[str]:
        """The tensors that hold integers or floats of 8 bits or fewer."""
        return {name for name, (_, dtype) in self.headers.items() if _QUANTISED.match(dtype)}

    def config(self) -> dict[str, Any]:
        """The model's `config.json`, completed with the defaults of its model type where transformers knows it."""
        from transformers import AutoConfig

        file = self.directory / "config.json"
        try:
            return AutoConfig.from_pretrained(self.directory).to_dict()
        except Exception:
            try:
                return json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"{file}: not readable ({error})") from error
