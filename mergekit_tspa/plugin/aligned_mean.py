"""`aligned_mean`: mergekit's own `linear`, on full models that are aligned to the base as they are read."""

from collections import ChainMap
from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator

from mergekit_tspa.adapters import is_adapter, log_alignment, same_tensors
from mergekit_tspa.base.architectures import VOCABULARY
from mergekit_tspa.errors import InputError, did_you_mean
from mergekit_tspa.methods import MEAN_OF_MODELS
from mergekit_tspa.plugin.compat import (
    BasePolicy,
    ExecuteMergeMethodTask,
    FinalizeModel,
    GroupMergeMethod,
    InputContract,
    InputModelDefinition,
    LoaderCache,
    MergeConfiguration,
    MergeMethodSpec,
    MergeOptions,
    ModelReference,
    ParameterScope,
    ParameterSpec,
    Task,
    TensorGroup,
    aligns_vocabulary,
    planned_tensors,
    registered_methods,
)
from mergekit_tspa.plugin.merge_method import WEIGHT
from mergekit_tspa.plugin.recipe import (
    Completed,
    check_full_model,
    check_names,
    check_options,
    check_parameters,
    check_tokenizers,
    identity,
)
from mergekit_tspa.plugin.references import AlignedLoader, AlignedReference
from mergekit_tspa.symmetry.blocks import DEFAULT_KINDS, kinds_of

if TYPE_CHECKING:  # this module is imported while mergekit's planner is not yet there
    from mergekit_tspa.plugin.compat import MergePlanner


def _symmetries(text: str) -> str:
    """
    Raises:
        InputError: one of the names is no symmetry, or there is none.
    """
    if not kinds_of(text):
        raise InputError("align: name a symmetry, or use mergekit's linear, which aligns nothing")
    return text


