"""Check and complete a recipe of one of our methods before mergekit looks at it."""

import os
from collections.abc import Iterator

from mergekit import common
from mergekit.common import ModelPath, ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputSliceDefinition,
)
from mergekit.options import MergeOptions
from pydantic import ValidationError

from mergekit_tspa.adapters import base_of_adapter, is_adapter
from mergekit_tspa.errors import InputError
from mergekit_tspa.graph.method import ADAPTER, AdapterMergeMethod
from mergekit_tspa.graph.reference import AdapterReference
from mergekit_tspa.methods import METHODS, Method

Source = InputModelDefinition | InputSliceDefinition


def complete(config: MergeConfiguration, options: MergeOptions) -> None:
    """Check the recipe and complete it in place: bases of bare adapters, common base, base of every slice.

    Raises:
        InputError: the first of its `faults`.
    """
    for fault in faults(config, options):
        raise fault


def faults(config: MergeConfiguration, options: MergeOptions) -> Iterator[InputError]:
    """What is wrong with the recipe, which is completed on the way.

    No adapters, adapters of different bases, an adapter listed twice, a full model as input, an unknown parameter or a
    value out of range.
    """
    yield from _check_options(config, options)
    yield from _check_parameters(config, METHODS[config.merge_method])
    for step in (_complete_adapters(config, options), _complete_base(config)):
        found = list(step)
        yield from found
        if found:
            return
    for group in groups(config):
        yield from _complete_sources(group, config.base_model)
    for output_slice in _slices(config):
        yield from _append_base(output_slice, config.base_model)


def _check_options(config: MergeConfiguration, options: MergeOptions) -> Iterator[InputError]:
    """What mergekit itself would find out only after the solving."""
    for key in ("dtype", "out_dtype"):
        try:
            common.dtype_from_name(getattr(config, key))
        except RuntimeError:
            yield InputError(f"{key}: {getattr(config, key)!r} is no dtype that mergekit knows")
    if options.multi_gpu:
        try:
            common.get_torch_accelerator_count()
        except AttributeError:
            yield InputError("--multi-gpu: this machine has no accelerator; leave the option out")


def _slices(config: MergeConfiguration) -> Iterator[OutputSliceDefinition]:
    yield from config.slices or ()
    for module in (config.modules or {}).values():
        yield from module.slices or ()


def groups(config: MergeConfiguration) -> Iterator[list[Source]]:
    """The lists of inputs that are merged with each other."""
    if config.models:
        yield config.models
    for module in (config.modules or {}).values():
        if module.models:
            yield module.models
    for output_slice in _slices(config):
        yield output_slice.sources


def _complete_adapters(config: MergeConfiguration, options: MergeOptions) -> Iterator[InputError]:
    """Write an adapter that is given without its base as `base+adapter`."""
    for source in (source for group in groups(config) for source in group):
        path = source.model.model
        known = config.base_model and _identity(path) == _identity(config.base_model.model)
        if source.model.lora or known or not is_adapter(path.path, path.revision, options.transformers_cache):
            continue
        try:
            base = config.base_model or _base_of(path, options)
        except InputError as error:
            yield error
            continue
        source.model = ModelReference(model=base.model, lora=path, override_architecture=base.override_architecture)


def _base_of(adapter: ModelPath, options: MergeOptions) -> ModelReference:
    """The base model that an adapter's configuration names."""
    path = base_of_adapter(adapter.path, adapter.revision, options.transformers_cache)
    try:
        base = ModelReference(model=ModelPath(path=path))
        base.config(options.trust_remote_code)
    except Exception as error:  # not named, not there, not reachable, not a model: all need the same way out
        raise InputError(
            f"{adapter}: its adapter_config.json names the base model {path!r}, which is neither a model directory nor "
            "a model of the hub that can be reached; name the base as base_model in the recipe"
        ) from error
    return base


