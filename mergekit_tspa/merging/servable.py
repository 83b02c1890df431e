"""What of a merge can be one LoRA adapter, why the rest cannot, and how much an adapter without the rest
loses.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import reduce
from typing import Any, NamedTuple

import torch

from mergekit_tspa.adapters import LoraModule, StoredTensor
from mergekit_tspa.base.architectures import VOCABULARY
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.finish import finish
from mergekit_tspa.merging.outputs import OutputTensor, TensorPlan
from mergekit_tspa.merging.plan import MergePlan
from mergekit_tspa.updates import LowRank

LOG = logging.getLogger(__name__)

# What a merge may do to a tensor besides a low-rank update, by the names that `adapter_leaves_out` takes.
MAGNITUDES, NORMS, BIASES, EMBEDDINGS, OTHERS = "magnitudes", "norms", "biases", "embeddings", "others"
LEFT_OUT = (MAGNITUDES, NORMS, BIASES, EMBEDDINGS, OTHERS)


class LeftOut(NamedTuple):
    """A tensor whose change an adapter holds in part or not at all."""

    output: OutputTensor
    kinds: tuple[str, ...]  # of `LEFT_OUT`


def adapter_tensors(
    plan: MergePlan,
    base: ModelTensors | None,
    leaves_out: Set[str] = frozenset(),
    whole: bool = True,
) -> tuple[list[TensorPlan], list[LeftOut]]:
    """The tensors of the merge as an adapter of the base, and those whose change is not all in it.

    Args:
        base: the base model, if it is known
        leaves_out: which of `LEFT_OUT` the adapter need not hold
        whole: whether the plan lays out the whole model, as that of a recipe does, or names only what it
            changes

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
    left_out = []
    for output in changed:
        if kinds := tuple(kind for kind in _kinds(output) if kind in leaves_out):
            left_out.append(LeftOut(output, kinds))
        if not output.parts[0].plan.sources and len(output.parts) == 1 and {*_kinds(output)} <= leaves_out:
            continue
        shape = base.shapes.get(base.find(output.base) or "", ()) if base is not None else ()
        convolution = any(module.convolution for module in output.parts[0].plan.modules)
        if convolution or (len(shape) > 2 and not output.parts[0].index and "[" not in output.name):
            raise InputError(f"{output.name}: it is a convolution, for which no adapter is written")
        if reason := _obstacle(plan, output, leaves_out):
            raise InputError(f"{output.name}: {reason}, so the merge cannot be written as an adapter")
    tensors = [output.parts[0].plan for output in changed if output.parts[0].plan.sources]
    if not tensors:
        raise InputError("the adapter leaves out all that the merge changes, so there is no adapter to write")
    return tensors, left_out


class InAdapter:
    """What an adapter holds of a merge, as far as it must be known to say what it leaves out."""

    def __init__(self, plan: MergePlan, left_out: Sequence[LeftOut]):
        self.plan, self.left_out = plan, left_out
        self.partly: dict[str, LowRank] = {}  # updates of tensors of which it leaves out the rest
        self.rest = 0.0  # sum ||dW||^2 of the others

    def add(self, tensor: str, update: LowRank) -> None:
        if any(output.name == tensor for output, _ in self.left_out):
            self.partly[tensor] = update
        elif self.left_out:
            self.rest += update.norm().item() ** 2

    def log(self) -> None:
        """One line on what it leaves out, and its share `sum ||dW - B A||^2 / sum ||dW||^2` of the change."""
        count: dict[str, int] = {}
        lost, total = 0.0, self.rest
        for output, kinds in self.left_out:
            for kind in kinds:
                count[kind] = count.get(kind, 0) + 1
            update = self.partly.pop(output.name, None)
            if self.plan.read is not None:
                W = self.plan.read(output.name).float()
                change = finish(output.parts[0].plan, update).apply_to(W) - W
                held = torch.zeros_like(W) if update is None else update.apply_to(W) - W
                lost += (change - held).square().sum().item()
                total += change.square().sum().item()
        if not count:
            return
        share = f"{lost / total:.1%} of the merge's ||dW||^2" if total else "nothing of the merge's ||dW||^2"
        listed = ", ".join(f"{kind} of {n} tensors" for kind, n in count.items())
        LOG.warning("the adapter leaves out %s, as asked: it lacks %s", listed, share)


def module_name(plan: TensorPlan) -> str:
    """The module as PEFT finds it in the whole model: as adapters name it, or with what some of them leave
    out.
    """
    name = max((module for _, module in plan.sources), key=len)
    # A file may have the prefix `model.` twice, which transformers takes for one.
    whole = re.sub(r"^(model\.)+", "model.", plan.name.removesuffix(".weight"))
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


def _kinds(output: OutputTensor) -> list[str]:
    """What besides a low-rank update happens to a tensor, by the names of `LEFT_OUT`."""
    kinds = [MAGNITUDES] if any(part.plan.is_dora for part in output.parts) else []
    if not any(part.plan.changes for part in output.parts):
        return kinds
    name = output.name
    if name.endswith(".bias"):
        return [*kinds, BIASES]
    if name.endswith(VOCABULARY):
        return [*kinds, EMBEDDINGS]
    return [*kinds, NORMS if re.search(r"norm|\bln_", name, re.IGNORECASE) else OTHERS]


def _obstacle(plan: MergePlan, output: OutputTensor, leaves_out: Set[str]) -> str | None:
    """Why a tensor's change is no LoRA update; None if it is one."""
    (part, *more) = output.parts
    if output.base != output.name:
        return f"it is {output.base} of the base, whose layers this recipe rearranges"
    if part.index or more or part.plan.name.endswith("]"):
        return "it is a fused expert"
    for kind in _kinds(output):
        if kind not in leaves_out:
            what = (
                "an adapter is a DoRA, whose magnitudes are not low-rank"
                if kind == MAGNITUDES
                else "an adapter trained it directly (modules_to_save, biases, tokens, or a full model's own "
                "weights)"
            )
            return f"{what} (adapter_leaves_out: {kind} would leave that out)"
    if plan.method.result.dense and part.plan.parameters.rank is None:
        other = ", or take the method in another space (core_, knots_, ctm_)"
        return (
            f"{plan.method.name} gives a dense update; set `rank`"
            f"{other if plan.method.name.startswith('lora_') else ''}"
        )
    return None
