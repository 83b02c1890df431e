"""`aligned_mean`: mergekit's own `linear`, on full models that are aligned to the base as they are read."""

from collections import ChainMap
from typing import Annotated, Any

import torch
from pydantic import AfterValidator

from mergekit_tspa.adapters import is_adapter, log_alignment
from mergekit_tspa.errors import InputError, did_you_mean
from mergekit_tspa.methods import MEAN_OF_MODELS
from mergekit_tspa.plugin.compat import (
    BasePolicy,
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
    registered_methods,
)
from mergekit_tspa.plugin.recipe import check_full_model, identity
from mergekit_tspa.plugin.references import AlignedLoader, AlignedReference
from mergekit_tspa.symmetry.blocks import DEFAULT_KINDS, kinds_of


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


def adopt(config: MergeConfiguration, options: MergeOptions) -> None:
    """Let the models of a recipe be read aligned to the base, which is the first model if none is named.

    A base that is not among the models takes part with weight 0.

    Raises:
        InputError: inputs that are no full models of one architecture, or parameters that are unknown.
    """
    models = config.models
    if not models or config.slices or config.modules:
        raise InputError(
            f"{MEAN_OF_MODELS}: it compares whole models, so list them under models:, without slices and "
            "modules"
        )
    _check_parameters(config)
    config.base_model = base = config.base_model or models[0].model
    seen: set[Any] = set()
    for reference in (base, *(source.model for source in models)):
        if reference.lora or is_adapter(
            reference.model.path, reference.model.revision, options.transformers_cache
        ):
            raise InputError(
                f"{reference}: {MEAN_OF_MODELS} takes full models; merge the adapter into its model first, "
                "or use a method on adapters with align:"
            )
    for source in models:
        reference = source.model
        if (key := identity(reference.model)) in seen:
            raise InputError(f"{reference}: listed twice; list it once with the summed weight")
        seen.add(key)
        if key == identity(base.model):
            source.model = base
            continue
        check_full_model(reference, base, options.trust_remote_code)
        given = ChainMap(source.parameters or {}, config.parameters or {})
        source.model = AlignedReference(
            model=reference.model,
            base=base,
            kinds=kinds_of(str(given.get("align", ", ".join(DEFAULT_KINDS)))),
            device=None if options.multi_gpu else options.device,  # None: that of the thread
            override_architecture=reference.override_architecture,
        )
    if identity(base.model) not in seen:
        models.append(InputModelDefinition(model=base, parameters={"weight": 0.0}))


def _check_parameters(config: MergeConfiguration) -> None:
    """
    Raises:
        InputError: an unknown name, or a value that is none.
    """
    specs = {spec.name: spec for spec in AlignedMean.spec.parameters}
    for holder in (config, *(config.models or ())):
        for name, setting in (holder.parameters or {}).items():
            if name not in specs:
                raise InputError(f"{MEAN_OF_MODELS} has no parameter {name!r}{did_you_mean(name, specs)}")
            if name == "align":
                try:
                    specs[name].validate(setting)
                except ValueError as error:
                    raise InputError(
                        f"align: {setting}: give some of permutation, rotation, scale, or all"
                    ) from error


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
