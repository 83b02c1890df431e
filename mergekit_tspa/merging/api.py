"""The Python entry: merge adapters without a recipe and without mergekit."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mergekit_tspa.adapters import (
    Adapter,
    Extraction,
    extract_adapter,
    is_model,
    locate_adapter,
    read_adapter,
)
from mergekit_tspa.adapters.write import AdapterWriter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.files import path_of, read_json
from mergekit_tspa.base.geometry import AttentionGeometry
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.arguments import (
    AdapterLike,
    BaseLike,
    TextsLike,
    adapters_of,
    check_base,
    check_geometry,
    numbers_of,
    text_sources,
    usable,
)
from mergekit_tspa.merging.bases import warn_of_different_bases, warn_of_other_bases
from mergekit_tspa.merging.finish import MergedUpdate, finish, low_rank
from mergekit_tspa.merging.guide import Guide
from mergekit_tspa.merging.merge import log_merge, merge_plan
from mergekit_tspa.merging.outputs import TensorPlan, Wanted
from mergekit_tspa.merging.plan import MergePlan, plan_merge
from mergekit_tspa.merging.servable import adapter_tensors, module_name, own_dtype, task_type_of
from mergekit_tspa.methods import METHODS, Method
from mergekit_tspa.methods.inputs import Parameters, Progress, silent
from mergekit_tspa.methods.report import Report, Truncation, summary


class MergedAdapters(dict[str, MergedUpdate]):
    """`{module: update}`, and what the method's solvers report of each stage."""

    reports: Sequence[Report | Truncation] = ()
    plan: MergePlan | None = None
    model: ModelTensors | None = None  # the base, if one was given
    base: str | None = None  # its directory

    def __getstate__(self) -> dict[str, Any]:
        return {
            "reports": self.reports
        }  # the rest reads files, and stays behind when the updates are pickled

    def __repr__(self) -> str:
        modules = ", ".join([*self][:2]) + (", .." if len(self) > 2 else "")
        return f"<MergedAdapters of {len(self)} modules: {modules}>"  # not the values of all tensors

    def save_adapter(
        self,
        path: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the merge as one PEFT adapter of scale 1 and one rank, as `mergekit-tspa adapter` does.

        Args:
            path: a directory, which is made if it is not there.  An adapter that is there is replaced.
            base: what the adapter names as its base model; by default the base of the merge, if it was given
                by its path, else the one that all merged adapters name.
            dtype: of the factors; by default the widest of the adapters' own, float32 if full models are
                among them.

        Raises:
            InputError: something in the merge is no low-rank update (DoRA magnitudes, tensors trained
                directly, fused experts, convolutions, dense updates without `rank`), no base is known, or
                nothing can be written there.
        """
        directory = Path(path_of(path, "the adapter"))
        if self.plan is None:
            raise InputError(
                "these updates are a copy, which has lost its merge: save the adapter before copying"
            )
        tensors, _ = adapter_tensors(self.plan, self.model, whole=False)
        tensors = [tensor for tensor in tensors if _module(tensor) in self]
        if not tensors:
            raise InputError("there is no update left to save")
        updates = {tensor.name: self[_module(tensor)] for tensor in tensors}
        bases = {adapter.base for adapter in self.plan.adapters if adapter.base}
        base = base or self.base or (bases.pop() if len(bases) == 1 else None)
        if base is None:
            raise InputError(
                "an adapter names its base model: give base=, its directory or its name on the hub"
            )
        base = path_of(base, "base")
        if dtype is not None and not (
            isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        ):
            raise InputError(
                "dtype must be a floating-point dtype of torch of 16 bits or more, such as torch.bfloat16, "
                f"not {dtype!r}"
            )
        _check_directory(directory, self.plan.adapters)
        names = {module_name(tensor): tensor for tensor in tensors}
        modules = {name: tensor.modules[0] for name, tensor in names.items()}
        task_type = (
            task_type_of(read_json(config)) if (config := Path(base, "config.json")).is_file() else None
        )
        try:
            writer = AdapterWriter(directory, modules, dtype or own_dtype(tensors))
            for name, tensor in names.items():
                writer.add(name, low_rank(updates[tensor.name]))
            writer.finish(base, task_type)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{directory}: the adapter could not be written: {error}") from error


def _check_directory(directory: Path, adapters: Iterable[Adapter]) -> None:
    """
    Raises:
        InputError: an adapter must not be written there.
    """
    if os.path.exists(directory) and not directory.is_dir():
        raise InputError(f"{directory}: it is a file; name a directory")
    if os.path.exists(directory / "config.json"):
        raise InputError(
            f"{directory}: holds a model, and transformers would apply an adapter beside its config.json a "
            "second time; name another directory"
        )
    inputs = {os.path.realpath(os.path.expanduser(adapter.name)) for adapter in adapters}
    if os.path.realpath(directory) in inputs:
        raise InputError(f"{directory}: it is one of the merged adapters; name another directory")


def _module(tensor: TensorPlan) -> str:
    """The key of a tensor in `MergedAdapters`."""
    return tensor.name.removesuffix(".weight")


@torch.no_grad()
def merge_adapters(
    method: str,
    adapters: Sequence[AdapterLike],
    weights: Sequence[float] | None = None,
    base: BaseLike | None = None,
    geometry: AttentionGeometry | None = None,
    device: torch.device | str | None = None,
    progress: Progress = silent,
    examples: TextsLike | Sequence[TextsLike | None] | None = None,
    calibration: Sequence[str | os.PathLike | None] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    **parameters: Any,
) -> MergedAdapters:
    """Merge LoRA adapters of one base into one update per module.

    Args:
        method: a name of `mergekit_tspa.METHODS`.
        adapters: each a PEFT directory, a hub repository, a mapping `module name -> (B, A)` with the LoRA
            scale folded in, or the directory of a full model of the base's architecture.
        weights: one number per adapter, 1 by default, also as scalars of numpy or torch; an adapter of weight
            0 takes no part.
        base: the base model, a checkpoint directory or a mapping of tensors.  Needed by methods that look at
            attention products, by PiSSA and OLoRA adapters, and by full models; for others it only checks
            names and shapes.
        geometry: head counts, when `base` is a mapping; a directory has them in its configuration.
        device: where the method computes; the CPU by default.
        progress: called with the name of a stage, the fraction of it that is done, and the fraction of the
            objective at its start that is left, None where there is none.
        examples: for methods that look at texts, one per adapter: a file of JSON lines, a list of such
            objects, or `self` for texts that the adapter writes itself; `"self"` alone is that for all.
        calibration: instead, one file per adapter with statistics of its texts (`mergekit-tspa calibrate`).
        model: that reads the texts, if the base is in memory already, in place of the base's directory.
        tokenizer: of that model.
        **parameters: as in a recipe (`lambda` as `lambda_` or through `**{"lambda": ..}`), `extract_rank` and
            `extract_energy` for all full models.

    Returns:
        The update of every module that at least one adapter touches, in float32, by the module's name in the
        base (in the adapter, without one); `name[3]` is expert 3 of a fused tensor.  `LowRank` and `Dense`
        updates are there as such (`.dense()`); what DoRA and directly trained tensors do depends on the base
        (`.apply_to(W)`).

    Raises:
        InputError: an unknown method or parameter, an adapter that cannot be read, shapes that differ.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"there is no method {method!r}; known are {', '.join(METHODS)}")
    row = METHODS[method]
    adapters = adapters_of(adapters, weighted=weights is not None)
    weights = [1.0] * len(adapters) if weights is None else numbers_of(weights)
    if len(weights) != len(adapters):
        raise InputError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight per adapter")
    check_base(base)
    check_geometry(geometry)
    if not callable(progress):
        raise InputError(f"progress must be a function, not {progress!r}")
    # Not torch's default device, where the adapters need not be.
    device = usable("cpu" if device is None else device)
    paths = [os.path.realpath(adapter) for adapter in adapters if not isinstance(adapter, Mapping)]
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise InputError(f"{twice[0]}: given twice; give it once with the summed weight")
    if "weight" in parameters:
        raise InputError("weight: give weights=, a list with one number per adapter")
    if "lambda_" in parameters:
        if "lambda" in parameters:
            raise InputError("lambda and lambda_ are the same parameter: give one of them")
        parameters["lambda"] = parameters.pop("lambda_")
    bound = row.bind(parameters)
    directory = None if base is None or isinstance(base, Mapping) else os.fspath(base)
    stored = Checkpoint(directory) if directory is not None else base
    assert stored is None or isinstance(stored, Mapping)

    tensors = None if stored is None else ModelTensors.of("the base", stored)
    extraction = row.extraction(parameters)._replace(device=str(device))
    loaded, touched = zip(
        *(load_adapter(a, f"adapter {i}", tensors, extraction) for i, a in enumerate(adapters))
    )
    if directory is None:
        warn_of_different_bases(loaded)
    else:
        warn_of_other_bases(loaded, directory)
    guide = None
    if row.guided:
        sources = text_sources(loaded, examples, calibration)
        guide = Guide(tensors, None if directory is None else Path(directory), sources, model, tokenizer)
    plan = plan_adapters(row, bound, loaded, touched, weights, tensors, stored, geometry, guide)
    updates, reports = merge_plan(plan, device, progress)
    log_merge([], loaded)
    merged = MergedAdapters(
        {_module(tensor): finish(tensor, updates.get(tensor.name)) for tensor in plan.every}
    )
    merged.reports, merged.plan = summary(reports), plan
    merged.model, merged.base = tensors, directory
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
    guide: Guide | None = None,
) -> MergePlan:
    """A merge of adapters with one weight and one set of parameters for all tensors.

    Args:
        touched: per adapter `{tensor: module that updates it}`
        model: the base as adapters see it
        base: its tensors
        geometry: its head counts, where `base` is a mapping
        guide: the base and the texts, for methods that look at texts

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
        guide=guide,
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
                f"{path}: it is a full model; give the base whose difference to it is merged (base=, --base)"
            )
        adapter = extract_adapter(path, ModelTensors.of(path, Checkpoint(path)), base, extraction)
        return adapter, adapter.tensors
    else:
        adapter = read_adapter(locate_adapter(path), path)
    return adapter.fit(base) if base else (adapter, adapter.tensors)
