"""Read an adapter directory of whatever format."""

import os
from pathlib import Path

from mergekit_tspa.adapters.adapter import Adapter
from mergekit_tspa.adapters.adapter_files import read_config
from mergekit_tspa.adapters.kinds import MLX, label_of
from mergekit_tspa.adapters.mlx_format import read_mlx
from mergekit_tspa.adapters.peft_format import read_peft
from mergekit_tspa.base.files import path_of


def kind_of(directory: str | os.PathLike[str]) -> str:
    """What an adapter's configuration calls it, such as `LoRA` or `DoRA, PiSSA`."""
    return label_of(read_config(Path(directory), str(directory)))


def read_adapter(path: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """Read a directory that PEFT or mlx-lm wrote; `docs/adapters.md` lists what is read and what is refused.

    Raises:
        InputError: files are missing or damaged, or the adapter is of a kind that cannot be merged.
    """
    directory, name = Path(path_of(path, "an adapter")), name or str(path)
    config = read_config(directory, name)
    return (read_mlx if MLX.flag in config else read_peft)(directory, config, name)
