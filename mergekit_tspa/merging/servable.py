"""What of a merge can be one LoRA adapter, and why the rest cannot."""

import re
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch

from mergekit_tspa.adapters import LoraModule, StoredTensor
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.outputs import OutputTensor, TensorPlan
from mergekit_tspa.merging.plan import MergePlan


def adapter_tensors(plan: MergePlan, base: ModelTensors | None, whole: bool = True) -> list[TensorPlan]:
    """The tensors of the merge as an adapter of the base.

    Args:
        base: the base model, if it is known
        whole: whether the plan lays out the whole model, as that of a recipe does, or names only what it changes

    Raises:
        InputError: something in the merge is no low-rank update of a base tensor.
    """
    changed = [output for output in plan.changed.values() if not _unchanged(plan, output)]
    if not changed:
        raise InputError("the merge changes no weight, so there is no adapter to write")
    if base is not None and whole:
        merged = _layers(base.find(output.base) or output.base for output in plan.outputs)
        if missing := _layers(base.shapes) - merged:
            raise InputError(
                f"the recipe leaves out {min(missing)} of the base, so no adapter of the base gives its model"
            )
    for output in changed:
        shape = base.shapes.get(base.find(output.base) or "", ()) if base is not None else ()
        convolution = any(module.convolution for module in output.parts[0].plan.modules)
        if convolution or (len(shape) > 2 and not output.parts[0].index and "[" not in output.name):
            raise InputError(f"{output.name}: it is a convolution, for which no adapter is written")
        if reason := _obstacle(plan, output):
            raise InputError(f"{output.name}: {reason}, so the merge cannot be written as an adapter")
    return [output.parts[0].plan for output in changed]


def module_name(plan: TensorPlan) -> str:
    """The module as PEFT finds it in the whole model: as adapters name it, or with what some of them leave out."""
    name = max((module for _, module in plan.sources), key=len)
    whole = plan.name.removesuffix(".weight")
    return whole if whole.endswith(f".{name}") else name


def own_dtype(tensors: Iterable[TensorPlan]) -> torch.dtype:
    """The widest dtype among the adapters' own, at most the float32 in which merges are computed.

    Factors that are extracted from full models have no dtype of their own: with them it is float32.
    """
    modules = [module for tensor in tensors for module in tensor.modules]
    if not all(isinstance(module, LoraModule) for module in modules):
        return torch.float32
    widest = reduce(
        torch.promote_types, {factor.dtype for module in modules for factor in (module.B, module.A)}
    )
    return torch.float32 if widest == torch.float64 else widest


def task_type_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's name for what a model of this `config.json` is for, where it is a language model."""
    if config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    architecture = (config.get("architectures") or [""])[0]
    causal = architecture.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))
    return "CAUSAL_LM" if causal else None


def _layers(tensors: Iterable[str]) -> set[str]:
    """Names of the layers that tensors belong to, such as `model.layers.3`."""
    return {found[1] for tensor in tensors if (found := re.match(r"(.*?\.\d+)\.", tensor))}


def _unchanged(plan: MergePlan, output: OutputTensor) -> bool:
    """Whether full models hold the base's own values of a tensor that they do not adapt by factors."""
    changes = [change for part in output.parts for change, _ in part.plan.changes]
    low_rank = any(part.plan.sources for part in output.parts)
    if low_rank or plan.read is None or not all(isinstance(change, StoredTensor) for change in changes):
        return False
    W = plan.read(output.name)
    return not any(change.difference(W).any() for change in changes)


def _obstacle(plan: MergePlan, output: OutputTensor) -> str | None:
    """Why a tensor's change is no LoRA update; None if it is one."""
    (part, *more) = output.parts
    if output.base != output.name:
        return f"it is {output.base} of the base, whose layers this recipe rearranges"
    if part.index or more or part.plan.name.endswith("]"):
        return "it is a fused expert"
    if part.plan.changes:
        return (
            "an adapter trained it directly (modules_to_save, biases, tokens, or a full model's own weights)"
        )
    if part.plan.is_dora:
        return "an adapter is a DoRA, whose magnitudes are not low-rank"
    if plan.method.result.dense and part.plan.parameters.rank is None:
        return (
            f"{plan.method.name} gives a dense update; set `rank`, or take the method in another space (core_, knots_, "
            "ctm_)"
        )
    return None
