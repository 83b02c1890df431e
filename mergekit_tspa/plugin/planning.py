"""From mergekit's plan of a recipe to a `MergePlan`, and from that to the tasks that take the place of
mergekit's.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.geometry import AttentionGeometry
from mergekit_tspa.base.tensors import Index, ModelTensors
from mergekit_tspa.calibration.readings import TextSource
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.bases import warn_of_other_bases
from mergekit_tspa.merging.guide import Guide
from mergekit_tspa.merging.memory import budget
from mergekit_tspa.merging.outputs import OutputTensor, Wanted
from mergekit_tspa.merging.plan import LOG, Chunk, MergePlan, plan_merge
from mergekit_tspa.methods import METHODS, Method
from mergekit_tspa.methods.emr_records import DESCRIPTION, RECORDS
from mergekit_tspa.plugin.compat import (
    ExecuteMergeMethodTask,
    GatherTensors,
    MergeConfiguration,
    MergeOptions,
    MergePlanner,
    ModelReference,
    Task,
    TensorWriterTask,
    WeightInfo,
    accelerator_count,
    planned_tensors,
    stored_name,
)
from mergekit_tspa.plugin.merge_method import ADAPTER_PARAMETERS, TEXTS, dense_message
from mergekit_tspa.plugin.recipe import filters
from mergekit_tspa.plugin.references import AdapterReference, LoraLoader, adapter_loader, base_loader
from mergekit_tspa.plugin.tasks import (
    ApplyUpdates,
    FinishRecords,
    LoadBase,
    LoadSide,
    LogMerge,
    MergeChunk,
    RecordSource,
    SaveRecord,
    SideSource,
    SurveyModel,
    TakeReports,
    TakeUpdate,
    Target,
    Work,
)

# What one MergeChunk task holds at most, factors and solver: small beside a shard on a CPU, large batches on
# a GPU.
CPU_BYTES, ACCELERATOR_BYTES = 2**28, 2**32


@dataclass(frozen=True, eq=False)
class PlannedRecipe:
    """A recipe as mergekit resolved it, and the merge that it asks for."""

    config: MergeConfiguration
    options: MergeOptions
    weights: tuple[WeightInfo, ...]  # all tensors of the output
    loads: Mapping[str, LoadBase]  # of those tensors the base's, except where mergekit aligns the vocabulary
    merge: MergePlan
    texts: Mapping[Adapter, TextSource]  # of each adapter, whether the method looks at them or not

    @property
    def base(self) -> ModelTensors:
        """The base as adapters see it."""
        return base_tensors(self.config, self.options)


@dataclass(frozen=True, eq=False)
class MergeTasks:
    """The tasks of a planned recipe."""

    recipe: PlannedRecipe
    applied: Mapping[str, ApplyUpdates]  # by tensor of the output
    merges: Mapping[str, MergeChunk]  # by tensor that the method merges
    updates: Mapping[str, TakeUpdate]
    survey: SurveyModel | None

    @property
    def reports(self) -> tuple[TakeReports, ...]:
        return tuple(TakeReports(merge=merge) for merge in dict.fromkeys(self.merges.values()))


def replace_tasks(planner: MergePlanner) -> None:
    """Plan the recipe that mergekit has resolved, and put the tasks of the plan where mergekit's were.

    Tensors whose vocabulary mergekit aligns keep their stock task.
    """
    tasks = make_tasks(plan_recipe(planner))
    ours: dict[str, Task] = {**tasks.recipe.loads, **tasks.applied}
    tensors = planned_tensors(planner)
    tensors[:] = [(weight, ours.get(weight.name, task)) for weight, task in tensors]
    planner.adapter_merge = tasks  # type: ignore[attr-defined]  # beside the tensors that it is the plan of


def merge_of(planner: MergePlanner) -> MergeTasks:
    """What `replace_tasks` made of a planner's recipe."""
    return planner.adapter_merge  # type: ignore[attr-defined]


def _stock_tasks(planner: MergePlanner) -> Iterator[tuple[WeightInfo, ExecuteMergeMethodTask]]:
    """The output's tensors and mergekit's own tasks of them, before `replace_tasks`."""
    for weight, task in planned_tensors(planner):
        assert isinstance(task, ExecuteMergeMethodTask)
        yield weight, task


