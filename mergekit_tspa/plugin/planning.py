"""Replace mergekit's dense tasks of a planned merge by ours."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from mergekit import common
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoaderCache, TensorWriterTask
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.plan import MergePlanner

from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.geometry import AttentionGeometry
from mergekit_tspa.base.tensors import Index
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.pair_plans import plan_pairs
from mergekit_tspa.merging.plan import TensorPlan, check_plans, plan_tensor, surveys
from mergekit_tspa.methods import METHODS, Method
from mergekit_tspa.methods.emr_records import DESCRIPTION, RECORDS
from mergekit_tspa.methods.inputs import PairPlan
from mergekit_tspa.plugin.merge_method import ADAPTER, dense_message
from mergekit_tspa.plugin.references import AdapterReference, FullModelReference
from mergekit_tspa.plugin.tasks import (
    ApplyUpdates,
    Chunk,
    FinishRecords,
    LoadBase,
    LoadSide,
    LogMerge,
    MergeChunk,
    Part,
    Reports,
    SaveRecord,
    SideSource,
    Survey,
    TakeUpdate,
)

LOG = logging.getLogger(__name__)

# What one MergeChunk task holds at most, factors and solver: small beside a shard on a CPU, large batches on a GPU.
CPU_BYTES, ACCELERATOR_BYTES = 2**28, 2**32


@dataclass
class _Unit:
    """Weights that must be merged together: one, or those of an attention block."""

    label: str  # the first of its base tensors in reading order
    plans: list[TensorPlan]
    pairs: list[PairPlan]

    @property
    def nbytes(self) -> int:
        return sum(plan.nbytes for plan in self.plans) + sum(pair.nbytes for pair in self.pairs)


def replace_tasks(planner: MergePlanner) -> None:
    """Rewrite `planner._tensors` in place.

    Every tensor that an adapter touches becomes `ApplyUpdates(base tensor, updates of its parts)`; every other one
    becomes the `LoadBase` of its name.  Tensors whose vocabulary mergekit aligns keep their stock task.

    Raises:
        InputError: a weight out of the method's range, an adapter of which nothing would be merged, an
            attention layout that is not known.
    """
    method, options = METHODS[planner.config.merge_method], planner.options
    touched: dict[ModelReference, set[str]] = {}
    bases: dict[str, LoadBase] = {}
    parts: dict[str, list[tuple[Index, TensorPlan]]] = {}  # of each tensor that changes
    unweighted: list[str] = []
    for weight, task in planner._tensors:
        if isinstance(task.gather_tensors, GatherTensors):
            bases[weight.name], adapted = _inputs(weight.name, task, touched)
            parameters = method.bind({name: v for name, v in task.parameters.items() if name != ADAPTER.name})
            plans = [
                (index, plan_tensor(method, name, sources, parameters, changes))
                for name, (index, sources, changes) in adapted.items()
            ]
            parts[weight.name] = [(index, plan) for index, plan in plans if plan is not None]
            if adapted and not parts[weight.name]:
                unweighted.append(weight.name)
        else:
            _refuse_dense(method, weight.name, task)
    if unweighted:
        named = f"{unweighted[0]} and {len(unweighted) - 1} more" if unweighted[1:] else unweighted[0]
        LOG.warning("%s: all weights are zero, so the base stays as it is", named)
    _check_touched(touched)
    plans = {plan.name: plan for planned in parts.values() for _, plan in planned if plan.sources}
    check_plans(method, [*plans.values()])
    loads = {name: base.model_copy(update={"dtype": None}) for name, base in bases.items()}
    pairs = []
    if method.attention:
        pairs = list(plan_pairs([*plans.values()], _shapes(planner, loads), _geometry(planner)))

    device = None if options.multi_gpu else options.device
    budget = CPU_BYTES if device == "cpu" else ACCELERATOR_BYTES
    labels = {plan.name: loads[name].group_label() or name for name, planned in parts.items() for _, plan in planned}
    units = _units(plans, pairs, labels)
    if options.multi_gpu:
        budget = min(budget, 1 + sum(unit.nbytes for unit in units) // max(1, common.get_torch_accelerator_count()))
    survey = None
    if surveys(method, [*plans.values()]):
        survey = Survey(chunk=Chunk(method, [*plans.values()], [], "\0"), device=device)
    if method.result.dense:
        budget = 0  # an update is as large as its weight: one at a time
    updates: dict[str, TakeUpdate] = {}
    reports = Reports()
    for chunk in _chunks(units, budget):
        merge = _merge_task(method, chunk, loads, survey, device, options.quiet, reports)
        for index, plan in enumerate(merge.chunk.plans):
            updates[plan.name] = TakeUpdate(merge=merge, index=index, label=labels[plan.name])

    dtype = planner.config.out_dtype or planner.config.dtype
    for position, (weight, _) in enumerate(planner._tensors):
        if parts.get(weight.name):
            done = tuple(Part(index, plan, updates.get(plan.name)) for index, plan in parts[weight.name])
            applied = ApplyUpdates(base=loads[weight.name], parts=done, dtype=weight.force_dtype or dtype)
            planner._tensors[position] = weight, applied
        elif weight.name in bases:
            planner._tensors[position] = weight, bases[weight.name]


def _inputs(
    name: str, task: ExecuteMergeMethodTask, touched: dict[ModelReference, set[str]]
) -> tuple[LoadBase, dict[str, tuple[Index, list[tuple], list[tuple]]]]:
    """The base's load task, and what adapters do to the output's tensor `name`, or to experts in it.

    By name of the part: its index, `(adapter, module, weight)` of the adapters with factors for it, and
    `(adapter, change, weight)` of those that trained it directly.
    """
    gather = task.gather_tensors
    infos = dict(gather.weight_info.items())
    # Of the weights after the last layer mergekit lists as many as the first slice has inputs; the name is one.
    shared = next(iter(infos.values()))
    info = infos.get(task.base_model, shared)
    base = LoadBase(
        model=task.base_model,
        tensor=info.name,
        dtype=info.force_dtype or gather.dtype,
        device=gather.device,
        optional=info.optional,
        aliases=info.aliases,
        tied_names=info.tied_names,
    )
    adapted: dict[str, tuple[Index, list[tuple], list[tuple]]] = {}
    for reference in task.model_order:
        if not isinstance(reference, AdapterReference):
            continue
        loader = LoaderCache().get(reference)
        done = touched.setdefault(reference, set())
        given = infos.get(reference, shared)
        parts = next((loader.parts[n] for n in (given.name, *(given.aliases or ())) if n in loader.parts), {})
        if parts and reference not in infos:
            raise InputError(
                f"{loader.adapter.name}: it adapts {given.name}, but mergekit does not weigh the inputs of the last "
                "slice for tensors outside the layers; give all slices the same inputs, some with weight 0"
            )
        done.update(parts)
        for part, index in parts.items():
            unique = name if index == () else part if name == given.name else f"{name}: {part}"
            _, sources, changes = adapted.setdefault(unique, (index, [], []))
            weight = task.input_parameters[reference]["weight"]
            if part in loader.modules:
                sources.append((loader.adapter, loader.modules[part], weight))
            if part in loader.adapter.changes:
                changes.append((loader.adapter, loader.adapter.changes[part], weight))
    return base, adapted


def _refuse_dense(method: Method, name: str, task: ExecuteMergeMethodTask) -> None:
    """A tensor whose vocabulary mergekit aligns reaches the method dense."""
    for reference in task.model_order:
        if isinstance(reference, AdapterReference) and name in (loader := LoaderCache().get(reference)).parts:
            raise InputError(dense_message(method, name, loader.adapter.name))


def _check_touched(touched: dict[ModelReference, set[str]]) -> None:
    for reference, tensors in touched.items():
        loader = LoaderCache().get(reference)
        missing = loader.adapted - tensors
        if not tensors:
            raise InputError(f"{loader.adapter.name}: nothing of it lies in the layers that the recipe merges")
        if missing:
            LOG.warning(
                "%s: %d of its tensors are not part of the output, %s among them",
                *(loader.adapter.name, len(missing), min(missing)),
            )


def _shapes(planner: MergePlanner, loads: dict[str, LoadBase]) -> dict[str, tuple[int, ...] | None]:
    """Shapes of the output's tensors; None for those that mergekit converts when it reads them."""
    loader = LoaderCache().get(planner.config.base_model)
    shapes = Checkpoint(loader.index.base_path).shapes()
    return {name: shapes.get(load._resolve_name(loader)) for name, load in loads.items()}


