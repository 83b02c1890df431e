"""Write a PEFT adapter that every consumer reads alike: scale 1, one rank, few configuration keys."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mergekit_tspa.adapters.adapter_files import CONFIG_FILE
from mergekit_tspa.adapters.modules import LoraModule
from mergekit_tspa.base.files import replaced
from mergekit_tspa.errors import InputError
from mergekit_tspa.updates import LoraFactors


def write_adapter(
    directory: Path,
    updates: Mapping[str, LoraFactors],
    modules: Mapping[str, LoraModule],
    base: str,
    task_type: str | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Save updates as `adapter_model.safetensors` and, last, `adapter_config.json`, which means: complete.

    The scale is baked in (`lora_alpha = r`), and smaller ranks are padded with zeros to the largest: vLLM
    and llama.cpp read neither patterns nor more than one rank.

    Args:
        updates: by module, in the orientation in which the base stores its tensor
        modules: an adapter's module of that name, for its orientation and kind
        base: the base model as the user wrote it

    Returns:
        The configuration.

    Raises:
        InputError: a factor is too large for the dtype.
    """
    rank = max(f.rank for f in updates.values())
    tensors = {}
    for name, f in updates.items():
        f = f.padded(rank).to(dtype)
        B, A = (f.A.mT, f.B.mT) if modules[name].transposed else f
        kind = "lora_embedding_{}" if modules[name].embedding else "lora_{}.weight"
        for side, factor in (("B", B), ("A", A)):
            if not torch.isfinite(factor).all():
                raise InputError(
                    f"{name}: a factor of the merged update is too large for {dtype}; take float32"
                )
            tensors[f"base_model.model.{name}.{kind.format(side)}"] = factor.contiguous().cpu()
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in updates}),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "fan_in_fan_out": any(m.transposed and not m.embedding for n, m in modules.items() if n in updates),
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    with replaced(directory / "adapter_model.safetensors") as file:
        save_file(tensors, file, metadata={"format": "pt"})
    with replaced(directory / CONFIG_FILE) as file:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config
