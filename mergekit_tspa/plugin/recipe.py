"""Check and complete a recipe of one of our methods before mergekit looks at it."""

import logging
import os
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from transformers import AutoTokenizer

from mergekit_tspa.adapters import base_of_adapter, check_architecture, check_reachable, is_adapter
from mergekit_tspa.errors import InputError, did_you_mean, reason_of
from mergekit_tspa.merging.servable import LEFT_OUT
from mergekit_tspa.methods import METHODS, Method
from mergekit_tspa.methods.emr_records import DESCRIPTION
from mergekit_tspa.methods.inputs import PER_MODEL
from mergekit_tspa.plugin.compat import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    MergeMethodSpec,
    MergeOptions,
    ModelArchitecture,
    ModelPath,
    ModelReference,
    OutputModuleDefinition,
    OutputSliceDefinition,
    ParameterScope,
    ParameterSpec,
    accelerator_count,
    dtype_from_name,
)
from mergekit_tspa.plugin.merge_method import (
    ADAPTER,
    ADAPTER_PARAMETERS,
    LEAVES_OUT,
    TEXTS,
    WEIGHT,
    AdapterMergeMethod,
)
from mergekit_tspa.plugin.references import AdapterReference, FullModelReference, TurnedReference, config_of

LOG = logging.getLogger(__name__)
Source = InputModelDefinition | InputSliceDefinition
# What has `parameters`, besides the inputs themselves.
Holder = MergeConfiguration | OutputModuleDefinition | OutputSliceDefinition


class Completed(NamedTuple):
    """A recipe with everything that its author may leave out, and what is wrong with it."""

    config: MergeConfiguration
    faults: list[InputError]


def complete(config: MergeConfiguration, options: MergeOptions, absent: Set[str] = frozenset()) -> Completed:
    """Complete a copy of a recipe: bases of bare adapters, common base, base of every slice, seed.

    What is wrong: no adapters, adapters of different bases, an adapter listed twice, a full model of another
    architecture, an unknown parameter or a value out of range.

    Args:
        absent: models that do not exist yet; what needs them stays as it is
    """
    config = config.model_copy(deep=True)
    faults = [*check_options(config, options)]
    _take_seed(config, options)
    method = METHODS[config.merge_method]
    flawed = [*check_parameters(config, AdapterMergeMethod(method).spec, method.unknown_parameter)]
    faults += flawed
    for step in (check_names, _complete_adapters, _complete_base):
        if found := [*step(config, options)]:
            return Completed(config, [*faults, *found])
    faults += check_tokenizers(config, options, absent)
    faults += _complete_sources(config, options, absent, parameters=not flawed)
    assert config.base_model is not None  # `_complete_base` found no fault
    for output_slice in _slices(config):
        faults += _append_base(output_slice, config.base_model)
    return Completed(config, faults)


def adopt(config: MergeConfiguration, options: MergeOptions) -> None:
    """Complete a recipe that mergekit already holds, in place.

    Raises:
        InputError: the first of its faults; the recipe is then as it was.
    """
    completed, faults = complete(config, options)
    if faults:
        raise faults[0]
    for name in MergeConfiguration.model_fields:
        setattr(config, name, getattr(completed, name))


def adopt_modules(config: MergeConfiguration, architecture: ModelArchitecture) -> None:
    """Take modules that the recipe leaves out, such as a vision tower, from the base; mergekit would not
    write them.
    """
    if not config.modules:
        return
    for name in architecture.modules:
        if name in config.modules:
            continue
        LOG.info("module %s is not in the recipe: it is the base's", name)
        config.modules[name] = OutputModuleDefinition(models=[InputModelDefinition(model=config.base_model)])


def check_options(config: MergeConfiguration, options: MergeOptions) -> Iterator[InputError]:
    """What mergekit itself would find out only after the solving."""
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        try:
            dtype = dtype_from_name(name)
        except RuntimeError:
            yield InputError(f"{key}: {name!r} is no dtype that mergekit knows")
            continue
        if dtype is not None and not dtype.is_floating_point:
            yield InputError(
                f"{key}: {name} has whole numbers only, to which weights would be rounded; give float32, "
                "bfloat16 or float16"
            )
    try:
        torch.zeros(1, device=options.device).item()  # the device `meta` has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(". ")[0]
        yield InputError(f"--device {options.device}: not on this machine ({reason})")
    if options.multi_gpu and not accelerator_count():
        yield InputError("--multi-gpu: this machine has no accelerator; leave the option out")


