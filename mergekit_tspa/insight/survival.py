"""What a merge leaves of its adapters, measured by merging; nothing dense is kept."""

import time

import torch

from mergekit_tspa.insight.inspection import Inspection, Merge, Place
from mergekit_tspa.insight.measures import projection
from mergekit_tspa.merging.merge import Device, merge_chunks
from mergekit_tspa.merging.plan import MergePlan
from mergekit_tspa.methods.inputs import Progress
from mergekit_tspa.updates import Dense

SECONDS = 20  # about what merging for a report may take


def merge_layers(
    plan: MergePlan,
    budget: float,
    inspection: Inspection,
    layers: int | None,
    device: Device,
    progress: Progress,
) -> Merge:
    """Merge as the plan says, on evenly spaced layers if all would take too long.

    How many fit is found by merging the middle one first.

    Args:
        budget: bytes of a chunk
        layers: how many to merge; as many as `SECONDS` allow by default
    """
    merged = Merge(plan.method.name, inspection.measures.norm * torch.nan, inspection.ratio * torch.nan)
    every = sorted({layer for tensor in plan.tensors if (layer := Place.of(tensor.name).layer) is not None})
    count = len(every) if layers is None else min(layers, len(every))
    if layers is None and every:
        start = time.perf_counter()
        _merge_some(plan, budget, {every[len(every) // 2]}, inspection, None, device, progress)
        count = min(count, max(1, int(SECONDS / (time.perf_counter() - start))))
    chosen: set[int | None] = {every[round(i * (len(every) - 1) / max(1, count - 1))] for i in range(count)}
    if count == len(every):
        chosen.add(None)  # the tensors outside the layers
    else:
        named = ", ".join(str(layer) for layer in sorted(layer for layer in chosen if layer is not None))
        merged.notes.append(
            f"what survives is measured on {count} of {len(every)} layers, evenly spaced: {named}"
        )
        if plan.surveys:
            merged.notes.append(
                "scope: model: the thresholds are those of these layers, not of the whole model"
            )
    _merge_some(plan, budget, chosen, inspection, merged, device, progress)
    return merged


def _merge_some(
    plan: MergePlan,
    budget: float,
    layers: set[int | None],
    inspection: Inspection,
    result: Merge | None,
    device: Device,
    progress: Progress,
) -> None:
    """Merge the tensors of some layers, chunk by chunk, and note what is left of the adapters in `result`."""
    some = plan.only(lambda name: Place.of(name).layer in layers)
    sources = {tensor.name: tensor.sources for tensor in some.tensors}
    index = {tensor: i for i, tensor in enumerate(inspection.tensors)}
    shown = plan.method.name if result else "timing one layer"

    def told(stage: str, done: float, left: float | None = None) -> None:
        progress(shown, done)

    for updates, reports in merge_chunks(some, list(some.chunks(budget)), device, told):
        for name, update in updates.items():
            factors = [adapter.factors(module, device=device) for adapter, module in sources[name]]
            inner, norm = projection(update.dW if isinstance(update, Dense) else update, factors)
            if result:
                columns = [inspection.adapters.index(adapter) for adapter, _ in sources[name]]
                result.inner[index[name], columns] = inner.cpu()
                result.norm[index[name]] = norm.cpu()
        if result:
            result.reports += reports
    progress(shown, 1.0)
