"""Read an adapter directory of whatever format."""

import os
from pathlib import Path

from mergekit_tspa.adapters.adapter import Adapter
from mergekit_tspa.adapters.mlx_format import read_mlx
from mergekit_tspa.adapters.peft_format import read_peft
from mergekit_tspa.base.files import read_config

_KINDS = {"use_dora": "DoRA", "use_rslora": "rsLoRA", "use_bdlora": "BD-LoRA", "fine_tune_type": "mlx-lm"}


def kind_of(directory: str | os.PathLike) -> str:
    """What an adapter's configuration calls it, such as `LoRA` or `DoRA, PiSSA`."""
    config = read_config(Path(directory), str(directory))
    kinds = [kind for key, kind in _KINDS.items() if config.get(key)]
    init = str(config.get("init_lora_weights")).lower()
    kinds += [kind for kind in ("PiSSA", "OLoRA") if kind.lower() == init]
    return ", ".join(kinds) or "LoRA"


def read_adapter(path: str | os.PathLike, name: str | None = None) -> Adapter:
    """Read a directory that PEFT or mlx-lm wrote; `docs/adapters.md` lists what is read and what is refused.

    Raises:
        InputError: files are missing or damaged, or the adapter is of a kind that cannot be merged.
    """
    directory, name = Path(path), name or str(path)
    config = read_config(directory, name)
    return (read_mlx if "fine_tune_type" in config else read_peft)(directory, config, name)