def _take_seed(config: MergeConfiguration, options: MergeOptions) -> None:
    """Make `--random-seed` the seed of methods that draw, unless the recipe has one."""
    if options.random_seed is None or "seed" not in METHODS[config.merge_method].parameter_fields():
        return
    config.parameters = {"seed": options.random_seed} | (config.parameters or {})
    if (seed := config.parameters["seed"]) != options.random_seed:
        LOG.warning(
            "--random-seed %s has no effect: the recipe's seed %s is taken", options.random_seed, seed
        )


def _slices(config: MergeConfiguration) -> Iterator[OutputSliceDefinition]:
    yield from config.slices or ()
    for module in (config.modules or {}).values():
        yield from module.slices or ()


def _groups(config: MergeConfiguration) -> Iterator[tuple[Sequence[Source], list[Holder]]]:
    """The lists of inputs that are merged with each other, and where their parameters may be, innermost
    first.
    """
    scopes: list[MergeConfiguration | OutputModuleDefinition] = [config, *(config.modules or {}).values()]
    for scope in scopes:
        outer: list[Holder] = [] if scope is config else [config]
        if scope.models:
            yield scope.models, [scope, *outer]
        for output_slice in scope.slices or ():
            yield output_slice.sources, [output_slice, scope, *outer]


def sources(config: MergeConfiguration) -> Iterator[Source]:
    """All inputs of the recipe."""
    return (source for group, _ in _groups(config) for source in group)


def check_names(config: MergeConfiguration, options: MergeOptions) -> Iterator[InputError]:
    """Names that are left empty, or that no file system has."""
    base = config.base_model
    if base and not base.model.path:
        yield InputError("base_model: the name is empty; leave it out if all adapters name one base")
    for reference in [*(source.model for source in sources(config)), *([base] if base else [])]:
        if any("\0" in path.path for path in (reference.model, reference.lora) if path):
            yield InputError(f"model {str(reference)!r}: a name of a directory cannot hold the character NUL")
    for source in sources(config):
        reference = source.model
        if not reference.model.path:
            yield InputError(
                f"model {str(reference)!r}: there is no base model before the +, or no name at all"
            )
        elif reference.lora and not reference.lora.path:
            yield InputError(f"model {str(reference)!r}: there is no adapter after the +")


def _complete_adapters(config: MergeConfiguration, options: MergeOptions) -> Iterator[InputError]:
    """Write an adapter that is given without its base as `base+adapter`."""
    for source in sources(config):
        path = source.model.model
        known = config.base_model and identity(path) == identity(config.base_model.model)
        if source.model.lora or known or not is_adapter(path.path, path.revision, options.transformers_cache):
            continue
        try:
            base = config.base_model or _base_of(path, options)
        except InputError as error:
            yield error
            continue
        source.model = ModelReference(
            model=base.model, lora=path, override_architecture=base.override_architecture
        )


def _base_of(adapter: ModelPath, options: MergeOptions) -> ModelReference:
    """The base model that an adapter's configuration names."""
    path = base_of_adapter(adapter.path, adapter.revision, options.transformers_cache)
    try:
        base = ModelReference(model=ModelPath(path=path))
        config_of(base, options.trust_remote_code)
    except Exception as error:  # not named, not there, not reachable, not a model: all need the same way out
        raise InputError(
            f"{adapter}: its adapter_config.json names the base model {path!r}, which is neither a model "
            "directory nor a model of the hub that can be reached; name the base as base_model in the recipe"
        ) from error
    return base


def _complete_base(config: MergeConfiguration, options: MergeOptions) -> Iterator[InputError]:
    adapters = [source.model for source in sources(config) if source.model.lora]
    base = config.base_model and identity(config.base_model.model)
    if not adapters and (
        base is None or all(identity(source.model.model) == base for source in sources(config))
    ):
        yield InputError(
            f"{config.merge_method}: the recipe has no adapter; write inputs as `model: base+adapter`, as "
            "`model: adapter` for a directory without a model, or, with base_model, as `model: full model`"
        )
        return
    bases = list({identity(reference.model): str(reference.model) for reference in adapters}.values())
    if config.base_model is None:
        if len(bases) > 1:
            yield InputError(
                f"the adapters have different bases ({', '.join(bases)}); name one as base_model"
            )
            return
        config.base_model = ModelReference(
            model=adapters[0].model, override_architecture=adapters[0].override_architecture
        )
    if config.base_model.lora is not None:
        yield InputError(
            f"base_model {config.base_model} has an adapter of its own; give the plain base, or merge that "
            "adapter into a checkpoint first"
        )


