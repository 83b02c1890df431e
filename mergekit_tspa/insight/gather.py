"""Adapters in directories, measured by themselves."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_tspa.adapters import Adapter, is_model, kind_of, locate_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError
from mergekit_tspa.insight.inspection import Inspection, inspect_plan
from mergekit_tspa.merging.api import load_adapter, plan_adapters
from mergekit_tspa.merging.merge import Device
from mergekit_tspa.methods import METHODS
from mergekit_tspa.methods.inputs import Parameters, Progress


def inspect_adapters(
    paths: Sequence[str], base: str | None, device: Device, progress: Progress, align: str | None = None
) -> Inspection:
    """Adapters of weight 1 each.

    Args:
        align: by which symmetries full models are aligned to the base first
        base: where PiSSA and OLoRA find what they took out of it, and names and shapes are checked

    Raises:
        InputError: one cannot be read, is listed twice, or does not fit the base or the others.
    """
    extraction = Parameters(align=align).extraction._replace(device=str(device))
    model = None if base is None else ModelTensors.of(base, Checkpoint(base))
    adapters: list[Adapter] = []
    touched: list[dict[str, str]] = []
    notes, kinds = [], []
    found: dict[Path, str] = {}
    for i, path in enumerate(paths):
        progress("reading", i / len(paths))
        directory = locate_adapter(path)
        if first := found.get(Path(directory).resolve()):
            raise InputError(f"{path}: listed twice" + (f" ({first} is the same)" if first != path else ""))
        found[Path(directory).resolve()] = path
        adapter, tensors = load_adapter(path, path, model, extraction)
        needy = {
            t for t, m in tensors.items() if (part := adapter.modules[m].base_part) and part.read is None
        }
        if needy:
            notes.append(
                f"{path}: its {len(needy)} PiSSA or OLoRA updates need the base (--base) and are not measured"
            )
        adapters.append(adapter)
        touched.append({tensor: module for tensor, module in tensors.items() if tensor not in needy})
        kinds.append("full model" if is_model(directory) else kind_of(directory))
    weights = [1.0] * len(adapters)
    plan = plan_adapters(METHODS["lora_task_arithmetic"], Parameters(), adapters, touched, weights)
    count = f"{len(adapters)} adapters" if len(adapters) > 1 else "One adapter"
    return inspect_plan(plan, adapters, kinds, count, progress, device, notes)
