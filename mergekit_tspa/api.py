"""The Python entry: merge adapters without a recipe and without mergekit."""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_tspa.adapters import Adapter, locate_adapter, read_adapter
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods import METHODS, MergedUpdate
from mergekit_tspa.methods.base import merge_weights, plan_weight

AdapterLike = str | os.PathLike | Mapping[str, tuple[Tensor, Tensor]]


def merge_adapters(
    method: str,
    adapters: Sequence[AdapterLike],
    weights: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    **parameters,
) -> dict[str, MergedUpdate]:
    """Merge LoRA adapters of one base into one update per module.

    Args:
        method: a name of `mergekit_tspa.METHODS`.
        adapters: each a PEFT directory, a hub repository, or a mapping `module name -> (B, A)` with the LoRA
            scale folded in.
        weights: one number per adapter, 1 by default; an adapter of weight 0 takes no part.
        device: where the method computes; the CPU by default.
        **parameters: as in a recipe (`lambda` as `lambda_` or through `**{"lambda": ..}`).

    Returns:
        The update of every module that at least one adapter touches, in float32, by module name.

    Raises:
        InputError: an unknown method or parameter, an adapter that cannot be read, shapes that differ.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}; known are {', '.join(METHODS)}")
    row = METHODS[method]
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if not adapters or len(weights) != len(adapters):
        raise InputError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight per adapter")
    if "lambda_" in parameters:
        parameters["lambda"] = parameters.pop("lambda_")
    bound = row.bind(parameters)
    loaded = [_load(adapter, f"adapter {i}") for i, adapter in enumerate(adapters)]

    plans = []
    for module in dict.fromkeys(module for adapter in loaded for module in adapter.modules):
        sources = [(adapter, module, w) for adapter, w in zip(loaded, weights) if module in adapter.modules]
        shapes = {adapter.name: adapter.modules[module].shape for adapter, *_ in sources}
        if len(set(shapes.values())) > 1:
            raise InputError(f"{module}: updates of different shapes {shapes}; the adapters belong to different bases")
        if (plan := plan_weight(row, module, sources, bound)) is not None:
            plans.append(plan)
    return {plan.name: update for plan, update in zip(plans, merge_weights(row, plans, device))}


def _load(adapter: AdapterLike, name: str) -> Adapter:
    if isinstance(adapter, Mapping):
        return Adapter.from_factors(name, adapter)
    return read_adapter(locate_adapter(os.fspath(adapter)), os.fspath(adapter))
