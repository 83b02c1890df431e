"""The merge as one PEFT adapter: beside the model (`adapter: true`), or alone (`mergekit-tspa adapter`)."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit import merge
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoaderCache
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from pydantic import ConfigDict

from mergekit_tspa.adapters.extract import StoredTensor
from mergekit_tspa.adapters.write import write_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.plan import TensorPlan
from mergekit_tspa.methods import METHODS
from mergekit_tspa.plugin.card import adapter_card
from mergekit_tspa.plugin.output import refuse_inputs
from mergekit_tspa.plugin.planning import log_tasks
from mergekit_tspa.plugin.recipe import span
from mergekit_tspa.plugin.tasks import ApplyUpdates, TakeUpdate
from mergekit_tspa.updates import LowRank

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """What is written of a merge."""

    plans: list[TensorPlan]
    directory: Path
    base: str
    task_type: str | None
    dtype: str | None
    card: str


class SaveAdapter(Task[None], frozen=True):
    """Collect the updates of all weights, which are small, and write them."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    updates: tuple[TakeUpdate, ...]
    file: AdapterFile

    def arguments(self) -> dict[str, Task]:
        return {str(i): update for i, update in enumerate(self.updates)}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, **updates: tuple[torch.Tensor, ...]) -> None:
        file = self.file
        names = [_module_name(plan) for plan in file.plans]
        modules = {name: plan.modules[0] for name, plan in zip(names, file.plans)}
        merged = {name: LowRank(*updates[str(i)]) for i, name in enumerate(names)}
        dtype = dtype_from_name(file.dtype) or torch.float32
        write_adapter(file.directory, merged, modules, file.base, file.task_type, dtype)
        (file.directory / "README.md").write_text(file.card, encoding="utf-8")


def make_planner(config: MergeConfiguration, options: MergeOptions) -> MergePlanner:
    """As `run_merge` makes it, but for the layers that slices add to or take from the output's configuration."""
    architecture = merge.get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    base = config.base_model.config(options.trust_remote_code)
    return MergePlanner(config, architecture, options=options, out_model_config=base)


def _module_name(plan: TensorPlan) -> str:
    """The module as PEFT finds it in the whole model: as adapters name it, or with what some of them leave out."""
    name, whole = max((module for _, module in plan.sources), key=len), plan.name.removesuffix(".weight")
    return whole if whole.endswith(f".{name}") else name


def adapter_task(planner: MergePlanner, directory: Path, source: str | None = None) -> SaveAdapter:
    """The task that writes the planned merge as an adapter.

    Args:
        source: the recipe as its author wrote it

    Raises:
        InputError: something in the merge is no low-rank update of a base weight.
    """
    config = planner.config
    if config.tokenizer or config.tokenizer_source:
        raise InputError("an adapter has no tokenizer of its own; leave the tokenizer options out")
    applied = {weight.name: task for weight, task in planner._tensors if isinstance(task, ApplyUpdates)}
    applied = {name: task for name, task in applied.items() if not _unchanged(task)}
    if not applied:
        raise InputError("the merge changes no weight, so there is no adapter to write")
    model = config.base_model.config(planner.options.trust_remote_code)
    checkpoint = Checkpoint(LoaderCache().get(config.base_model).index.base_path)
    base = ModelTensors.of(str(config.base_model), checkpoint, model.to_dict())
    planned = [getattr(task, "base", task).tensor for _, task in planner._tensors]
    if missing := _layers(base.shapes) - _layers(base.find(tensor) or tensor for tensor in planned):
        raise InputError(f"the recipe leaves out {min(missing)} of the base, so no adapter of the base gives its model")
    for name, task in applied.items():
        if len(base.shapes.get(base.find(task.base.tensor), ())) > 2 and not task.parts[0].index:
            raise InputError(f"{name}: it is a convolution, for which no adapter is written")
        if reason := _not_low_rank(config.merge_method, name, task):
            raise InputError(f"{name}: {reason}, so the merge cannot be written as an adapter")
    parts = [task.parts[0] for task in applied.values()]
    architecture = (getattr(model, "architectures", None) or [""])[0]
    causal = "CAUSAL_LM" if architecture.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) else None
    file = AdapterFile(
        plans=[part.plan for part in parts],
        directory=directory,
        base=str(config.base_model),
        task_type="SEQ_2_SEQ_LM" if getattr(model, "is_encoder_decoder", False) else causal,
        dtype=config.out_dtype or config.dtype,
        card=adapter_card(config, weight_ranges(part.plan for part in parts), source or config.to_yaml()),
    )
    return SaveAdapter(updates=tuple(part.update for part in parts), file=file)


def _layers(tensors: Iterable[str]) -> set[str]:
    """Names of the layers that tensors belong to, such as `model.layers.3`."""
    return {found[1] for tensor in tensors if (found := re.match(r"(.*?\.\d+)\.", tensor))}


def _unchanged(task: ApplyUpdates) -> bool:
    """Whether full models hold the base's own values of a tensor that they do not adapt by factors."""
    changes = [change for part in task.parts for change, _ in part.plan.changes]
    if any(part.plan.sources for part in task.parts) or not all(isinstance(c, StoredTensor) for c in changes):
        return False
    W = task.base.execute()
    return not any(change.difference(W).any() for change in changes)


def _not_low_rank(method: str, name: str, task: ApplyUpdates) -> str | None:
    """Why a tensor's change is no LoRA update; None if it is one."""
    (part, *more) = task.parts
    plan = part.plan
    if task.base.tensor != name:
        return f"it is {task.base.tensor} of the base, whose layers this recipe rearranges"
    if part.index or more:
        return "it is a fused expert"
    if plan.changes:
        return "an adapter trained it directly (modules_to_save, biases, tokens, or a full model's own weights)"
    if any(module.magnitude is not None for module in plan.modules):
        return "an adapter is a DoRA, whose magnitudes are not low-rank"
    if METHODS[method].result.dense and plan.parameters.rank is None:
        return f"{method} gives a dense update; set `rank`, or take the method in another space (core_, knots_, ctm_)"
    return None


def weight_ranges(plans: Iterable[TensorPlan]) -> dict[str, str]:
    """The weights of each adapter, such as `0.5` or `0.5 to 0.7`."""
    weights: dict[str, set[float]] = {}
    for plan in plans:
        for (adapter, _), weight in zip(plan.sources, plan.weights):
            weights.setdefault(adapter.name, set()).add(weight)
    return {name: span(used) for name, used in weights.items()}


def write_merged_adapter(config: MergeConfiguration, merge_options: MergeOptions, out_path: Path, source: str) -> None:
    planner = make_planner(config, merge_options)
    refuse_inputs(config, out_path)
    planner._plan()
    save = adapter_task(planner, out_path, source)
    tasks = [save, *log_tasks(planner, save)]
    if merge_options.multi_gpu:
        executor = MultiGPUExecutor(targets=tasks, storage_device="cpu")
    else:
        executor = Executor(targets=tasks, math_device=merge_options.device, storage_device="cpu")
    for _ in executor.run(quiet=merge_options.quiet):
        pass