def plan_recipe(planner: MergePlanner) -> PlannedRecipe:
    """The merge that mergekit's planned tasks describe.

    Raises:
        InputError: a weight out of the method's range, an adapter of which nothing would be merged, an
            attention layout that is not known.
    """
    config, options = planner.config, planner.options
    method = METHODS[config.merge_method]
    adapters: dict[ModelReference, LoraLoader] = {}
    touched: dict[ModelReference, set[str]] = {}
    loads: dict[str, LoadBase] = {}
    wanted: list[Wanted] = []
    for weight, task in _stock_tasks(planner):
        for reference in task.model_order:
            if isinstance(reference, AdapterReference) and reference not in adapters:
                adapters[reference] = adapter_loader(reference)
        if isinstance(task.gather_tensors, GatherTensors):
            loads[weight.name] = _base_of(task)
            wanted += _wanted(method, weight.name, task, touched)
        else:
            _refuse_dense(method, weight.name, task)
    _check_touched(touched)
    warn_of_other_bases((loader.adapter for loader in adapters.values()), str(config.base_model))
    unconverted = {name: load.model_copy(update={"dtype": None}) for name, load in loads.items()}
    names = [weight.name for weight, _ in planned_tensors(planner)]
    for unmatched in sorted(f for f in filters(config) if not any(f in name for name in names)):
        LOG.warning("filter %r is in the name of no tensor", unmatched)

    def read(name: str) -> Tensor:
        W = unconverted[name].execute()
        assert W is not None
        return W

    guide, texts = None, _text_sources(planner, adapters)
    if method.guided:
        directory = base_loader(config).index.base_path
        guide = Guide(base_tensors(config, options), Path(directory), texts)
    merge = plan_merge(
        method,
        [loader.adapter for loader in adapters.values()],
        bases={name: load.tensor for name, load in loads.items()},
        wanted=wanted,
        read=read,
        shapes=_shapes(config, unconverted) if method.attention or method.guided else None,
        geometry_of=_geometry(config, options) if method.attention or method.guided else None,
        guide=guide,
    )
    return PlannedRecipe(
        config, options, tuple(weight for weight, _ in planned_tensors(planner)), loads, merge, texts
    )


def make_tasks(planned: PlannedRecipe) -> MergeTasks:
    """Every tensor that adapters change becomes `ApplyUpdates(base tensor, updates of its parts)`."""
    plan, options = planned.merge, planned.options
    device = None if options.multi_gpu else options.device
    loads = {name: load.model_copy(update={"dtype": None}) for name, load in planned.loads.items()}
    labels = {
        part.plan.name: loads[output.name].group_label() or output.name
        for output in plan.outputs
        for part in output.parts
    }
    survey = None
    if plan.surveys:
        survey = SurveyModel(work=Work(plan, plan.whole, "\0"), device=device, quiet=options.quiet)
    merges: dict[str, MergeChunk] = {}
    for chunk in plan.chunks(_budget(planned), labels.__getitem__):
        merge = _merge_chunk(plan, chunk, loads, labels, survey, device, options.quiet)
        merges |= {tensor.name: merge for tensor in chunk.tensors}
    updates = {
        name: TakeUpdate(merge=merge, tensor=name, label=labels[name]) for name, merge in merges.items()
    }
    dtypes = {weight.name: weight.force_dtype for weight in planned.weights}
    dtype = planned.config.out_dtype or planned.config.dtype
    applied = {
        name: ApplyUpdates(
            base=loads[name],
            target=Target(output),
            updates=tuple(updates[part.plan.name] for part in output.parts if part.plan.sources),
            dtype=dtypes[name] or dtype,
        )
        for name, output in plan.changed.items()
    }
    return MergeTasks(planned, applied, merges, updates, survey)


