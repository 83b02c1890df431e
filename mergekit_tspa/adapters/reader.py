"""Read an adapter directory of whatever format."""

import os
from pathlib import Path

from mergekit_tspa.adapters.adapter import Adapter
from mergekit_tspa.adapters.files import read_config
from mergekit_tspa.adapters.mlx_format import read_mlx
from mergekit_tspa.adapters.peft_format import read_peft


def read_adapter(path: str | os.PathLike, name: str | None = None) -> Adapter:
    """Read a directory that PEFT or mlx-lm wrote; `docs/adapters.md` lists what is read and what is refused.

    Raises:
        InputError: files are missing or damaged, or the adapter is of a kind that cannot be merged.
    """
    directory, name = Path(path), name or str(path)
    config = read_config(directory, name)
    return (read_mlx if "fine_tune_type" in config else read_peft)(directory, config, name)
