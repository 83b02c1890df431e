"""A dry run of a recipe, from the adapters and the headers of the models alone.

Only whether a full model leaves room for an adapter as the result is seen from its norms, biases and
embeddings.
"""

import logging
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from rich.console import Console
from rich.table import Column, Table

from mergekit_tspa.adapters import kind_of, locate_adapter, read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError, reason_of
from mergekit_tspa.insight.forecast import AdapterOutcome, Forecast, SeenAdapter, StoredAs
from mergekit_tspa.insight.inspection import short_names
from mergekit_tspa.merging.reading_plan import ReadingPlan, reading_plan
from mergekit_tspa.methods import METHODS
from mergekit_tspa.plugin.adapter_output import adapter_file, make_planner, weight_ranges
from mergekit_tspa.plugin.compat import (
    LoaderCache,
    LoadTensor,
    MergeConfiguration,
    MergeOptions,
    MergePlanner,
    ModelReference,
    aligns_vocabulary,
    planned_tensors,
    stored_name,
)
from mergekit_tspa.plugin.merge_method import ADAPTER
from mergekit_tspa.plugin.planning import PlannedRecipe, merge_of
from mergekit_tspa.plugin.recipe import complete, sources
from mergekit_tspa.plugin.recipe_file import faults_of
from mergekit_tspa.plugin.references import (
    AdapterReference,
    FullModelReference,
    adapter_loader,
    base_loader,
    config_of,
)
from mergekit_tspa.plugin.spelling import UnreadableRecipe
from mergekit_tspa.plugin.tasks import LoadBase

T = TypeVar("T")


@dataclass
class DryRun:
    """All that can be said of one recipe."""

    config: MergeConfiguration
    adapters: list[SeenAdapter] = field(default_factory=list)
    forecast: Forecast | None = None
    reading: ReadingPlan | None = None  # of methods that look at texts
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def print(self, console: Console) -> None:
        console.print(f"{self.config.merge_method} on {self.config.base_model}", soft_wrap=True)
        weights = weight_ranges(self.forecast.plan) if self.forecast else {}
        norms = [adapter.norm for adapter in self.adapters if adapter.norm]
        names = short_names([adapter.adapter.name for adapter in self.adapters])
        columns = ("kind", "rank", "modules", "dtype", "norm (of median)", "weight")
        table = Table(Column("adapter", overflow="fold"), *columns, show_lines=True)
        alike: dict[str, list[str]] = {}
        for name, adapter in zip(names, self.adapters):
            row = adapter.row(
                weights.get(adapter.adapter.name, "-"), statistics.median(norms) if norms else 0
            )
            table.add_row(name, *row)
            alike.setdefault(adapter.about(), []).append(name)
        if self.adapters:
            console.print(table)
        for about, of in alike.items():
            console.print(f"{', '.join(of)}: {about}", soft_wrap=True)
        for sentence in self.reading.said if self.reading else ():
            console.print(f"texts: {sentence}", soft_wrap=True)
        reading = self.reading.memory if self.reading else {}
        for label, text in self.forecast.rows(self.adapters, reading) if self.forecast else ():
            console.print(f"{label}: {text}", soft_wrap=True)
        for warning in self.warnings:
            console.print(f"Warning: {warning}", soft_wrap=True)


def check(config: MergeConfiguration, options: MergeOptions, stages: set[str]) -> DryRun:
    """Check the recipe, its base, each of its adapters and, if nothing is wrong with them, the plan.

    Args:
        stages: names of merges whose results do not exist yet
    """
    run, method = DryRun(config), METHODS[config.merge_method]
    problems = run.problems
    LoaderCache().setup(options=options)
    with collected(run.warnings):
        config, faults = complete(config, options, stages)
        run.config = config
        problems += dict.fromkeys(fault.message for fault in faults)
        base = config.base_model
        given = sorted(stages & {model.model.path for model in config.referenced_models()})
        for stage in given:
            run.warnings.append(
                f"{stage} is the result of another stage and taken as given: the plan is not checked"
            )
        staged = base is not None and base.model.path in stages
        unreadable = f"base {base} is not readable as a model"
        found = base and not staged and attempt(problems, unreadable, lambda: open_base(base, options))
        for reference in dict.fromkeys(source.model for source in sources(config)):
            if reference.lora and not reference.lora.path:
                continue  # a fault of the recipe already
            if reference.lora or (found and isinstance(reference, FullModelReference)):
                name = reference.lora or reference.model
                seen = attempt(problems, name, lambda: _see(reference, bool(found)))  # noqa: B023
                run.adapters += [seen] if seen else []
        for adapter in run.adapters:
            run.warnings += adapter.warnings(method, None if staged or not base else str(base))
        if found and not problems and not given:
            run.forecast = attempt(problems, config.merge_method, lambda: _forecast(config, options))
        if run.forecast:
            run.warnings += run.forecast.warnings()
            plan = run.forecast.plan
            if guide := plan.guide:
                run.reading = attempt(problems, "texts", lambda: reading_plan(method, plan.tensors, guide))
    run.warnings = [
        *dict.fromkeys(run.warnings)
    ]  # what is seen of an adapter is said again when it is planned
    return run


