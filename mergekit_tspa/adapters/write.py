"""Write a PEFT adapter that every consumer reads alike: scale 1, one rank, few configuration keys."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mergekit_tspa.adapters.adapter_files import CONFIG_FILE
from mergekit_tspa.adapters.modules import LoraModule
from mergekit_tspa.base.files import replaced
from mergekit_tspa.errors import InputError
from mergekit_tspa.updates import LoraFactors

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


class AdapterWriter:
    """An adapter that is written update by update, so that only one of them is in memory.

    The scale is baked in (`lora_alpha = r`), and smaller ranks are padded with zeros to the largest: vLLM
    and llama.cpp read neither patterns nor more than one rank.  As the largest is known last, the factors
    wait in a file without a name, which goes with the process, however that ends.

    Args:
        directory: made if it is not there, once there is something to write
        modules: by name, an adapter's module, for its orientation and kind
        dtype: of the factors
    """

    def __init__(self, directory: Path, modules: Mapping[str, LoraModule], dtype: torch.dtype):
        self.directory, self.modules, self.dtype = directory, modules, dtype
        self.places: dict[str, tuple[int, tuple[int, int]]] = {}  # by key: where it begins, and its shape
        self.rank = 0

    @cached_property
    def waiting(self) -> IO[bytes]:
        """The factors so far."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=self.directory)

    def add(self, name: str, f: LoraFactors) -> None:
        """
        Args:
            f: the update of a module, in the orientation in which the base stores its tensor

        Raises:
            InputError: a factor is too large for the dtype.
        """
        module = self.modules[name]
        B, A = (f.A.mT, f.B.mT) if module.transposed else f
        kind = "lora_embedding_{}" if module.embedding else "lora_{}.weight"
        for side, factor in (("B", B.to(self.dtype)), ("A", A.to(self.dtype))):
            if not torch.isfinite(factor).all():
                raise InputError(
                    f"{name}: a factor of the merged update is too large for {self.dtype}; take float32"
                )
            rows, columns = factor.shape
            key = f"base_model.model.{name}.{kind.format(side)}"
            self.places[key] = self.waiting.seek(0, os.SEEK_END), (rows, columns)
            self.waiting.write(_bytes(factor))
        self.rank = max(self.rank, f.rank)

    def finish(self, base: str, task_type: str | None) -> dict[str, Any]:
        """Write `adapter_model.safetensors` and, last, `adapter_config.json`, which means: complete.

        Args:
            base: the base model as the user wrote it

        Returns:
            The configuration.
        """
        modules = self.modules
        config = {
            "peft_type": "LORA",
            "task_type": task_type,
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.rank,
            "target_modules": sorted({name.rsplit(".", 1)[-1] for name in modules}),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "fan_in_fan_out": any(m.transposed and not m.embedding for m in modules.values()),
            "inference_mode": True,
        }
        (self.directory / CONFIG_FILE).unlink(missing_ok=True)
        with replaced(self.directory / "adapter_model.safetensors") as file, file.open("wb") as out:
            for part in self._content():
                out.write(part)
        self.waiting.close()
        with replaced(self.directory / CONFIG_FILE) as file:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return config

    def _content(self) -> Iterator[bytes]:
        """The file as safetensors writes it: the length of a header, the header, and the values."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key in sorted(self.places):
            shape = self._padded(key)
            start, end = end, end + prod(shape) * self.dtype.itemsize
            header[key] = {"dtype": _NAMES[self.dtype], "shape": shape, "data_offsets": [start, end]}
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        yield len(packed).to_bytes(8, "little") + packed
        for key in sorted(self.places):
            start, shape = self.places[key]
            self.waiting.seek(start)
            factor = torch.frombuffer(
                bytearray(self.waiting.read(prod(shape) * self.dtype.itemsize)), dtype=self.dtype
            )
            rows, columns = (wide - own for wide, own in zip(self._padded(key), shape))
            yield _bytes(torch.nn.functional.pad(factor.view(shape), (0, columns, 0, rows)))

    def _padded(self, key: str) -> tuple[int, int]:
        """The shape of a factor in the file."""
        _, (d_out, d_in) = self.places[key]
        return (d_out, self.rank) if key.removesuffix(".weight").endswith("B") else (self.rank, d_in)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
