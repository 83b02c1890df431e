"""`mergekit-tspa inspect`: adapters, or the adapters and the merge of a recipe, measured and shown on one page."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_tspa.adapters import Adapter, Extraction, kind_of, locate_adapter
from mergekit_tspa.alignment.attention import SideGrams
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError
from mergekit_tspa.insight.inspection import Inspection, Merge, Place, Progress, inspect_plans
from mergekit_tspa.insight.measures import projection
from mergekit_tspa.merging.api import load_adapter, plan_adapters
from mergekit_tspa.merging.merge import merge_tensors, survey_tensors
from mergekit_tspa.merging.plan import TensorPlan, surveys
from mergekit_tspa.methods import METHODS
from mergekit_tspa.methods.inputs import Pair, Parameters
from mergekit_tspa.plugin.adapter_output import make_planner
from mergekit_tspa.plugin.recipe import sources
from mergekit_tspa.plugin.references import FullModelReference
from mergekit_tspa.plugin.tasks import ApplyUpdates, MergeChunk
from mergekit_tspa.updates import Dense

SECONDS = 20  # about what merging for a report may take


def inspect_adapters(
    paths: Sequence[str], base: str | None, device: torch.device | str | None, progress: Progress
) -> Inspection:
    """Adapters of weight 1 each, by themselves.

    Args:
        base: where PiSSA and OLoRA find what they took out of it, and names and shapes are checked

    Raises:
        InputError: one cannot be read, is listed twice, or does not fit the base or the others.
    """
    model = None if base is None else ModelTensors.of(base, Checkpoint(base))
    loaded: list[tuple[Adapter, dict[str, str]]] = []
    notes, kinds, found = [], [], {}
    for i, path in enumerate(paths):
        progress("reading", i / len(paths))
        directory = locate_adapter(path)
        if (first := found.setdefault(Path(directory).resolve(), path)) is not path:
            raise InputError(f"{path}: listed twice" + (f" ({first} is the same)" if first != path else ""))
        adapter, touched = load_adapter(path, path, model, Extraction())
        needy = {t for t, m in touched.items() if (part := adapter.modules[m].base_part) and part.read is None}
        if needy:
            notes.append(f"{path}: its {len(needy)} PiSSA or OLoRA updates need the base (--base) and are not measured")
        loaded.append((adapter, {t: m for t, m in touched.items() if t not in needy}))
        kinds.append(kind_of(directory))
    adapters, touched = zip(*loaded)
    weights = [1.0] * len(adapters)
    plans = plan_adapters(METHODS["lora_task_arithmetic"], Parameters(), adapters, touched, weights)
    count = f"{len(adapters)} adapters" if len(adapters) > 1 else "One adapter"
    return inspect_plans(plans, adapters, kinds, count, progress, device, notes)


def inspect_recipe(
    config: MergeConfiguration, options: MergeOptions, layers: int | None, progress: Progress
) -> Inspection:
    """The adapters of a recipe with its weights, and what its method makes of them.

    Args:
        layers: how many evenly spaced layers to merge; as many as `SECONDS` allow by default

    Raises:
        InputError: the recipe cannot be planned, as in a merge.
    """
    progress("planning", 0.0)
    planner = make_planner(config, options)
    planner._plan()
    tasks = [task for _, task in planner._tensors if isinstance(task, ApplyUpdates)]
    plans = [part.plan for task in tasks for part in task.parts]
    used = {adapter for plan in plans for adapter, _ in plan.sources}
    adapters, kinds, notes = [], [], []
    for reference in dict.fromkeys(source.model for source in sources(config) if source.model != config.base_model):
        adapter = LoaderCache().get(reference).adapter
        if adapter not in used:
            reason = "has tensors trained directly only" if not adapter.modules else "has weight 0 everywhere"
            notes.append(f"{adapter.name}: it {reason}, and is left out here")
            continue
        adapters.append(adapter)
        full, lora = isinstance(reference, FullModelReference), reference.lora
        cache = options.transformers_cache
        kinds.append("full model" if full else kind_of(locate_adapter(lora.path, lora.revision, cache)))
    title = f"{len(adapters)} adapters, {config.merge_method}"
    inspection = inspect_plans(plans, adapters, kinds, title, progress, options.device, notes)
    inspection.base = str(config.base_model)
    merges = dict.fromkeys(part.update.merge for task in tasks for part in task.parts if part.update)
    inspection.merge = merge_layers(list(merges), inspection, layers, progress)
    return inspection


def merge_layers(merges: Sequence[MergeChunk], inspection: Inspection, layers: int | None, progress: Progress) -> Merge:
    """Merge as the recipe says, on evenly spaced layers if all would take too long; nothing dense is kept.

    How many fit is found by merging the middle one first.
    """
    method = merges[0].chunk.method
    merged = Merge(method.name, inspection.measures.norm * torch.nan, inspection.ratio * torch.nan)
    every = sorted({_layer(plan) for merge in merges for plan in merge.chunk.plans} - {None})
    count = len(every) if layers is None else min(layers, len(every))
    if layers is None and every:
        start = time.perf_counter()
        _merge_some(merges, {every[len(every) // 2]}, inspection, None, progress)
        count = min(count, max(1, int(SECONDS / (time.perf_counter() - start))))
    chosen = {every[round(i * (len(every) - 1) / max(1, count - 1))] for i in range(count)}
    if count == len(every):
        chosen.add(None)
    else:
        merged.notes.append(
            f"what survives is measured on {count} of {len(every)} layers, evenly spaced: "
            f"{', '.join(map(str, sorted(chosen)))}"
        )
        if surveys(method, [merges[0].chunk.plans[0]]):
            merged.notes.append("scope: model: the thresholds are those of these layers, not of the whole model")
    _merge_some(merges, chosen, inspection, merged, progress)
    return merged


def _layer(plan: TensorPlan) -> int | None:
    return Place.of(plan.name).layer


def _merge_some(
    merges: Sequence[MergeChunk],
    layers: set[int | None],
    inspection: Inspection,
    result: Merge | None,
    progress: Progress,
) -> None:
    """Merge the weights of some layers, chunk by chunk, and note what is left of the adapters in `result`."""
    method, device = merges[0].chunk.method, merges[0].device
    parts = [part for part in (_part(merge, layers) for merge in merges) if part[0]]
    survey = survey_tensors(method, [plan for plans, _ in parts for plan in plans], device)
    index = {tensor: i for i, tensor in enumerate(inspection.tensors)}
    for done, (plans, sides) in enumerate(parts):
        stage = method.name if result else "timing one layer"
        progress(stage, done / len(parts))
        pairs = [Pair(pair, *(SideGrams(*side.execute()) for side in both)) for pair, *both in sides]
        updates, reports = merge_tensors(
            *(method, plans, pairs, device),
            (lambda _, share, left: progress(stage, (done + share) / len(parts))),  # noqa: B023
            survey,
        )
        for plan, update in zip(plans, updates):
            factors = [adapter.factors(module, device=device) for adapter, module in plan.sources]
            inner, norm = projection(update.dW if isinstance(update, Dense) else update, factors)
            if result:
                columns = [inspection.adapters.index(adapter) for adapter, _ in plan.sources]
                result.inner[index[plan.name], columns] = inner.cpu()
                result.norm[index[plan.name]] = norm.cpu()
        if result:
            result.reports += reports
    progress(stage, 1.0)


def _part(merge: MergeChunk, layers: set[int | None]) -> tuple[list[TensorPlan], list[tuple]]:
    """The weights of a chunk that lie in some layers; its pairs there, each with its two sides."""
    plans = [plan for plan in merge.chunk.plans if _layer(plan) in layers]
    names = {plan.name for plan in plans}
    sides = zip(merge.chunk.pairs, merge.sides[::2], merge.sides[1::2])
    return plans, [side for side in sides if {side[0].x.tensor, side[0].y.tensor} & names]