def stage_problems(stages: Sequence[tuple[Any, MergeConfiguration | None]]) -> Iterator[str]:
    """Why `mergekit-multi` cannot order merges, each given by its name and, where it is readable, its recipe.

    Args:
        stages: the name is None for the final merge
    """
    names = [name for name, _ in stages]
    if odd := [name for name in names if name is not None and not (isinstance(name, str) and name)]:
        yield f"name {odd[0]!r}: it names a directory, so write text there, in quotes if need be"
        return
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        name = "without a name" if twice[0] is None else f"of the name {twice[0]!r}"
        yield f"there are several merges {name}; give each its own, only the final merge may have none"
        return
    needed = {
        name: {model.model.path for model in config.referenced_models()} & {*names} if config else set()
        for name, config in stages
    }
    try:
        TopologicalSorter(needed).prepare()
    except CycleError as error:
        yield f"the merges need each other in a circle: {' <- '.join(map(str, error.args[1]))}"


def _see(reference: ModelReference, fit: bool) -> SeenAdapter:
    """Read an adapter and, if it can be done, fit it to its base.

    Raises:
        InputError: it is not readable or does not fit.
    """
    if isinstance(reference, FullModelReference):
        adapter = adapter_loader(reference).adapter
        return SeenAdapter(adapter, "full model, aligned" if adapter.aligned else "full model", {})
    lora = reference.lora
    directory = locate_adapter(lora.path, lora.revision, LoaderCache().hf_cache_dir)
    if fit and isinstance(reference, AdapterReference):
        adapter = adapter_loader(reference).adapter
    else:
        adapter = read_adapter(directory, str(lora))
    return SeenAdapter.of(adapter, kind_of(directory))


def open_base(base: ModelReference, options: MergeOptions) -> bool:
    config_of(base, options.trust_remote_code)
    return bool(Checkpoint(LoaderCache().get(base).index.base_path).headers)


def _forecast(config: MergeConfiguration, options: MergeOptions) -> Forecast:
    """Plan the merge as mergekit would, and look at the plan."""
    planner = make_planner(config, options)
    planner.plan_to_disk(os.devnull)  # where no earlier merge lies
    tasks = merge_of(planner)
    recipe = tasks.recipe
    index = base_loader(config).index
    return Forecast(
        plan=recipe.merge,
        base=str(config.base_model),
        stored=stored_tensors(planner, recipe.loads, recipe.base),
        chunks=[merge.work.chunk for merge in dict.fromkeys(tasks.merges.values())],
        adapter=_adapter(recipe),
        wants_adapter=bool((config.parameters or {}).get(ADAPTER.name)),
        aligned=aligns_vocabulary(planner),
        safetensors=options.safe_serialization,
        shard_limit=options.out_shard_size,
        base_shard=max(os.path.getsize(Path(index.base_path, shard.filename)) for shard in index.shards),
        base_mapped=index.is_safetensors,
    )


def stored_tensors(
    planner: MergePlanner, loads: Mapping[str, LoadBase], base: ModelTensors
) -> dict[str, StoredAs | None]:
    """How the output's tensors will be stored; None for those that the base does not have.

    Args:
        loads: tasks that load the base's tensors, where there are any of ours
    """
    config = planner.config
    loader = base_loader(config)
    headers = Checkpoint(loader.index.base_path).headers
    stored: dict[str, StoredAs | None] = {}
    for weight, _ in planned_tensors(planner):
        load = loads.get(weight.name) or LoadTensor(  # also where its vocabulary is aligned
            model=config.base_model, tensor=weight.name, aliases=weight.aliases, tied_names=weight.tied_names
        )
        name = stored_name(load, loader)
        parts = [headers[part] for part in ([name] if name else base.find_parts(load.tensor))]
        dtype = weight.force_dtype or config.out_dtype or config.dtype or (parts[0][1] if parts else "")
        stored[weight.name] = StoredAs(sum(math.prod(shape) for shape, _ in parts), dtype) if parts else None
    return stored


def _adapter(recipe: PlannedRecipe) -> AdapterOutcome | str:
    try:
        file = adapter_file(recipe, Path())
    except InputError as error:
        return error.message
    return AdapterOutcome(file.tensors, file.dtype)


def attempt(problems: list[str], what: Any, call: Callable[[], T]) -> T | None:
    """The result, or None and one sentence per problem."""
    try:
        return call()
    except InputError as error:
        problems.append(error.message)
    except (ValidationError, UnreadableRecipe) as error:
        problems += [f"{what}: {fault}" for fault in faults_of(error)]
    except Exception as error:  # mergekit, transformers and the hub raise a dozen unrelated types
        problems.append(f"{what}: {reason_of(error)}")
    return None


class _Collector(logging.Handler):
    def __init__(self, warnings: list[str]):
        super().__init__(logging.WARNING)
        self.warnings = warnings

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())


@contextmanager
def collected(warnings: list[str]) -> Iterator[None]:
    """Warnings that are logged become part of the report."""
    handler = _Collector(warnings)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