def _complete_base(config: MergeConfiguration) -> Iterator[InputError]:
    adapters = [source.model for group in groups(config) for source in group if source.model.lora]
    if not adapters:
        yield InputError(
            f"{config.merge_method}: the recipe has no adapter; write inputs as `model: base+adapter`, or as "
            "`model: adapter` for a directory without a model"
        )
        return
    bases = list({_identity(reference.model): str(reference.model) for reference in adapters}.values())
    if config.base_model is None:
        if len(bases) > 1:
            yield InputError(f"the adapters have different bases ({', '.join(bases)}); name one as base_model")
            return
        config.base_model = ModelReference(
            model=adapters[0].model, override_architecture=adapters[0].override_architecture
        )
    if config.base_model.lora is not None:
        yield InputError(
            f"base_model {config.base_model} has an adapter of its own; give the plain base, or merge that adapter "
            "into a checkpoint first"
        )


def _complete_sources(group: list[Source], base: ModelReference) -> Iterator[InputError]:
    """Write the base as `base_model` spells it, and adapters as references on it."""
    seen = set()
    for source in group:
        reference = source.model
        same_base = _identity(reference.model) == _identity(base.model)
        if not same_base and reference.lora is None:
            yield InputError(
                f"{reference}: a full model among adapters is not supported; write `{base}+adapter`, or extract "
                "an adapter from it first (mergekit-extract-lora)"
            )
        elif not same_base:
            yield InputError(
                f"{reference}: written on base {reference.model}, but this merge is based on {base}; "
                "adapters of different bases cannot be merged"
            )
        elif reference.lora is None:
            source.model = base
        else:
            key = _identity(reference.lora)
            if key in seen:
                yield InputError(f"{reference.lora}: listed twice; list it once with the summed weight")
            seen.add(key)
            source.model = AdapterReference(
                model=base.model, lora=reference.lora, override_architecture=base.override_architecture
            )


def _identity(path: ModelPath) -> tuple[str, str | None]:
    """Equal for two spellings of one directory."""
    return (os.path.realpath(path.path) if os.path.exists(path.path) else path.path), path.revision


def _append_base(output_slice: OutputSliceDefinition, base: ModelReference) -> Iterator[InputError]:
    """mergekit adds the base to `models:` only."""
    if any(source.model == base for source in output_slice.sources):
        return
    ranges = {tuple(source.layer_range) for source in output_slice.sources}
    if len(ranges) > 1:
        yield InputError(
            f"a slice takes layers {sorted(ranges)} of its adapters, so the layers of the base are not clear; "
            f"add `model: {base}` with its layer_range to the slice"
        )
        return
    output_slice.sources.append(InputSliceDefinition(model=base, layer_range=ranges.pop()))


def _check_parameters(config: MergeConfiguration, method: Method) -> Iterator[InputError]:
    """mergekit ignores parameters that it does not know; a misspelt one must not pass."""
    specs = {spec.name: spec for spec in AdapterMergeMethod(method).spec.parameters}
    shared_scopes = [config, *(config.modules or {}).values(), *_slices(config)]
    sources = [source for group in groups(config) for source in group]
    for holder in [*shared_scopes, *sources]:
        for name, setting in (holder.parameters or {}).items():
            if name not in specs:
                yield InputError(method.unknown_parameter(name))
                continue
            if holder is not config and name == ADAPTER.name:
                yield InputError(f"{name} applies to the whole merge; move it to the top level")
            if isinstance(holder, Source) and name in method.parameter_fields():
                yield InputError(f"{name} applies to the whole merge; move it from {holder.model} to the top level")
            for value in _scalars(setting):
                try:
                    specs[name].validate(value)
                except ValidationError as error:
                    yield InputError(f"parameter {name}: {value!r}: {error.errors()[0]['msg']}")


def _scalars(setting) -> Iterator:
    """All values of a scalar, a gradient, or a list of filters."""
    if isinstance(setting, ConditionalParameter):
        yield from _scalars(setting.value)
    elif isinstance(setting, list):
        for item in setting:
            yield from _scalars(item)
    else:
        yield setting