def _geometry(planner: MergePlanner) -> Callable[[str], AttentionGeometry]:
    """Head counts of a block, from the base's configuration."""
    config = planner.config.base_model.config(planner.options.trust_remote_code).to_dict()
    return cache(lambda block: AttentionGeometry.from_config(config, block))


def _units(plans: dict[str, TensorPlan], pairs: Sequence[PairPlan], labels: dict[str, str]) -> list[_Unit]:
    """Group the weights by attention block, in the order in which mergekit reads the base's tensors."""
    block_of = {side.tensor: pair.block for pair in pairs for side in (pair.x, pair.y)}
    units: dict[str, _Unit] = {}
    for name in sorted(plans, key=labels.__getitem__):
        unit = units.setdefault(block_of.get(name, name), _Unit(labels[name], [], []))
        unit.plans.append(plans[name])
    for pair in pairs:
        units[pair.block].pairs.append(pair)
    return list(units.values())


def _chunks(units: Sequence[_Unit], budget: int) -> Iterator[list[_Unit]]:
    chunk, size = [], 0
    for unit in units:
        if chunk and size + unit.nbytes > budget:
            yield chunk
            chunk, size = [], 0
        chunk.append(unit)
        size += unit.nbytes
    if chunk:
        yield chunk


def _merge_task(
    method: Method,
    units: Sequence[_Unit],
    loads: dict[str, LoadBase],
    survey: Survey | None,
    device: str | None,
    quiet: bool,
    reports: Reports,
) -> MergeChunk:
    plans, pairs = ([item for unit in units for item in getattr(unit, part)] for part in ("plans", "pairs"))
    # Solvers run before the first tensor is written ("\0" sorts first): a failure leaves no files, and the executor
    # does not hold the base weights that it would meet while Grams of later layers are still being made.
    first = "\0" if method.solves else ""
    sides = [
        LoadSide(source=SideSource(pair, side, loads, f"{first}{loads[side.tensor].group_label()}"), device=device)
        for pair in pairs
        for side in (pair.x, pair.y)
    ]
    label = max([f"{first}{units[0].label}", *(side.source.label for side in sides)])
    chunk = Chunk(method, plans, pairs, label)
    return MergeChunk(chunk=chunk, sides=tuple(sides), survey=survey, device=device, quiet=quiet, reports=reports)