def check_tokenizers(
    config: MergeConfiguration, options: MergeOptions, absent: Set[str]
) -> Iterator[InputError]:
    """Tokenizers that the recipe asks for; mergekit would miss them once it has begun to merge."""
    asked = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if not asked:
        return
    # mergekit goes on without the tokenizers of other inputs.
    models = [config.base_model.model, *([asked.model] if isinstance(asked, ModelReference) else [])]
    for model in dict.fromkeys(models):
        if model.path in absent:
            continue
        try:
            check_reachable(model.path, model.revision)
            AutoTokenizer.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=options.trust_remote_code
            )
        except (
            Exception
        ) as error:  # not there, damaged, of a class that is not known: transformers has many words
            key = "tokenizer" if config.tokenizer else "tokenizer_source"
            yield InputError(
                f"{key}: {model} has no tokenizer that transformers can load "
                f"({reason_of(error)}); leave the option out"
            )


def _complete_sources(
    config: MergeConfiguration, options: MergeOptions, absent: Set[str], parameters: bool
) -> Iterator[InputError]:
    """Write the base as `base_model` spells it, adapters as references on it, and full models as such beside
    it.

    Args:
        parameters: whether those of the recipe can be relied on; the defaults are taken otherwise
    """
    base, method = config.base_model, METHODS[config.merge_method]
    assert base is not None
    for group, holders in _groups(config):
        seen = set()
        for source in group:
            reference = source.model
            same_base = identity(reference.model) == identity(base.model)
            settings = _settings(source, holders) if parameters else {}
            if reference.lora and not same_base and not settings.get("align"):
                yield InputError(
                    f"{reference}: written on base {reference.model}, but this merge is based on {base}; "
                    "adapters of different bases cannot be merged, unless align: brings their models together"
                )
                continue
            added = reference.lora or reference.model
            if identity(added) in seen:
                base_alone = same_base and not reference.lora
                yield InputError(
                    f"{added}: listed twice; list it once{'' if base_alone else ' with the summed weight'}"
                )
            seen.add(identity(added))
            if absent.isdisjoint((reference.model.path, base.model.path)):
                try:
                    source.model = _reference(reference, settings, base, method, options)
                except InputError as error:
                    yield error


def _settings(source: Source, holders: list[Holder]) -> dict[str, Any]:
    """The parameters of one model, from where they are given nearest to it."""
    given = ChainMap(*(holder.parameters or {} for holder in (source, *holders)))
    return {name: given[name] for name in PER_MODEL if name in given}


def leaves_out(config: MergeConfiguration) -> Set[str]:
    """What an adapter as the result need not hold, of `LEFT_OUT`."""
    return _named((config.parameters or {}).get(LEAVES_OUT.name, ""))


def _named(setting: Any) -> Set[str]:
    """The names in `norms, magnitudes` or `[norms, magnitudes]`."""
    text = ",".join(map(str, setting)) if isinstance(setting, list) else str(setting)
    return {name.strip() for name in text.split(",")} - {""}


def filters(config: MergeConfiguration) -> set[str]:
    """The filters of all parameters, but those that match everything."""
    holders = [holder for group, outer in _groups(config) for holder in (*group, *outer)]
    settings = [setting for holder in holders for setting in (holder.parameters or {}).values()]
    given = [part for setting in settings for part in (setting if isinstance(setting, list) else [setting])]
    named = {part.filter for part in given if isinstance(part, ConditionalParameter)}
    return {part for part in named if part not in (None, "*")}


def weights_of(config: MergeConfiguration, base: bool = False) -> dict[ModelReference, str]:
    """The weight of each input, as the recipe has it: `0.5`, or `0.5 to 0.7` over layers and tensors.

    Args:
        base: also that of the base, which is an input of `aligned_mean`
    """
    used: dict[ModelReference, list[float]] = {}
    for group, holders in _groups(config):
        for source in group:
            if base or source.model != config.base_model:
                used.setdefault(source.model, []).extend(_weights(source, holders))
    return {reference: span(weights) for reference, weights in used.items()}


