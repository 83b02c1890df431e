"""The file of a recipe: how it is read, and what of it mergekit would drop without a word."""

import logging
from collections.abc import Iterator, Mapping, Set
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mergekit_tspa.errors import InputError, did_you_mean, nearest
from mergekit_tspa.methods import MEAN_OF_MODELS, METHODS
from mergekit_tspa.plugin.compat import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    ModelPath,
    ModelReference,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit_tspa.plugin.merge_method import ADAPTER_PARAMETERS, TEXTS, WEIGHT
from mergekit_tspa.plugin.spelling import UnreadableRecipe

LOG = logging.getLogger(__name__)

# Of the recipe's lists and mappings, what they hold.
_PARTS: dict[str, type[BaseModel]] = {
    "models": InputModelDefinition,
    "slices": OutputSliceDefinition,
    "sources": InputSliceDefinition,
    "modules": OutputModuleDefinition,
}
# What is said in place of pydantic's words on Python's types.
_EXPECTED = {
    "model_type": "is no mapping; write `key: value` there",
    "dict_type": "is no mapping; write `key: value` there",
    "list_type": "is no list; write each item after `- `",
    "string_type": "is no text",
}


def read_documents(file: Path) -> list[dict[str, Any]]:
    """The recipes of a file, one or, for `mergekit-multi`, several.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    return _documents(_text(file), file)


def read_recipe(file: Path, foreign: bool = False) -> tuple[MergeConfiguration, str]:
    """A recipe of one of our methods, and its text.

    Args:
        foreign: take any recipe for `run_merge`, which knows mergekit's own methods and gives the warnings

    Raises:
        InputError: it cannot be read, or is no such recipe.
    """
    text = _text(file)
    document, *more = _documents(text, file)
    if more:
        raise InputError(
            f"{file}: holds {1 + len(more)} recipes, which is for mergekit-multi; put the one that is meant "
            "into a file of its own"
        )
    try:
        config = MergeConfiguration.model_validate(document)
    except (ValidationError, RuntimeError) as error:
        what = "; ".join(faults_of(error))
        raise InputError(f"{file}: no recipe that mergekit can read: {what}") from error
    if foreign:
        return config, text
    if config.merge_method not in METHODS:
        near = nearest(config.merge_method, METHODS)
        hint = f"do you mean {near[0]}?" if near else "see `mergekit-tspa methods`"
        if config.merge_method == MEAN_OF_MODELS:
            hint = "merge it with mergekit-yaml; `mergekit-tspa align` says how far full models are"
        raise InputError(f"{file}: {config.merge_method} is not a method on adapters; {hint}")
    for warning in unknown_keys(document):
        LOG.warning("%s", warning)
    return config, text


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}; name a file with a recipe") from error
    except ValueError as error:
        raise InputError(f"{file}: not readable as YAML ({error})") from error


def _documents(text: str, file: Path) -> list[dict[str, Any]]:
    try:
        refuse_repeated_keys(text, str(file))
        documents = list(yaml.safe_load_all(text))
    except InputError:
        raise
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{file}: not readable as YAML ({error})") from error
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise InputError(f"{file}: holds no recipe, which is a mapping with merge_method and models")
    return documents


def refuse_repeated_keys(text: str, where: str) -> None:
    """
    Raises:
        InputError: a key is twice in one mapping, of which YAML would keep the last.
    """
    nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    seen = set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # by an anchor
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                nodes.append(value)
                if not isinstance(key, yaml.ScalarNode) or key.value == "<<":  # which takes in a mapping
                    continue
                if key.value in lines:
                    raise InputError(
                        f"{where}: {key.value} is there twice, in lines {lines[key.value]} and "
                        f"{key.start_mark.line + 1}, and only the last would count; leave one out"
                    )
                lines[key.value] = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def faults_of(error: Exception) -> list[str]:
    """What is wrong with a recipe that mergekit cannot read, one sentence for each place in it."""
    if isinstance(error, UnreadableRecipe):
        return error.faults
    if not isinstance(error, ValidationError):
        return [str(error)]
    found: dict[str, str] = {}
    for fault in error.errors():
        where = [str(part) for part in fault["loc"]]
        what = _EXPECTED.get(fault["type"])
        if fault.get("ctx", {}).get("class_name") == "ModelReference":
            what = "is no name of a model"
        what = f"{fault['input']!r} {what}" if what else fault["msg"]
        if where[-1:] == ["[key]"]:
            where, what = where[:-2], f"{fault['input']!r} is no name; write it in quotes if it is meant"
        elif "parameters" in where[:-2]:  # pydantic tries each kind of value, and all fail
            where = where[: where.index("parameters") + 2]
            what = (
                f"{fault['input']!r} is no value; give a number, a word, true or false, a list of these "
                "over the layers, or a list of filters"
            )
            if where[-1] in {spec.name for spec in TEXTS}:  # it may be texts, which are not to be seen
                what = "is no name of a file; write texts into one, a JSON object a line"
        found.setdefault(".".join(where) or "recipe", what)
    return [f"{where}: {what}" for where, what in found.items()]


def unknown_keys(
    document: Mapping[str, Any], kind: type[BaseModel] = MergeConfiguration, where: str = ""
) -> Iterator[str]:
    """Keys that mergekit drops without a word, anywhere in a recipe but the names of parameters."""
    for key, value in document.items():
        if key not in kind.model_fields and (where or key != "name"):  # of a merge of mergekit-multi
            misplaced = "parameters" in kind.model_fields and key in _parameter_names()
            hint = "; write it under `parameters:` there" if misplaced else ""
            hint = hint or did_you_mean(str(key), kind.model_fields)
            yield f"{where}{key}: mergekit knows no such key, so it has no effect{hint}"
        for name, part, of in _parts(kind, key, value):
            yield from unknown_keys(part, of, f"{where}{name}.")


def _parts(
    kind: type[BaseModel], key: str, value: Any
) -> Iterator[tuple[str, Mapping[str, Any], type[BaseModel]]]:
    """The mappings below a key of a recipe: their names, what they hold, and what mergekit makes of them."""
    of: type[BaseModel]
    found: dict[str, Any]
    if key in ("model", "lora", "base_model"):
        of, found = ModelPath if kind is ModelReference else ModelReference, {key: value}
    elif key == "parameters":  # each a value, or filters
        settings = _items(key, value)
        of, found = ConditionalParameter, dict(settings)
        for name, setting in settings.items():
            found |= _items(name, setting) if isinstance(setting, list) else {}
    else:
        of, found = _PARTS.get(key, MergeConfiguration), _items(key, value) if key in _PARTS else {}
    return ((name, part, of) for name, part in found.items() if isinstance(part, dict))


def _items(key: str, value: Any) -> dict[str, Any]:
    """Of `models`, `{"models.0": .., "models.1": ..}`; of `modules`, `{"modules.default": ..}`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {f"{key}.{name}": part for name, part in items}


@cache
def _parameter_names() -> Set[str]:
    """Names of the parameters of all methods."""
    fields = (name for method in METHODS.values() for name in method.parameter_fields())
    return {WEIGHT.name, *ADAPTER_PARAMETERS, *fields}
