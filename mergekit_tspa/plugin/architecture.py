"""Which tensors a merge has: those of mergekit's definition, or all of a base that it does not describe."""

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

from transformers import PretrainedConfig

from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError, reason_of
from mergekit_tspa.plugin.compat import (
    JsonLayerTemplates,
    JsonModuleArchDef,
    JsonModuleArchitecture,
    MergeConfiguration,
    MergeOptions,
    ModelArchitecture,
    ModuleDefinition,
    WeightInfo,
    can_convert_checkpoint_keys,
    get_auto_cls,
)
from mergekit_tspa.plugin.references import config_of

LOG = logging.getLogger(__name__)

Find: TypeAlias = Callable[[MergeConfiguration, MergeOptions], ModelArchitecture]
_LAYER = re.compile(r"\.(\d+)\.")


def fit_architecture(find: Find, config: MergeConfiguration, options: MergeOptions) -> ModelArchitecture:
    """The architecture as mergekit knows it, or one of the base's own tensors if the base has other ones.

    mergekit's definitions are of one variant and age of a model: GPT-NeoX's has buffers that are not saved
    any more, T5's the gated layers of version 1.1, RoBERTa's the prefix of models with a head, Gemma 3's an
    older vision tower.

    Args:
        find: mergekit's own way

    Raises:
        InputError: there is no base, or it is no model of one class, it lacks tensors that transformers needs
            too, or the recipe does not go by its modules.
    """
    reference: Any = config.base_model
    try:
        model_config = config_of(reference, options.trust_remote_code)
    except InputError:
        raise
    except (
        Exception
    ) as error:  # not there, not reachable, damaged, unknown: transformers has many words for it
        raise InputError(
            f"{reference}: no model, here or on the hub, whose config.json can be read: {reason_of(error)}"
        ) from error
    if len(model_config.architectures or ()) != 1:
        raise InputError(
            f"{reference}: its config.json does not name the class of the model; complete architectures"
        )
    known = find(config, options)
    checkpoint = Checkpoint(reference.local_path(options.transformers_cache))
    base = ModelTensors.of(str(reference), checkpoint, model_config.to_dict())
    aligned = config.tokenizer or config.tokenizer_source or options.unsafe_truncate_embeddings
    misfit = next(_misfits(known.all_weights(model_config), base, model_config.model_type), None)
    if misfit:
        _check_complete(config, options)
        if aligned:
            raise InputError(
                f"{reference}: it has no {misfit}, which mergekit's definition of it asks for, so that it is "
                "not known where its vocabulary is; leave out the tokenizer options"
            )
    elif forgotten := next(_forgotten(known.all_weights(model_config), base), None):
        if aligned or config.modules:  # which go by the definition
            LOG.warning(
                "%s: mergekit's definition of it lacks %s, so it is not in the output", reference, forgotten
            )
        else:
            misfit = forgotten
    if misfit:
        LOG.info(
            "%s: mergekit's definition of it does not fit %s; all its tensors are taken", reference, misfit
        )
        known = _of_tensors(checkpoint.headers)
    there = ", ".join(sorted(known.modules))
    if unknown := set(config.modules or ()) - known.modules.keys():
        raise InputError(f"modules: {reference} has no {min(unknown)}; it has {there}")
    if config.slices and len(known.modules) > 1:
        raise InputError(
            f"slices: {reference} has several stacks of layers; give modules:, each with its slices: {there}"
        )
    _check_layers(config, known, model_config)
    return known


def _check_layers(
    config: MergeConfiguration, known: ModelArchitecture, model_config: PretrainedConfig
) -> None:
    """
    Raises:
        InputError: a slice takes layers that the base does not have.
    """
    (first, *_) = known.modules
    slices = {first: config.slices or ()}
    slices |= {name: module.slices or () for name, module in (config.modules or {}).items()}
    for name, parts in slices.items():
        count = known.modules[name].architecture.num_layers(model_config) if parts else 0
        for source in (source for part in parts for source in part.sources):
            start, end = source.layer_range
            if not 0 <= start < end <= count:
                hint = "" if start < end else "; the second number is the first layer that is left out"
                raise InputError(
                    f"layer_range [{start}, {end}] of {source.model}: {config.base_model} has {count} layers"
                    + hint
                )