def _weights(source: Source, holders: Sequence[Holder]) -> Iterator[float]:
    """All values of the weight of an input, over layers and tensors."""
    given = ChainMap(*(holder.parameters or {} for holder in (source, *holders)))
    return map(float, _scalars(given.get(WEIGHT.name, WEIGHT.default)))


def span(values: Iterable[float]) -> str:
    """`0.5`, or `0.5 to 0.7`."""
    values = set(values)
    return " to ".join(f"{value:g}" for value in sorted({min(values), max(values)}))


def _reference(
    reference: ModelReference,
    settings: dict[str, Any],
    base: ModelReference,
    method: Method,
    options: MergeOptions,
) -> ModelReference:
    """The base as `base_model` spells it, an adapter on it, or a full model beside it, perhaps with an
    adapter.
    """
    model, lora = reference.model, reference.lora
    same_base = identity(model) == identity(base.model)
    if lora and same_base:
        return AdapterReference(model=base.model, lora=lora, override_architecture=base.override_architecture)
    if same_base:
        return base
    check_full_model(reference, base, options.trust_remote_code)
    device = None if options.multi_gpu else options.device  # None: that of the thread
    kind = TurnedReference if lora else FullModelReference
    return kind(
        model=model,
        lora=lora,
        base=base,
        extraction=method.extraction(settings)._replace(device=device),
        override_architecture=reference.override_architecture,
    )


def check_full_model(reference: ModelReference, base: ModelReference, trust_remote_code: bool) -> None:
    """
    Raises:
        InputError: there is no such model, or it is of another architecture.
    """
    model = reference.model
    try:
        config = config_of(reference, trust_remote_code)
    except Exception as error:  # not there, not reachable, damaged: transformers has many words for it
        raise InputError(f"{model}: there is neither an adapter nor a model with a config.json") from error
    try:
        base_config = config_of(base, trust_remote_code)
    except Exception:  # mergekit itself says so of a base
        return
    check_architecture(str(model), config.to_dict(), str(base), base_config.to_dict())
    here, there = (getattr(c.get_text_config(), "num_hidden_layers", None) for c in (config, base_config))
    if here != there:
        raise InputError(
            f"{model}: it has {here} layers, and its base {base} {there}; a full model must have exactly the "
            "tensors of the base"
        )


def identity(path: ModelPath) -> tuple[str, str | None]:
    """Equal for two spellings of one directory."""
    return (os.path.realpath(path.path) if os.path.exists(path.path) else path.path), path.revision


def _append_base(output_slice: OutputSliceDefinition, base: ModelReference) -> Iterator[InputError]:
    """mergekit adds the base to `models:` only."""
    own = output_slice.base_model
    if own and identity(own.model) != identity(base.model):
        yield InputError(
            f"a slice has base_model {own}, but this merge is based on {base}; adapters of different bases "
            "cannot be merged, so leave it out there"
        )
        return
    output_slice.base_model = None  # the recipe's, however it was spelled
    counts = {source.layer_range[1] - source.layer_range[0] for source in output_slice.sources}
    if len(counts) > 1:
        yield InputError(
            f"a slice takes {' and '.join(map(str, sorted(counts)))} layers of its inputs; give each a "
            "layer_range of as many layers"
        )
        return
    if any(source.model == base for source in output_slice.sources):
        return
    ranges = {tuple(source.layer_range) for source in output_slice.sources}
    if len(ranges) > 1:
        yield InputError(
            f"a slice takes layers {sorted(ranges)} of its adapters, so the layers of the base are not "
            f"clear; add `model: {base}` with its layer_range to the slice"
        )
        return
    output_slice.sources.append(InputSliceDefinition(model=base, layer_range=ranges.pop()))


