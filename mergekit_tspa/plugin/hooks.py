"""What the post-import hooks do to mergekit's modules; everything else in mergekit stays as it is.

Each hook is given the function of mergekit that it replaces, and that function's arguments.
"""

from __future__ import (
    annotations,  # a name of mergekit may not be imported yet while mergekit is half imported
)

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml
from click import ClickException, get_current_context

from mergekit_tspa.errors import InputError, nearest
from mergekit_tspa.methods import MEAN_OF_MODELS, METHODS
from mergekit_tspa.plugin import compat
from mergekit_tspa.plugin.spelling import (
    UnclearReference,
    UnreadableRecipe,
    read_path,
    read_reference,
    written,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mergekit_tspa.plugin.aligned_mean import AlignedMean
    from mergekit_tspa.plugin.merge_method import AdapterMergeMethod

LOG = logging.getLogger(__name__)

Hook: TypeAlias = Callable[..., Any]

_registered: list[AdapterMergeMethod | AlignedMean] = []
_said = False  # whether it was said that mergekit does not fit


class PrintedError(ClickException, InputError):  # type: ignore[misc]  # both set `message`, to the same
    """What `mergekit-yaml` and `mergekit-multi` print as one sentence, where they would show a traceback."""


class PrintedReference(ClickException, UnclearReference):
    """The same of a reference that cannot be read; pydantic lets all but a `ValueError` pass."""


class PrintedRecipe(ClickException, UnreadableRecipe):
    """The same of a recipe that mergekit cannot read."""

    def __init__(self, faults: list[str]):
        super().__init__(f"mergekit cannot read the recipe: {'; '.join(faults)}")
        self.faults = faults


def _printed(read: Hook) -> Hook:
    def reading(value: Any) -> Any:
        try:
            return read(value)
        except UnclearReference as error:
            raise PrintedReference(str(error)) from error

    return reading


def _refuse_unreadable(recipe: Any, error: Exception) -> None:
    """Where a command reads a recipe of one of our methods, say what is wrong; a program gets the error.

    Raises:
        ClickException: in one sentence, where mergekit's command would show a traceback.
    """
    name = recipe.get("merge_method") if isinstance(recipe, dict) else None
    if isinstance(error, ClickException) or get_current_context(silent=True) is None:
        return
    if isinstance(name, str) and name in (*METHODS, MEAN_OF_MODELS):
        from mergekit_tspa.plugin.recipe_file import faults_of

        raise PrintedRecipe(faults_of(error)) from error


def extend(module: ModuleType) -> None:
    """Extend one of the hooked modules, if what was seen of mergekit so far fits."""
    name = module.__name__
    if not _fits(compat.look(executed=name)):
        return
    if name == "mergekit.config":
        compat.respell(_printed(read_path), _printed(read_reference), written, _refuse_unreadable)
    elif name == "mergekit.merge_methods.registry":
        _register_methods(module)
    elif name == "mergekit.evo.genome":
        _search_weights()
    for needed, hook in _HOOKS.items():
        if needed.module == name:
            compat.surround(needed, hook)


def _fits(fits: bool) -> bool:
    """Pass on whether mergekit fits; if it does not, say so once and take our methods out of it."""
    global _said
    if not fits and not _said:
        _said = True
        LOG.warning("%s", compat.sentence())
        while _registered:
            compat.unregister(_registered.pop())
    return fits


def _ours(name: str) -> bool:
    """Whether mergekit knows this method from us; a later mergekit may bring one of the same name."""
    if name not in METHODS or not _fits(compat.look_everywhere()):
        return False
    from mergekit_tspa.plugin.merge_method import AdapterMergeMethod

    registered = {method.spec.name: method for method in compat.registered_methods()}
    return isinstance(registered.get(name), AdapterMergeMethod)


def _is_mean(name: str) -> bool:
    """Whether it is our method on whole models."""
    from mergekit_tspa.plugin.aligned_mean import AlignedMean

    if name != MEAN_OF_MODELS or not _fits(compat.look_everywhere()):
        return False
    registered = {method.spec.name: method for method in compat.registered_methods()}
    return isinstance(registered.get(name), AlignedMean)


def _refuse_unknown(name: str) -> None:
    """
    Raises:
        InputError: a method that mergekit does not know; it would merge the adapters before it says so.
    """
    known = [method.spec.name for method in compat.registered_methods()]
    if _registered and name not in known:
        near = nearest(name, known)
        hint = f"do you mean {near[0]}?" if near else "`mergekit-tspa methods` lists those on adapters"
        raise InputError(f"there is no merge_method {name!r}; {hint}")


def _register_methods(registry: ModuleType) -> None:
    from mergekit_tspa.plugin.merge_method import AdapterMergeMethod

    taken = {method.spec.name for method in registry.registered_methods()}
    for name, method in METHODS.items():
        if name in taken:
            LOG.warning("mergekit already has a method %s; mergekit_tspa's is not registered", name)
        else:
            _registered.append(AdapterMergeMethod(method))
            registry.register(_registered[-1])
    from mergekit_tspa.plugin.aligned_mean import AlignedMean

    if MEAN_OF_MODELS not in taken:
        _registered.append(AlignedMean())
        registry.register(_registered[-1])


def _get_architecture_info(
    original: Hook, config: compat.MergeConfiguration, options: compat.MergeOptions
) -> compat.ModelArchitecture:
    """`run_merge` looks at a recipe for the first time through this function."""
    from mergekit_tspa.plugin.architecture import fit_architecture

    if _is_mean(config.merge_method):
        from mergekit_tspa.plugin.aligned_mean import adopt as adopt_models

        adopt_models(config, options)
        return fit_architecture(original, config, options)
    if not _ours(config.merge_method):
        _refuse_unknown(config.merge_method)
        return original(config, options)
    from mergekit_tspa.plugin.recipe import adopt, adopt_modules

    adopt(config, options)
    architecture = fit_architecture(original, config, options)
    adopt_modules(config, architecture)
    return architecture


def _model_out_config(
    original: Hook, config: compat.MergeConfiguration, *args: Any, **kwargs: Any
) -> PretrainedConfig:
    made = original(config, *args, **kwargs)
    if _ours(config.merge_method) or _is_mean(config.merge_method):
        from mergekit_tspa.plugin.output import save_whole

        save_whole(made)
    return made


def _run_merge(
    original: Hook,
    merge_config: compat.MergeConfiguration,
    out_path: str,
    options: compat.MergeOptions,
    config_source: str | None = None,
) -> None:
    try:
        if not _ours(merge_config.merge_method) and not _is_mean(merge_config.merge_method):
            return original(merge_config, out_path, options, config_source)
        from mergekit_tspa.plugin.output import held
        from mergekit_tspa.plugin.recipe_file import refuse_repeated_keys, unknown_keys

        if config_source:
            refuse_repeated_keys(config_source, "the recipe")
            for warning in unknown_keys(yaml.safe_load(config_source)):
                LOG.warning("%s", warning)
        if not out_path:
            raise InputError("the output directory has no name; for the current directory write .")
        with held(Path(out_path)):
            return original(merge_config, out_path, options, config_source)
    except InputError as error:
        raise PrintedError(error.message) from error


def _generate_card(
    original: Hook, config: compat.MergeConfiguration, config_yaml: str, name: str | None = None
) -> str:
    if not _ours(config.merge_method) and not _is_mean(config.merge_method):
        return original(config, config_yaml, name)
    from mergekit_tspa.plugin.card import model_card

    return model_card(config, config_yaml, name)


def _search_weights() -> None:
    """Let mergekit-evolve search the weights of our methods' inputs."""
    searched = compat.genome_parameters()
    for name in METHODS:
        searched.setdefault(name, ["weight"])


def _genotype_merge_config(original: Hook, genome: Any, genotype: Any) -> compat.MergeConfiguration:
    config = original(genome, genotype)
    if _ours(config.merge_method):
        # It writes `int8_mask`, and `normalize: false` where none was asked for.
        asked = genome.definition.normalize
        config.parameters = None if asked is None else {"normalize": asked}
    return config


def _plan(original: Hook, planner: compat.MergePlanner) -> None:
    original(planner)
    if _ours(planner.config.merge_method):
        from mergekit_tspa.plugin.planning import replace_tasks

        replace_tasks(planner)
    elif _is_mean(planner.config.merge_method):
        from mergekit_tspa.plugin.aligned_mean import check_plan

        check_plan(planner)


def _plan_in_memory(original: Hook, planner: compat.MergePlanner) -> list[compat.Task]:
    if _ours(planner.config.merge_method):  # mergekit-evolve comes here, not through `run_merge`
        from mergekit_tspa.plugin.recipe import adopt

        adopt(planner.config, planner.options)
    return original(planner)


def _plan_to_disk(original: Hook, planner: compat.MergePlanner, out_path: str) -> list[compat.Task]:
    if _is_mean(planner.config.merge_method):
        return _plan_mean(original, planner, Path(out_path))
    if not _ours(planner.config.merge_method):
        return original(planner, out_path)
    from mergekit_tspa.plugin.output import begin_model, weights_in
    from mergekit_tspa.plugin.planning import log_task, merge_of, record_tasks
    from mergekit_tspa.plugin.recipe import check_output
    from mergekit_tspa.plugin.tasks import ClearEarlier, EarlierWeights

    check_output(Path(out_path), planner.config)
    tasks = original(planner, out_path)
    begin_model(planner.config, Path(out_path))
    (finish,) = (task for task in tasks if isinstance(task, compat.FinalizeModel))
    merge = merge_of(planner)
    tasks += [log_task(merge, finish), *record_tasks(merge, out_path)]
    earlier = EarlierWeights(Path(out_path), weights_in(Path(out_path)))
    tasks.append(ClearEarlier(finish=finish, earlier=earlier))
    if (planner.config.parameters or {}).get("adapter") is True:
        from mergekit_tspa.plugin.adapter_output import adapter_task

        try:
            tasks.append(adapter_task(merge, Path(out_path, "adapter")))
        except InputError as error:
            LOG.warning("no adapter is written beside the model: %s", error.message)
    return tasks


def _plan_mean(original: Hook, planner: compat.MergePlanner, out: Path) -> list[compat.Task]:
    from mergekit_tspa.plugin.aligned_mean import LogAlignment
    from mergekit_tspa.plugin.output import begin_model, weights_in
    from mergekit_tspa.plugin.recipe import check_output
    from mergekit_tspa.plugin.tasks import ClearEarlier, EarlierWeights

    check_output(out, planner.config)
    models = tuple(dict.fromkeys(source.model for source in planner.config.models or ()))
    tasks = original(planner, str(out))
    begin_model(planner.config, out)
    (finish,) = (task for task in tasks if isinstance(task, compat.FinalizeModel))
    earlier = EarlierWeights(out, weights_in(out))
    return [*tasks, LogAlignment(finish=finish, models=models), ClearEarlier(finish=finish, earlier=earlier)]


def _run_parallel(original: Hook, executor: compat.MultiGPUExecutor, quiet: bool = False) -> Any:
    compat.keep_all_results(executor)
    return original(executor, quiet)


_HOOKS: dict[compat.Needed, Hook] = {
    compat.GET_ARCHITECTURE_INFO: _get_architecture_info,
    compat.MODEL_OUT_CONFIG: _model_out_config,
    compat.RUN_MERGE: _run_merge,
    compat.GENERATE_CARD: _generate_card,
    compat.GENOME_CONFIG: _genotype_merge_config,
    compat.PLAN: _plan,
    compat.PLAN_IN_MEMORY: _plan_in_memory,
    compat.PLAN_TO_DISK: _plan_to_disk,
    compat.RUN_PARALLEL: _run_parallel,
}