def _misfits(weights: Collection[WeightInfo], base: ModelTensors, model_type: str) -> Iterator[str]:
    """Weights that mergekit would look for in vain, or not plan at all."""
    stored = set(base.shapes)
    for weight in weights:
        names = (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
        if weight.optional:
            if weight.aliases:  # the planner of mergekit 0.1.5 stops with a TypeError
                yield weight.name
        elif not any(base.has(n) or can_convert_checkpoint_keys(model_type, stored, n) for n in names):
            yield weight.name


def _forgotten(weights: Collection[WeightInfo], base: ModelTensors) -> Iterator[str]:
    """Tensors of the base that would not be part of the output."""
    asked = {
        name
        for weight in weights
        for name in (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
    }
    # Most are asked for by their name on disk, which spares looking for their names at run time.
    rest = (tensor for tensor in base.shapes if tensor not in asked)
    return (tensor for tensor in rest if asked.isdisjoint(base.places(tensor)))


def _check_complete(config: MergeConfiguration, options: MergeOptions) -> None:
    """
    Raises:
        InputError: transformers misses tensors of the base, too.
    """
    reference = config.base_model
    try:
        model_config: Any = reference.config(options.trust_remote_code)
        auto_class: Any = get_auto_cls(model_config.architectures[0])
        _, loading = auto_class.from_pretrained(
            reference.local_path(options.transformers_cache),
            trust_remote_code=options.trust_remote_code,
            device_map="meta",
            output_loading_info=True,
        )
    except (
        Exception
    ) as error:  # code that is not there, or of another version: then nobody knows better than the file
        LOG.info("%s: transformers cannot say what belongs to it (%s)", reference, error)
        return
    if missing := loading["missing_keys"]:
        unknown = loading["unexpected_keys"]
        instead = f" and has {min(unknown)}, which transformers does not know" if unknown else ""
        raise InputError(
            f"{reference}: its checkpoint lacks {min(missing)}{instead}; copy or save the model again"
        )


def _of_tensors(headers: Mapping[str, tuple[tuple[int, ...], str]]) -> ModelArchitecture:
    """All tensors of a checkpoint, under their names there; one module per stack of layers."""
    stacks: dict[str, dict[str, set[int]]] = {}  # of each stack, in which layers a tensor is
    loose = []
    for name, (_, dtype) in headers.items():
        if found := _LAYER.search(name):
            template = f"{name[: found.start()]}.${{layer_index}}.{name[found.end() :]}"
            stacks.setdefault(name[: found.start()], {}).setdefault(template, set()).add(int(found[1]))
        else:  # indices are not converted to the dtype of a merge
            loose.append(
                WeightInfo(name=name, force_dtype="int64" if dtype in ("I64", "torch.int64") else None)
            )
    if len(stacks) == 1:
        modules = {"default": _module(loose, *stacks.values())}
    else:
        modules = {"default": _module(loose, {})} | {
            name: _module([], stack) for name, stack in stacks.items()
        }
    return ModelArchitecture(modules=modules, architectures=[], model_type="")


def _module(loose: list[WeightInfo], templates: dict[str, set[int]]) -> ModuleDefinition:
    count = 1 + max((layer for there in templates.values() for layer in there), default=-1)
    weights = [WeightInfo(name=name, optional=len(there) < count) for name, there in templates.items()]
    definition = JsonModuleArchDef(
        model_type="",
        architectures=[],
        pre_weights=loose,
        layer_templates=JsonLayerTemplates(weights=weights),
        post_weights=[],
        override_num_layers=count,
    )
    return ModuleDefinition(architecture=JsonModuleArchitecture(definition=definition))
