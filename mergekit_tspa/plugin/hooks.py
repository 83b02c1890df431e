"""What the post-import hooks do to mergekit's modules; everything else in mergekit stays as it is."""

import functools
import logging
from pathlib import Path

import yaml
from click import ClickException

from mergekit_tspa.errors import InputError, nearest
from mergekit_tspa.methods import METHODS

LOG = logging.getLogger(__name__)


class PrintedError(InputError, ClickException):
    """What `mergekit-yaml` and `mergekit-multi` print as one sentence, where they would show a traceback."""

    def __init__(self, message: str):
        ClickException.__init__(self, message)


def extend(module) -> None:
    """Extend one of the hooked modules."""
    {
        "mergekit.evo.genome": _evolve_weights,
        "mergekit.merge_methods.registry": _register_methods,
        "mergekit.merge": _complete_recipes,
        "mergekit.plan": _plan_tasks,
    }[module.__name__](module)


def _ours(name: str) -> bool:
    """Whether mergekit knows this method from us; a later mergekit may bring one of the same name."""
    from mergekit.merge_methods.registry import registered_methods

    from mergekit_tspa.plugin.merge_method import AdapterMergeMethod

    return any(method.spec.name == name and isinstance(method, AdapterMergeMethod) for method in registered_methods())


def _refuse_misspelt(name: str) -> None:
    """
    Raises:
        InputError: a method that mergekit does not know and whose name is nearly one of ours.
    """
    from mergekit.merge_methods.registry import registered_methods

    near = nearest(name, METHODS, cutoff=0.8)
    if near and name not in {method.spec.name for method in registered_methods()}:
        raise InputError(f"there is no merge_method {name!r}; do you mean {near[0]}?")


def _register_methods(registry) -> None:
    from mergekit_tspa.plugin.merge_method import AdapterMergeMethod

    taken = {method.spec.name for method in registry.registered_methods()}
    for name, method in METHODS.items():
        if name in taken:
            LOG.warning("mergekit already has a method %s; mergekit_tspa's is not registered", name)
        else:
            registry.register(AdapterMergeMethod(method))


def _complete_recipes(merge) -> None:
    """`run_merge` looks at a recipe for the first time through this function."""
    original = merge.get_architecture_info

    @functools.wraps(original)
    def get_architecture_info(config, options):
        if not _ours(config.merge_method):
            _refuse_misspelt(config.merge_method)
            return original(config, options)
        from mergekit_tspa.plugin.architecture import fit_architecture
        from mergekit_tspa.plugin.recipe import adopt, adopt_modules

        adopt(config, options)
        architecture = fit_architecture(original, config, options)
        adopt_modules(config, architecture)
        return architecture

    merge.get_architecture_info = get_architecture_info

    out_config = merge._model_out_config

    @functools.wraps(out_config)
    def _model_out_config(config, *args, **kwargs):
        made = out_config(config, *args, **kwargs)
        if _ours(config.merge_method):
            from mergekit_tspa.plugin.output import save_whole

            save_whole(made)
        return made

    merge._model_out_config = _model_out_config

    run = merge.run_merge

    @functools.wraps(run)
    def run_merge(merge_config, out_path, options, config_source=None):
        try:
            if not _ours(merge_config.merge_method):
                return run(merge_config, out_path, options, config_source)
            from mergekit_tspa.plugin.output import held
            from mergekit_tspa.plugin.recipe import unknown_keys

            for warning in unknown_keys(yaml.safe_load(config_source)) if config_source else ():
                LOG.warning("%s", warning)
            with held(Path(out_path)):
                return run(merge_config, out_path, options, config_source)
        except InputError as error:
            raise PrintedError(error.message) from error

    merge.run_merge = run_merge

    card = merge.generate_card

    @functools.wraps(card)
    def generate_card(config, config_yaml, name=None):
        if not _ours(config.merge_method):
            return card(config, config_yaml, name)
        from mergekit_tspa.plugin.card import model_card

        return model_card(config, config_yaml, name)

    merge.generate_card = generate_card


def _evolve_weights(genome) -> None:
    """Let mergekit-evolve search the weights of our methods' inputs."""
    for name in METHODS:
        genome.METHOD_PARAM_MAPS.setdefault(name, ["weight"])
    original = genome.ModelGenome.genotype_merge_config

    @functools.wraps(original)
    def genotype_merge_config(self, genotype):
        config = original(self, genotype)
        if _ours(config.merge_method):
            # It writes `int8_mask`, and `normalize: false` where none was asked for.
            asked = self.definition.normalize
            config.parameters = None if asked is None else {"normalize": asked}
        return config

    genome.ModelGenome.genotype_merge_config = genotype_merge_config


def _plan_tasks(plan) -> None:
    original = plan.MergePlanner._plan

    @functools.wraps(original)
    def _plan(self):
        if not _ours(self.config.merge_method):
            return original(self)
        from mergekit_tspa.plugin.planning import replace_tasks

        original(self)
        self.adapter_merge = replace_tasks(self)

    plan.MergePlanner._plan = _plan

    in_memory = plan.MergePlanner.plan_in_memory

    @functools.wraps(in_memory)
    def plan_in_memory(self):
        if _ours(self.config.merge_method):  # mergekit-evolve comes here, not through `run_merge`
            from mergekit_tspa.plugin.recipe import adopt

            adopt(self.config, self.options)
        return in_memory(self)

    plan.MergePlanner.plan_in_memory = plan_in_memory

    to_disk = plan.MergePlanner.plan_to_disk

    @functools.wraps(to_disk)
    def plan_to_disk(self, out_path):
        ours = _ours(self.config.merge_method)
        if ours:
            from mergekit_tspa.plugin.output import begin_model
            from mergekit_tspa.plugin.recipe import check_output

            check_output(Path(out_path), self.config)
        tasks = to_disk(self, out_path)
        if ours:
            from mergekit.io.tasks import FinalizeModel

            from mergekit_tspa.plugin.planning import log_task, record_tasks

            begin_model(self.config, Path(out_path))
            merge = self.adapter_merge
            (finish,) = (task for task in tasks if isinstance(task, FinalizeModel))
            tasks += [log_task(merge, finish), *record_tasks(merge, out_path)]
            if (self.config.parameters or {}).get("adapter") is True:
                from mergekit_tspa.plugin.adapter_output import adapter_task

                try:
                    tasks.append(adapter_task(merge, Path(out_path, "adapter")))
                except InputError as error:
                    LOG.warning("no adapter is written beside the model: %s", error.message)
        return tasks

    plan.MergePlanner.plan_to_disk = plan_to_disk