class AlignedMean(GroupMergeMethod):
    """`sum_t a_t W_t / sum_t a_t` over full models, each aligned to the base first.

    Wortsman et al., Model soups, 2022 (arXiv 2203.05482); after Ainsworth et al., Git Re-Basin, 2023 (arXiv
    2209.04836), and Zhang et al., 2025 (arXiv 2502.00264).
    """

    spec = MergeMethodSpec(
        name=MEAN_OF_MODELS,
        parameters=(
            ParameterSpec(
                name="weight",
                value_type=float,
                scope=ParameterScope.INPUT,
                default=1.0,
                description="weight of the model",
            ),
            ParameterSpec(
                name="normalize",
                value_type=bool,
                scope=ParameterScope.SHARED,
                default=True,
                description="divide by the sum of the weights",
            ),
            ParameterSpec(
                name="align",
                value_type=Annotated[str, AfterValidator(_symmetries)],
                scope=ParameterScope.INPUT,
                default=", ".join(DEFAULT_KINDS),
                description="by which symmetries: permutation, rotation, scale, or all",
            ),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED),
        pretty_name="Mean of aligned models",
        reference_url="https://arxiv.org/abs/2209.04836",
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """What `linear` makes of the tensors, which were aligned when they were read."""
        linear: Any = next(method for method in registered_methods() if method.spec.name == "linear")
        given = {name: parameters[name] for name in ("weight", "normalize")}
        (merged,) = linear((group,), parameters=given)
        return merged


def complete(config: MergeConfiguration, options: MergeOptions, absent: Set[str] = frozenset()) -> Completed:
    """Complete a copy of a recipe, in which models are read aligned to the base, by default the first one.

    A base that is not among the models takes part with weight 0.  What is wrong: inputs that are no full
    models of one architecture, parameters that are unknown or out of range, slices and modules.

    Args:
        absent: models that do not exist yet; they stay as they are
    """
    config = config.model_copy(deep=True)
    faults = [*check_options(config, options), *check_parameters(config, AlignedMean.spec, _unknown)]
    flawed = len(faults) > 0
    if not config.models or config.slices or config.modules:
        what = "it compares whole models, so list them under models:, without slices and modules"
        return Completed(config, [*faults, InputError(f"{MEAN_OF_MODELS}: {what}")])
    if misnamed := [*check_names(config, options)]:
        return Completed(config, [*faults, *misnamed])
    config.base_model = config.base_model or config.models[0].model
    if adapters := [*_adapters(config, options, absent)]:
        return Completed(config, [*faults, *adapters])
    faults += check_tokenizers(config, options, absent)
    faults += _complete_models(config, options, absent, {} if flawed else config.parameters or {})
    return Completed(config, faults)


def adopt(config: MergeConfiguration, options: MergeOptions) -> None:
    """Complete a recipe that mergekit already holds, in place.

    Raises:
        InputError: the first of its faults; the recipe is then as it was.
    """
    completed, faults = complete(config, options)
    if faults:
        raise faults[0]
    config.base_model, config.models = completed.base_model, completed.models


def _unknown(name: str) -> str:
    known = [parameter.name for parameter in AlignedMean.spec.parameters]
    return f"{MEAN_OF_MODELS} has no parameter {name!r}{did_you_mean(name, known)}"


def _adapters(config: MergeConfiguration, options: MergeOptions, absent: Set[str]) -> Iterator[InputError]:
    for reference in dict.fromkeys(config.referenced_models()):
        path = reference.model
        if path.path in absent and not reference.lora:
            continue
        if reference.lora or is_adapter(path.path, path.revision, options.transformers_cache):
            yield InputError(
                f"{reference}: {MEAN_OF_MODELS} takes full models; merge the adapter into its model first, "
                "or use a method on adapters with align:"
            )


def _complete_models(
    config: MergeConfiguration, options: MergeOptions, absent: Set[str], shared: Mapping[str, Any]
) -> Iterator[InputError]:
    """Write the base as `base_model` spells it, and the others as models that are aligned to it.

    Args:
        shared: parameters of the whole recipe
    """
    base, models = config.base_model, config.models
    assert base is not None and models is not None
    seen: set[Any] = set()
    for source in models:
        reference = source.model
        if (key := identity(reference.model)) in seen:
            yield InputError(f"{reference}: listed twice; list it once with the summed weight")
        seen.add(key)
        if key == identity(base.model):
            source.model = base
        elif absent.isdisjoint((reference.model.path, base.model.path)):
            given = ChainMap(source.parameters or {}, dict(shared))
            try:
                check_full_model(reference, base, options.trust_remote_code)
                kinds = kinds_of(str(given.get("align", ", ".join(DEFAULT_KINDS))))
            except InputError as error:
                yield error
                continue
            source.model = AlignedReference(
                model=reference.model,
                base=base,
                kinds=kinds,
                device=None if options.multi_gpu else options.device,  # None: that of the thread
                override_architecture=reference.override_architecture,
            )
    if identity(base.model) not in seen:
        models.append(InputModelDefinition(model=base, parameters={WEIGHT.name: 0.0}))


def check_plan(planner: "MergePlanner") -> None:
    """
    Raises:
        InputError: the models have other tensors, or of other shapes where mergekit does not resize them, or
            the weights of a tensor cannot be divided by their sum.
    """
    resizes = aligns_vocabulary(planner) or planner.options.unsafe_truncate_embeddings
    for reference in planner.config.referenced_models():
        loader = LoaderCache().get(reference)
        if isinstance(loader, AlignedLoader):
            model, base = loader.aligned.model, loader.aligned.anchor
            same_tensors(model.name, model, base, resized=VOCABULARY if resizes else ())
    for weight, task in planned_tensors(planner):
        assert isinstance(task, ExecuteMergeMethodTask)
        weights = [float(given[WEIGHT.name]) for given in task.input_parameters.values()]
        if task.parameters["normalize"] and abs(sum(weights)) <= 1e-6 * sum(map(abs, weights)):
            raise InputError(
                f"{weight.name}: the weights of the models add up to 0, by which normalize would divide; "
                "give other weights, or normalize: false"
            )


class LogAlignment(Task[None], frozen=True):
    """Once the merge is written, say how far its models were from being aligned."""

    finish: FinalizeModel
    models: tuple[ModelReference, ...]

    def arguments(self) -> dict[str, Task]:
        """After the last tensor."""
        return {"finished": self.finish}

    def main_thread_only(self) -> bool:
        """As all that comes last."""
        return True

    def execute(self, **_finished: None) -> None:
        """Log."""
        for reference in self.models:
            loader = LoaderCache().get(reference)
            if isinstance(loader, AlignedLoader):
                log_alignment(loader.aligned)