def _budget(planned: PlannedRecipe) -> float:
    """How many bytes of factors and solver a chunk may hold; with several GPUs, so few that each has work."""
    if not planned.options.multi_gpu:
        return min(CPU_BYTES, budget() // 4) if planned.options.device == "cpu" else ACCELERATOR_BYTES
    total = sum(unit.nbytes for unit in planned.merge.units())
    return min(ACCELERATOR_BYTES, 1 + total // max(1, accelerator_count()))


def _merge_chunk(
    plan: MergePlan,
    chunk: Chunk,
    loads: Mapping[str, LoadBase],
    labels: Mapping[str, str],
    survey: SurveyModel | None,
    device: str | None,
    quiet: bool,
) -> MergeChunk:
    # Solvers run before the first tensor is written ("\0" sorts first): a failure leaves no files, and the
    # executor does not hold the base tensors that it would meet while Grams of later layers are still being
    # made.
    first = "\0" if plan.method.solves else ""
    sides = [
        LoadSide(
            source=SideSource(plan, pair, side, f"{first}{loads[side.tensor].group_label()}"), device=device
        )
        for pair in chunk.pairs
        for side in (pair.x, pair.y)
    ]
    label = max([f"{first}{labels[chunk.tensors[0].name]}", *(side.source.label for side in sides)])
    return MergeChunk(
        work=Work(plan, chunk, label), sides=tuple(sides), survey=survey, device=device, quiet=quiet
    )


def log_task(tasks: MergeTasks, finish: Task) -> LogMerge:
    """The task that reports on the merge after `finish`."""
    return LogMerge(finish=finish, reports=tasks.reports, adapters=tasks.recipe.merge.adapters)


def record_tasks(tasks: MergeTasks, out_path: str) -> list[Task]:
    """Tasks that write what the method keeps beside the model in `out_path`; none for most methods.

    Raises:
        InputError: a tensor changes by more than one low-rank update per adapter, which is all that records
            hold.
    """
    planned, plan = tasks.recipe, tasks.recipe.merge
    if plan.method.record is None or not plan.changed:
        return []
    writer = TensorWriterTask(
        out_path=out_path,
        max_shard_size=planned.options.out_shard_size,
        override_basename=RECORDS.removesuffix(".safetensors"),
    )
    base = str(planned.config.base_model)
    base = os.path.abspath(base) if os.path.exists(base) else base
    description = {
        "base_model": base,
        "method": plan.method.name,
        "weights": {name: _described(plan.method, output) for name, output in plan.changed.items()},
    }
    saved = [
        SaveRecord(
            source=RecordSource(plan, output.parts[0].plan),
            label=tasks.applied[name].group_label() or "",
            survey=tasks.survey,
            writer=writer,
            device=tasks.merges[output.parts[0].plan.name].device,
        )
        for name, output in plan.changed.items()
    ]
    finish = FinishRecords(
        saved=tuple(saved), writer=writer, description=json.dumps(description, indent=1), file=DESCRIPTION
    )
    return [*saved, finish]


def _described(method: Method, output: OutputTensor) -> dict[str, object]:
    """Whose records a tensor has."""
    part = output.parts[0]
    if part.index or part.plan.changes or part.plan.is_dora:
        raise InputError(
            f"{output.name}: {method.name} keeps what a task adds to each weight, and here a task does "
            "something else "
            "(DoRA, a fused expert, or a tensor trained directly); use another method for such adapters"
        )
    return {"base": output.base, "tasks": [adapter.name for adapter, _ in part.plan.sources]}


def _base_of(task: ExecuteMergeMethodTask) -> LoadBase:
    """The task that loads the base's tensor."""
    gather = task.gather_tensors
    infos = dict(gather.weight_info.items())
    info = infos.get(task.base_model, next(iter(infos.values())))
    return LoadBase(
        model=task.base_model,
        tensor=info.name,
        dtype=info.force_dtype or gather.dtype,
        device=gather.device,
        optional=info.optional,
        aliases=info.aliases,
        tied_names=info.tied_names,
    )


def _wanted(
    method: Method, name: str, task: ExecuteMergeMethodTask, touched: dict[ModelReference, set[str]]
) -> Iterable[Wanted]:
    """What adapters do to the output's tensor `name`, or to experts in it; what they touch is added to
    `touched`.
    """
    infos = dict(task.gather_tensors.weight_info.items())
    # Of the tensors after the last layer mergekit lists as many as the first slice has inputs; the name is
    # one.
    shared = next(iter(infos.values()))
    base = infos.get(task.base_model, shared).name
    parameters = method.bind(
        {key: value for key, value in task.parameters.items() if key not in ADAPTER_PARAMETERS}
    )
    wanted: dict[str, Wanted] = {}
    for reference in task.model_order:
        if not isinstance(reference, AdapterReference):
            continue
        loader = adapter_loader(reference)
        done = touched.setdefault(reference, set())
        given = infos.get(reference, shared)
        names = (given.name, *(given.aliases or ()))
        parts: Mapping[str, Index] = next(filter(None, map(loader.parts, names)), {})
        if parts and reference not in infos:
            raise InputError(
                f"{loader.adapter.name}: it adapts {given.name}, but mergekit does not weigh the inputs of "
                "the last "
                "slice for tensors outside the layers; give all slices the same inputs, some with weight 0"
            )
        done.update(parts)
        for part, index in parts.items():
            unique = name if index == () else part if name == given.name else f"{name}: {part}"
            want = wanted.get(unique, Wanted(name, base, unique, index, [], [], parameters))
            weight = task.input_parameters[reference]["weight"]
            if part in loader.modules:
                source = (loader.adapter, loader.modules[part], weight)
                want = want._replace(sources=[*want.sources, source])
            if part in loader.adapter.changes:
                change = (loader.adapter, loader.adapter.changes[part], weight)
                want = want._replace(changes=[*want.changes, change])
            wanted[unique] = want
    return wanted.values()


def _text_sources(
    planner: MergePlanner, adapters: Mapping[ModelReference, LoraLoader]
) -> dict[Adapter, TextSource]:
    """Where each adapter's texts come from, by the recipe."""
    sources = {}
    for _, task in _stock_tasks(planner):
        for reference in task.model_order:
            if reference in adapters:
                settings = dict(task.input_parameters[reference].items())
                given = [settings.get(spec.name) or None for spec in TEXTS]
                examples, calibration, held_out = (text and os.path.expanduser(text) for text in given)
                sources[adapters[reference].adapter] = TextSource(
                    examples, calibration and Path(calibration), held_out
                )
    return sources


def _refuse_dense(method: Method, name: str, task: ExecuteMergeMethodTask) -> None:
    """A tensor whose vocabulary mergekit aligns reaches the method dense."""
    for reference in task.model_order:
        if isinstance(reference, AdapterReference) and (loader := adapter_loader(reference)).parts(name):
            raise InputError(dense_message(method, name, loader.adapter.name))


def _check_touched(touched: Mapping[ModelReference, set[str]]) -> None:
    for reference, tensors in touched.items():
        loader = adapter_loader(reference)
        missing = loader.adapted - tensors
        if not tensors:
            raise InputError(
                f"{loader.adapter.name}: nothing of it lies in the layers that the recipe merges"
            )
        if missing:
            LOG.warning(
                "%s: %d of its tensors are not part of the output, %s among them",
                loader.adapter.name,
                len(missing),
                min(missing),
            )


def _shapes(config: MergeConfiguration, loads: Mapping[str, LoadBase]) -> dict[str, tuple[int, ...] | None]:
    """Shapes of the output's tensors; None for those that mergekit converts when it reads them."""
    loader = base_loader(config)
    shapes = Checkpoint(loader.index.base_path).shapes()
    return {name: shapes.get(stored_name(load, loader) or "") for name, load in loads.items()}


def _geometry(config: MergeConfiguration, options: MergeOptions) -> Callable[[str], AttentionGeometry]:
    """Head counts of a block, from the base's configuration."""
    model = config.base_model.config(options.trust_remote_code).to_dict()
    return cache(lambda block: AttentionGeometry.from_config(model, block))


def base_tensors(config: MergeConfiguration, options: MergeOptions) -> ModelTensors:
    """The tensors of the base of a completed recipe."""
    checkpoint = Checkpoint(base_loader(config).index.base_path)
    model = config.base_model.config(options.trust_remote_code)
    return ModelTensors.of(str(config.base_model), checkpoint, model.to_dict())
