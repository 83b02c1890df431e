"""Replace mergekit's dense tasks of a planned merge by ours."""

import logging
from collections.abc import Iterable, Iterator

from mergekit.common import ModelReference
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.plan import MergePlanner

from mergekit_tspa.errors import InputError
from mergekit_tspa.graph.reference import AdapterReference
from mergekit_tspa.graph.tasks import ApplyUpdate, Chunk, MergeChunk, TakeUpdate
from mergekit_tspa.methods import METHODS
from mergekit_tspa.methods.base import WeightPlan, plan_weight

LOG = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 2**20  # float32 factors that one MergeChunk task holds at most


def replace_tasks(planner: MergePlanner) -> None:
    """Rewrite `planner._tensors` in place.

    Every weight that an adapter touches becomes `ApplyUpdate(base tensor, its update)`; every other one
    becomes the `LoadTensor` of the base.  Tensors whose vocabulary mergekit aligns keep their stock task.

    Raises:
        InputError: a weight out of the method's range, or an adapter of which nothing would be merged.
    """
    method = METHODS[planner.config.merge_method]
    touched: dict[ModelReference, set[str]] = {}
    planned: list[tuple[int, LoadTensor, WeightPlan]] = []
    for index, (weight, task) in enumerate(planner._tensors):
        if not isinstance(task.gather_tensors, GatherTensors):
            continue
        base, sources = _inputs(task, touched)
        plan = (
            plan_weight(method, weight.name, sources, method.bind(dict(task.parameters.items()))) if sources else None
        )
        if sources and plan is None:
            LOG.warning("%s: all weights are zero, so the base stays as it is", weight.name)
        if plan is None:
            planner._tensors[index] = weight, base
        else:
            planned.append((index, base.model_copy(update={"dtype": None}), plan))
    _check_touched(touched)

    dtype = planner.config.out_dtype or planner.config.dtype
    device = None if planner.options.multi_gpu else planner.options.device
    for chunk in _chunks(planned):
        label = chunk[0][1].group_label()
        merge = MergeChunk(chunk=Chunk(method, [plan for *_, plan in chunk], label), device=device)
        for position, (index, base, _) in enumerate(chunk):
            weight, _ = planner._tensors[index]
            update = TakeUpdate(merge=merge, index=position, label=base.group_label())
            planner._tensors[index] = weight, ApplyUpdate(base=base, update=update, dtype=weight.force_dtype or dtype)


def _inputs(task: ExecuteMergeMethodTask, touched: dict[ModelReference, set[str]]) -> tuple[LoadTensor, list[tuple]]:
    """The base's load task and `(adapter, module, weight)` of each adapter that changes this tensor."""
    gather = task.gather_tensors
    base_info = gather.weight_info[task.base_model]
    base = gather.arguments()[f"{task.base_model}:{base_info.name}"]
    sources = []
    for reference in task.model_order:
        if not isinstance(reference, AdapterReference):
            continue
        loader = LoaderCache().get(reference)
        done = touched.setdefault(reference, set())
        info = gather.weight_info[reference]
        tensor = next((name for name in (info.name, *(info.aliases or ())) if name in loader.modules), None)
        if tensor is not None:
            done.add(tensor)
            sources.append((loader.adapter, loader.modules[tensor], task.input_parameters[reference]["weight"]))
    return base, sources


def _check_touched(touched: dict[ModelReference, set[str]]) -> None:
    for reference, tensors in touched.items():
        missing = LoaderCache().get(reference).modules.keys() - tensors
        if not tensors:
            raise InputError(f"{reference.lora}: nothing of this adapter lies in the layers that the recipe merges")
        if missing:
            LOG.warning(
                "%s: %d of its tensors are not part of the output, %s among them",
                *(reference.lora, len(missing), min(missing)),
            )


def _chunks(
    planned: Iterable[tuple[int, LoadTensor, WeightPlan]],
) -> Iterator[list[tuple[int, LoadTensor, WeightPlan]]]:
    """Split into chunks of bounded size, in the order in which mergekit reads the base's tensors."""
    chunk, size = [], 0
    for item in sorted(planned, key=lambda item: item[1].group_label()):
        if chunk and size + item[2].nbytes > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += item[2].nbytes
    if chunk:
        yield chunk
