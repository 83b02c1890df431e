"""The Python entry: merge adapters without a recipe and without mergekit."""

import os
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from mergekit_tspa.adapters import (
    Adapter,
    Extraction,
    extract_adapter,
    is_model,
    locate_adapter,
    read_adapter,
)
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.geometry import AttentionGeometry
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.finish import MergedUpdate, finish
from mergekit_tspa.merging.bases import warn_of_different_bases, warn_of_other_bases
from mergekit_tspa.merging.merge import log_merge, merge_plan
from mergekit_tspa.merging.outputs import Wanted
from mergekit_tspa.merging.plan import MergePlan, plan_merge
from mergekit_tspa.methods import METHODS, Method
from mergekit_tspa.methods.inputs import Parameters, Progress, silent
from mergekit_tspa.methods.report import Report, Truncation, summary

AdapterLike = str | os.PathLike | Mapping[str, tuple[Tensor, Tensor]]
BaseLike = str | os.PathLike | Mapping[str, Tensor]


class MergedAdapters(dict[str, MergedUpdate]):
    """`{module: update}`, and what the method's solvers report of each stage."""

    reports: Sequence[Report | Truncation] = ()


@torch.no_grad()
def merge_adapters(
    method: str,
    adapters: Sequence[AdapterLike],
    weights: Sequence[float] | None = None,
    base: BaseLike | None = None,
    geometry: AttentionGeometry | None = None,
    device: torch.device | str | None = None,
    progress: Progress = silent,
    **parameters,
) -> MergedAdapters:
    """Merge LoRA adapters of one base into one update per module.

    Args:
        method: a name of `mergekit_tspa.METHODS`.
        adapters: each a PEFT directory, a hub repository, a mapping `module name -> (B, A)` with the LoRA
            scale folded in, or the directory of a full model of the base's architecture.
        weights: one number per adapter, 1 by default; an adapter of weight 0 takes no part.
        base: the base model, a checkpoint directory or a mapping of tensors.  Needed by methods that look at
            attention products, by PiSSA and OLoRA adapters, and by full models; for others it only checks names and
            shapes.
        geometry: head counts, when `base` is a mapping; a directory has them in its configuration.
        device: where the method computes; the CPU by default.
        progress: called with the name of a stage, the fraction of it that is done, and the fraction of the objective at
            its start that is left, None where there is none.
        **parameters: as in a recipe (`lambda` as `lambda_` or through `**{"lambda": ..}`), `extract_rank` and
            `extract_energy` for all full models.

    Returns:
        The update of every module that at least one adapter touches, in float32, by the module's name in the
        base (in the adapter, without one); `name[3]` is expert 3 of a fused tensor.  `LowRank` and `Dense` updates
        are there as such (`.dense()`); what DoRA and directly trained tensors do depends on the base
        (`.apply_to(W)`).

    Raises:
        InputError: an unknown method or parameter, an adapter that cannot be read, shapes that differ.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}; known are {', '.join(METHODS)}")
    row = METHODS[method]
    if isinstance(adapters, str | os.PathLike | Mapping):
        raise InputError("adapters must be a sequence: put the one adapter in a list")
    if weights is None:
        weights = [1.0] * len(adapters)
    if not all(isinstance(weight, int | float) for weight in weights):
        raise InputError(f"weights must be numbers, not {list(weights)}")
    device = torch.device(device or "cpu")  # not torch's default device, where the adapters need not be
    if not adapters or len(weights) != len(adapters):
        raise InputError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight per adapter")
    paths = [os.path.realpath(adapter) for adapter in adapters if not isinstance(adapter, Mapping)]
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise InputError(f"{twice[0]}: given twice; give it once with the summed weight")
    if "lambda_" in parameters:
        parameters["lambda"] = parameters.pop("lambda_")
    bound = row.bind(parameters)
    named = None if base is None or isinstance(base, Mapping) else os.fspath(base)
    if base is not None and not isinstance(base, Mapping):
        base = Checkpoint(base)

    model = None if base is None else ModelTensors.of("the base", base)
    extraction = row.extraction(parameters)
    loaded, touched = zip(
        *(load_adapter(a, f"adapter {i}", model, extraction) for i, a in enumerate(adapters))
    )
    if named is None:
        warn_of_different_bases(loaded)
    else:
        warn_of_other_bases(loaded, named)
    plan = plan_adapters(row, bound, loaded, touched, weights, model, base, geometry)
    updates, reports = merge_plan(plan, device, progress)
    log_merge([], loaded)
    merged = MergedAdapters(
        {
            tensor.name.removesuffix(".weight"): finish(tensor, updates.get(tensor.name))
            for tensor in plan.every
        }
    )
    merged.reports = summary(reports)
    return merged


def plan_adapters(
    method: Method,
    parameters: Parameters,
    adapters: Sequence[Adapter],
    touched: Sequence[Mapping[str, str]],
    weights: Sequence[float],
    model: ModelTensors | None = None,
    base: Mapping[str, Tensor] | None = None,
    geometry: AttentionGeometry | None = None,
) -> MergePlan:
    """A merge of adapters with one weight and one set of parameters for all tensors.

    Args:
        touched: per adapter `{tensor: module that updates it}`
        model: the base as adapters see it
        base: its tensors
        geometry: its head counts, where `base` is a mapping

    Raises:
        InputError: what `plan_merge` refuses, or no head counts where they are needed.
    """
    names = dict.fromkeys(name for a, modules in zip(adapters, touched) for name in (*modules, *a.changes))
    wanted = [
        Wanted(
            output=name,
            base=name,
            name=name,
            index=(),
            sources=[
                (a, modules[name], w) for a, modules, w in zip(adapters, touched, weights) if name in modules
            ],
            changes=[(a, a.changes[name], w) for a, w in zip(adapters, weights) if name in a.changes],
            parameters=parameters,
        )
        for name in names
    ]

    @cache
    def geometry_of(block: str) -> AttentionGeometry:
        if geometry is not None:
            return geometry
        if not isinstance(base, Checkpoint):
            raise InputError(
                f"{method.name}: give the head counts with a base of tensors (geometry=AttentionGeometry(..))"
            )
        return AttentionGeometry.from_config(base.config(), block)

    return plan_merge(
        method,
        adapters,
        bases={name: name for name in names},
        wanted=wanted,
        read=None if base is None else base.__getitem__,
        shapes=None if model is None else model.shapes,
        geometry_of=geometry_of,
    )


def load_adapter(
    given: AdapterLike, name: str, base: ModelTensors | None, extraction: Extraction
) -> tuple[Adapter, Mapping[str, str]]:
    """The adapter, and `{tensor: module that updates it}`, matched to the base if there is one."""
    if isinstance(given, Mapping):
        adapter = Adapter.from_factors(name, given)
    elif is_model(path := os.fspath(given)):
        if base is None:
            raise InputError(
                f"{path}: it is a full model; give the base whose difference to it is merged (base=)"
            )
        adapter = extract_adapter(path, ModelTensors.of(path, Checkpoint(path)), base, extraction)
        return adapter, adapter.tensors
    else:
        adapter = read_adapter(locate_adapter(path), path)
    return adapter.fit(base) if base else (adapter, adapter.tensors)
