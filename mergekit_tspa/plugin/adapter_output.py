"""The merge as one PEFT adapter: beside the model (`adapter: true`), or alone (`mergekit-tspa adapter`)."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mergekit_tspa.adapters.write import AdapterWriter
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.outputs import TensorPlan
from mergekit_tspa.merging.plan import MergePlan
from mergekit_tspa.merging.servable import (
    InAdapter,
    LeftOut,
    adapter_tensors,
    module_name,
    own_dtype,
    task_type_of,
)
from mergekit_tspa.plugin.card import adapter_card
from mergekit_tspa.plugin.compat import (
    Executor,
    LoaderCache,
    MergeConfiguration,
    MergeOptions,
    MergePlanner,
    MultiGPUExecutor,
    Task,
    dtype_from_name,
    get_architecture_info,
    plan,
)
from mergekit_tspa.plugin.output import held, refuse_inputs
from mergekit_tspa.plugin.planning import MergeTasks, PlannedRecipe, log_task, merge_of
from mergekit_tspa.plugin.recipe import leaves_out, span
from mergekit_tspa.plugin.recipe_file import read_recipe
from mergekit_tspa.plugin.tasks import MergeChunk, device_of
from mergekit_tspa.updates import LowRank


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """What is written of a merge."""

    tensors: list[TensorPlan]
    left_out: list[LeftOut]
    plan: MergePlan
    directory: Path
    base: str
    task_type: str | None
    dtype: torch.dtype
    card: str


@dataclass(frozen=True, eq=False)
class OpenAdapter:
    """An adapter that is being written."""

    file: AdapterFile
    writer: AdapterWriter
    held: InAdapter

    @classmethod
    def of(cls, file: AdapterFile) -> "OpenAdapter":
        modules = {module_name(plan): plan.modules[0] for plan in file.tensors}
        return cls(
            file, AdapterWriter(file.directory, modules, file.dtype), InAdapter(file.plan, file.left_out)
        )


class SaveUpdates(Task[None], frozen=True, arbitrary_types_allowed=True):
    """Write what a chunk made, so that it need not be kept."""

    merge: MergeChunk
    adapter: OpenAdapter

    def arguments(self) -> dict[str, Task]:
        return {"merged": self.merge}

    def group_label(self) -> str:
        return self.merge.group_label()

    def priority(self) -> int:
        return 1000  # before the next chunk is merged

    def main_thread_only(self) -> bool:
        return True

    def execute(self, merged: dict) -> None:
        wanted = {plan.name: module_name(plan) for plan in self.adapter.file.tensors}
        for tensor, fields in merged["updates"].items():
            if tensor in wanted:
                update = LowRank(**fields)
                self.adapter.writer.add(wanted[tensor], update)
                self.adapter.held.add(tensor, update)


class FinishAdapter(Task[None], frozen=True, arbitrary_types_allowed=True):
    """Give the adapter its name once all updates are written."""

    saved: tuple[SaveUpdates, ...]
    adapter: OpenAdapter

    def arguments(self) -> dict[str, Task]:
        return {str(i): task for i, task in enumerate(self.saved)}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, **_saved: None) -> None:
        file = self.adapter.file
        self.adapter.held.log()
        self.adapter.writer.finish(file.base, file.task_type)
        (file.directory / "README.md").write_text(file.card, encoding="utf-8")


def make_planner(config: MergeConfiguration, options: MergeOptions) -> MergePlanner:
    """As `run_merge` makes it, but for the layers that slices add to or take from the output's
    configuration.
    """
    architecture = get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    base = config.base_model.config(options.trust_remote_code)
    return MergePlanner(config, architecture, options=options, out_model_config=base)


def adapter_file(recipe: PlannedRecipe, directory: Path, source: str | None = None) -> AdapterFile:
    """What would be written of the planned merge as an adapter.

    Args:
        source: the recipe as its author wrote it

    Raises:
        InputError: something in the merge is no low-rank update of a base weight.
    """
    config, base = recipe.config, recipe.base
    _refuse_tokenizer(config)
    tensors, left_out = adapter_tensors(recipe.merge, base, leaves_out(config))
    named = config.out_dtype or config.dtype
    return AdapterFile(
        tensors=tensors,
        left_out=left_out,
        plan=recipe.merge,
        directory=directory,
        base=str(config.base_model),
        task_type=task_type_of(base.config),
        dtype=dtype_from_name(named) or own_dtype(tensors),
        card=adapter_card(config, weight_ranges(recipe.merge), source or config.to_yaml()),
    )


def _refuse_tokenizer(config: MergeConfiguration) -> None:
    if config.tokenizer or config.tokenizer_source:
        raise InputError("an adapter has no tokenizer of its own; leave the tokenizer options out")


def adapter_task(tasks: MergeTasks, directory: Path, source: str | None = None) -> FinishAdapter:
    """The task that writes the planned merge as an adapter.

    Raises:
        InputError: as `adapter_file`.
    """
    adapter = OpenAdapter.of(adapter_file(tasks.recipe, directory, source))
    chunks = dict.fromkeys(tasks.merges[tensor.name] for tensor in adapter.file.tensors)
    saved = tuple(SaveUpdates(merge=merge, adapter=adapter) for merge in chunks)
    return FinishAdapter(saved=saved, adapter=adapter)


def weight_ranges(plan: MergePlan) -> dict[str, str]:
    """The weights of each adapter, such as `0.5` or `0.5 to 0.7`."""
    return {name: span(used) for name, used in plan.weights_of().items()}


def merge_to_adapter(file: Path, options: MergeOptions, out_path: Path) -> None:
    """Merge the recipe of a file to one adapter in `out_path`, which nobody else writes meanwhile.

    Raises:
        InputError: the recipe cannot be merged to an adapter, or not to this directory.
    """
    config, source = read_recipe(file)
    if (out_path / "config.json").exists():
        raise InputError(
            f"{out_path}: holds a model, and transformers would apply an adapter beside its config.json a "
            "second time; name another directory"
        )
    with held(out_path):
        write_merged_adapter(config, options, out_path, source)


def write_merged_adapter(
    config: MergeConfiguration, merge_options: MergeOptions, out_path: Path, source: str
) -> None:
    """Merge to one adapter in `out_path`, without a model.

    Args:
        source: the recipe as its author wrote it

    Raises:
        InputError: something in the merge is no low-rank update of a base tensor.
    """
    _refuse_tokenizer(config)
    planner = make_planner(config, merge_options)
    refuse_inputs(config, out_path)
    plan(planner)
    merge = merge_of(planner)
    save = adapter_task(merge, out_path, source)
    tasks: list[Task] = [save, log_task(merge, save)]
    cpu = torch.device("cpu")
    if merge_options.multi_gpu:
        executor: MultiGPUExecutor | Executor = MultiGPUExecutor(targets=tasks, storage_device=cpu)
    else:
        math_device = device_of(merge_options.device)
        executor = Executor(targets=tasks, math_device=math_device, storage_device=cpu)
    for _ in executor.run(quiet=merge_options.quiet):
        pass