def check_parameters(
    config: MergeConfiguration, spec: MergeMethodSpec, unknown_parameter: Callable[[str], str]
) -> Iterator[InputError]:
    """mergekit ignores parameters that it does not know; a misspelt one must not pass.

    Args:
        unknown_parameter: what to say of one that the method does not have
    """
    specs = {parameter.name: parameter for parameter in spec.parameters}
    modules = (config.modules or {}).values()
    holders: list[Holder | Source] = [config, *modules, *_slices(config), *sources(config)]
    for holder in holders:
        for name, setting in (holder.parameters or {}).items():
            if name not in specs:
                yield InputError(unknown_parameter(name))
                continue
            if holder is not config and name in ADAPTER_PARAMETERS:
                yield InputError(f"{name} applies to the whole merge; move it to the top level")
            if name == ADAPTER.name and not isinstance(setting, bool):
                yield InputError(f"{name}: {setting}: give true or false")
                continue
            if name == LEAVES_OUT.name and (unknown := sorted(_named(setting) - {*LEFT_OUT})):
                yield InputError(
                    f"{name}: {unknown[0]}: give some of "
                    f"{', '.join(LEFT_OUT)}{did_you_mean(unknown[0], LEFT_OUT)}"
                )
                continue
            if name in (spec.name for spec in TEXTS) and isinstance(setting, list):
                yield InputError(f"{name}: give one file per model, no list and no filters")
                continue
            if name in PER_MODEL and isinstance(setting, list):
                yield InputError(f"{name}: {setting}: give one value per model, no gradient and no filters")
            of_all = specs[name].scope is ParameterScope.SHARED and name not in ADAPTER_PARAMETERS
            if isinstance(holder, Source) and of_all:
                yield InputError(
                    f"{name} applies to the whole merge; move it from {holder.model} to the top level"
                )
            if not (values := [*_scalars(setting)]):
                yield InputError(f"parameter {name}: an empty list")
            _warn_of_unreachable(name, setting)
            for gradient in _gradients(setting):
                if fault := _fault_of_gradient(name, gradient, specs[name]):
                    yield InputError(fault)
            for value in values:
                try:
                    taken = specs[name].validate(value)
                    if isinstance(value, bool) and not isinstance(taken, bool):
                        yield InputError(
                            f"parameter {name}: {value}: true and yes are no numbers; give a number"
                        )
                except ValidationError as error:
                    yield InputError(f"parameter {name}: {value!r}: {error.errors()[0]['msg']}")


def check_output(out: Path, config: MergeConfiguration) -> None:
    """
    Raises:
        InputError: the output directory holds what would be taken for a part of this merge.
    """
    if (out / "adapter_config.json").exists():
        raise InputError(
            f"{out}: holds an adapter, which transformers would apply to a model there; name another one"
        )
    method = METHODS.get(config.merge_method)
    kept = {DESCRIPTION: method is not None and method.record is not None}
    kept["adapter"] = (config.parameters or {}).get(ADAPTER.name) is True
    for name, rewritten in kept.items():
        if (out / name).exists() and not rewritten:
            raise InputError(f"{out}: holds {name} of an earlier merge; remove it, or name another directory")


def _warn_of_unreachable(name: str, setting: Any) -> None:
    """Say which filters never match, because mergekit takes the first that does."""
    if not isinstance(setting, list) or not all(isinstance(part, ConditionalParameter) for part in setting):
        return
    open_ = next((i for i, part in enumerate(setting) if part.filter in (None, "*")), len(setting))
    for part in setting[open_ + 1 :]:
        LOG.warning(
            "parameter %s: %s never has an effect, because the value %s before it is for all tensors; put "
            "filters first",
            name,
            f"filter {part.filter!r}" if part.filter else f"the value {part.value!r}",
            setting[open_].value,
        )


def _gradients(setting: Any) -> Iterator[list[Any]]:
    """The lists of values over layers in a setting."""
    for part in setting if isinstance(setting, list) else [setting]:
        if isinstance(part, ConditionalParameter):
            yield from _gradients(part.value)
    if isinstance(setting, list) and not any(isinstance(part, ConditionalParameter) for part in setting):
        yield setting


def _fault_of_gradient(name: str, gradient: list[Any], spec: ParameterSpec) -> str | None:
    """Why values cannot change over the layers: between whole numbers there are values that are none."""
    try:
        taken = {spec.validate(value) for value in gradient}
    except ValidationError:  # said of each value by itself
        return None
    if len(taken) > 1 and all(isinstance(value, int) and not isinstance(value, bool) for value in taken):
        return f"{name}: {gradient}: a whole number has no gradient over layers; give one value, or filters"
    return None


def _scalars(setting) -> Iterator:
    """All values of a scalar, a gradient, or a list of filters."""
    if isinstance(setting, ConditionalParameter):
        yield from _scalars(setting.value)
    elif isinstance(setting, list):
        for item in setting:
            yield from _scalars(item)
    else:
        yield setting