def log_tasks(planner: MergePlanner, finish: Task) -> list[Task]:
    """The task that reports on the merge after `finish`; none if nothing is merged."""
    full = [model for model in planner.config.referenced_models() if isinstance(model, FullModelReference)]
    adapters = tuple(LoaderCache().get(model).adapter for model in sorted(full, key=str))
    parts = (part for _, task in planner._tensors if isinstance(task, ApplyUpdates) for part in task.parts)
    reports = {part.update.merge.reports for part in parts if part.update}
    return [LogMerge(finish=finish, reports=gathered, full=adapters) for gathered in reports or {Reports()}]


def record_tasks(planner: MergePlanner, out_path: str) -> list[Task]:
    """Tasks that write what the method keeps beside the model in `out_path`; none for most methods.

    Raises:
        InputError: a tensor changes by more than one low-rank update per adapter, which is all that records hold.
    """
    applied = {weight.name: task for weight, task in planner._tensors if isinstance(task, ApplyUpdates)}
    method, options = METHODS[planner.config.merge_method], planner.options
    if method.record is None or not applied:
        return []
    writer = TensorWriterTask(
        out_path=out_path, max_shard_size=options.out_shard_size, override_basename=RECORDS.removesuffix(".safetensors")
    )
    saved = []
    base = str(planner.config.base_model)
    base = os.path.abspath(base) if os.path.exists(base) else base
    description = {"base_model": base, "method": method.name, "weights": {}}
    for name, task in applied.items():
        part = task.parts[0]
        plan = part.plan
        if part.index or plan.changes or any(module.magnitude is not None for module in plan.modules):
            raise InputError(
                f"{name}: {method.name} keeps what a task adds to each weight, and here a task does something else "
                "(DoRA, a fused expert, or a tensor trained directly); use another method for such adapters"
            )
        chunk = Chunk(method, [plan], [], task.group_label() or "")
        merge = part.update.merge
        saved.append(SaveRecord(chunk=chunk, survey=merge.survey, writer=writer, device=merge.device))
        adapters = [adapter.name for adapter, _ in plan.sources]
        description["weights"][name] = {"base": task.base.tensor, "tasks": adapters}
    finish = FinishRecords(
        saved=tuple(saved), writer=writer, description=json.dumps(description, indent=1), file=DESCRIPTION
    )
    return [*saved, finish]
