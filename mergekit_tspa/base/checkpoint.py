"""A base checkpoint on disk as a mapping of tensors that are read when asked for."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mergekit_tspa.base.files import check_name, load_pickle, read_json, readable
from mergekit_tspa.errors import InputError

_SINGLE = ("model.safetensors", "pytorch_model.bin")
# As safetensors and torch spell them.
_QUANTISED = re.compile(r"^(I8|U8|F8\w*|F4|torch\.(u?int8|float8\w*))$")


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a Hugging Face model directory, sharded or not, safetensors or `.bin`.

    Args:
        names: file names to look for; followed by `.index.json` each is the name of the index of its shards

    Raises:
        InputError: there are no tensors, a header or index is damaged, or an index points out of the
            directory.
    """

    def __init__(self, directory: str | Path, names: Sequence[str] = _SINGLE):
        self.directory = Path(directory)
        self.files = self._index(names)  # that hold each tensor

    def _index(self, names: Sequence[str]) -> dict[str, Path]:
        for name in names:
            index, single = self.directory / f"{name}.index.json", self.directory / name
            if os.path.isfile(index):  # False also of a name that is too long for the file system
                files = read_json(index).get("weight_map")
                if not isinstance(files, dict):
                    raise InputError(f"{index}: has no weight_map; copy or save the checkpoint again")
                return {check_name(tensor, index): self._shard(file, index) for tensor, file in files.items()}
            if os.path.isfile(single):
                names = self._open(single).keys()  # of a mapping, or of safetensors' file
                return {check_name(tensor, single): single for tensor in names}
        raise InputError(f"{self.directory}: no {' or '.join(names)} there, whole or sharded")

    def _shard(self, file: Any, index: Path) -> Path:
        if not isinstance(file, str) or "\0" in file or Path(file).is_absolute() or ".." in Path(file).parts:
            raise InputError(
                f"{index}: {str(file)[:80]!r} is no file of this checkpoint; copy or save it again"
            )
        return self.directory / file

    def _open(self, file: Path):
        with readable(file):
            return (
                safe_open(file, framework="pt")
                if file.suffix == ".safetensors"
                else load_pickle(file, mmap=True)
            )

    def __getitem__(self, name: str) -> Tensor:
        opened = self._open(file := self.files[name])
        with readable(file):
            return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes, as safetensors or torch spell them, of all tensors."""
        headers = {}
        for file in dict.fromkeys(self.files.values()):
            opened = self._open(file)
            with readable(file):
                for name in (name for name, owner in self.files.items() if owner == file):
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
        """The model's `config.json`, with the defaults of its model type if transformers knows that type."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.directory, trust_remote_code=False).to_dict()
        except Exception:
            return read_json(self.directory / "config.json")
