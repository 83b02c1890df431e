"""The adapters and the merge of a recipe, measured."""

from mergekit_tspa.adapters import kind_of, locate_adapter
from mergekit_tspa.insight.inspection import Inspection, inspect_plan
from mergekit_tspa.insight.survival import merge_layers
from mergekit_tspa.methods.inputs import Progress
from mergekit_tspa.plugin.adapter_output import make_planner
from mergekit_tspa.plugin.compat import MergeConfiguration, MergeOptions
from mergekit_tspa.plugin.compat import plan as plan_tensors
from mergekit_tspa.plugin.planning import CPU_BYTES, merge_of
from mergekit_tspa.plugin.recipe import sources
from mergekit_tspa.plugin.references import FullModelReference, adapter_loader


def inspect_recipe(
    config: MergeConfiguration, options: MergeOptions, layers: int | None, progress: Progress
) -> Inspection:
    """The adapters of a recipe with its weights, and what its method makes of them.

    Args:
        layers: how many evenly spaced layers to merge; as many as fit some seconds by default

    Raises:
        InputError: the recipe cannot be planned, as in a merge.
    """
    progress("planning", 0.0)
    planner = make_planner(config, options)
    plan_tensors(planner)
    plan = merge_of(planner).recipe.merge
    used = {adapter for tensor in plan.every for adapter, _ in tensor.sources}
    adapters, kinds, notes = [], [], []
    models = dict.fromkeys(source.model for source in sources(config))
    for reference in [model for model in models if model != config.base_model]:
        adapter = adapter_loader(reference).adapter
        if adapter not in used:
            reason = "has tensors trained directly only" if not adapter.modules else "has weight 0 everywhere"
            notes.append(f"{adapter.name}: it {reason}, and is left out here")
            continue
        adapters.append(adapter)
        lora, cache = reference.lora, options.transformers_cache
        full = isinstance(reference, FullModelReference)
        kinds.append("full model" if full else kind_of(locate_adapter(lora.path, lora.revision, cache)))
    title = f"{len(adapters)} adapters, {config.merge_method}"
    inspection = inspect_plan(plan, adapters, kinds, title, progress, options.device, notes)
    inspection.base = str(config.base_model)
    inspection.merge = merge_layers(plan, CPU_BYTES, inspection, layers, options.device, progress)
    return inspection
