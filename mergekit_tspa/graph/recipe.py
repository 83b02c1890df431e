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
        InputError: no adapters, adapters of different bases, an adapter listed twice, a full model as input,
            an unknown parameter or a value out of range.
    """
    method = METHODS[config.merge_method]
    _check_options(config, options)
    _check_parameters(config, method)
    _complete_adapters(config, options)
    _complete_base(config)
    for group in _groups(config):
        _check_sources(group, config.base_model)
    for group in _groups(config):
        for source in group:
            source.model = _reference(source.model, config.base_model)
    for output_slice in _slices(config):
        _append_base(output_slice, config.base_model)


def _check_options(config: MergeConfiguration, options: MergeOptions) -> None:
    """What mergekit itself would find out only after the solving."""
    for key in ("dtype", "out_dtype"):
        try:
            common.dtype_from_name(getattr(config, key))
        except RuntimeError as error:
            raise InputError(f"{key}: {getattr(config, key)!r} is no dtype that mergekit knows") from error
    if options.multi_gpu:
        try:
            common.get_torch_accelerator_count()
        except AttributeError as error:
            raise InputError("--multi-gpu: this machine has no accelerator; leave the option out") from error


def _reference(reference: ModelReference, base: ModelReference) -> ModelReference:
    """The base as `base_model` spells it, or an adapter on it."""
    if reference.lora is None:
        return base
    return AdapterReference(model=base.model, lora=reference.lora, override_architecture=base.override_architecture)


def _slices(config: MergeConfiguration) -> Iterator[OutputSliceDefinition]:
    yield from config.slices or ()
    for module in (config.modules or {}).values():
        yield from module.slices or ()


def _groups(config: MergeConfiguration) -> Iterator[list[Source]]:
    """The lists of inputs that are merged with each other."""
    if config.models:
        yield config.models
    for module in (config.modules or {}).values():
        if module.models:
            yield module.models
    for output_slice in _slices(config):
        yield output_slice.sources


def _complete_adapters(config: MergeConfiguration, options: MergeOptions) -> None:
    """Write an adapter that is given without its base as `base+adapter`."""
    for source in (source for group in _groups(config) for source in group):
        path = source.model.model
        known = config.base_model and _identity(path) == _identity(config.base_model.model)
        if source.model.lora or known or not is_adapter(path.path, path.revision, options.transformers_cache):
            continue
        base = config.base_model or _base_of(path, options)
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


def _complete_base(config: MergeConfiguration) -> None:
    adapters = [source.model for group in _groups(config) for source in group if source.model.lora]
    if not adapters:
        raise InputError(
            f"{config.merge_method}: the recipe has no adapter; write inputs as `model: base+adapter`, or as "
            "`model: adapter` for a directory without a model"
        )
    bases = list({_identity(reference.model): str(reference.model) for reference in adapters}.values())
    if config.base_model is None:
        if len(bases) > 1:
            raise InputError(f"the adapters have different bases ({', '.join(bases)}); name one as base_model")
        config.base_model = ModelReference(
            model=adapters[0].model, override_architecture=adapters[0].override_architecture
        )
    if config.base_model.lora is not None:
        raise InputError(
            f"base_model {config.base_model} has an adapter of its own; give the plain base, or merge that adapter "
            "into a checkpoint first"
        )


def _check_sources(group: list[Source], base: ModelReference) -> None:
    seen = set()
    for source in group:
        reference = source.model
        same_base = _identity(reference.model) == _identity(base.model)
        if reference.lora is None:
            if not same_base:
                raise InputError(
                    f"{reference}: a full model among adapters is not supported; write `{base}+adapter`, or extract "
                    "an adapter from it first (mergekit-extract-lora)"
                )
            continue
        if not same_base:
            raise InputError(
                f"{reference}: written on base {reference.model}, but this merge is based on {base}; "
                "adapters of different bases cannot be merged"
            )
        key = _identity(reference.lora)
        if key in seen:
            raise InputError(f"{reference.lora}: listed twice; list it once with the summed weight")
        seen.add(key)


def _identity(path: ModelPath) -> tuple[str, str | None]:
    """Equal for two spellings of one directory."""
    return (os.path.realpath(path.path) if os.path.exists(path.path) else path.path), path.revision


def _append_base(output_slice: OutputSliceDefinition, base: ModelReference) -> None:
    """mergekit adds the base to `models:` only."""
    if any(source.model == base for source in output_slice.sources):
        return
    ranges = {tuple(source.layer_range) for source in output_slice.sources}
    if len(ranges) > 1:
        raise InputError(
            f"a slice takes layers {sorted(ranges)} of its adapters, so the layers of the base are not clear; "
            f"add `model: {base}` with its layer_range to the slice"
        )
    output_slice.sources.append(InputSliceDefinition(model=base, layer_range=ranges.pop()))


def _check_parameters(config: MergeConfiguration, method: Method) -> None:
    """mergekit ignores parameters that it does not know; a misspelt one must not pass."""
    specs = {spec.name: spec for spec in AdapterMergeMethod(method).spec.parameters}
    shared_scopes = [config, *(config.modules or {}).values(), *_slices(config)]
    sources = [source for group in _groups(config) for source in group]
    for holder in [*shared_scopes, *sources]:
        for name, setting in (holder.parameters or {}).items():
            if name not in specs:
                raise InputError(method.unknown_parameter(name))
            if holder is not config and name == ADAPTER.name:
                raise InputError(f"{name} applies to the whole merge; move it to the top level")
            if isinstance(holder, Source) and name in method.parameter_fields():
                raise InputError(f"{name} applies to the whole merge; move it from {holder.model} to the top level")
            for value in _scalars(setting):
                try:
                    specs[name].validate(value)
                except ValidationError as error:
                    raise InputError(f"parameter {name}: {value!r}: {error.errors()[0]['msg']}") from error


def _scalars(setting) -> Iterator:
    """All values of a scalar, a gradient, or a list of filters."""
    if isinstance(setting, ConditionalParameter):
        yield from _scalars(setting.value)
    elif isinstance(setting, list):
        for item in setting:
            yield from _scalars(item)
    else:
        yield setting
